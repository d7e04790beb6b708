"""The CUDA C++ kernels without a GPU: compiled for the CPU with cuda_emulator.h, and compared with
the reference. On a GPU tests/kernels/test_kernels.py runs them."""

import ctypes
import functools
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.kernels import cases, cuda, reference
from tinygpt.kernels.cuda import kernel

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("the emulator is for Linux on x86", allow_module_level=True)

EMULATOR = Path(__file__).with_name("cuda_emulator.h")
CONVERSIONS = """
static inline float to_float(bf16 x) {
  const unsigned bits = (unsigned)x.bits << 16;
  return __builtin_bit_cast(float, bits);
}
static inline float to_float(f16 x) { return __builtin_bit_cast(_Float16, x.bits); }
static inline void from_float(float x, bf16* y) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  y->bits = (bits + 32767 + (bits >> 16 & 1)) >> 16;
}
static inline void from_float(float x, f16* y) {
  y->bits = __builtin_bit_cast(unsigned short, (_Float16)x);
}
"""


@functools.cache
def library(folder: Path, code: str) -> ctypes.CDLL:
    """A kernel's code, compiled with the emulator."""
    defines, _, body = code.partition("/*")
    declared = re.search(r"#define ARGUMENTS (.*)", defines)[1].split(", ")
    calls = ", ".join(f"({kind.rpartition(' ')[0]})arguments[{i}]"
                      for i, kind in enumerate(declared))
    text = (f'struct bf16;\nstruct f16;\n{defines}\n#include "{EMULATOR}"\n/*{body}\n{CONVERSIONS}'
            f"static void begin() {{ NAME({calls}); threads[current].done = true; "
            "leave(); }\n")
    source = folder / f"{len(list(folder.iterdir()))}.cpp"
    source.write_text(text)
    made = source.with_suffix(".so")
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "-x", "c++", "-std=c++20", "-O1", "-w",
                    "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-shared", "-fPIC",
                    "-fno-sanitize=undefined", "-o", made, source, "-lm"], check=True)
    return ctypes.CDLL(str(made))


class Emulated(kernel.CudaKernel):
    """A kernel that runs at once, on the emulator; `calls` has the gradients of what ran."""

    folder: Path
    calls: list = []

    def __call__(self, *, outputs, inputs, sizes, gradient=None, flops=0):
        arrays = {name: aligned(np.full(t.nbytes(), 0xFF, np.uint8))
                  for name, t in outputs.items() if t is not None}
        self._run(outputs, inputs, sizes, list(arrays.values()))
        made = {name: tensor(array, outputs[name]) for name, array in arrays.items()}
        self.calls.append((gradient, made))
        return made

    def in_place(self, *, changed, inputs, sizes, flops=0):
        arrays = [raw(t) for t in changed.values()]
        self._run(changed, inputs, sizes, arrays)
        return {name: tensor(array, t) for (name, t), array in
                zip(changed.items(), arrays, strict=True)}

    def _run(self, outputs, inputs, sizes, written: list[np.ndarray]) -> None:
        _, defines = self._declarations(outputs, inputs, sizes)
        given = [raw(t) for value in inputs.values()
                 for t in (value if isinstance(value, list) else [value]) if t is not None]
        pointers = [a.ctypes.data for a in (*written, *given)]
        run = library(self.folder, kernel.source(self.file, "emulated", defines)).run
        run((ctypes.c_void_p * len(pointers))(*pointers), *self.grid)


def raw(t: Tensor) -> np.ndarray:
    """A tensor's bytes."""
    t = t.contiguous()
    return aligned(t.bitcast(dtypes.uint16).numpy() if t.dtype.itemsize == 2 else t.numpy())


