"""The operations in C, for float32, bfloat16 and float16 on tinygrad's CPU device.

Each C file stands beside this one and says what it computes. It is compiled once for a machine
and takes its sizes when it runs. Arithmetic is float32 whatever the activations are, but for the
matrix products of bfloat16 activations on a processor with AMX. `fits` says which tensors these
functions can take.
"""

from tinygrad import Tensor, UOp, dtypes

from tinygpt.kernels import reference
from tinygpt.kernels.cpu.compile import amx
from tinygpt.kernels.cpu.kernel import Kernel, constants, memory, untransposed
from tinygpt.kernels.cpu.threads import pool

FLOAT_IN, FLOAT_OUT, ACT_IN, ACT_OUT = "const float*", "float*", "const act*", "act*"
WEIGHT_IN = "const void*"  # of as many bits as the define WEIGHT says
GEMV_ROWS = 4  # as many rows at most are cheaper as dot products than packed
MOST_INPUTS = 32  # of a kernel; tinygrad 0.14 allows 63 arguments
GEMM_STRIP, GEMM_SLICE = 1536, 512  # the greatest NC and the least KC of gemm.h


WIDEST_HEAD = 2048  # whose tiles fit on the stack of a thread
WITH_INTEGERS = ("embedding", "quantized_embedding", "cross_entropy", "adamw8bit", "draw")
IN_16_BITS = ("linear", "quantized_linear", "layer_norm", "rms_norm", "gelu", "swiglu", "rope",
              "attention", "cached_attention", "cross_entropy", "draw")
C_TYPES = {dtypes.float32: "float", dtypes.bfloat16: "bf16", dtypes.float16: "f16"}


def fits(operation: str, *tensors: Tensor | None) -> bool:
    """Are these, but for what is None, on the CPU and of dtypes that the operation can take?"""
    given = [t for t in tensors if t is not None]
    if "attention" in operation and given[0].shape[-1] > WIDEST_HEAD:
        return False
    return all(str(t.device) == "CPU" and (
        t.dtype == dtypes.float32
        or (t.dtype in C_TYPES and operation in IN_16_BITS)
        or (dtypes.is_int(t.dtype) and operation in WITH_INTEGERS)) for t in given)


def _empty(*shape: int, dtype=dtypes.float32) -> Tensor:
    return Tensor.empty(*shape, dtype=dtype, device="CPU")


def linear(x, weight, bias=None, residual=None):
    N, K = weight.shape
    rows = x.numel() // K
    shapes = x.shape, weight.shape, bias is not None, residual is not None
    weight, bias = weight.float(), bias if bias is None else bias.float()
    residual = residual if residual is None else residual.cast(x.dtype)

    def gradient(dy: Tensor, _) -> list[Tensor | None]:
        x_shape, w_shape, with_bias, with_residual = shapes
        dx = _gemm(x_shape, dy, weight, (rows, K, N))
        dw, *sums = _gemm(w_shape, dy, x, (N, K, rows), ta=1, sums=with_bias, dtype=dtypes.float32)
        return [dx, dw, *sums, *([dy] if with_residual else [])]

    if rows <= GEMV_ROWS:
        return _gemv(x, weight, None, bias, residual, gradient)
    return _gemm((*x.shape[:-1], N), x, weight, (rows, N, K), bias, residual, tb=1,
                 gradient=gradient)


def quantized_linear(x, scale, bias, residual, weight):
    scale, bias = (t if t is None else t.float() for t in (scale, bias))
    residual = residual if residual is None else residual.cast(x.dtype)
    return _gemv(x, weight, scale, bias, residual)


def _gemv(x, weight, scale, bias, residual, gradient=None):
    N, K = weight.shape
    M = x.numel() // K
    arguments = [(ACT_OUT, "y"), (ACT_IN, "x"), (WEIGHT_IN, "w")]
    inputs, defines = [x, weight], dict([_act(x), ("WEIGHT", 8 * weight.dtype.itemsize)])
    for kind, name, tensor in ((FLOAT_IN, "bias", bias), (ACT_IN, "residual", residual),
                               (FLOAT_IN, "scale", scale)):
        defines[name.upper()] = name if tensor is not None else 0
        if tensor is not None:
            inputs.append(tensor)
            arguments.append((kind, name))
    kernel = Kernel("gemv.c", tuple(arguments), tuple(defines.items()))
    out = _empty(*x.shape[:-1], N, dtype=x.dtype)
    return kernel([out], inputs, (M, N, K), gradient, 2 * M * N * K)[0]


