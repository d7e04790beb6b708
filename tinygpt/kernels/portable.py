"""Every operation in Tensor code that tinygrad compiles well on any device.

The mathematics is `reference.py`'s. What is added are barriers, which stop tinygrad from fusing
a matrix product with what surrounds it (and then computing it again for every output), and
column sums in two stages, which it can spread over cores and vector lanes.
"""

import functools
import math
import operator

from tinygrad import Tensor, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.random import counter
from tinygpt.kernels.reference import (
    adamw,
    adamw8bit,
    attention_mask,
    draw,
    dropout,
    lion,
    write_cache,
)

__all__ = ["adamw", "adamw8bit", "attention", "cached_attention", "cross_entropy", "draw",
           "dropout", "embedding", "gelu", "layer_norm", "linear", "lion", "orthogonalize",
           "quantized_embedding", "quantized_linear", "rms_norm", "rope", "square_sum", "swiglu"]


def linear(x, weight, bias=None, residual=None):
    y = _barrier(x @ weight.cast(x.dtype).T)
    if bias is not None:
        y = y + _expand_rows(bias.cast(x.dtype), y.shape)
    return _barrier(y if residual is None else residual + y)


def embedding(idx, weight):
    # a sum over a one-hot matrix: its gradient is a matrix product instead of a scatter
    one_hot = counter(weight.shape[0], idx.device) == idx.unsqueeze(-1)
    return _barrier(one_hot.cast(weight.dtype).contiguous() @ weight)


def quantized_linear(x, scale, bias, residual, weight):
    y = x @ weight.cast(x.dtype).T
    if scale is not None:
        y = y * scale.cast(x.dtype)
    y = _barrier(y)
    if bias is not None:
        y = y + bias.cast(x.dtype)
    return _barrier(y if residual is None else residual + y)


def quantized_embedding(idx, scale, weight):
    rows = weight[idx].cast(dtypes.float32)
    return _barrier(rows if scale is None else rows * scale[idx].unsqueeze(-1))


def layer_norm(x, weight, bias=None, eps=1e-5):
    z = x.cast(dtypes.float32)
    z = z - _barrier(z.mean(-1, keepdim=True))
    z = z * _barrier((z.square().mean(-1, keepdim=True) + eps).rsqrt())
    z = z * _expand_rows(weight, z.shape)
    if bias is not None:
        z = z + _expand_rows(bias, z.shape)
    return _barrier(z.cast(x.dtype))


def rms_norm(x, weight, eps=1e-5):
    z = x.cast(dtypes.float32)
    z = z * _barrier((z.square().mean(-1, keepdim=True) + eps).rsqrt())
    return _barrier((z * _expand_rows(weight, z.shape)).cast(x.dtype))


def gelu(x, tanh=False):
    return _barrier(reference.gelu(x, tanh))


def swiglu(gate, up):
    return _barrier(reference.swiglu(gate, up))


def rope(x, cos, sin):
    return _barrier(reference.rope(x, cos, sin))


def attention(q, k, v, offset=0, window=None, dropout_p=0.0, dropout_key=None, start=None):
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    q = _barrier(q.reshape(B, G, H // G, T, D))
    k, v = _barrier(k.unsqueeze(2)), _barrier(v.unsqueeze(2))  # (B, G, 1, S, D)
    scores = _barrier(q @ k.transpose(-1, -2)).cast(dtypes.float32)  # (B, G, H/G, T, S)
    mask = attention_mask(T, S, offset, window, q.device, start)
    scores = mask.where(scores * (1 / math.sqrt(D)), -float("inf"))
    weights = _barrier((scores - scores.max(-1, keepdim=True).detach().contiguous()).exp())
    weights = _barrier(weights / _barrier(weights.sum(-1, keepdim=True))).cast(q.dtype)
    weights = dropout(weights, dropout_p, dropout_key)
    return _barrier(_barrier(weights @ v).reshape(B, H, T, D))


def cached_attention(q, k, v, keys, values, offset, window=None, start=None):
    write_cache(k, v, keys, values, offset)
    return attention(q, keys, values, offset, window, start=start)


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    logits = _barrier(logits).cast(dtypes.float32)
    V = logits.shape[-1]
    top = logits.max(-1, keepdim=True).detach().contiguous()
    log_z = _barrier((logits - top).exp().sum(-1).log()) + top.squeeze(-1)
    target = (counter(V, targets.device) == targets.unsqueeze(-1)).where(logits, 0)
    loss = log_z - (1 - label_smoothing) * _barrier(target.sum(-1))
    if label_smoothing:
        loss = loss - label_smoothing * _barrier(logits.mean(-1))
    counted = targets >= 0
    return counted.where(loss + z_loss * log_z.square(), 0).sum() / counted.sum()


def square_sum(*tensors):
    return functools.reduce(operator.add, (x.square().sum().contiguous() for x in tensors))


def orthogonalize(*xs):
    return [_orthogonalize(x) for x in xs]


def _orthogonalize(x):
    # A and its polynomials commute: the steps are taken on A, the product applied to x once
    a, b, c = reference.NEWTON_SCHULZ
    x = (x / (x.square().sum().sqrt() + 1e-7).contiguous()).contiguous()
    wide = x.shape[0] <= x.shape[1]
    A = _product(x, x.T) if wide else _product(x.T, x)  # (N, N)
    i, product = counter(A.shape[0], A.device), None
    eye = (i.unsqueeze(1) == i) * a
    for i in range(5):
        step = (eye + b * A + c * _product(A, A)).contiguous()
        product = step if product is None else _product(product, step)
        if i < 4:
            A = _product(_product(step, A), step)
            A = ((A + A.T) / 2).contiguous()  # else what is not symmetric grows at every step
    return _product(product, x) if wide else _product(x, product)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b).contiguous()


def _barrier(x: Tensor) -> Tensor:
    """`x` in memory of its own, and so its gradient; times one, so that an assignment to either is
    to a value and does not change that memory under what else is computed from it."""
    return (x * 1).contiguous().contiguous_backward() * 1


def _expand_rows(w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`w` (C,) along the last axis of `shape`; its gradient, a column sum, takes two stages."""
    rows = math.prod(shape[:-1])
    group = max(d for d in range(1, 17) if rows % d == 0)
    w = w.reshape(1, 1, -1).expand(rows // group, 1, shape[-1]).contiguous_backward()
    return w.expand(rows // group, group, shape[-1]).reshape(shape)
