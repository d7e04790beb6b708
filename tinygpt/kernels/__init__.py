"""The operations of the model, each one function with several implementations.

    reference   plain Tensor code: the specification
    cpu         C for the CPU (kernels/cpu/)
    cuda        CUDA C++ for NVIDIA's GPUs (kernels/cuda/)
    portable    Tensor code that tinygrad compiles well on every device
    flash       UOps for a GPU's workgroups and tensor cores (attention only, kernels/flash.py)

`implementation="auto"` takes the first in AUTO that can run, and `use()` changes that for the whole
process. An implementation asked for by name runs or raises ValueError, and so do shapes that do not
fit one another. Activations are float32, bfloat16 or float16, and arithmetic inside is float32;
weights are float32, matrices bfloat16 or float16 too where no gradient is asked for.
"""

import functools
import warnings

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import cpu, cuda, flash, portable, reference
from tinygpt.kernels.cpu.kernel import stored
from tinygpt.kernels.cpu.threads import set_threads

__all__ = ["IMPLEMENTATIONS", "adamw", "adamw8bit", "attention", "cached_attention",
           "cross_entropy", "draw", "dropout", "embedding", "gelu", "in_use", "layer_norm",
           "linear", "lion", "muon", "quantized_embedding", "quantized_linear", "rms_norm", "rope",
           "set_threads", "square_sum", "stored", "swiglu", "use"]

IMPLEMENTATIONS = {"reference": reference, "cpu": cpu, "cuda": cuda, "portable": portable,
                   "flash": flash}
# What "auto" tries on a device, the fastest first, elsewhere "portable" alone. Flash attention is
# there where it was measured to be faster in every case (bench/gpu.csv).
AUTO = {"CPU": ("cpu", "portable"), "CUDA": ("cuda", "flash", "portable")}
_in_use = "auto"


def use(implementation: str) -> None:
    """Makes `implementation` what "auto" means from now on; "auto" itself undoes that.

    An operation that `implementation` does not have at all is chosen automatically; tensors that
    it cannot take raise ValueError.
    """
    global _in_use
    _in_use = _check_name(implementation)


def in_use() -> str:
    """What "auto" means now."""
    return _in_use


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
           implementation: str = "auto") -> Tensor:
    """residual + x @ weight.T + bias.

    x (..., C), weight (N, C), bias (N,), residual (..., N) -> (..., N) in x's dtype.
    """
    _check_linear("linear", x, weight, bias, residual)
    return _run("linear", implementation, (x, weight, bias, residual))


def embedding(idx: Tensor, weight: Tensor, implementation: str = "auto") -> Tensor:
    """Rows of weight (V, C) at idx (...,) int32 -> (..., C) float32. The rows of ids outside 0..V-1
    are undefined."""
    return _run("embedding", implementation, (idx, weight))


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None,
                     bias: Tensor | None = None, residual: Tensor | None = None,
                     implementation: str = "auto") -> Tensor:
    """residual + x @ (scale * weight).T + bias with weights of few bits; no gradient.

    x (..., C), bias (N,), residual (..., N) -> (..., N) in x's dtype. weight is one of
    (N, C) float16, without a scale
    (N, C) int8 with scale (N,) float32, a row's
    (N, 16 G) uint8 with scale (N, G) float16, those of groups of 32 weights, G = ceil(C / 32): four
    bits each, in llama.cpp's Q4_0 (see cpu/weight.h)
    With int8 and int4 an implementation may round each group of 32 numbers in x to multiples of its
    largest magnitude / 32767.
    """
    _check_linear("quantized_linear", x, weight, bias, residual)
    return _run("quantized_linear", implementation, (x, scale, bias, residual), weight)


def quantized_embedding(idx: Tensor, weight: Tensor, scale: Tensor | None = None,
                        implementation: str = "auto") -> Tensor:
    """Rows of scale * weight at idx (...,) int32 -> (..., C) float32; no gradient.

    weight (V, C) and scale are as for `quantized_linear`; of four bits, C is a multiple of 32.
    """
    return _run("quantized_embedding", implementation, (idx, scale), weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
               implementation: str = "auto") -> Tensor:
    """LayerNorm over the last axis, in float32 inside (arXiv:1607.06450). x (..., C) -> same."""
    _check("layer_norm", all(t is None or t.shape == x.shape[-1:] for t in (weight, bias)),
           x, weight, bias)
    return _run("layer_norm", implementation, (x, weight, bias), eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5,
             implementation: str = "auto") -> Tensor:
    """RMSNorm over the last axis, in float32 inside (arXiv:1910.07467). x (..., C) -> same."""
    _check("rms_norm", weight.shape == x.shape[-1:], x, weight)
    return _run("rms_norm", implementation, (x, weight), eps)