def _gemm(shape, a, b, sizes, bias=None, residual=None, ta=0, tb=0, sums=None, gradient=None,
          dtype=None):
    """op(a) op(b) + bias + residual of `sizes` M, N, K, in a tensor of `shape` and `dtype`, a's
    where none is given.

    With `sums` not None a list of that and, if it is true, the column sums of a.
    """
    M, N, K = sizes
    out = _empty(*shape, dtype=dtype or a.dtype)
    outputs, inputs, arguments = [out], [a, b], [("c_t*", "c")]
    defines = {"BIAS": 0, "RESIDUAL": 0, "SUMS": 0, "PARTIAL": 0}
    matrices = zip(("a_t", "b_t", "c_t"), (a, b, out), strict=True)
    defines |= {name: C_TYPES[t.dtype] for name, t in matrices}
    if a.dtype == dtypes.bfloat16 and (kind := amx()):
        defines |= {"AMX": 1, "AMX_EMULATED": int(kind == "emulated")}
    if sums:
        outputs.append(_empty(M))
        arguments.append((FLOAT_OUT, "sums"))
        defines["SUMS"] = "sums"
    if out.dtype != dtypes.float32 and K > GEMM_SLICE:
        outputs.append(_empty(M, min(N, GEMM_STRIP)))
        arguments.append((FLOAT_OUT, "partial"))
        defines["PARTIAL"] = "partial"
    arguments += [("const a_t*", "a"), ("const b_t*", "b")]
    for kind, name, tensor in ((FLOAT_IN, "bias", bias), ("const c_t*", "residual", residual)):
        if tensor is not None:
            inputs.append(tensor)
            arguments.append((kind, name))
            defines[name.upper()] = name
    kernel = Kernel("gemm.c", tuple(arguments), tuple(defines.items()))
    made = kernel(outputs, inputs, (*sizes, ta, tb), gradient, flops=2 * M * N * K)
    return made[0] if sums is None else made[:1 + sums]


def embedding(idx, weight):
    N, (V, C) = idx.numel(), weight.shape
    idx = idx.cast(dtypes.int32)

    def gradient(dy: Tensor, _) -> list[Tensor | None]:
        return [None, *Kernel("embedding_backward.c")([_empty(V, C)], [dy, idx], (N, V, C))]

    return _rows(idx, weight, None, gradient)


def quantized_embedding(idx, scale, weight):
    return _rows(idx.cast(dtypes.int32), weight, scale)


def _rows(idx, weight, scale, gradient=None):
    V, C = weight.shape
    arguments = ((FLOAT_OUT, "out"), ("const int*", "idx"), (WEIGHT_IN, "weight"),
                 *([(FLOAT_IN, "scale")] if scale is not None else []))
    kernel = Kernel("embedding_forward.c", arguments, (
        ("WEIGHT", 8 * weight.dtype.itemsize), ("SCALE", 0 if scale is None else "scale")))
    inputs = [idx, weight, *([] if scale is None else [scale])]
    return kernel([_empty(*idx.shape, C)], inputs, (idx.numel(), C, V), gradient)[0]


def layer_norm(x, weight, bias=None, eps=1e-5):
    return _norm(x, weight, bias, eps, rms=0)


def rms_norm(x, weight, eps=1e-5):
    return _norm(x, weight, None, eps, rms=1)


