"""Every operation in numpy, cases of it, and the way to run an implementation on them."""

import functools
import math

import numpy as np
import pytest
from tinygrad import Device, Tensor, dtypes

from tinygpt import kernels
from tinygpt.kernels.random import make_key

# largest error, as a share of the largest number that is right
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
WEIGHTS = ("weight", "bias")  # float32 whatever the activations are


def ids(shape: tuple[int, ...], high: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(5).integers(low, high, shape).astype(np.int32)


def heads(B: int, H: int, G: int, T: int, S: int, D: int) -> dict[str, tuple[int, ...]]:
    return {"q": (B, H, T, D), "k": (B, G, S, D), "v": (B, G, S, D)}


ANGLES = np.outer(np.arange(3), 1 / np.arange(1, 6)).astype(np.float32)
KEY = make_key(1, 2)
GROUPED = heads(2, 4, 2, 5, 5, 8)
CACHED = heads(1, 5, 1, 3, 13, 6)
SQUARE = heads(1, 4, 2, 7, 7, 7)

# operation: (shapes of the inputs that have a gradient, other arguments), ...; in bfloat16 the
# first of each only
CASES = {
    "linear": [
        (dict(x=(3, 7, 10), weight=(6, 10), bias=(6,), residual=(3, 7, 6)), {}),
        (dict(x=(17, 5), weight=(1, 5)), {}),
        (dict(x=(1, 1, 80), weight=(13, 80), bias=(13,)), {}),
    ],
    "embedding": [
        (dict(weight=(509, 12)), dict(idx=ids((3, 7), 509))),
        (dict(weight=(1, 5)), dict(idx=ids((1, 3), 1))),
    ],
    "layer_norm": [
        (dict(x=(17, 10), weight=(10,), bias=(10,)), dict(eps=0.1)),
        (dict(x=(2, 3, 7, 13), weight=(13,)), {}),
        (dict(x=(1, 1, 80), weight=(80,), bias=(80,)), {}),
    ],
    "rms_norm": [
        (dict(x=(17, 10), weight=(10,)), dict(eps=0.1)),
        (dict(x=(2, 3, 7, 13), weight=(13,)), {}),
    ],
    "gelu": [(dict(x=(17, 10)), dict(tanh=True)), (dict(x=(17, 10)), {}), (dict(x=(1, 3, 1)), {})],
    "swiglu": [(dict(gate=(17, 10), up=(17, 10)), {}), (dict(gate=(1, 3, 1), up=(1, 3, 1)), {})],
    "rope": [
        (dict(x=(2, 5, 3, 10)), dict(cos=np.cos(ANGLES), sin=np.sin(ANGLES))),
        (dict(x=(1, 1, 1, 2)), dict(cos=np.cos(ANGLES[2:, :1]), sin=np.sin(ANGLES[2:, :1]))),
    ],
    "attention": [
        (GROUPED, {}),
        (heads(1, 1, 1, 65, 65, 80), dict(window=17)),
        (CACHED, dict(offset=7, window=4)),
        (heads(2, 2, 2, 1, 9, 4), dict(offset=8)),
        (SQUARE, dict(dropout_p=0.3, dropout_key=KEY)),
    ],
    "cross_entropy": [
        (dict(logits=(17, 509)), dict(targets=ids((17,), 509, -1), label_smoothing=0.1,
                                      z_loss=0.01)),
        (dict(logits=(17, 509)), dict(targets=ids((17,), 509))),
        (dict(logits=(3, 7)), dict(targets=np.array([6, -100, 0], np.int32))),
        (dict(logits=(1, 1)), dict(targets=np.array([0], np.int32), z_loss=0.5)),
    ],
}


# ---- the same operations in numpy, in float64


def np_bits(key: np.ndarray, count: int) -> np.ndarray:
    def mix(x):
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)
    return mix(mix(np.arange(count, dtype=np.uint32)) + key)


def np_dropout(x, p, key):
    return np.where(np_bits(key, x.size).reshape(x.shape) / 2**32 >= p, x / (1 - p), 0)


def np_linear(x, weight, bias=0, residual=0):
    return residual + np.einsum("...c,nc->...n", x, weight) + bias