def gelu(x: Tensor, tanh: bool = False, implementation: str = "auto") -> Tensor:
    """GELU (arXiv:1606.08415), exact or by its tanh approximation, which GPT-2 uses."""
    return _run("gelu", implementation, (x,), tanh)


def swiglu(gate: Tensor, up: Tensor, implementation: str = "auto") -> Tensor:
    """silu(gate) * up (arXiv:2002.05202), elementwise."""
    _check("swiglu", gate.shape == up.shape, gate, up)
    return _run("swiglu", implementation, (gate, up))


def rope(x: Tensor, cos: Tensor, sin: Tensor, implementation: str = "auto") -> Tensor:
    """Rotary positions (arXiv:2104.09864) on the pairs (i, i + D/2), as Llama has them.

    x (B, H, T, D), cos and sin (T, D/2) float32 -> (B, H, T, D).
    """
    T, D = x.shape[2:]
    _check("rope", cos.shape == sin.shape == (T, D // 2) and D % 2 == 0, x, cos, sin)
    return _run("rope", implementation, (x, cos, sin))


def dropout(x: Tensor, p: float, key: Tensor | None, implementation: str = "auto") -> Tensor:
    """Zeroes each element with probability p and scales the rest by 1 / (1 - p).

    key (1,) uint32 decides which (see random.py); without a key x is returned unchanged.
    """
    return _run("dropout", implementation, (x,), p, key)


def attention(q: Tensor, k: Tensor, v: Tensor, offset: int | UOp = 0, window: int | None = None,
              dropout_p: float = 0.0, dropout_key: Tensor | None = None,
              starts: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """Causal attention, softmax(q k^T / sqrt(D)) v (arXiv:1706.03762), grouped-query heads
    (arXiv:2305.13245) where k and v have fewer heads than q.

    q (B, H, T, D), k and v (B, G, S, D), H a multiple of G -> (B, H, T, D) in q's dtype.
    Query i stands at position offset + i (a symbolic offset is fine) and sees the keys at
    positions up to its own, with `window` only the last `window` of them. Keys behind the last
    query have no effect as long as they are finite. dropout_p, below 1, applies to the softmax's
    weights if there is a dropout_key. With starts (B, T) int32, where several documents lie in a
    row, query i of row b does not see keys before starts[b, i], but always its own.
    """
    _check_attention(q, k, v, window)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} is out of range: choose at least 0 and below 1")
    _check("attention", starts is None or starts.shape == (q.shape[0], q.shape[2]), q, starts)
    return _run("attention", implementation, (q, k, v, starts), offset, window, dropout_p,
                dropout_key)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor,
                     offset: int | UOp, window: int | None = None, start: Tensor | None = None,
                     implementation: str = "auto") -> Tensor:
    """Writes k and v (B, G, T, D) into a cache, keys and values (B, G, S, D), from position offset
    on, and is then `attention` of q (B, H, T, D) to the cache; no gradient.

    keys and values have to be realized; realizing the result writes into them. With start (B,)
    int32 the queries of row b do not see keys before start[b], which are padding; a query that is
    itself before start[b] sees its own key alone.
    """
    _check_attention(q, keys, values, window)
    _check("cached_attention", k.shape == v.shape == (*keys.shape[:2], q.shape[2], q.shape[3]),
           q, k, v, keys)
    _check("cached_attention", start is None or start.shape == q.shape[:1], q, start)
    return _run("cached_attention", implementation, (q, k, v, keys, values), offset, window, start)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0,
                  z_loss: float = 0.0, implementation: str = "auto") -> Tensor:
    """Mean negative log-likelihood in nats, a scalar float32, over the targets that are not
    negative: -1 (nanoGPT) and -100 (Hugging Face) mark positions without a target.

    logits (N, V), targets (N,) int32. Label smoothing mixes the target with the uniform
    distribution (arXiv:1512.00567); z_loss adds z_loss * log(Z)^2 (arXiv:2204.02311). NaN where
    every target is negative.
    """
    _check("cross_entropy", targets.shape == logits.shape[:1], logits, targets)
    return _run("cross_entropy", implementation, (logits, targets), label_smoothing, z_loss)


def draw(logits: Tensor, key: Tensor | None = None, temperature: Tensor | None = None,
         implementation: str = "auto") -> Tensor:
    """An index of each row of logits (B, V) float32, drawn from softmax(logits / temperature) by
    the Gumbel-max trick; without a key the index of the largest, the first of equals: (B,) int32.

    key (1,) uint32, or one for each row (B,); temperature (1,) float32; no gradient.
    """
    _check("draw", key is None or key.shape in ((1,), logits.shape[:1]), logits, key)
    return _run("draw", implementation, (logits, key, temperature))


def adamw(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, options: Tensor,
          implementation: str = "auto") -> list[Tensor]:
    """One AdamW step (arXiv:1711.05101) on a weight p and its moments m and v, in place.

    All four are float32 of one shape. options (9,) float32 are those of `options.AdamWOptions`.
    Returns p, m and v, to be realized.
    """
    return _run("adamw", implementation, (p, m, v, grad), options)


