"""Flash attention for GPUs. Without one, tinygrad's PYTHON device runs the kernels thread by
thread, tensor cores included, and nvcc, where it is, compiles their source. With one, on it."""

import functools
import math
import shutil
import subprocess

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes

from tinygpt import kernels
from tinygpt.kernels import flash, reference
from tinygpt.kernels.random import make_key
from tinygpt.kernels.workgroup import (
    CUDA,
    IS_014,
    METAL,
    PLAIN,
    find_core,
    renderer_for,
    renderer_of,
)

# largest error, as a share of the largest number that is right
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
KEY = make_key(1, 2)

# (B, H, G, T, S, D), options of attention, and how it is tried
CASES = {
    "one query": ((1, 2, 2, 1, 9, 4), dict(offset=8), dict(dtype="bfloat16")),
    "grouped": ((2, 2, 1, 3, 3, 8), {}, dict(flat=True)),
    "cached": ((1, 2, 1, 5, 13, 6), dict(offset=7, window=4), {}),
    "one tile and a row": ((1, 1, 1, 17, 17, 20), {}, {}),
    "two tiles and a row": ((1, 1, 1, 33, 33, 8), dict(window=5), {}),
    "dropout": ((1, 2, 2, 7, 7, 4), dict(dropout_p=0.3, dropout_key=KEY), {}),
}
ARCHITECTURE = {"CUDA": "sm_80", "METAL": "Apple9"}


@functools.cache
def draw(B, H, G, T, S, D) -> dict[str, np.ndarray]:
    """Normal numbers that bfloat16 holds exactly; dy is the output's gradient."""
    rng = np.random.default_rng(0)
    shapes = {"q": (B, H, T, D), "k": (B, G, S, D), "v": (B, G, S, D), "dy": (B, H, T, D)}
    arrays = {name: rng.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}
    return {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in arrays.items()}


def attend(module, arrays: dict, options: dict, device: str, dtype: str = "float32",
           flat: bool = False) -> list[Tensor]:
    """y and the gradients of q, k and v; `flat` has the heads side by side in memory."""
    def put(a: np.ndarray) -> Tensor:
        return Tensor(a, device=device).cast(getattr(dtypes, dtype)).contiguous().realize()

    def heads(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if flat else x

    q, k, v, dy = (put(a.swapaxes(1, 2) if flat else a) for a in arrays.values())
    options = {n: Tensor(o, device=device).realize() if isinstance(o, np.ndarray) else o
               for n, o in options.items()}
    y = module.attention(heads(q), heads(k), heads(v), **options)
    return [y, *y.gradient(q, k, v, gradient=heads(dy))]


def numbers(tensors: list[Tensor], flat: bool = False) -> list[np.ndarray]:
    Tensor.realize(*tensors)
    y, *grads = [t.cast(dtypes.float32).numpy() for t in tensors]
    return [y, *[g.swapaxes(1, 2) if flat else g for g in grads]]


def check(shape, options, device="PYTHON", dtype="float32", flat=False) -> None:
    arrays = draw(*shape)
    ours = attend(flash, arrays, options, device, dtype, flat)
    assert all(t.dtype == getattr(dtypes, dtype) for t in ours)
    right = numbers(attend(reference, arrays, options, Device.DEFAULT))
    for name, got, wanted in zip(("y", "q", "k", "v"), numbers(ours, flat), right, strict=True):
        assert got.shape == wanted.shape and np.isfinite(got).all(), name
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


# ---- on the emulator


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case):
    shape, options, how = CASES[case]
    check(shape, options, **how)


@pytest.mark.parametrize("core, dtype", [(CUDA, "bfloat16"), (METAL, "float32")],
                         ids=["CUDA", "METAL"])
def test_tensor_cores_equal_reference(monkeypatch, core, dtype):
    monkeypatch.setattr(flash, "find_core", lambda *_: core)
    check((1, 1, 1, 17, 17, 12), dict(window=7), dtype=dtype)


