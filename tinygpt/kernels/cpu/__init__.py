"""The operations in C, for float32, bfloat16 and float16 on tinygrad's CPU device.

Each C file in this folder begins with what it computes. It is compiled once for a machine and takes
its sizes when it runs. Arithmetic is float32 whatever the activations are, with two exceptions:
products of bfloat16 activations, in linear layers and in attention, on a processor that multiplies
bfloat16 (AMX, AVX512_BF16, Arm's BF16), which are summed in float32; and products of int8 and int4
matrices with more than a few rows on a processor with AVX512_VNNI, for which groups of 32
activations are rounded to 16 bits. `fits` decides whether these functions can take given tensors.
"""

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.cpu.compile import bfloat16_defines, integer_defines
from tinygpt.kernels.cpu.kernel import Kernel, constants, memory, projected, strided
from tinygpt.kernels.cpu.threads import pool
from tinygpt.kernels.options import AdamWOptions, LionOptions, MuonOptions, thirds

GEMV_ROWS = 4  # up to so many rows dot products are faster than packing
QUANTIZED_GEMV_ROWS = 8  # the same where the weights are of few bits
MOST_INPUTS = 32  # of a kernel; tinygrad 0.14 allows 63 arguments
GEMM_STRIP, GEMM_SLICE = 1536, 512  # the greatest NC and the least KC of gemm.h
WIDEST_HEAD = 2048  # whose tiles fit on the stack of a thread
WITH_INTEGERS = ("embedding", "quantized_embedding", "attention", "cross_entropy", "adamw8bit",
                 "draw")
IN_16_BITS = ("linear", "quantized_linear", "quantized_embedding", "layer_norm", "rms_norm", "gelu",
              "swiglu", "rope", "attention", "cached_attention", "cross_entropy", "draw",
              "embedding")
ACTIVATIONS = (dtypes.float32, dtypes.bfloat16, dtypes.float16)


def fits(operation: str, *tensors: Tensor | None) -> bool:
    """Whether the tensors that are not None are on the CPU and of dtypes that the operation takes.
    """
    given = [t for t in tensors if t is not None]
    if "attention" in operation and given[0].shape[-1] > WIDEST_HEAD:
        return False
    return all(str(t.device) == "CPU" and (
        t.dtype == dtypes.float32
        or (t.dtype in ACTIVATIONS and operation in IN_16_BITS)
        or (dtypes.is_int(t.dtype) and operation in WITH_INTEGERS)) for t in given)


def _empty(*shape: int, dtype=dtypes.float32) -> Tensor:
    return Tensor.empty(*shape, dtype=dtype, device="CPU")


def _empty_like(x: Tensor | None) -> Tensor | None:
    return x if x is None else _empty(*x.shape, dtype=x.dtype)


def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.float()


def linear(x, weight, bias=None, residual=None):
    N, K = weight.shape
    M = x.numel() // K
    few = M <= GEMV_ROWS
    weight, bias = weight if few else weight.float(), _float(bias)
    residual = residual if residual is None else residual.cast(x.dtype)

    def gradient(dy: Tensor, _) -> dict[str, Tensor]:
        matrix = weight.float()
        dx = _gemm(_empty_like(x), dict(a=dy, b=matrix), dict(M=M, N=K, K=N, ta=0, tb=0))["c"]
        made = _gemm(_empty_like(matrix), dict(a=dy, b=x), dict(M=N, N=K, K=M, ta=1, tb=0),
                     sums=_empty_like(bias))
        names = ("x", "weight") if few else ("a", "b")
        grads = dict(zip(names, (dx, made["c"].cast(weight.dtype)), strict=True))
        return grads | dict(bias=made.get("sums"), residual=dy)

    if few:
        return _gemv(x, weight, None, bias, residual, gradient)
    return _gemm(_empty(*x.shape[:-1], N, dtype=x.dtype),
                 dict(a=x, b=weight, bias=bias, residual=residual),
                 dict(M=M, N=N, K=K, ta=0, tb=1), gradient=gradient)["c"]


def quantized_linear(x, scale, bias, residual, weight):
    N, K = weight.shape[0], x.shape[-1]
    M = x.numel() // K
    bias, residual = _float(bias), residual if residual is None else residual.cast(x.dtype)
    if M <= QUANTIZED_GEMV_ROWS:
        return _gemv(x, weight, scale, bias, residual)
    defines = {}
    if weight.dtype != dtypes.float16:
        defines = dict(QUANTIZED=1) | _int4(weight) | integer_defines()
    return _gemm(_empty(*x.shape[:-1], N, dtype=x.dtype),
                 dict(a=x, b=weight, scale=scale, bias=bias, residual=residual),
                 dict(M=M, N=N, K=K, ta=0, tb=1), **defines)["c"]