def _norm(x, weight, bias, eps, rms):
    C = x.shape[-1]
    N = x.numel() // C
    shape, with_bias, kind = x.shape, bias is not None, _act(x)
    weight, bias = weight.float(), bias if bias is None else bias.float()

    def gradient(dy: Tensor, made: list[Tensor]) -> list[Tensor | None]:
        outputs = [_empty(*shape, dtype=x.dtype), _empty(C),
                   *([_empty(C)] if with_bias else [])]
        names = [(ACT_OUT, "dx"), (FLOAT_OUT, "dweight"), (FLOAT_OUT, "dbias")][:len(outputs)]
        names += [(ACT_IN, "dy"), (ACT_IN, "x"), (FLOAT_IN, "weight"), (FLOAT_IN, "stats")]
        kernel = Kernel("norm_backward.c", tuple(names),
                        (kind, ("RMS", rms), ("DBIAS", "dbias" if with_bias else "((float*)0)")))
        return [*kernel(outputs, [dy, x, weight, made[1]], (N, C)), None]

    names = [(ACT_OUT, "y"), (FLOAT_OUT, "stats"), (ACT_IN, "x"), (FLOAT_IN, "weight")]
    names += [(FLOAT_IN, "bias")] if with_bias else []
    kernel = Kernel("norm_forward.c", tuple(names),
                    (kind, ("RMS", rms), ("BIAS", "bias" if with_bias else 0)))
    inputs = [x, weight, *([bias] if with_bias else []), constants(dtypes.float32, eps)]
    outputs = [_empty(*shape, dtype=x.dtype), _empty(N, 2)]
    return kernel(outputs, inputs, (N, C), gradient)[0]


def gelu(x, tanh=False):
    return _activation("GELU_TANH" if tanh else "GELU", x)


def swiglu(gate, up):
    return _activation("SWIGLU", gate, up.cast(gate.dtype))


def _activation(kind: str, *inputs: Tensor) -> Tensor:
    n, shapes, dtype = inputs[0].numel(), [x.shape for x in inputs], inputs[0].dtype
    names = [(ACT_IN, name) for name in ("x", "up")[:len(inputs)]]
    shared = (_act(inputs[0]), (kind, 1), ("UP", "up" if len(inputs) == 2 else 0))

    def gradient(dy: Tensor, _) -> list[Tensor]:
        outputs = [(ACT_OUT, name) for name in ("out", "out_up")[:len(inputs)]]
        kernel = Kernel("activation.c", (*outputs, (ACT_IN, "dy"), *names),
                        (*shared, ("BACKWARD", 1), ("DY", "dy"),
                         ("OUT_UP", "out_up" if len(inputs) == 2 else 0)))
        return kernel([_empty(*s, dtype=dtype) for s in shapes], [dy, *inputs], (n,))

    kernel = Kernel("activation.c", ((ACT_OUT, "out"), *names),
                    (*shared, ("BACKWARD", 0), ("DY", 0), ("OUT_UP", 0)))
    return kernel([_empty(*shapes[0], dtype=dtype)], list(inputs), (n,), gradient)[0]


def rope(x, cos, sin):
    B, H, T, D = x.shape
    cos, sin = cos.float(), sin.float()
    memory, strides = _strided(x)
    shape = memory.shape

    def turn(x: Tensor, backward: int, gradient=None) -> Tensor:
        kernel = Kernel("rope.c", defines=(_act(x), ("BACKWARD", backward)))
        return kernel([_empty(*shape, dtype=x.dtype)], [x, cos, sin],
                      (B, H, T, D, *strides), gradient)[0]

    out = turn(memory, 0, lambda dy, _: [turn(dy, 1), None, None])
    return out if memory is x else out.transpose(1, 2)