def aligned(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in memory aligned to 16 of them."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    memory = memory[-memory.ctypes.data % 16:][:array.nbytes]
    memory[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memory


def tensor(memory: np.ndarray, like: Tensor) -> Tensor:
    kind = {2: np.uint16, 4: np.int32}[like.dtype.itemsize]
    return Tensor(memory.view(kind).reshape(like.shape)).bitcast(like.dtype).realize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture
def emulator(folder, monkeypatch):
    monkeypatch.setattr(Emulated, "folder", folder, raising=False)
    monkeypatch.setattr(Emulated, "calls", [])
    monkeypatch.setattr(cuda, "CudaKernel", Emulated)
    return Emulated


def differentiate(operation: str, arrays: dict, options: dict, dtype: str) -> dict:
    """The output and the gradients, by the names that inputs have in the first kernel."""
    inputs = cases.tensors(arrays, dtype)
    y = getattr(cuda, operation)(*inputs.values(), **cases.constants(options))
    gradient, made = Emulated.calls[0]
    first = next(iter(made.values()))
    dy = np.zeros(first.shape, np.float32)
    part = tuple(slice(n) for n in (y.shape if y.ndim else first.shape))
    counted = (arrays | options)["targets"] >= 0 if y.ndim == 0 else 1
    dy[part] = cases.cotangent(y.shape) / np.sum(counted)
    grads = gradient(Tensor(dy).cast(first.dtype).realize(), made)
    return {"y": y} | {name: g for name, g in grads.items() if g is not None}


def check(operation: str, arrays: dict, options: dict, dtype: str, **names: str) -> None:
    """names: of inputs that have another name in the kernel."""
    ours = differentiate(operation, arrays, options, dtype)
    right = cases.run(operation, "reference", arrays, options, "float32")
    for name, wanted in right.items():
        got = ours[names.get(name, name)].float().numpy()
        got = got[tuple(slice(n) for n in wanted.shape)]  # without padding
        assert np.isfinite(got).all(), name
        error = cases.error(got, wanted)
        assert error <= cases.TOLERANCE[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype, shapes", [
    ("bfloat16", dict(x=(3, 27, 40), weight=(50, 40), bias=(50,), residual=(3, 27, 50))),
    ("float16", dict(x=(259, 200), weight=(136, 200), bias=(136,), residual=(259, 136))),
    ("bfloat16", dict(x=(1100, 136), weight=(8, 136))),
])
def test_linear(emulator, dtype, shapes):
    check("linear", cases.draw(shapes), {}, dtype, x="a", weight="b")


@pytest.mark.parametrize("dtype, operation, number", [
    ("float32", "layer_norm", 0), ("bfloat16", "layer_norm", 2), ("float32", "layer_norm", 1),
    ("bfloat16", "rms_norm", 0), ("float32", "gelu", 0), ("float16", "gelu", 1),
    ("bfloat16", "rope", 0), ("float32", "rope", 1),
])
def test_equals_reference(emulator, dtype, operation, number):
    shapes, options = cases.CASES[operation][number]
    check(operation, cases.draw(shapes), options, dtype)


def test_swiglu(emulator):
    check("swiglu", cases.draw(dict(gate=(17, 16), up=(17, 16))), {}, "bfloat16", gate="x")


def test_rope_of_heads_side_by_side(emulator):
    """Read where they are, without a copy."""
    shapes, options = cases.CASES["rope"][0]
    arrays, options = cases.draw(shapes), cases.constants(options)
    flat = Tensor(arrays["x"].swapaxes(1, 2).copy()).realize()
    y = cuda.rope(flat.transpose(1, 2), **options)
    right = reference.rope(Tensor(arrays["x"]), **options).numpy()
    np.testing.assert_allclose(y.numpy(), right, atol=1e-6)
    gradient, made = emulator.calls[0]
    assert made["out"].shape == flat.shape
    dy = cases.cotangent(flat.shape)
    back = gradient(Tensor(dy), made)["x"].numpy()
    assert abs((back * flat.numpy()).sum() - (dy * made["out"].numpy()).sum()) < 1e-3


@pytest.mark.parametrize("number, dtype", [(0, "float32"), (2, "bfloat16")])
def test_cross_entropy(emulator, number, dtype):
    shapes, options = cases.CASES["cross_entropy"][number]
    check("cross_entropy", cases.draw(shapes), options, dtype, logits="x")


def test_embedding_backward(emulator):
    idx, dy = cases.ids((3, 211), 23), cases.draw(dict(dy=(3, 211, 300)))["dy"]
    idx[idx == 7] = 8  # an id that does not occur
    weight = Tensor.zeros(23, 300).contiguous().realize()
    y = cuda.embedding(Tensor(idx), weight)
    dweight = y.gradient(weight, gradient=Tensor(dy))[0].numpy()
    right = np.zeros((23, 300))
    np.add.at(right, idx, dy)
    np.testing.assert_allclose(dweight, right, atol=1e-5)


@pytest.mark.parametrize("shape, apply", [((16, 32), 1.0), ((17, 31), 1.0), ((17, 31), 0.0)])
def test_adamw(emulator, shape, apply):
    options = cases.numbers(*cases.ADAMW._replace(apply=apply))
    arrays = cases.draw(dict(p=shape, m=shape, grad=shape)) | {"v": cases.positive(*shape)}
    def update(module) -> list[np.ndarray]:
        given = cases.tensors(arrays)
        made = module.adamw(given["p"], given["m"], given["v"], given["grad"], Tensor(options))
        Tensor.realize(*made)
        return [t.numpy() for t in made]
    for ours, right in zip(update(cuda), update(reference), strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-6)


def test_square_sum(emulator):
    arrays = cases.draw(dict(a=(17, 31), b=(1,), c=(3, 5, 7), d=(5000,)))
    right = sum((a.astype(np.float64)**2).sum() for a in arrays.values())
    assert abs(cuda.square_sum(*map(Tensor, arrays.values())).item() / right - 1) < 1e-6


def test_sources_compile(tmp_path, monkeypatch):
    """To machine code, with no registers in memory."""
    if not (nvcc := shutil.which("nvcc")):
        pytest.skip("nvcc is not here")

    class Compiled(kernel.CudaKernel):
        def __call__(self, *, outputs, inputs, sizes, gradient=None, flops=0):
            name, defines = self._declarations(outputs, inputs, sizes)
            path = tmp_path / f"{name}.cu"
            path.write_text(kernel.source(self.file, "compiled", defines))
            done = subprocess.run([nvcc, "-arch=sm_80", "-cubin", "-Xptxas", "-v", "-o",
                                   path.with_suffix(".cubin"), path],
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "0 bytes spill stores" in done.stderr, done.stderr
            made = {key: t for key, t in outputs.items() if t is not None}
            if gradient:
                gradient(next(iter(made.values())), made)
            return made

    def empty(*shape, dtype=dtypes.bfloat16):
        return Tensor.empty(*shape, dtype=dtype)

    monkeypatch.setattr(cuda, "CudaKernel", Compiled)
    weight, bias = empty(768, 768, dtype=dtypes.float32), empty(768, dtype=dtypes.float32)
    x = empty(4096, 768)
    cuda.linear(x, weight, bias, x)
    cuda.layer_norm(x, bias, bias)
    cuda.swiglu(x, x)
    cuda.rope(empty(2, 3, 5, 64), *[empty(5, 32, dtype=dtypes.float32)] * 2)
    cuda.cross_entropy(x, empty(4096, dtype=dtypes.int32))
    cuda.square_sum(weight, bias)


def test_which_tensors_it_takes(monkeypatch):
    def some(*shape, dtype=dtypes.bfloat16):
        return Tensor.empty(*shape, dtype=dtype)

    assert not cuda.fits("gelu", some(64, 64))  # on the CPU
    monkeypatch.setattr(cuda, "_has_tensor_cores", lambda device: True)
    weight = some(50, 64, dtype=dtypes.float32)
    assert cuda.fits("linear", some(2, 32, 64), weight, None, some(2, 32, 50))
    assert not cuda.fits("linear", some(64, 64, dtype=dtypes.float32), weight)
    assert not cuda.fits("linear", some(63, 64), weight)  # few rows
    assert not cuda.fits("linear", some(64, 60), some(50, 60))  # rows not aligned to 16 bytes
    assert not cuda.fits("linear", some(64, 64), some(50, 64, dtype=dtypes.int8))
    assert not cuda.fits("gelu", some(64, 64, dtype=dtypes.float64))
    assert cuda.fits("cross_entropy", some(64, 50), some(64, dtype=dtypes.int32))
    ids, wide = some(8, dtype=dtypes.int32), some(9, 2**15, dtype=dtypes.float32)
    assert not cuda.fits("embedding", ids, wide)
    with pytest.raises(ValueError, match="'cuda' have no linear"):
        kernels.linear(some(64, 60), some(50, 60), implementation="cuda")
