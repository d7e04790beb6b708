"""The specification of every operation, in plain Tensor code.

Nothing here is tuned. Every other implementation has to agree with this one, forward and
gradients, and tests and benchmarks measure against it alone. Whatever the activations are,
arithmetic is float32 (in float16 the square of 300 is infinite), or float64 for activations in
float64, which `tinygpt.check` uses. The docstrings of the operations are in
`tinygpt/kernels/__init__.py`.
"""

import functools
import math
import operator

from tinygrad import dtypes
from tinygrad.dtype import least_upper_dtype

from tinygpt.kernels.blockwise import dequantize, in_blocks, quantize
from tinygpt.kernels.options import AdamWOptions, LionOptions, MuonOptions, thirds, unpack
from tinygpt.kernels.random import counter, random_bits, uniform


def _wide(x):
    """x in float32, or in float64 if it already is."""
    return x.cast(least_upper_dtype(x.dtype, dtypes.float32))


def linear(x, weight, bias=None, residual=None):
    y = _wide(x) @ weight.T
    if bias is not None:
        y = y + bias
    return (y if residual is None else residual + y).cast(x.dtype)


def embedding(idx, weight):
    return _wide(weight[idx])


def quantized_linear(x, scale, bias, residual, weight):
    return linear(x, dequantized(weight, scale)[:, :x.shape[-1]], bias, residual)


def quantized_embedding(idx, scale, weight):
    return dequantized(weight, scale)[idx]


def dequantized(weight, scale):
    if weight.dtype == dtypes.uint8:  # (N, 16 G), scale (N, G) -> (N, 32 G)
        halves = weight.reshape(*scale.shape, 1, 16)
        halves = (halves & 15).cat(halves >> 4, dim=-2)  # (N, G, 2, 16)
        scale = scale.cast(dtypes.float32).reshape(*scale.shape, 1, 1)
        return ((halves.cast(dtypes.float32) - 8) * scale).reshape(weight.shape[0], -1)
    weight = weight.cast(dtypes.float32)
    return weight if scale is None else weight * scale.unsqueeze(-1)


def layer_norm(x, weight, bias=None, eps=1e-5):
    z = _wide(x)
    z = z - z.mean(-1, keepdim=True)
    z = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return (z if bias is None else z + bias).cast(x.dtype)


def rms_norm(x, weight, eps=1e-5):
    z = _wide(x)
    return (z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).cast(x.dtype)


def gelu(x, tanh=False):
    z = _wide(x)
    if tanh:
        z = 0.5 * z * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)).tanh())
    else:
        z = 0.5 * z * (1 + (z / math.sqrt(2)).erf())
    return z.cast(x.dtype)


def swiglu(gate, up):
    z = _wide(gate)
    return (z * z.sigmoid() * up).cast(gate.dtype)


def rope(x, cos, sin):
    a, b = _wide(x).chunk(2, dim=-1)
    return (a * cos - b * sin).cat(b * cos + a * sin, dim=-1).cast(x.dtype)


def dropout(x, p, key):
    if p == 0 or key is None:
        return x
    # in memory of its own: tinygrad 0.14 miscompiles these bits inside a matrix product
    keep = (random_bits(key, x.shape) >= int(p * 2**32)).contiguous()
    return keep.where(x / (1 - p), 0)


def attention_mask(T, S, offset, window, device, starts=None):
    """(T, S) bool: query i stands at offset + i and sees itself and what lies before it; with
    starts (B,) or (B, T) a mask (B, 1, 1, T, S) that hides what lies before the start of a row or
    of a query."""
    i = counter(T, device).reshape(T, 1) + offset
    j = counter(S, device).reshape(1, S)
    mask = i >= j if window is None else (i >= j) & (i < j + window)
    if starts is None:
        return mask
    starts = starts.reshape(starts.shape[0], 1, 1, -1, 1)
    return mask & ((j >= starts) | (i == j))  # a softmax needs one key


