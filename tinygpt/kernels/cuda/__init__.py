"""The operations that cost most on NVIDIA's GPUs of compute capability 8.0 and later, in CUDA C++.

Each file in this folder begins with what it computes. Arithmetic is float32, but for the products
of matrices of 16-bit activations, which run on tensor cores and are summed in float32. `fits`
decides whether these functions can take given tensors.
"""

import math

from tinygrad import Device, Tensor, dtypes

from tinygpt.kernels import portable
from tinygpt.kernels.cpu.kernel import memory, strided
from tinygpt.kernels.cuda.kernel import CudaKernel
from tinygpt.kernels.options import AdamWOptions

ACTIVATIONS = (dtypes.float32, dtypes.bfloat16, dtypes.float16)
TILE, DEPTH = 128, 32  # of gemm.cu
FEWEST_ROWS = 64  # of products, of which a tile has TILE
BLOCKS = 264  # that run at the same time, two on each multiprocessor of an H100
WIDEST_ROW = 16384  # of dweight in embedding_backward.cu, whose threads sum it in registers
MOST_INPUTS = 32  # of a kernel


def fits(operation: str, *tensors: Tensor | None) -> bool:
    """Whether the tensors that are not None are on one GPU, of dtypes that the operation takes, and
    large enough."""
    given = [t for t in tensors if t is not None]
    if len({t.device for t in given}) > 1 or not _has_tensor_cores(given[0].device):
        return False
    x, last = given[0], given[-1]
    if operation == "linear":
        C = x.shape[-1]
        return (x.dtype in ACTIVATIONS[1:] and C % 8 == 0 and x.numel() // C >= FEWEST_ROWS
                and all(dtypes.is_float(t.dtype) for t in given))
    if operation == "embedding":
        return last.dtype == dtypes.float32 and last.shape[1] <= WIDEST_ROW
    return all(t.dtype in ACTIVATIONS or (t.dtype == dtypes.int32 and operation == "cross_entropy")
               for t in given)


def _has_tensor_cores(device) -> bool:
    if not isinstance(device, str) or not device.startswith("CUDA"):
        return False
    return int(Device[device].renderer.target.arch.removeprefix("sm_")) >= 80


def _empty(x: Tensor, *shape: int, dtype=dtypes.float32) -> Tensor:
    """On x's device."""
    return Tensor.empty(*shape, dtype=dtype, device=x.device)


def _empty_like(x: Tensor | None) -> Tensor | None:
    return x if x is None else _empty(x, *x.shape, dtype=x.dtype)


def _width(dtype, *lengths: int) -> int:
    """How many elements a thread loads together: 16 bytes if rows are aligned to that, else one."""
    count = 16 // dtype.itemsize
    return 1 if any(n % count for n in lengths) else count


