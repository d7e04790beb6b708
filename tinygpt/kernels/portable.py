"""Every operation in Tensor code that tinygrad compiles well on any device.

The mathematics is `reference.py`'s. What is added are barriers, which stop tinygrad from fusing
a matrix product with what surrounds it (and then computing it again for every output), and
column sums in two stages, which it can spread over cores and vector lanes. On a GPU, activations
of 16 bits are multiplied as such, which its tensor cores can, and summed in float32.

Private interfaces of tinygrad: `embedding` is a UOp's call with a gradient of its own.
"""

import functools
import math
import operator

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.cpu.kernel import narrow
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
           "dropout", "embedding", "gelu", "layer_norm", "linear", "lion", "muon",
           "quantized_embedding", "quantized_linear", "rms_norm", "rope", "square_sum", "swiglu"]


def linear(x, weight, bias=None, residual=None):
    y = _barrier(_matmul(x, weight.T).cast(x.dtype))
    if bias is not None:
        y = y + _expand_rows(bias, y.shape)
    return _barrier((y if residual is None else residual + y).cast(x.dtype))


def embedding(idx, weight, gradient=None):
    """gradient: what makes weight's gradient of the output's, if not a matrix product."""
    V, C = weight.shape

    def by_product(dy: Tensor) -> Tensor:
        # with a one-hot matrix, since tinygrad has no scatter
        one_hot = counter(V, idx.device).unsqueeze(-1) == idx.reshape(-1)  # (V, N)
        return _barrier(_matmul(one_hot.cast(dy.dtype).contiguous(), dy))

    def backward(dy: UOp, _) -> tuple[UOp, None]:
        dy = narrow(Tensor(dy)).contiguous().reshape(-1, C)
        return (gradient or by_product)(dy).uop, None

    rows = reference.embedding(idx.as_param(1), weight.as_param(0))
    return (weight.call(idx, fxn=rows, grad_fxn=backward) * 1).contiguous() * 1


def quantized_linear(x, scale, bias, residual, weight):
    if weight.dtype == dtypes.uint8:
        weight, scale = reference.dequantized(weight, scale)[:, :x.shape[-1]], None
    y = _matmul(x, weight.T)
    y = _barrier(y if scale is None else y * scale)
    if bias is not None:
        y = y + bias
    return _barrier((y if residual is None else residual + y).cast(x.dtype))


def quantized_embedding(idx, scale, weight):
    if weight.dtype == dtypes.uint8:
        rows = reference.dequantized(weight[idx].reshape(-1, weight.shape[1]),
                                     scale[idx].reshape(-1, scale.shape[1]))
        return _barrier(rows.reshape(*idx.shape, -1))
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


def attention(q, k, v, starts=None, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    # a power of two of 1 / sqrt(D) goes first: exact, and products stay in float16's range
    rest, exponent = math.frexp(1 / math.sqrt(D))
    q = _barrier((q * 2.0**exponent).reshape(B, G, H // G, T, D))
    k, v = _barrier(k.unsqueeze(2)), _barrier(v.unsqueeze(2))  # (B, G, 1, S, D)
    scores = _barrier(_matmul(q, k.transpose(-1, -2)))  # (B, G, H/G, T, S) float32
    mask = attention_mask(T, S, offset, window, q.device, starts)
    scores = mask.where(scores * rest, -float("inf"))
    weights = _barrier((scores - scores.max(-1, keepdim=True).detach().contiguous()).exp())
    weights = _barrier(weights / _barrier(weights.sum(-1, keepdim=True))).cast(q.dtype)
    weights = dropout(weights, dropout_p, dropout_key)
    return _barrier(_barrier(_matmul(weights, v).cast(q.dtype)).reshape(B, H, T, D))


def cached_attention(q, k, v, keys, values, offset, window=None, start=None):
    write_cache(k, v, keys, values, offset)
    return attention(q, keys, values, start, offset, window)


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
    count = counted.sum().contiguous()  # else every element of the gradient counts again
    return counted.where(loss + z_loss * log_z.square(), 0).sum() / count


def square_sum(*tensors):
    return functools.reduce(operator.add, (x.square().sum().contiguous() for x in tensors))


def muon(*arguments):
    return reference.muon_steps(_orthogonalize, *arguments)


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
            A = ((A + A.T) / 2).contiguous()  # any asymmetry would grow at every step
    return _product(product, x) if wide else _product(x, product)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; on a GPU of b rounded to a's dtype, as its tensor cores multiply."""
    if _multiplies_in_16_bits(a):
        return a.matmul(b.cast(a.dtype), dtype=dtypes.float32)
    return a.cast(dtypes.float32) @ b.cast(dtypes.float32)


def _multiplies_in_16_bits(x: Tensor) -> bool:
    """A CPU has no faster products of 16 bits, and would round each of them before it is added."""
    devices = x.device if isinstance(x.device, tuple) else (x.device,)
    return not devices[0].startswith("CPU")


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b).contiguous()


def _barrier(x: Tensor) -> Tensor:
    """`x` in memory of its own, and its gradient too. Multiplied by one each is a value: assigning
    to it does not overwrite that memory, which other results are computed from."""
    return (x * 1).contiguous().contiguous_backward() * 1


def _expand_rows(w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`w` (C,) along the last axis of `shape`; its gradient, a column sum, takes two stages."""
    rows = math.prod(shape[:-1])
    group = max(d for d in range(1, 17) if rows % d == 0)
    w = w.reshape(1, 1, -1).expand(rows // group, 1, shape[-1]).contiguous_backward()
    return w.expand(rows // group, group, shape[-1]).reshape(shape)