def test_queries_keys_and_values_that_a_kernel_made_together():
    """They are read where they are, and their gradients are one matrix."""
    B, T, H, G, D = 2, 7, 4, 2, 8
    arrays = draw(B, H + 2 * G, H + 2 * G, T, T, D)
    def run(module, device: str) -> list[Tensor]:
        x = [Tensor(a, device=device).realize() for a in arrays.values()]
        qkv = module.attention(*x[:3]).transpose(1, 2).reshape(B, T, -1)
        q, k, v = (y.reshape(B, T, -1, D).transpose(1, 2)
                   for y in qkv.split([H * D, G * D, G * D], dim=-1))
        y = module.attention(q, k, v)
        return [y, *y.gradient(*x[:3], gradient=x[3][:, :H])]

    right = run(reference, Device.DEFAULT)
    for got, wanted in zip(run(flash, "PYTHON"), right, strict=True):
        np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=1e-5)
    first, *others = run(flash, "PYTHON")
    count = len(first.schedule_linear(*others).src)
    assert count <= 14, "q, k, v or a gradient is copied"


def test_symbolic_offset():
    shape = 1, 1, 1, 2, 9, 4
    q, k, v = (Tensor(a, device="PYTHON").realize() for a in list(draw(*shape).values())[:3])
    variable = UOp.variable("offset", 0, 7)
    jitted = TinyJit(lambda q, k, v, offset: flash.attention(q, k, v, offset=offset, window=3)
                     .realize())
    for offset in (1, 7, 0, 5):
        right = attend(reference, draw(*shape), dict(offset=offset, window=3), Device.DEFAULT)[0]
        np.testing.assert_allclose(jitted(q, k, v, variable.bind(offset)).numpy(), right.numpy(),
                                   atol=2e-6)


def test_dropout_drops_what_the_reference_drops():
    arrays = draw(1, 2, 1, 6, 6, 6) | {"v": np.eye(6, dtype=np.float32)[None, None]}
    options = dict(dropout_p=0.4, dropout_key=KEY)
    ours, right = (attend(module, arrays, options, device)[0].numpy()  # y is the weights
                   for module, device in ((flash, "PYTHON"), (reference, Device.DEFAULT)))
    np.testing.assert_array_equal(ours == 0, right == 0)
    assert 2 < (right[:, :, np.tri(6, dtype=bool)] == 0).sum() < 40


def largest_buffer(module, device: str, T: int) -> int:
    """Elements of the largest buffer that attention and its gradients use."""
    linear = Tensor.linear_with_vars(*attend(module, draw(1, 1, 1, T, T, 4), {}, device))[0]
    return max(math.prod(u.shape) for u in linear.toposort() if u.op.name == "BUFFER")


def test_no_matrix_of_queries_times_keys_is_in_memory():
    assert largest_buffer(flash, "PYTHON", 100) < 100 * 100
    assert largest_buffer(reference, Device.DEFAULT, 100) >= 100 * 100  # the measure sees one


# ---- what runs where


def test_which_tensors_it_takes():
    def some(device="PYTHON", dtype=dtypes.float32, D=8):
        return Tensor.empty(1, 1, 3, D, device=device, dtype=dtype)

    assert flash.fits("attention", some(), some(), some())
    assert flash.fits("attention", *[some(dtype=dtypes.bfloat16, D=128)] * 3)
    assert flash.fits("attention", *[some(D=160)] * 3)
    assert not flash.fits("attention", *[some(D=4096)] * 3)  # more than a workgroup may share
    assert not flash.fits("attention", some(), some(dtype=dtypes.bfloat16), some())
    assert not flash.fits("attention", *[some(dtype=dtypes.int32)] * 3)
    assert not flash.fits("attention", *[some("CPU")] * 3)
    with pytest.raises(ValueError, match=r"'flash' have no attention for .* on CPU"):
        kernels.attention(*[some("CPU")] * 3, implementation="flash")


