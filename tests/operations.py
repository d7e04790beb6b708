"""Every operation in numpy, and the way to run an implementation on the cases of it."""

import functools
import math

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.kernels import cases
from tinygpt.kernels.cases import (
    CACHED,
    CASES,
    GROUPED,
    KEY,
    SQUARE,
    TOLERANCE,
    WITHOUT_GRADIENT,
    constants,
    cotangent,
    draw,
    ids,
    implementations,
    tensors,
)

__all__ = ["CACHED", "CASES", "GROUPED", "KEY", "SQUARE", "TOLERANCE", "WITHOUT_GRADIENT",
           "constants", "cotangent", "draw", "ids", "implementations", "tensors"]

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
    wanted = ((1 - label_smoothing) * logits[rows, targets.clip(0)]
              + label_smoothing * logits.mean(-1))
    return (log_z - wanted + z_loss * log_z**2)[counted].mean()


def np_orthogonalize(x):
    x = x / (np.linalg.norm(x) + 1e-7)
    if len(x) > x.shape[1]:
        return np_orthogonalize(x.T).T
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


def unmix(word: int) -> int:
    """The word that lowbias32 turns into this one."""
    def unshift(x, s):
        y = x
        for _ in range(32 // s):
            y = x ^ (y >> s)
        return y

    x = unshift(word, 16) * pow(0x846CA68B, -1, 2**32) % 2**32
    x = unshift(x, 15) * pow(0x7FEB352D, -1, 2**32) % 2**32
    return unshift(x, 16)


# ---- running them


def skip_where_it_is_not_for(implementation: str, dtype: str = "float32",
                             operation: str | None = None) -> None:
    if not cases.can_run(implementation, dtype, operation):
        pytest.skip(f"{implementation} is not for {dtype} here")


def call(operation: str, implementation: str, *inputs: Tensor, **options) -> Tensor:
    """The output, or a skip where the implementation is not for the device."""
    skip_where_it_is_not_for(implementation, operation=operation)
    return getattr(kernels, operation)(*inputs, **options, implementation=implementation)


def differentiate(operation: str, implementation: str, *args):
    """See `cases.differentiate`; a skip where the implementation is not for the device."""
    skip_where_it_is_not_for(implementation, operation=operation)
    return cases.differentiate(operation, implementation, *args)


def run(operation: str, implementation: str, arrays: dict[str, np.ndarray], options: dict,
        dtype: str = "float32", dy: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """See `cases.run`; a skip where the implementation is not for the device and dtype."""
    skip_where_it_is_not_for(implementation, dtype, operation)
    return cases.run(operation, implementation, arrays, options, dtype, dy)


@functools.cache
def result(operation: str, number: int, implementation: str, dtype: str = "float32"):
    shapes, options = (CASES | WITHOUT_GRADIENT)[operation][number]
    return run(operation, implementation, draw(shapes), options, dtype)


def check(ours: dict, theirs: dict, dtype: str = "float32") -> None:
    for name, right in theirs.items():
        assert np.isfinite(ours[name]).all(), name
        error = cases.error(ours[name], right)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"