def attention(q, k, v, offset=0, window=None, dropout_p=0.0, dropout_key=None, start=None):
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    inputs, places = _projections(q, k.cast(q.dtype), v.cast(q.dtype))
    drops = dropout_p > 0 and dropout_key is not None
    offset = _number(offset)
    key = dropout_key if drops else constants(dtypes.uint32, 0)
    sizes = (B, H, G, T, S, D, *sum(places, ()), window or 0,
             int(dropout_p * 2**32) if drops else 0)
    flops = 2 * B * H * D * T * (2 * S - T)
    names = list("qkv")[:len(inputs)]
    known = [(ACT_IN, name) for name in names]
    kind = (_act(q), *zip("QKV", names * (3 // len(names)), strict=True))

    def gradient(dy: Tensor, made: list[Tensor]) -> list[Tensor | None]:
        outputs = [_empty(*x.shape, dtype=x.dtype if n else dtypes.float32)
                   for n, x in enumerate(inputs)]
        given = [(ACT_IN, "dout"), (ACT_IN, "out"), (FLOAT_IN, "lse"), *known]
        grads = [(ACT_OUT if n else FLOAT_OUT, f"d{name}") for n, name in enumerate(names)]
        into = tuple((f"D{name}", f"d{value}") for name, value in kind[1:])
        kernel = Kernel("attention_backward.c", (*grads, (FLOAT_OUT, "delta"), *given),
                        (*kind, *into))
        made = kernel([*outputs, _empty(B, H, T)], [dy, *made, *inputs, offset, key], sizes,
                      flops=flops * 5 // 2)
        return [made[0].cast(q.dtype), *made[1:-1], None, None]

    padding, more = _padding(start)
    kernel = Kernel("attention_forward.c", ((ACT_OUT, "out"), (FLOAT_OUT, "lse"), *known, *more),
                    (*kind, ("START", "start" if padding else 0)))
    out = kernel([_empty(B, T, H, D, dtype=q.dtype), _empty(B, H, T)],
                 [*inputs, *padding, offset, key], sizes, None if padding else gradient, flops)[0]
    return out.transpose(1, 2)


def _projections(q, k, v) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """The memory of q, k and v, and where in it each begins and its batch, head and row strides.

    One tensor where the three are what a kernel projected together, else one each.
    """
    (B, H, T, D), G = q.shape, k.shape[1]
    width = (H + 2 * G) * D
    views = [memory(x) for x in (q, k, v)]
    together = [(start, T * width, D, width) for start in (0, H * D, (H + G) * D)]
    source = views[0][0]
    if (q.dtype == dtypes.float32 and k.shape == v.shape == (B, G, T, D)
            and source.numel() == B * T * width
            and all(other.uop is source.uop for other, _, _ in views)
            and [(start, *strides) for _, start, strides in views] == [(*p, 1) for p in together]):
        return [source], together
    inputs, strides = zip(*[_strided(x) for x in (q, k, v)], strict=True)
    return list(inputs), [(0, *s) for s in strides]


def cached_attention(q, k, v, keys, values, offset, window=None, start=None):
    B, H, T, D = q.shape
    if T > 1 or keys.dtype != q.dtype:
        reference.write_cache(k, v, keys, values, offset)
        return attention(q, keys, values, offset, window, start=start)
    sources, places = [], []
    for x in (q, k.cast(q.dtype), v.cast(q.dtype)):
        source, first, strides = memory(x)
        if strides[3] != 1:
            source, first, strides = memory(x.contiguous())
        sources.append(source)
        places += [first, *strides[:2]]
    padding, more = _padding(start)
    arguments = (*((ACT_OUT, name) for name in ("out", "keys", "values")),
                 *((ACT_IN, name) for name in "qkv"), ("const int*", "offset"), *more)
    kernel = Kernel("attention_decode.c", arguments,
                    (_act(q), ("START", "start" if padding else 0)))
    return kernel.in_place(
        [_empty(B, H, T, D, dtype=q.dtype), keys, values], [*sources, _number(offset), *padding],
        (B, H, *keys.shape[1:], window or 0, *places), flops=4 * B * H * D * keys.shape[2])[0]


def _padding(start: Tensor | None) -> tuple[list[Tensor], list[tuple[str, str]]]:
    """The input, and its argument, that says where each row begins; neither without one."""
    return ([], []) if start is None else ([start], [("const int*", "start")])


def _number(n: int | UOp) -> Tensor:
    """(1,) int32. The same symbolic number gives the same node of the graph, computed once."""
    if isinstance(n, UOp):
        return (Tensor.zeros(1, dtype=dtypes.int32, device="CPU") + n).contiguous()
    return constants(dtypes.int32, n)


def _strided(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The memory that x (B, H, T, D) is read from, and its batch, head and row strides."""
    if (y := untransposed(x)) is not None:
        _, T, H, D = y.shape
        return y, (T * H * D, D, H * D)
    _, H, T, D = x.shape
    return x, (H * T * D, T * D, D)


def _act(x: Tensor) -> tuple[str, str]:
    """The define that names the type of activations in C."""
    return "act", C_TYPES[x.dtype]


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    N, V = logits.shape
    targets = targets.cast(dtypes.int32)
    options = constants(dtypes.float32, label_smoothing, z_loss)
    kind, sizes = (_act(logits),), (N, V)

    def gradient(dloss: Tensor, made: list[Tensor]) -> list[Tensor | None]:
        dx = Kernel("cross_entropy_backward.c", defines=kind)(
            [_empty(N, V, dtype=logits.dtype)],
            [dloss, logits, targets, made[1], options], sizes)
        return [*dx, None, None]

    loss = Kernel("cross_entropy_forward.c", defines=kind)(
        [_empty(N), _empty(N)], [logits, targets, options], sizes, gradient)[0]
    return loss.sum() / (targets >= 0).sum()


def draw(logits, key=None, temperature=None):
    B, V = logits.shape
    given = [("const unsigned*", "key", key), (FLOAT_IN, "temperature", temperature)]
    arguments = [("int*", "token"), (FLOAT_IN, "logits")]
    arguments += [(kind, name) for kind, name, tensor in given if tensor is not None]
    logits = logits.float()
    kernel = Kernel("draw.c", tuple(arguments), tuple(
        (name.upper(), 0 if tensor is None else name) for _, name, tensor in given))
    inputs = [logits, *(tensor for _, _, tensor in given if tensor is not None)]
    sizes = B, V, int(key is not None and key.shape[0] > 1)
    return kernel([_empty(B, dtype=dtypes.int32)], inputs, sizes)[0]


def square_sum(*tensors):
    return sum(map(_square_sum, _parts(tensors, MOST_INPUTS)), start=Tensor.zeros((), device="CPU"))


def _parts(tensors, most):
    return [tensors[i:i + most] for i in range(0, len(tensors), most)]


def _square_sum(tensors):
    names = [f"x{i}" for i in range(len(tensors))]
    kernel = Kernel("square_sum.c", ((FLOAT_OUT, "out"), *((FLOAT_IN, name) for name in names)),
                    (("COUNT", len(names)), ("INPUTS", ", ".join(names))))
    sizes = tuple(x.numel() for x in tensors)
    return kernel([_empty(1)], list(tensors), sizes)[0].reshape(())


def orthogonalize(*xs):
    # a half, since there is an output for each input
    return [made for part in _parts(xs, MOST_INPUTS // 2) for made in _orthogonalize(part)]


def _orthogonalize(xs):
    outs, ins = ([f"{kind}{i}" for i in range(len(xs))] for kind in ("out", "x"))
    kernel = Kernel("orthogonalize.c", (
        *((FLOAT_OUT, name) for name in (*outs, "scratch")), *((FLOAT_IN, name) for name in ins)), (
        ("COUNT", len(xs)), ("OUTPUTS", ", ".join(outs)), ("INPUTS", ", ".join(ins))))
    N = max(min(x.shape) for x in xs)
    outputs = [*(_empty(*x.shape) for x in xs),
               _empty(min(pool().threads, len(xs)), 4, N, N)]
    return kernel(outputs, [x.contiguous() for x in xs], sum((x.shape for x in xs), ()))[:-1]


def adamw(p, m, v, grad, options):
    return _in_place("adamw.c", [p, m, v], grad, options)


def lion(p, m, grad, options):
    return _in_place("lion.c", [p, m], grad, options)


def adamw8bit(p, m, m_tops, v, v_tops, grad, options):
    return _in_place("adamw8bit.c", [p, m, m_tops, v, v_tops], grad, options)


def _in_place(file, tensors, grad, options):
    updated = Kernel(file).in_place(tensors, [grad, options], (tensors[0].numel(),))
    for old, new in zip(tensors, updated, strict=True):
        old.replace(new)
    return tensors
