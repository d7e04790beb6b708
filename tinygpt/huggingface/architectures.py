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
    fields of GPTConfig; write: the reverse.
    """

    tensors: dict[str, tuple[str, ...]]
    prefix: str
    transposed: bool
    ignored: tuple[str, ...]
    required: dict[str, object]
    read: Callable[["Settings"], dict]
    write: Callable[[dict, Tokenizer | None], dict]


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

    def number(self, name: str, default: float) -> float:
        return float(self._get(name, default, "a number above 0", _is_positive))

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
    heads, width = settings.size("num_attention_heads", 32), settings.size("hidden_size", 4096)
    size = settings.size("head_dim", None)
    if size is not None and size * heads != width:
        raise PretrainedError(f"{settings.path} has head_dim={size}, which is not supported: "
                              "use a model with hidden_size / num_attention_heads = "
                              f"{width / heads}")
    bias = settings.switch("attention_bias", False)
    if settings.switch("mlp_bias", False) != bias:
        raise PretrainedError(f"{settings.path} has attention_bias={bias} and mlp_bias={not bias}: "
                              "use a model with biases in both or in neither")
    return dict(block_size=settings.size("max_position_embeddings", 2048),
                vocab_size=settings.size("vocab_size", 32000),
                n_layer=settings.size("num_hidden_layers", 32), n_head=heads,
                n_kv_head=settings.size("num_key_value_heads", heads), n_embd=width,
                n_inner=settings.size("intermediate_size", 11008), bias=bias, norm="rmsnorm",
                norm_eps=settings.number("rms_norm_eps", 1e-6), activation="swiglu",
                position="rope", rope_theta=_rope_theta(settings),
                tie_weights=settings.switch("tie_word_embeddings", False))


def _rope_theta(settings: Settings) -> float:
    """The base of RoPE; older files have it outside the group of RoPE settings."""
    groups = [settings.group(name) for name in ("rope_parameters", "rope_scaling")]
    rope = next((group for group in groups if group.settings), groups[0])
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind != "default" or rope.number("partial_rotary_factor", 1) != 1:
        raise PretrainedError(f"{settings.path} has rope_type={one_line(kind)}, which is not "
                              "supported: use a model with unscaled RoPE")
    return rope.number("rope_theta", settings.number("rope_theta", 10000.0))


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
    width, heads = config["n_embd"], config["n_head"]
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    inner = config["n_inner"] or math.ceil(width / 3) * 8  # as in gpt.py
    return dict(architectures=["LlamaForCausalLM"], model_type="llama",
                max_position_embeddings=config["block_size"], hidden_size=width,
                num_hidden_layers=config["n_layer"], num_attention_heads=heads,
                num_key_value_heads=config["n_kv_head"] or heads, head_dim=width // heads,
                intermediate_size=inner, rms_norm_eps=config["norm_eps"], hidden_act="silu",
                attention_bias=config["bias"], mlp_bias=config["bias"],
                attention_dropout=config["dropout"], rope_parameters=rope,
                rope_theta=config["rope_theta"], **_common_settings(config, tokenizer))


def _common_settings(config: dict, tokenizer: Tokenizer | None) -> dict:
    """The settings that all architectures share."""
    end = end_of_text(tokenizer)
    return dict(vocab_size=config["vocab_size"], tie_word_embeddings=config["tie_weights"],
                bos_token_id=end, eos_token_id=end, dtype="float32")


def _gpt2_tensors() -> dict[str, tuple[str, ...]]:
    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = ["wte.weight", "wpe.weight"]
    for part in (*(f"h.{{}}.{layer}" for layer in layers), "ln_f"):
        names += [f"{part}.weight", f"{part}.bias"]
    return {name: (name,) for name in names}


def _llama_tensors() -> dict[str, tuple[str, ...]]:
    layers = {"attn.c_attn": [f"self_attn.{x}_proj" for x in "qkv"],
              "attn.c_proj": ["self_attn.o_proj"], "mlp.c_gate": ["mlp.gate_proj"],
              "mlp.c_fc": ["mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}
    names = {"wte.weight": ("embed_tokens.weight",), "ln_f.weight": ("norm.weight",),
             "h.{}.ln_1.weight": ("layers.{}.input_layernorm.weight",),
             "h.{}.ln_2.weight": ("layers.{}.post_attention_layernorm.weight",)}
    for ours, theirs in layers.items():
        for kind in ("weight", "bias"):
            names[f"h.{{}}.{ours}.{kind}"] = tuple(f"layers.{{}}.{t}.{kind}" for t in theirs)
    return names


ARCHITECTURES = {
    "gpt2": Architecture(
        tensors=_gpt2_tensors(), prefix="transformer.", transposed=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                  "add_cross_attention": False, "quantization_config": None},
        read=_read_gpt2, write=_write_gpt2),
    "llama": Architecture(
        tensors=_llama_tensors(), prefix="model.", transposed=False,
        ignored=(".rotary_emb.inv_freq",),
        required={"hidden_act": "silu", "partial_rotary_factor": 1.0, "sliding_window": None,
                  "quantization_config": None},
        read=_read_llama, write=_write_llama),
}
