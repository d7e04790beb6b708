"""The architectures of the Hugging Face hub that GPT covers: their settings and tensors.

An architecture is a table from our tensors to theirs, and two functions that convert between their
config.json and the fields of GPTConfig.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygpt.data.tokenizer import Tokenizer, end_of_text
from tinygpt.safetensors_file import one_line

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


class PretrainedError(ValueError):
    """A pretrained model that is missing, damaged, or has an unsupported option."""


@dataclass(frozen=True)
class Architecture:
    """The layout of a model on the hub.

    tensors: our name -> theirs, concatenated by rows if there are several; `{}` is the layer.
    prefix: of their names. transposed: their matrices are (C, N), ours (N, C). ignored: suffixes of
    tensors that are not weights. required: values of settings, if given. read: their settings ->
    fields of GPTConfig; write: the reverse, for configurations with the options of `supports`.
    """

    name: str  # of the class in transformers

    tensors: dict[str, tuple[str, ...]]
    prefix: str
    transposed: bool
    ignored: tuple[str, ...]
    required: dict[str, object]
    read: Callable[["Settings"], dict]
    write: Callable[[dict, Tokenizer | None], dict]
    supports: Callable[[dict], dict[str, tuple]]

    def lacks(self, config: dict) -> list[str]:
        """The options of a configuration that it does not have, "name=value"."""
        return [f"{option}={config[option]}" for option, values in self.supports(config).items()
                if config[option] not in values]


def require(settings: dict, required: dict[str, object], path: str) -> None:
    """Raises PretrainedError if a setting has another value than the required one."""
    for name, value in required.items():
        given = settings.get(name)
        if given is not None and (
                given != value or isinstance(given, bool) != isinstance(value, bool)):
            raise PretrainedError(f"{path} has {name}={one_line(given)}, which is not supported: "
                                  f"use a model with {name}={value!r}")


class Settings:
    """The settings in a config.json, read by type; missing or null ones have the default.

    Raises PretrainedError that names the file, the setting and its value if the type is wrong.
    """

    def __init__(self, settings: dict, path: str):
        self.settings, self.path = settings, path

    def size(self, name: str, default: int | None) -> int | None:
        return self._get(name, default, "a whole number of 1 or more",
                         lambda v: type(v) is int and 1 <= v < 2**53)

    def number(self, name: str, default: float | None) -> float:
        value = self._get(name, default, "a number above 0", _is_positive)
        if value is None:
            raise PretrainedError(f"{self.path} has no {name}, which its RoPE needs: download it "
                                  "again")
        return float(value)

    def array(self, name: str) -> list | None:
        return self._get(name, None, "a list", lambda v: isinstance(v, list))

    def switch(self, name: str, default: bool) -> bool:
        return self._get(name, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, name: str, default: str) -> str:
        return self._get(name, default, "a name", lambda v: isinstance(v, str))

    def group(self, name: str) -> "Settings":
        """A nested object of settings, {} if it is missing."""
        group = self._get(name, {}, "an object", lambda v: isinstance(v, dict))
        return Settings(group, self.path)

    def choice(self, name: str, default: str, choices) -> str:
        value = self.text(name, default)
        if value not in choices:
            raise PretrainedError(f"{self.path} has {name}={one_line(value)}, which is not "
                                  f"supported: use a model with one of {', '.join(choices)}")
        return value

    def _get(self, name: str, default, kind: str, is_valid: Callable):
        value = self.settings.get(name)
        if value is None:
            return default
        if not is_valid(value):
            raise PretrainedError(f"{self.path} has {name}={one_line(value)}, which is not {kind}")
        return value


def _is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300


def _read_gpt2(settings: Settings) -> dict:
    activation = settings.choice("activation_function", "gelu_new", ACTIVATIONS)
    return dict(block_size=settings.size("n_positions", 1024),
                vocab_size=settings.size("vocab_size", 50257),
                n_layer=settings.size("n_layer", 12), n_head=settings.size("n_head", 12),
                n_embd=settings.size("n_embd", 768), n_inner=settings.size("n_inner", None),
                norm_eps=settings.number("layer_norm_epsilon", 1e-5), bias=True,
                activation=ACTIVATIONS[activation],
                tie_weights=settings.switch("tie_word_embeddings", True))


def _read_llama(settings: Settings) -> dict:
    return _read_common(settings) | dict(bias=_bias(settings))


def _read_mistral(settings: Settings) -> dict:
    default = None if "sliding_window" in settings.settings else 4096  # null: no window
    return _read_common(settings, max_position_embeddings=131072, intermediate_size=14336,
                        num_key_value_heads=8) | dict(
        sliding_window=settings.size("sliding_window", default))


def _read_qwen2(settings: Settings) -> dict:
    return _read_common(settings, max_position_embeddings=32768, intermediate_size=22016,
                        vocab_size=151936) | dict(qkv_bias=True, sliding_window=_window(settings))


def _read_qwen3(settings: Settings) -> dict:
    return _read_common(settings, max_position_embeddings=32768, intermediate_size=22016,
                        vocab_size=151936, head_dim=128) | dict(
        qk_norm=True, sliding_window=_window(settings))


def _read_smollm3(settings: Settings) -> dict:
    config = _read_common(settings, max_position_embeddings=32768, vocab_size=128256,
                          hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
                          num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2e6)
    every, layers = settings.size("no_rope_layer_interval", 4), settings.array("no_rope_layers")
    if layers is not None:
        every = layers.index(0) + 1 if 0 in layers else None
        if len(layers) != config["n_layer"] or layers != _rope_layers(every, len(layers)):
            raise PretrainedError(f"{settings.path} has no_rope_layers={one_line(layers)}, which "
                                  "is not supported: use a model in which the last of every so "
                                  "many layers is 0")
    return config | dict(bias=_bias(settings), nope_interval=every)


def _rope_layers(every: int | None, count: int) -> list[int]:
    """1 for each layer with RoPE, 0 for one without: the last of `every` layers."""
    return [int(every is None or i % every != 0) for i in range(1, count + 1)]


def _read_common(settings: Settings, **defaults) -> dict:
    """What Llama and its descendants share. Defaults are for what config.json leaves out."""
    defaults = dict(max_position_embeddings=2048, vocab_size=32000, hidden_size=4096,
                    intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                    head_dim=None, tie_word_embeddings=False, rope_theta=10000.0) | defaults

    def size(name: str) -> int | None:
        return settings.size(name, defaults[name])

    heads, width, head_dim = map(size, ("num_attention_heads", "hidden_size", "head_dim"))
    defaults.setdefault("num_key_value_heads", heads)
    return dict(block_size=size("max_position_embeddings"), vocab_size=size("vocab_size"),
                n_layer=size("num_hidden_layers"), n_head=heads,
                n_kv_head=size("num_key_value_heads"), n_embd=width,
                head_dim=None if head_dim == width / heads else head_dim,
                n_inner=size("intermediate_size"), bias=False, norm="rmsnorm",
                norm_eps=settings.number("rms_norm_eps", 1e-6),
                activation="swiglu", position="rope",
                **_read_rope(settings, defaults["rope_theta"]),
                tie_weights=settings.switch("tie_word_embeddings",
                                            defaults["tie_word_embeddings"]))


def _bias(settings: Settings) -> bool:
    """Whether all linear layers have biases. Raises PretrainedError where only some have."""
    bias = settings.switch("attention_bias", False)
    if settings.switch("mlp_bias", False) != bias:
        raise PretrainedError(f"{settings.path} has attention_bias={bias} and mlp_bias={not bias}: "
                              "use a model with biases in both or in neither")
    return bias


def _window(settings: Settings) -> int | None:
    """The sliding window of a Qwen. Raises PretrainedError where only some layers have it."""
    if not settings.switch("use_sliding_window", False):
        return None
    kinds = set(map(str, settings.array("layer_types") or ["unknown"]))
    if kinds == {"sliding_attention"}:
        return settings.size("sliding_window", 4096)
    raise PretrainedError(f"{settings.path} has use_sliding_window=True with layer_types="
                          f"{one_line(sorted(kinds))}, which is not supported: use a model in "
                          "which all layers are 'sliding_attention', or none")


def _read_rope(settings: Settings, theta: float) -> dict:
    """The settings of RoPE; older files have its base outside the group of the others."""
    groups = [settings.group(name) for name in ("rope_parameters", "rope_scaling")]
    rope = next((group for group in groups if group.settings), groups[0])
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise PretrainedError(f"{settings.path} has rope_type={one_line(kind)}, which is not "
                              "supported: use a model with default, linear or llama3 RoPE")
    if rope.number("partial_rotary_factor", 1) != 1:
        raise PretrainedError(f"{settings.path} has partial_rotary_factor="
                              f"{one_line(rope.settings['partial_rotary_factor'])}, which is not "
                              "supported: use a model with partial_rotary_factor=1")
    found = dict(rope_theta=rope.number("rope_theta", settings.number("rope_theta", theta)))
    if kind != "default":
        found |= dict(rope_scaling=kind, rope_factor=rope.number("factor", None))
    if kind == "llama3":
        found |= dict(rope_low_freq=rope.number("low_freq_factor", None),
                      rope_high_freq=rope.number("high_freq_factor", None),
                      rope_original_length=rope.size("original_max_position_embeddings", None)
                      or settings.size("max_position_embeddings", None))
    return found


def _write_gpt2(config: dict, tokenizer: Tokenizer | None) -> dict:
    activation = {v: k for k, v in reversed(ACTIVATIONS.items())}[config["activation"]]
    drop = config["dropout"]
    return dict(architectures=["GPT2LMHeadModel"], model_type="gpt2",
                n_positions=config["block_size"], n_embd=config["n_embd"],
                n_layer=config["n_layer"], n_head=config["n_head"], n_inner=config["n_inner"],
                layer_norm_epsilon=config["norm_eps"], activation_function=activation,
                resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=drop,
                **_common_settings(config, tokenizer))


def _write_llama(config: dict, tokenizer: Tokenizer | None) -> dict:
    return _write_common("llama", config, tokenizer) | dict(
        attention_bias=config["bias"], mlp_bias=config["bias"])


def _write_mistral(config: dict, tokenizer: Tokenizer | None) -> dict:
    return _write_common("mistral", config, tokenizer) | dict(
        sliding_window=config["sliding_window"])


def _write_qwen(kind: str) -> Callable[[dict, Tokenizer | None], dict]:
    def write(config: dict, tokenizer: Tokenizer | None) -> dict:
        window = config["sliding_window"]
        kinds = ["full_attention" if window is None else "sliding_attention"] * config["n_layer"]
        return _write_common(kind, config, tokenizer) | dict(
            attention_bias=False, use_sliding_window=window is not None, sliding_window=window,
            max_window_layers=0, layer_types=kinds)
    return write


def _write_smollm3(config: dict, tokenizer: Tokenizer | None) -> dict:
    every = config["nope_interval"]
    return _write_common("smollm3", config, tokenizer) | dict(
        attention_bias=config["bias"], mlp_bias=config["bias"], no_rope_layer_interval=every,
        no_rope_layers=_rope_layers(every, config["n_layer"]), pad_token_id=None)


def _write_common(kind: str, config: dict, tokenizer: Tokenizer | None) -> dict:
    """What Llama and its descendants share."""
    width, heads = config["n_embd"], config["n_head"]
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if config["rope_scaling"] != "none":
        rope |= {"rope_type": config["rope_scaling"], "factor": config["rope_factor"]}
    if config["rope_scaling"] == "llama3":
        rope |= {"low_freq_factor": config["rope_low_freq"],
                 "high_freq_factor": config["rope_high_freq"],
                 "original_max_position_embeddings": config["rope_original_length"]}
    inner = config["n_inner"] or math.ceil(width / 3) * 8  # as in gpt.py
    return dict(architectures=[ARCHITECTURES[kind].name], model_type=kind,
                max_position_embeddings=config["block_size"], hidden_size=width,
                num_hidden_layers=config["n_layer"], num_attention_heads=heads,
                num_key_value_heads=config["n_kv_head"] or heads,
                head_dim=config["head_dim"] or width // heads, intermediate_size=inner,
                rms_norm_eps=config["norm_eps"], hidden_act="silu",
                attention_dropout=config["dropout"], rope_parameters=rope,
                rope_theta=config["rope_theta"], **_common_settings(config, tokenizer))


def _gpt2_options(config: dict) -> dict[str, tuple]:
    """The values of options that a GPT-2 has."""
    return {"norm": ("layernorm",), "position": ("learned",),
            "activation": tuple(ACTIVATIONS.values()), "n_kv_head": (None, config["n_head"]),
            "head_dim": (None, config["n_embd"] / config["n_head"]), "qk_norm": (False,),
            "sliding_window": (None,), "parallel": (False,)}


def _llama_options(*free: str, **own: tuple) -> Callable[[dict], dict[str, tuple]]:
    """The values of options that a Llama has; a descendant has any of those in free, and own."""
    def options(config: dict) -> dict[str, tuple]:
        values = {"norm": ("rmsnorm",), "position": ("rope",), "activation": ("swiglu",),
                  "qkv_bias": (None, config["bias"]), "qk_norm": (False,),
                  "sliding_window": (None,), "nope_interval": (None,), "parallel": (False,)}
        return {k: v for k, v in (values | own).items() if k not in free}
    return options


def has_bias(name: str, config: dict) -> bool:
    """Whether a layer with one of our names has a bias in a configuration."""
    if name.endswith("attn.c_attn.bias") and config.get("qkv_bias") is not None:
        return config["qkv_bias"]
    return config["bias"]


def _common_settings(config: dict, tokenizer: Tokenizer | None) -> dict:
    """The settings that all architectures share."""
    end = end_of_text(tokenizer)
    return dict(vocab_size=config["vocab_size"], tie_word_embeddings=config["tie_weights"],
                bos_token_id=end, eos_token_id=end)


def _gpt2_tensors() -> dict[str, tuple[str, ...]]:
    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = ["wte.weight", "wpe.weight"]
    for part in (*(f"h.{{}}.{layer}" for layer in layers), "ln_f"):
        names += [f"{part}.weight", f"{part}.bias"]
    return {name: (name,) for name in names}


def _llama_tensors(qk_norm: bool = False) -> dict[str, tuple[str, ...]]:
    layers = {"attn.c_attn": [f"self_attn.{x}_proj" for x in "qkv"],
              "attn.c_proj": ["self_attn.o_proj"], "mlp.c_gate": ["mlp.gate_proj"],
              "mlp.c_fc": ["mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}
    names = {"wte.weight": ("embed_tokens.weight",), "ln_f.weight": ("norm.weight",),
             "h.{}.ln_1.weight": ("layers.{}.input_layernorm.weight",),
             "h.{}.ln_2.weight": ("layers.{}.post_attention_layernorm.weight",)}
    if qk_norm:
        names |= {f"h.{{}}.attn.{x}_norm.weight": (f"layers.{{}}.self_attn.{x}_norm.weight",)
                  for x in "qk"}
    for ours, theirs in layers.items():
        for kind in ("weight", "bias"):
            names[f"h.{{}}.{ours}.{kind}"] = tuple(f"layers.{{}}.{t}.{kind}" for t in theirs)
    return names


def _descendant(name: str, *, read: Callable, write: Callable, required: dict | None = None,
                supports: Callable, qk_norm: bool = False) -> Architecture:
    """Llama, or a model with its layout."""
    return Architecture(
        name=name, tensors=_llama_tensors(qk_norm), prefix="model.", transposed=False,
        ignored=(".rotary_emb.inv_freq",),
        required={"hidden_act": "silu", "partial_rotary_factor": 1.0,
                  "quantization_config": None} | (required or {}),
        read=read, write=write, supports=supports)


ARCHITECTURES = {
    "gpt2": Architecture(
        name="GPT2LMHeadModel", tensors=_gpt2_tensors(), prefix="transformer.", transposed=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                  "add_cross_attention": False, "quantization_config": None},
        read=_read_gpt2, write=_write_gpt2, supports=_gpt2_options),
    "llama": _descendant(
        "LlamaForCausalLM", read=_read_llama, write=_write_llama,
        required={"sliding_window": None}, supports=_llama_options()),
    "mistral": _descendant(
        "MistralForCausalLM", read=_read_mistral, write=_write_mistral,
        supports=_llama_options("sliding_window", bias=(False,))),
    "qwen2": _descendant(
        "Qwen2ForCausalLM", read=_read_qwen2, write=_write_qwen("qwen2"),
        supports=_llama_options("sliding_window", bias=(False,), qkv_bias=(True,))),
    "qwen3": _descendant(
        "Qwen3ForCausalLM", read=_read_qwen3, write=_write_qwen("qwen3"), qk_norm=True,
        required={"attention_bias": False},
        supports=_llama_options("sliding_window", bias=(False,), qk_norm=(True,))),
    "smollm3": _descendant(
        "SmolLM3ForCausalLM", read=_read_smollm3, write=_write_smollm3,
        required={"use_sliding_window": False}, supports=_llama_options("nope_interval")),
}
