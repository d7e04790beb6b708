"""A model as a C program: its options as constants, and its weights in the order in which
`c/model.c` takes them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tinygpt.data.tokenizer import HFTokenizer
from tinygpt.model import lora
from tinygpt.model.rope import rope_tables

FOLDER = Path(__file__).parent / "c"

# a weight in C, and how it becomes a float
WEIGHT_TYPES = {
    "int8": "typedef int8_t weight_t;\n\n"
            "static inline float number(weight_t w) { return (float)w; }\n",
    "float16": "typedef uint16_t weight_t;   /* IEEE's half precision, finite */\n\n"
               "static inline float number(weight_t w) {\n"
               "  /* sign and digits move to their place; the exponents have other biases */\n"
               "  return of_bits((w & 0x8000u) << 16 | (w & 0x7fffu) << 13) * 0x1p112f;\n}\n",
    "float32": "typedef float weight_t;\n\n"
               "static inline float number(weight_t w) { return w; }\n"}


def quantize(model, how: str | None) -> None:
    """Quantizes a model as --quantize says; None is int8. Raises ValueError if it is no GPT, or
    has no tokenizer of ours, or where how is int4, which the C code does not read."""
    if model.kind != "gpt":
        raise ValueError(f"a {model.kind} model has no form without Python: leave out --export")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: train it on text, or export it into a "
                         "folder in Hugging Face's layout")
    if isinstance(model.tokenizer, HFTokenizer):
        raise ValueError("the model's tokenizer.json has no form without Python: export the model "
                         "into a folder in Hugging Face's layout")
    if how == "int4":
        raise ValueError("quantize=int4 is exported as GGUF only: choose int8, or a .gguf file")
    lora.merge(model)
    if how != "none":
        model.quantize(how or "int8")


def source(*files: str) -> str:
    """The text of C files of this package, one after another."""
    return "\n".join((FOLDER / file).read_text(encoding="utf-8") for file in files)


def longest(config) -> int:
    """The inputs of the linear layer that has the most of them."""
    return max(config.n_embd, config.n_head * config.head_size, config.inner_size)


def chunk(config) -> int:
    """The most tokens that are read at once."""
    return min(64, config.block_size)


def kind(model) -> str:
    """The type of the matrices: "int8", "float16" or "float32"."""
    return str(_output_layer(model).weight.numpy().dtype)


def known_ids(model) -> int:
    """The number of ids that may be drawn: there may be logits without a token."""
    return min(model.config.vocab_size, model.tokenizer.vocab_size)


def constants(model) -> str:
    """The options of a model in C."""
    c, output = model.config, _output_layer(model)
    values = dict(
        BLOCK_SIZE=c.block_size, VOCAB_SIZE=c.vocab_size, KNOWN_IDS=known_ids(model),
        N_LAYER=c.n_layer, N_HEAD=c.n_head, N_KV_HEAD=c.kv_heads, N_EMBD=c.n_embd,
        HEAD_SIZE=c.head_size, N_INNER=c.inner_size, BIAS=c.bias,
        QKV_BIAS=model.h[0].attn.c_attn.bias is not None, RMS_NORM=c.norm == "rmsnorm",
        GELU_TANH=c.activation == "gelu_tanh", SWIGLU=c.is_gated, ROPE=c.position == "rope",
        NO_ROPE_INTERVAL=c.nope_interval or 0,
        QK_NORM=c.qk_norm, WINDOW=c.sliding_window or 0, PARALLEL=c.parallel,
        TIE_WEIGHTS=c.tie_weights, HAS_SCALE=_scale_of(output) is not None,
        LONGEST=longest(c), CHUNK=chunk(c))
    return (enum(values) + f"#define NORM_EPS {c.norm_eps!r}f\n\n"
            + WEIGHT_TYPES[kind(model)])


def enum(values: dict[str, int]) -> str:
    """Constants in C."""
    return "enum {\n" + ",\n".join(f"  {k} = {int(v)}" for k, v in values.items()) + "\n};\n"


def weights(model, layout: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The weights as `take_model` in c/model.c takes them; layout is `panels` or `pairs`."""
    return b"".join(array.tobytes() for array in _arrays(model, layout))


def panels(matrix: np.ndarray) -> np.ndarray:
    """A matrix (N, K) as c/panels.c has it: (ceil(N / 32), K, 32)."""
    N, K = matrix.shape
    return np.pad(matrix, ((0, -N % 32), (0, 0))).reshape(-1, 32, K).transpose(0, 2, 1)


def pairs(matrix: np.ndarray) -> np.ndarray:
    """A matrix (N, K) as c/pairs.c has it: (ceil(N / 16), ceil(K / 2), 16, 2)."""
    N, K = matrix.shape
    padded = np.pad(matrix, ((0, -N % 16), (0, K % 2)))
    return padded.reshape(-1, 16, (K + 1) // 2, 2).transpose(0, 2, 1, 3)


def _arrays(model, layout) -> Iterator[np.ndarray]:
    c = model.config
    yield from _linear(_output_layer(model), layout)
    if not c.tie_weights:
        yield model.wte.weight.numpy()
    if c.position == "learned":
        yield model.wpe.weight.numpy()
    else:
        tables = rope_tables(c.block_size, c.frequencies(c.head_size), model.device)
        yield from (table.numpy() for table in tables)
    for block in model.h:
        yield from _block(block, layout)
    yield from _vectors(model.ln_f)


def _block(block, layout) -> Iterator[np.ndarray]:
    attn, mlp = block.attn, block.mlp
    for layer in (block.ln_1, attn.c_attn, attn.q_norm, attn.k_norm, attn.c_proj, block.ln_2,
                  mlp.c_fc, mlp.c_gate, mlp.c_proj):
        if layer is not None:
            yield from _linear(layer, layout) if layer.weight.ndim == 2 else _vectors(layer)


def _vectors(layer) -> Iterator[np.ndarray]:
    """The vectors of a norm or a linear layer: (n,) float32 each."""
    for name in ("weight", "scale", "bias"):
        vector = getattr(layer, name, None)
        if vector is not None and vector.ndim == 1:
            yield vector.numpy()


def _linear(layer, layout) -> Iterator[np.ndarray]:
    yield layout(layer.weight.numpy())
    yield from _vectors(layer)


def _output_layer(model):
    return model.lm_head or model.wte


def _scale_of(layer):
    return getattr(layer, "scale", None)