def adamw8bit(p: Tensor, m: Tensor, m_tops: Tensor, v: Tensor, v_tops: Tensor, grad: Tensor,
              options: Tensor, implementation: str = "auto") -> list[Tensor]:
    """One AdamW step on a weight p whose moments are bytes (arXiv:2110.02861), in place.

    p and grad are float32 of one shape, m and v (N, 256) uint8 with their blocks' largest
    magnitudes m_tops and v_tops (N, 1) float32: see `tinygpt.kernels.blockwise`. options are
    adamw's. Returns all five, to be realized.
    """
    return _run("adamw8bit", implementation, (p, m, m_tops, v, v_tops, grad), options)


def lion(p: Tensor, m: Tensor, grad: Tensor, options: Tensor,
         implementation: str = "auto") -> list[Tensor]:
    """One Lion step (arXiv:2302.06675) on a weight p and its momentum m, in place.

    All three are float32 of one shape. options (6,) float32 are those of `options.LionOptions`.
    Returns p and m, to be realized.
    """
    return _run("lion", implementation, (p, m, grad), options)


def square_sum(*tensors: Tensor, implementation: str = "auto") -> Tensor:
    """The sum of the squares of all elements of float32 tensors, a scalar; no gradient."""
    return _run("square_sum", implementation, tensors)


def muon(params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], options: Tensor,
         implementation: str = "auto") -> list[Tensor]:
    """One Muon step (arXiv:2502.16982) on matrices and their momenta, in place.

    All are float32; a matrix (R, C), its momentum m and its gradient have one shape. It moves in
    the direction u f(s) v^T for grad + momentum m = u s v^T, f(s) in 0.7..1.2: five Newton-Schulz
    steps x <- (a + b A + c A^2) x, A = x x^T, from x of norm 1. options (5,) float32 are those of
    `options.MuonOptions`. Returns all matrices and momenta, to be realized.
    """
    return _run("muon", implementation, (*params, *momenta, *grads), options) if params else []


def _run(operation: str, implementation: str, tensors: tuple, *options):
    """Calls the operation of the first implementation that can run it on these tensors."""
    for name in _preferences(operation, _check_name(implementation), tensors[0].device):
        if _offers(name, operation, tensors):
            return getattr(IMPLEMENTATIONS[name], operation)(*tensors, *options)
        if implementation == _in_use == "auto" and name == "cpu" and hasattr(cpu, operation):
            _say_fallback(operation, ", ".join(dict.fromkeys(
                str(t.dtype) for t in tensors if t is not None)))
    kinds = ", ".join(f"{t.dtype} {t.shape} on {t.device}" for t in tensors if t is not None)
    raise ValueError(f"the kernels {name!r} have no {operation} for {kinds}")


def _preferences(operation: str, implementation: str, device) -> tuple[str, ...]:
    """The implementations to be tried, the fastest first; one alone that was asked for by name."""
    if implementation != "auto":
        return (implementation,)
    if _in_use != "auto" and hasattr(IMPLEMENTATIONS[_in_use], operation):
        return (_in_use,)
    return AUTO.get(str(device).split(":")[0], ("portable",))


def _offers(name: str, operation: str, tensors: tuple) -> bool:
    module = IMPLEMENTATIONS[name]
    takes_all = not hasattr(module, "fits")
    return hasattr(module, operation) and (takes_all or module.fits(operation, *tensors))


@functools.cache
def _say_fallback(operation: str, kinds: str) -> None:
    warnings.warn(f"no C kernel for {operation} of {kinds}: the portable one runs", stacklevel=4)


def _check(operation: str, fits: bool, *tensors: Tensor | None) -> None:
    if not fits:
        shapes = ", ".join(str(t.shape) for t in tensors if t is not None)
        raise ValueError(f"{operation} cannot take tensors of the shapes {shapes} together")


def _check_linear(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None,
                  residual: Tensor | None) -> None:
    N, C = weight.shape
    fits = -(-x.shape[-1] // 32) * 16 == C if weight.dtype == dtypes.uint8 else x.shape[-1] == C
    _check(operation, fits and (bias is None or bias.shape == (N,))
           and (residual is None or residual.shape == (*x.shape[:-1], N)),
           x, weight, bias, residual)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    _check("attention", q.ndim == k.ndim == 4 and k.shape == v.shape
           and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
           and q.shape[1] % k.shape[1] == 0, q, k, v)
    if window is not None and window < 1:
        raise ValueError(f"window={window} is out of range: choose at least 1, or None")


def _check_name(implementation: str) -> str:
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"no kernels are called {implementation!r}: "
                         f"choose auto, {', '.join(IMPLEMENTATIONS)}")
    return implementation