def _int4(weight: Tensor) -> dict[str, int]:
    """The definitions with which a C file reads int4 weights, two in a byte."""
    return dict(INT4=1) if weight.dtype == dtypes.uint8 else {}


def _gemv(x, weight, scale, bias, residual, gradient=None):
    N, K = weight.shape[0], x.shape[-1]
    M = x.numel() // K
    return Kernel("gemv.c", **_int4(weight))(
        outputs=dict(y=_empty(*x.shape[:-1], N, dtype=x.dtype)),
        inputs=dict(x=x, weight=weight, bias=bias, residual=residual, scale=scale),
        sizes=dict(M=M, N=N, K=K), gradient=gradient, flops=2 * M * N * K)["y"]


def _gemm(c, inputs, sizes, sums=None, gradient=None, **defines):
    """c = op(a) op(b) + bias + residual, and sums, the column sums of a; by name."""
    M, N, K = (sizes[name] for name in "MNK")
    narrow = c.dtype != dtypes.float32 and K > GEMM_SLICE
    a, b = inputs["a"].dtype, inputs["b"].dtype
    if a == dtypes.bfloat16 and b != dtypes.float16 and not defines:
        defines = bfloat16_defines()
    return Kernel("gemm.c", **defines)(
        outputs=dict(c=c, sums=sums, partial=_empty(M, min(N, GEMM_STRIP)) if narrow else None),
        inputs=dict(scale=None, bias=None, residual=None) | inputs, sizes=sizes, gradient=gradient,
        flops=2 * M * N * K)


def embedding(idx, weight):
    N, (V, C) = idx.numel(), weight.shape
    idx = idx.cast(dtypes.int32)

    def gradient(dy: Tensor, _) -> dict[str, Tensor]:
        made = Kernel("embedding_backward.c")(
            outputs=dict(dweight=_empty(V, C)), inputs=dict(dy=dy, idx=idx),
            sizes=dict(N=N, V=V, C=C))
        return dict(weight=made["dweight"].cast(weight.dtype))

    return _rows(idx, weight, None, gradient)


def quantized_embedding(idx, scale, weight):
    return _rows(idx.cast(dtypes.int32), weight, scale)


def _rows(idx, weight, scale, gradient=None):
    V, C = weight.shape[0], weight.shape[1] * (2 if _int4(weight) else 1)
    return Kernel("embedding_forward.c", **_int4(weight))(
        outputs=dict(out=_empty(*idx.shape, C)), inputs=dict(idx=idx, weight=weight, scale=scale),
        sizes=dict(N=idx.numel(), C=C, V=V), gradient=gradient)["out"]


def layer_norm(x, weight, bias=None, eps=1e-5):
    return _norm(x, weight, bias, eps, rms=0)


def rms_norm(x, weight, eps=1e-5):
    return _norm(x, weight, None, eps, rms=1)