def np_embedding(idx, weight):
    return weight[idx]


def np_layer_norm(x, weight, bias=0, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def np_rms_norm(x, weight, eps=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def np_gelu(x, tanh=False):
    if tanh:
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def np_swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def np_rope(x, cos, sin):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def np_attention(q, k, v, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    distance = offset + np.arange(T)[:, None] - np.arange(S)
    scores = np.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    scores[:, :, (distance < 0) | (distance >= (window or math.inf))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (np_dropout(weights, dropout_p, dropout_key) if dropout_p else weights) @ v


def np_cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    rows, counted = np.arange(len(targets)), targets >= 0
    top = logits.max(-1)
    log_z = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    wanted = ((1 - label_smoothing) * logits[rows, targets] + label_smoothing * logits.mean(-1))
    return (log_z - wanted + z_loss * log_z**2)[counted].mean()


def np_orthogonalize(x):
    x = x / (np.linalg.norm(x) + 1e-7)
    if len(x) > x.shape[1]:
        return np_orthogonalize(x.T).T
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


# ---- running them


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in arrays.items()}


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the output's gradient is."""
    return np.random.default_rng(9).standard_normal(shape, dtype=np.float32)


def tensors(arrays: dict, dtype: str = "float32") -> dict:
    """The arrays in that dtype, weights in float32."""
    kinds = {name: dtypes.float32 if name in WEIGHTS else getattr(dtypes, dtype) for name in arrays}
    return {name: Tensor(a).cast(kinds[name]).contiguous().realize() for name, a in arrays.items()}


def constants(options: dict) -> dict:
    return {name: Tensor(a).realize() if isinstance(a, np.ndarray) else a
            for name, a in options.items()}


def call(operation: str, implementation: str, *inputs: Tensor, **options) -> Tensor:
    """The output, or a skip where the implementation is not for such inputs."""
    if implementation == "flash" and Device.DEFAULT == "CPU":
        pytest.skip("flash attention is for GPUs")
    if implementation == "tinygrad" and "dropout_key" in options:
        pytest.skip("tinygrad's attention draws its dropout from global state")
    return getattr(kernels, operation)(*inputs, **options, implementation=implementation)


def differentiate(operation: str, implementation: str, inputs: dict[str, Tensor], options: dict,
                  dy: np.ndarray | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradient of each input, where the output's gradient is dy."""
    y = call(operation, implementation, **inputs, **options)
    dy = Tensor(cotangent(y.shape) if dy is None else dy)
    grads = (y.cast(dtypes.float32) * dy).sum().gradient(*inputs.values())
    return y, dict(zip(inputs, grads, strict=True))


def run(operation: str, implementation: str, arrays: dict[str, np.ndarray], options: dict,
        dtype: str = "float32", dy: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Output ("y") and gradients as float32 arrays."""
    y, grads = differentiate(operation, implementation, tensors(arrays, dtype),
                             constants(options), dy)
    Tensor.realize(y, *grads.values())
    for name, g in grads.items():
        assert g.shape == arrays[name].shape
        assert g.dtype == (dtypes.float32 if name in WEIGHTS else getattr(dtypes, dtype)), name
    in_float32 = operation in ("embedding", "cross_entropy")
    assert y.dtype == (dtypes.float32 if in_float32 else getattr(dtypes, dtype))
    return {name: t.cast(dtypes.float32).numpy() for name, t in {"y": y, **grads}.items()}


@functools.cache
def result(operation: str, number: int, implementation: str, dtype: str = "float32"):
    shapes, options = CASES[operation][number]
    return run(operation, implementation, draw(shapes), options, dtype)


def check(ours: dict, theirs: dict, dtype: str = "float32") -> None:
    for name, right in theirs.items():
        assert np.isfinite(ours[name]).all(), name
        error = np.abs(ours[name] - right).max() / max(np.abs(right).max(), 0.01)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


def implementations(operation: str, but: str = "") -> list[str]:
    return [name for name, module in kernels.IMPLEMENTATIONS.items()
            if name != but and hasattr(module, operation)]
