"""The operations of the model, each one function whatever implements it.

    reference   plain Tensor code: the specification
    portable    Tensor code that tinygrad compiles well on every device
    tinygrad    tinygrad's own scaled_dot_product_attention (attention only)

`implementation="auto"` takes the fastest one that can run here, which `use()` narrows for the
whole process; an implementation asked for by name runs or raises ValueError. All of them take
float32 or bfloat16 activations; weights are float32 and are cast to the activations' dtype.
"""

from tinygrad import Tensor, UOp

from tinygpt.kernels import portable, reference, stock

IMPLEMENTATIONS = {"reference": reference, "portable": portable, "tinygrad": stock}
_default = portable


def use(implementation: str) -> None:
    """Makes `implementation` what "auto" means from now on; "auto" itself undoes that."""
    global _default
    _default = portable if implementation == "auto" else _module("", implementation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
           implementation: str = "auto") -> Tensor:
    """residual + x @ weight.T + bias.

    x (..., C), weight (N, C), bias (N,), residual (..., N) -> (..., N) in x's dtype.
    """
    return _module("linear", implementation).linear(x, weight, bias, residual)


def embedding(idx: Tensor, weight: Tensor, implementation: str = "auto") -> Tensor:
    """Rows of weight (V, C) at idx (...,) int32 -> (..., C). Ids outside 0..V-1 are undefined."""
    return _module("embedding", implementation).embedding(idx, weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
               implementation: str = "auto") -> Tensor:
    """LayerNorm over the last axis, in float32 inside (arXiv:1607.06450). x (..., C) -> same."""
    return _module("layer_norm", implementation).layer_norm(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5,
             implementation: str = "auto") -> Tensor:
    """RMSNorm over the last axis, in float32 inside (arXiv:1910.07467). x (..., C) -> same."""
    return _module("rms_norm", implementation).rms_norm(x, weight, eps)


def gelu(x: Tensor, tanh: bool = False, implementation: str = "auto") -> Tensor:
    """GELU (arXiv:1606.08415), exact or, as GPT-2 has it, by its tanh approximation."""
    return _module("gelu", implementation).gelu(x, tanh)


def swiglu(gate: Tensor, up: Tensor, implementation: str = "auto") -> Tensor:
    """silu(gate) * up (arXiv:2002.05202), elementwise."""
    return _module("swiglu", implementation).swiglu(gate, up)


def rope(x: Tensor, cos: Tensor, sin: Tensor, implementation: str = "auto") -> Tensor:
    """Rotary positions (arXiv:2104.09864) on the pairs (i, i + D/2), as Llama has them.

    x (B, H, T, D), cos and sin (T, D/2) float32 -> (B, H, T, D).
    """
    return _module("rope", implementation).rope(x, cos, sin)


def dropout(x: Tensor, p: float, key: Tensor | None) -> Tensor:
    """Zeroes each element with probability p and scales the rest by 1 / (1 - p).

    key (1,) uint32 decides which (see random.py); without one, x comes back unchanged.
    """
    return reference.dropout(x, p, key)


def attention(q: Tensor, k: Tensor, v: Tensor, offset: int | UOp = 0, window: int | None = None,
              dropout_p: float = 0.0, dropout_key: Tensor | None = None,
              implementation: str = "auto") -> Tensor:
    """Causal attention, softmax(q k^T / sqrt(D)) v (arXiv:1706.03762), grouped-query heads
    (arXiv:2305.13245) where k and v have fewer heads than q.

    q (B, H, T, D), k and v (B, G, S, D), H a multiple of G -> (B, H, T, D) in q's dtype.
    Query i stands at position offset + i (a symbolic offset is fine) and sees the keys at
    positions up to its own, with `window` only the last `window` of them. Keys behind the last
    query are never looked at. dropout_p acts on the softmax's weights where there is a key.
    """
    return _module("attention", implementation).attention(
        q, k, v, offset, window, dropout_p, dropout_key)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0,
                  z_loss: float = 0.0, ignore_index: int = -1,
                  implementation: str = "auto") -> Tensor:
    """Mean negative log-likelihood in nats, a scalar float32, over targets != ignore_index.

    logits (N, V), targets (N,) int32. Label smoothing mixes the target with the uniform
    distribution (arXiv:1512.00567); z_loss adds z_loss * log(Z)^2 (arXiv:2204.02311).
    """
    return _module("cross_entropy", implementation).cross_entropy(
        logits, targets, label_smoothing, z_loss, ignore_index)


def _module(operation: str, implementation: str):
    if implementation == "auto":
        return _default if hasattr(_default, operation) else portable
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no kernels are called {implementation!r}: "
                         f"choose auto, {', '.join(IMPLEMENTATIONS)}")
    if not hasattr(module := IMPLEMENTATIONS[implementation], operation or "__name__"):
        raise ValueError(f"{implementation} has no {operation}")
    return module