def attention(q, k, v, starts=None, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    dtype, q = q.dtype, _wide(q).reshape(B, G, H // G, T, D)
    k, v = (_wide(x).unsqueeze(2) for x in (k, v))  # (B, G, 1, S, D)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)  # (B, G, H/G, T, S)
    mask = attention_mask(T, S, offset, window, q.device, starts)
    weights = mask.where(scores, -float("inf")).softmax(-1)
    return (dropout(weights, dropout_p, dropout_key) @ v).reshape(B, H, T, D).cast(dtype)


def write_cache(k, v, keys, values, offset):
    T = k.shape[2]
    keys[:, :, offset:offset + T, :] = k.cast(keys.dtype)
    values[:, :, offset:offset + T, :] = v.cast(values.dtype)


def cached_attention(q, k, v, keys, values, offset, window=None, start=None):
    write_cache(k, v, keys, values, offset)
    return attention(q, keys, values, start, offset, window)


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    logits = _wide(logits)
    V = logits.shape[-1]
    log_z = logits.logsumexp(-1)
    target = (counter(V, targets.device) == targets.unsqueeze(-1)).where(logits, 0)
    loss = log_z - (1 - label_smoothing) * target.sum(-1) - label_smoothing * logits.mean(-1)
    counted = targets >= 0
    return counted.where(loss + z_loss * log_z.square(), 0).sum() / counted.sum()


def draw(logits, key=None, temperature=None):
    if temperature is not None:
        logits = logits / temperature
    if key is not None:
        if key.shape[0] > 1:  # one for each row
            key = key.unsqueeze(-1).expand(logits.shape).reshape(-1)
        logits = logits - (-uniform(key, logits.shape).log()).log()
    return logits.contiguous().argmax(-1).cast(dtypes.int32).contiguous()


def square_sum(*tensors):
    return functools.reduce(operator.add, (x.square().sum() for x in tensors))


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a + b A + c A^2


def orthogonalize(x):
    a, b, c = NEWTON_SCHULZ
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x


def muon(*arguments):
    return muon_steps(orthogonalize, *arguments)


def muon_steps(orthogonalize, *arguments):
    *tensors, options = arguments
    params, momenta, grads = thirds(tensors)
    o = unpack(MuonOptions, options)
    for p, m, grad in zip(params, momenta, grads, strict=True):
        grad = grad * o.grad_scale
        m.assign((o.apply != 0).where(o.momentum * m + grad, m))
        step = orthogonalize(grad + o.momentum * m) * (0.2 * math.sqrt(max(p.shape)))
        moved = p * (1 - o.learning_rate * o.weight_decay) - o.learning_rate * step
        p.assign((o.apply != 0).where(moved, p))
    return [*params, *momenta]


def lion(p, m, grad, options):
    o = unpack(LionOptions, options)
    grad = grad * o.grad_scale
    step = (o.beta1 * m + (1 - o.beta1) * grad).sign()
    moved = p * (1 - o.learning_rate * o.weight_decay) - o.learning_rate * step
    later = o.beta2 * m + (1 - o.beta2) * grad
    p.assign((o.apply != 0).where(moved, p))
    m.assign((o.apply != 0).where(later, m))
    return [p, m]


def adamw(p, m, v, grad, options):
    o = unpack(AdamWOptions, options)
    grad = grad * o.grad_scale
    m.assign((o.apply != 0).where(o.beta1 * m + (1 - o.beta1) * grad, m))
    v.assign((o.apply != 0).where(o.beta2 * v + (1 - o.beta2) * grad * grad, v))
    root = (v * o.bias_correction2).sqrt() + o.eps
    moved = (p * (1 - o.learning_rate * o.weight_decay)
             - o.learning_rate * (m * o.bias_correction1) / root)
    p.assign((o.apply != 0).where(moved, p))
    return [p, m, v]


def adamw8bit(p, m, m_tops, v, v_tops, grad, options):
    moments = [dequantize(codes, tops, signed).reshape(-1)[:p.numel()].reshape(p.shape).contiguous()
               for codes, tops, signed in ((m, m_tops, True), (v, v_tops, False))]
    p, *moments = adamw(p, *moments, grad, options)
    updated, apply = [p], unpack(AdamWOptions, options).apply
    for new, codes, tops, signed in ((moments[0], m, m_tops, True), (moments[1], v, v_tops, False)):
        for old, x in zip((codes, tops), quantize(in_blocks(new), signed), strict=True):
            updated.append(old.assign((apply != 0).where(x, old)))
    return updated