def _blocks(count: int, size: int) -> tuple[int, int]:
    return -(-count // size), 1


def linear(x, weight, bias=None, residual=None):
    N = weight.shape[0]
    wide = -(-N // 8) * 8  # rows are aligned to 16 bytes
    if wide > N:
        weight = weight.pad(((0, wide - N), None))
        bias = bias if bias is None else bias.pad(((0, wide - N),))
    matrix = weight.cast(x.dtype).contiguous()
    fused = residual.cast(x.dtype) if residual is not None and wide == N else None

    def gradient(dy: Tensor, _) -> dict[str, Tensor]:
        return dict(a=_gemm(dy, matrix, b_rows=1), b=_weight_gradient(dy, x).cast(x.dtype),
                    bias=None if bias is None else _column_sums(dy)["sums"], residual=dy)

    y = _gemm(x, matrix, bias, fused, gradient=gradient)
    y = y if wide == N else y[..., :N]
    return y if residual is None or fused is not None else residual + y


def _gemm(a, b, bias=None, residual=None, b_rows=0, gradient=None):
    """a (..., K) b (N, K) transposed, or b (K, N) with b_rows, + bias + residual -> (..., N)."""
    K, N = a.shape[-1], b.shape[1 if b_rows else 0]
    return _product(_empty(a, *a.shape[:-1], N, dtype=a.dtype),
                    dict(a=a, b=b, bias=bias, residual=residual), dict(M=a.numel() // K, N=N, K=K),
                    dict(SPLITS=1, A_TRANSPOSED=0, B_ROWS=b_rows), gradient)


def _weight_gradient(dy, x):
    """The product of dy (..., N) transposed and x (..., C), float32 (N, C)."""
    N, C = dy.shape[-1], x.shape[-1]
    rows = x.numel() // C
    splits = _splits(math.prod(-(-n // TILE) for n in (N, C)), rows)
    return _product(_empty(x, splits, N, C), dict(a=dy, b=x, bias=None, residual=None),
                    dict(M=N, N=C, K=rows), dict(SPLITS=splits, A_TRANSPOSED=1, B_ROWS=1)).sum(0)


def _splits(tiles: int, depth: int) -> int:
    """Into how many parts a product of that depth is split, so that blocks do not wait for the
    last ones; each part costs a little."""
    most = max(1, min(8, depth // (16 * DEPTH)))
    return min(range(1, most + 1), key=lambda s: -(-tiles * s // BLOCKS) / s * (1 + 0.02 * s))


def _product(c, inputs, sizes, defines, gradient=None):
    M, N, K = sizes.values()
    tiles = math.prod(-(-n // TILE) for n in (M, N))
    return CudaKernel("gemm.cu", (tiles, defines["SPLITS"]), 128, **defines)(
        outputs=dict(c=c), inputs=inputs, sizes=sizes, gradient=gradient, flops=2 * M * N * K)["c"]


def _column_sums(dy, x=None, stats=None, with_sums=True):
    """Sums over the rows of dy (..., C), and of its products with x normalized by stats; by name.
    """
    C = dy.shape[-1]
    N = dy.numel() // C
    parts = max(1, min(-(-N // 64), 96))
    made = CudaKernel("column_sums.cu", (-(-C // 32), parts), 256, PARTS=parts)(
        outputs=dict(sums=_empty(dy, parts, C) if with_sums else None,
                     products=None if x is None else _empty(dy, parts, C)),
        inputs=dict(dy=dy, x=x, stats=stats), sizes=dict(N=N, C=C))
    return {name: x.sum(0) for name, x in made.items()}


def embedding(idx, weight):
    (V, C), N, idx = weight.shape, idx.numel(), idx.cast(dtypes.int32)

    def gradient(dy: Tensor) -> Tensor:
        return CudaKernel("embedding_backward.cu", (V, 1), 256)(
            outputs=dict(dweight=_empty(weight, V, C)), inputs=dict(dy=dy, idx=idx),
            sizes=dict(N=N, C=C))["dweight"]

    return portable.embedding(idx, weight, gradient)


def layer_norm(x, weight, bias=None, eps=1e-5):
    return _norm(x, weight, bias, eps, rms=0)


def rms_norm(x, weight, eps=1e-5):
    return _norm(x, weight, None, eps, rms=1)


def _norm(x, weight, bias, eps, rms):
    C = x.shape[-1]
    N = x.numel() // C
    weight, bias = weight.float(), bias if bias is None else bias.float()
    how = dict(grid=_blocks(N, 4), threads=128, RMS=rms, VECTOR=_width(x.dtype, C))

    def gradient(dy: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
        stats = made["stats"]
        dx = CudaKernel("norm_backward.cu", **how)(
            outputs=dict(dx=_empty_like(x)), inputs=dict(dy=dy, x=x, weight=weight, stats=stats),
            sizes=dict(N=N, C=C))["dx"]
        sums = _column_sums(dy, x, stats, with_sums=bias is not None)
        return dict(x=dx, weight=sums["products"], bias=sums.get("sums"))

    return CudaKernel("norm_forward.cu", **how)(
        outputs=dict(y=_empty_like(x), stats=_empty(x, N, 2)),
        inputs=dict(x=x, weight=weight, bias=bias), sizes=dict(N=N, C=C, eps=float(eps)),
        gradient=gradient)["y"]


def gelu(x, tanh=False):
    return _activation("GELU_TANH" if tanh else "GELU", x)


def swiglu(gate, up):
    return _activation("SWIGLU", gate, up.cast(gate.dtype))


def _activation(kind: str, x: Tensor, up: Tensor | None = None) -> Tensor:
    n = x.numel()
    width = _width(x.dtype, n)
    how = dict(grid=_blocks(n, 256 * width), threads=256, VECTOR=width) | {kind: 1}

    def gradient(dy: Tensor, _) -> dict[str, Tensor]:
        made = CudaKernel("activation.cu", **how, BACKWARD=1)(
            outputs=dict(out=_empty_like(x), out_up=_empty_like(up)),
            inputs=dict(dy=dy, x=x, up=up), sizes=dict(n=n))
        return dict(x=made["out"], up=made.get("out_up"))

    return CudaKernel("activation.cu", **how, BACKWARD=0)(
        outputs=dict(out=_empty_like(x), out_up=None), inputs=dict(dy=None, x=x, up=up),
        sizes=dict(n=n), gradient=gradient)["out"]


def rope(x, cos, sin):
    B, H, T, D = x.shape
    cos, sin = cos.float(), sin.float()
    source, (batch, head, row) = strided(x)

    def turn(x: Tensor, backward: int, gradient=None) -> Tensor:
        return CudaKernel("rope.cu", _blocks(x.numel() // 2, 256), 256, BACKWARD=backward)(
            outputs=dict(out=_empty_like(x)), inputs=dict(x=x, cos=cos, sin=sin),
            sizes=dict(B=B, H=H, T=T, D=D, batch=batch, head=head, row=row),
            gradient=gradient)["out"]

    out = turn(source, 0, lambda dy, _: dict(x=turn(dy, 1)))
    return out if source is x else out.transpose(1, 2)


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    N, V = logits.shape
    targets = targets.cast(dtypes.int32)
    x, W = _wide_rows(logits)
    sizes = dict(V=V, W=W, label_smoothing=float(label_smoothing), z_loss=float(z_loss))
    how = dict(grid=(N, 1), threads=256)

    def gradient(dloss: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
        dx = CudaKernel("cross_entropy_backward.cu", **how, VECTOR=_width(x.dtype, W))(
            outputs=dict(dx=_empty_like(x)), sizes=sizes,
            inputs=dict(dloss=dloss, x=x, y=targets, log_z=made["log_z"]))["dx"]
        return dict(x=dx)

    loss = CudaKernel("cross_entropy_forward.cu", **how, VECTOR=_width(x.dtype, V, W))(
        outputs=dict(loss=_empty(x, N), log_z=_empty(x, N)), inputs=dict(x=x, y=targets),
        sizes=sizes, gradient=gradient)["loss"]
    return loss.sum() / (targets >= 0).sum()


def _wide_rows(logits: Tensor) -> tuple[Tensor, int]:
    """The matrix of which the logits are the first columns, without a copy, and its width."""
    N, V = logits.shape
    source, first, (row, column) = memory(logits)
    if first == 0 and column == 1 and source.numel() == N * row:
        return source, row
    return logits, V


def adamw(p, m, v, grad, options):
    tensors, n = dict(p=p, m=m, v=v), p.numel()
    width = _width(p.dtype, n)
    updated = CudaKernel("adamw.cu", _blocks(n, 256 * width), 256, VECTOR=width,
                         OPTIONS=", ".join(AdamWOptions._fields)).in_place(
        changed=tensors, inputs=dict(grad=grad, options=options), sizes=dict(n=n))
    for name, tensor in tensors.items():
        tensor.replace(updated[name])
    return [p, m, v]


def square_sum(*tensors):
    parts = [tensors[i:i + MOST_INPUTS] for i in range(0, len(tensors), MOST_INPUTS)]
    return sum(map(_square_sum, parts), start=Tensor.zeros((), device=tensors[0].device))


def _square_sum(tensors):
    return CudaKernel("square_sum.cu", (BLOCKS, 1), 256, COUNT=len(tensors), PARTS=BLOCKS)(
        outputs=dict(out=_empty(tensors[0], BLOCKS)), inputs=dict(x=list(tensors)),
        sizes=dict(n=[x.numel() for x in tensors]))["out"].sum()