def test_auto_takes_it_where_it_measured_faster(monkeypatch):
    x = Tensor.empty(1, 1, 3, 8, device="PYTHON")
    for name in ("flash", "portable"):
        monkeypatch.setattr(kernels.IMPLEMENTATIONS[name], "attention", lambda *_, name=name: name)
    assert kernels.attention(x, x, x) == "portable"
    monkeypatch.setitem(kernels.AUTO, "PYTHON", kernels.AUTO["CUDA"])
    assert kernels.attention(x, x, x) == "flash"
    big = Tensor.empty(1, 1, 3, 4096, device="PYTHON")
    assert kernels.attention(big, big, big) == "portable"


def test_which_core_multiplies():
    cuda, metal = (renderer_for(*device) for device in ARCHITECTURE.items())
    assert find_core(cuda, dtypes.bfloat16) is find_core(cuda, dtypes.float16) is CUDA
    assert find_core(cuda, dtypes.float32) is PLAIN  # tf32 is not float32
    assert find_core(metal, dtypes.float32) is find_core(metal, dtypes.bfloat16) is METAL
    assert find_core(renderer_for("CUDA", "sm_70"), dtypes.bfloat16) is PLAIN


# ---- the source for GPUs


BARRIERS = {"forward": 6, "gradient_of_queries": 4, "gradient_of_keys": 4}
SHAPES = {"bfloat16": ((1, 2, 128, 128), (1, 1, 128, 128)),
          "float32": ((1, 4, 77, 20), (1, 2, 99, 20))}


@functools.cache
def sources(device: str, dtype: str) -> dict[str, str]:
    return flash.sources(*SHAPES[dtype], getattr(dtypes, dtype),
                         renderer_for(device, ARCHITECTURE[device]), window=50, drop=0.1)


@pytest.mark.parametrize("device, dtype, uses", [
    ("CUDA", "bfloat16", "mma.sync.aligned.m16n8k16"), ("CUDA", "float32", "__shared__"),
    ("METAL", "bfloat16", "simdgroup_multiply_accumulate"),
    ("METAL", "float32", "simdgroup_multiply_accumulate")])
def test_source(device, dtype, uses):
    barrier = {"CUDA": "__syncthreads()", "METAL": "threadgroup_barrier"}[device]
    for name, text in sources(device, dtype).items():
        # the emulator's threads run in step, so it cannot see that a barrier is missing; tinygrad
        # 0.14 adds one of its own behind the loop over a group's heads
        wanted = BARRIERS[name] + (IS_014 and name == "gradient_of_keys")
        assert uses in text and text.count(barrier) == wanted, name


@pytest.mark.parametrize("dtype", SHAPES)
def test_cuda_source_compiles(tmp_path, dtype):
    """To machine code, which also checks that a block's shared memory and registers suffice."""
    if not (nvcc := shutil.which("nvcc")):
        pytest.skip("nvcc is not here")
    for name, text in sources("CUDA", dtype).items():
        path = tmp_path / f"{name}.cu"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run([nvcc, "-arch=sm_80", "-cubin", "-Xptxas", "-v", "-o",
                               str(path.with_suffix(".cubin")), str(path)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores" in done.stderr, done.stderr


# ---- on a GPU


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", [*ARCHITECTURE, "CL"])
def test_on_a_gpu(device, dtype, monkeypatch):
    try:
        Device[device]
    except (RuntimeError, AttributeError, OSError, AssertionError) as error:
        pytest.skip(f"no {device} here: {str(error).splitlines()[0]}")
    if getattr(dtypes, dtype) not in renderer_of(device).supported_dtypes():
        pytest.skip(f"{device} has no {dtype} here")
    monkeypatch.setitem(TOLERANCE, "float32", 2e-5)  # a GPU's exp2 is an approximation
    for shape, options in (*[case[:2] for case in CASES.values()], ((2, 6, 3, 257, 257, 64), {}),
                           ((1, 2, 1, 130, 300, 80), dict(offset=170, window=99)),
                           ((2, 2, 2, 128, 128, 128), dict(dropout_p=0.2, dropout_key=KEY))):
        check(shape, options, device, dtype)