def _norm(x, weight, bias, eps, rms):
    C = x.shape[-1]
    N = x.numel() // C
    weight, bias = weight.float(), _float(bias)

    def gradient(dy: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = Kernel("norm_backward.c", RMS=rms)(
            outputs=dict(dx=_empty_like(x), dweight=_empty(C), dbias=_empty_like(bias)),
            inputs=dict(dy=dy, x=x, weight=weight, stats=made["stats"]), sizes=dict(N=N, C=C))
        return dict(x=grads["dx"], weight=grads["dweight"], bias=grads.get("dbias"))

    return Kernel("norm_forward.c", RMS=rms)(
        outputs=dict(y=_empty_like(x), stats=_empty(N, 2)),
        inputs=dict(x=x, weight=weight, bias=bias), sizes=dict(N=N, C=C, eps=float(eps)),
        gradient=gradient)["y"]


def gelu(x, tanh=False):
    return _activation("GELU_TANH" if tanh else "GELU", x)


def swiglu(gate, up):
    return _activation("SWIGLU", gate, up.cast(gate.dtype))


def _activation(kind: str, x: Tensor, up: Tensor | None = None) -> Tensor:
    sizes = dict(n=x.numel())

    def gradient(dy: Tensor, _) -> dict[str, Tensor]:
        made = Kernel("activation.c", BACKWARD=1, **{kind: 1})(
            outputs=dict(out=_empty_like(x), out_up=_empty_like(up)),
            inputs=dict(dy=dy, x=x, up=up), sizes=sizes)
        return dict(x=made["out"], up=made.get("out_up"))

    return Kernel("activation.c", BACKWARD=0, **{kind: 1})(
        outputs=dict(out=_empty_like(x), out_up=None), inputs=dict(dy=None, x=x, up=up),
        sizes=sizes, gradient=gradient)["out"]


def rope(x, cos, sin):
    B, H, T, D = x.shape
    cos, sin = cos.float(), sin.float()
    source, (batch, head, row) = strided(x)

    def turn(x: Tensor, backward: int, gradient=None) -> Tensor:
        return Kernel("rope.c", BACKWARD=backward)(
            outputs=dict(out=_empty(*source.shape, dtype=x.dtype)),
            inputs=dict(x=x, cos=cos, sin=sin), gradient=gradient,
            sizes=dict(B=B, H=H, T=T, D=D, batch=batch, head=head, row=row))["out"]

    out = turn(source, 0, lambda dy, _: dict(x=turn(dy, 1)))
    return out if source is x else out.transpose(1, 2)


def attention(q, k, v, starts=None, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    drops = dropout_p > 0 and dropout_key is not None
    sources, strides = _projections(q, k.cast(q.dtype), v.cast(q.dtype))
    where = dict(offset=_number(offset), starts=starts,
                 key=dropout_key if drops else constants(dtypes.uint32, 0))
    sizes = dict(B=B, H=H, G=G, T=T, S=S, D=D, **strides, window=window or 0,
                 dropout=int(dropout_p * 2**32) if drops else 0,
                 starts_row=0 if starts is None else starts.numel() // B)
    flops = 2 * B * H * D * T * (2 * S - T)

    def gradient(dy: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = Kernel("attention_backward.c", **_pairs(q))(
            outputs=dict(dq=_empty_like(sources["q"]), dk=_empty_like(sources["k"]),
                         dv=_empty_like(sources["v"]), delta=_empty(B, H, T),
                         sums=None if q.dtype == dtypes.float32 else _empty(B, H, T, D)),
            inputs=dict(dout=dy, **made, **sources, **where), sizes=sizes, flops=flops * 5 // 2)
        return dict(q=grads["dq"], k=grads.get("dk"), v=grads.get("dv"))

    made = Kernel("attention_forward.c", **_pairs(q))(
        outputs=dict(out=_empty(B, T, H, D, dtype=q.dtype), lse=_empty(B, H, T)),
        inputs=dict(**sources, **where), sizes=sizes, gradient=gradient, flops=flops)
    return made["out"].transpose(1, 2)


def _pairs(q: Tensor) -> dict[str, int]:
    """The definition with which attention multiplies pairs of bfloat16."""
    return dict(DOT=1) if q.dtype == dtypes.bfloat16 and bfloat16_defines() else {}


def _projections(q, k, v) -> tuple[dict[str, Tensor | None], dict[str, list[int]]]:
    """The memory of q, k and v, and where in it each begins and its batch, head and row strides.

    q's alone where the three are what a kernel projected together.
    """
    if (found := projected(q, k, v)) is not None:
        sources, places = (found[0], None, None), found[1]
    else:
        sources, strides = zip(*[strided(x) for x in (q, k, v)], strict=True)
        places = [(0, *s) for s in strides]
    return dict(zip("qkv", sources, strict=True)), {
        f"{name}_strides": list(place) for name, place in zip("qkv", places, strict=True)}


def cached_attention(q, k, v, keys, values, offset, window=None, start=None):
    B, H, T, D = q.shape
    if keys.dtype != q.dtype:
        reference.write_cache(k, v, keys, values, offset)
        return attention(q, keys, values, start, offset, window)
    sources, places = {}, {}
    for name, x in dict(q=q, k=k.cast(q.dtype), v=v.cast(q.dtype)).items():
        source, first, strides = memory(x)
        if strides[3] != 1:
            source, first, strides = memory(x.contiguous())
        sources[name], places[f"{name}_strides"] = source, [first, *strides[:3]]
    G, S = keys.shape[1:3]
    sizes = dict(B=B, H=H, G=G, S=S, D=D, window=window or 0, **places)
    if T == 1:
        return Kernel("attention_decode.c").in_place(
            changed=dict(out=_empty(B, H, T, D, dtype=q.dtype), keys=keys, values=values),
            inputs=dict(**sources, offset=_number(offset), start=start), sizes=sizes,
            flops=4 * B * H * D * S)["out"]
    return Kernel("attention_forward.c", CACHED=1, **_pairs(q)).in_place(
        changed=dict(out=_empty(B, T, H, D, dtype=q.dtype), lse=_empty(B, H, T), keys=keys,
                     values=values),
        inputs=dict(**sources, offset=_number(offset), starts=start,
                    key=constants(dtypes.uint32, 0)),
        sizes=sizes | dict(T=T, dropout=0, starts_row=0 if start is None else 1),
        flops=2 * B * H * D * T * (2 * S - T))["out"].transpose(1, 2)


def _number(n: int | UOp) -> Tensor:
    """(1,) int32. The same symbolic number gives the same node of the graph, computed once."""
    if isinstance(n, UOp):
        return (Tensor.zeros(1, dtype=dtypes.int32, device="CPU") + n).contiguous()
    return constants(dtypes.int32, n)


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    N, V = logits.shape
    targets = targets.cast(dtypes.int32)
    sizes = dict(N=N, V=V, label_smoothing=float(label_smoothing), z_loss=float(z_loss))

    def gradient(dloss: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
        dx = Kernel("cross_entropy_backward.c")(
            outputs=dict(dx=_empty_like(logits)), sizes=sizes,
            inputs=dict(dloss=dloss, x=logits, y=targets, log_z=made["log_z"]))["dx"]
        return dict(x=dx)

    loss = Kernel("cross_entropy_forward.c")(
        outputs=dict(loss=_empty(N), log_z=_empty(N)), inputs=dict(x=logits, y=targets),
        sizes=sizes, gradient=gradient)["loss"]
    return loss.sum() / (targets >= 0).sum()


def draw(logits, key=None, temperature=None):
    B, V = logits.shape
    return Kernel("draw.c")(
        outputs=dict(token=_empty(B, dtype=dtypes.int32)),
        inputs=dict(logits=logits.float(), key=key, temperature=temperature),
        sizes=dict(B=B, V=V, key_stride=int(key is not None and key.shape[0] > 1)))["token"]


def square_sum(*tensors):
    return sum(map(_square_sum, _parts(tensors, MOST_INPUTS)), start=Tensor.zeros((), device="CPU"))


def _parts(tensors, most):
    return [tensors[i:i + most] for i in range(0, len(tensors), most)]


def _square_sum(tensors):
    return Kernel("square_sum.c", COUNT=len(tensors))(
        outputs=dict(out=_empty(1)), inputs=dict(x=list(tensors)),
        sizes=dict(n=[x.numel() for x in tensors]))["out"].reshape(())


def muon(*arguments):
    *tensors, options = arguments
    parts = [_parts(some, MOST_INPUTS // 2) for some in thirds(tensors)]
    return [updated for part in zip(*parts, strict=True) for updated in _muon(*part, options)]


def _muon(params, momenta, grads, options):
    R, C = zip(*(p.shape for p in params), strict=True)
    room = max(2 * r * c + 4 * min(r, c)**2 for r, c in zip(R, C, strict=True))
    updated = Kernel("muon.c", COUNT=len(params), OPTIONS=", ".join(MuonOptions._fields)).in_place(
        changed=dict(p=params, m=momenta,
                     scratch=_empty(min(pool().threads, len(params)), room)),
        inputs=dict(grad=grads, options=options), sizes=dict(R=list(R), C=list(C), room=room))
    for name, tensors in dict(p=params, m=momenta).items():
        for tensor, new in zip(tensors, updated[name], strict=True):
            tensor.replace(new)
    return [*params, *momenta]


def adamw(p, m, v, grad, options):
    return _update("adamw.c", AdamWOptions, dict(p=p, m=m, v=v), grad, options)


def lion(p, m, grad, options):
    return _update("lion.c", LionOptions, dict(p=p, m=m), grad, options)


def adamw8bit(p, m, m_tops, v, v_tops, grad, options):
    tensors = dict(p=p, m=m, m_tops=m_tops, v=v, v_tops=v_tops)
    return _update("adamw8bit.c", AdamWOptions, tensors, grad, options)


def _update(file, kind, tensors, grad, options):
    updated = Kernel(file, OPTIONS=", ".join(kind._fields)).in_place(
        changed=tensors, inputs=dict(grad=grad, options=options),
        sizes=dict(n=tensors["p"].numel()))
    for name, tensor in tensors.items():
        tensor.replace(updated[name])
    return list(tensors.values())
