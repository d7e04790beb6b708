"""The families of models that ours can be: what their settings and tensors are called.

A family is a table of which of their tensors make one of ours, and two functions between their
config.json and the fields of our GPTConfig.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygpt.tokenizer import BPETokenizer, Tokenizer

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


class PretrainedError(ValueError):
    """A pretrained model that is missing, damaged, or has an option that ours lacks."""


@dataclass(frozen=True)
class Family:
    """How a family of models is written down.

    tensors: ours -> theirs, joined by rows where there are several; `{}` is the layer. transposed:
    their matrices (C, N) are ours (N, C). required: settings that must have that value where
    they are given. read makes GPTConfig's fields of their settings, write the reverse.
    """

    tensors: dict[str, tuple[str, ...]]
    prefix: str
    transposed: bool
    ignored: tuple[str, ...]
    required: dict[str, object]
    read: Callable[[dict, str], dict]
    write: Callable[[dict, Tokenizer | None], dict]


def require(settings: dict, required: dict[str, object], path: str) -> None:
    """Raises PretrainedError where a setting has another value than the required one."""
    for name, value in required.items():
        if settings.get(name, value) not in (value, None):
            raise PretrainedError(f"{path} has {name}={settings[name]!r}, which our model lacks: "
                                  f"it reads {name}={value!r} only")


def _read_gpt2(settings: dict, path: str) -> dict:
    def get(name: str, default):
        return default if settings.get(name) is None else settings[name]
    activation = get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise PretrainedError(f"{path} has activation_function={activation!r}, which our model "
                              f"lacks: it reads {', '.join(ACTIVATIONS)}")
    return dict(block_size=int(get("n_positions", 1024)), vocab_size=int(get("vocab_size", 50257)),
                n_layer=int(get("n_layer", 12)), n_head=int(get("n_head", 12)),
                n_embd=int(get("n_embd", 768)), n_inner=settings.get("n_inner"),
                norm_eps=float(get("layer_norm_epsilon", 1e-5)), bias=True,
                activation=ACTIVATIONS[activation],
                tie_weights=bool(get("tie_word_embeddings", True)))


def _read_llama(settings: dict, path: str) -> dict:
    def get(name: str, default):
        return default if settings.get(name) is None else settings[name]
    heads, width = int(get("num_attention_heads", 32)), int(get("hidden_size", 4096))
    if get("head_dim", width // heads) != width / heads:
        raise PretrainedError(f"{path} has head_dim={settings['head_dim']}, which our model lacks: "
                              f"its heads have hidden_size / num_attention_heads = {width / heads}")
    bias = bool(get("attention_bias", False))
    if bool(get("mlp_bias", False)) != bias:
        raise PretrainedError(f"{path} has attention_bias={bias} and mlp_bias={not bias}: our "
                              "model has biases in both or in neither")
    rope = get("rope_parameters", None) or get("rope_scaling", {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise PretrainedError(f"{path} has rope_type={kind!r}, which our model lacks: it reads "
                              "unscaled RoPE only")
    return dict(block_size=int(get("max_position_embeddings", 2048)),
                vocab_size=int(get("vocab_size", 32000)), n_layer=int(get("num_hidden_layers", 32)),
                n_head=heads, n_kv_head=int(get("num_key_value_heads", heads)), n_embd=width,
                n_inner=int(get("intermediate_size", 11008)), bias=bias, norm="rmsnorm",
                norm_eps=float(get("rms_norm_eps", 1e-6)), activation="swiglu", position="rope",
                rope_theta=float(rope.get("rope_theta", get("rope_theta", 10000.0))),
                tie_weights=bool(get("tie_word_embeddings", False)))


def _write_gpt2(config: dict, tokenizer: Tokenizer | None) -> dict:
    activation = {v: k for k, v in reversed(ACTIVATIONS.items())}[config["activation"]]
    drop = config["dropout"]
    return dict(architectures=["GPT2LMHeadModel"], model_type="gpt2",
                n_positions=config["block_size"], n_embd=config["n_embd"],
                n_layer=config["n_layer"], n_head=config["n_head"], n_inner=config["n_inner"],
                layer_norm_epsilon=config["norm_eps"], activation_function=activation,
                resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=drop, **_written(config, tokenizer))


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
                rope_theta=config["rope_theta"], **_written(config, tokenizer))


def _written(config: dict, tokenizer: Tokenizer | None) -> dict:
    """What the settings of every family have."""
    end = tokenizer.end_of_text if isinstance(tokenizer, BPETokenizer) else None
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


FAMILIES = {
    "gpt2": Family(
        tensors=_gpt2_tensors(), prefix="transformer.", transposed=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                  "add_cross_attention": False, "quantization_config": None},
        read=_read_gpt2, write=_write_gpt2),
    "llama": Family(
        tensors=_llama_tensors(), prefix="model.", transposed=False,
        ignored=(".rotary_emb.inv_freq",),
        required={"hidden_act": "silu", "partial_rotary_factor": 1.0, "sliding_window": None,
                  "quantization_config": None},
        read=_read_llama, write=_write_llama),
}
