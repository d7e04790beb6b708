"""Which device computes, what compiles for it, and what is in its memory.

Private interfaces of tinygrad: the connection to its cache, the processes in which 0.14 compiles,
and the buffers of tensors.
"""

import ctypes
import errno
import functools
import gc
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Device, Tensor, dtypes, helpers
from tinygrad.dtype import _from_np_dtype, _to_np_dtype
from tinygrad.helpers import CACHEDB, CACHELEVEL, DEV

from tinygpt import machine
from tinygpt.kernels.cpu import peak as cpu_peak
from tinygpt.kernels.cpu.compile import compilations

NO_COMPILER = ("tinygrad's CPU device needs clang, and none was found: "
               "pip install ziglang, or install clang, or name one in CC")

# devices of tinygrad that store or move data, or do neither (NULL)
CANNOT_COMPUTE = ("DISK", "NPY", "NULL", "RDMA", "TINYFS")


def _has_no_gpu() -> bool:
    """Whether a Linux machine has no file of a GPU's driver."""
    drivers = ("nvidia*", "kfd", "dri", "kgsl*", "dxg")
    return sys.platform == "linux" and not any(any(Path("/dev").glob(d)) for d in drivers)


# tinygrad would try every device that it knows, which takes half a second, and prefer CL to CPU.
# At import, so that a tensor that is made before a model is on the model's device; not if DEV is in
# the environment, where tinygrad also writes its choice for a tensor that was made before.
if not DEV.device and not os.environ.get("DEV") and _has_no_gpu():
    DEV.value = "CPU"


class DeviceError(ValueError):
    """No device, or none of that name, can be used here."""


def cache_dir() -> Path:
    """Where this user's caches belong."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "tinygpt"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "tinygpt"


@functools.cache
def prepare() -> None:
    """Prepares tinygrad to compile on this machine; the first model, run or command does it too.

    A script that computes with tinygrad before it makes a model has to call this first on a machine
    whose only clang is in the wheel `ziglang`: tinygrad does not find that one by itself.
    """
    export_compiler()
    check_cache()
    shield_workers()


def export_compiler() -> None:
    """Sets CC, in which tinygrad's CPU device looks for a C compiler, to the clang inside the wheel
    `ziglang` if CC is not set and there is no clang on the PATH."""
    if "CC" in os.environ or shutil.which("clang"):
        return
    if found := _zig():
        os.environ["CC"] = str(_zig_script(found))
        helpers.getenv.cache_clear()  # of a CC that was not there when something failed to compile


def _zig() -> Path | None:
    """The program inside the wheel `ziglang`, if that is installed."""
    found = importlib.util.find_spec("ziglang")
    return Path(found.origin).with_name("zig") if found else None


def zig() -> Path:
    """The program inside the wheel `ziglang`, which compiles C for WebAssembly. Raises DeviceError
    without it."""
    if (found := _zig()) is None:
        raise DeviceError("the compiler for WebAssembly is missing: pip install ziglang")
    return found


def _zig_script(zig: Path) -> Path:
    """A script that runs zig's clang as if it were clang, made once per installation of zig."""
    script = cache_dir() / f"clang-{hashlib.sha256(str(zig).encode()).hexdigest()[:12]}"
    text = f'#!/bin/sh\nexec {shlex.quote(str(zig))} clang "$@"\n'
    if not (script.is_file() and script.read_text() == text):
        try:
            _write_script(script, text)
        except OSError:
            script = Path(tempfile.mkdtemp(prefix="tinygpt-")) / script.name
            _write_script(script, text)
    return script


def _write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.chmod(0o755)
    part.replace(path)


class _Cache(sqlite3.Connection):
    """tinygrad's cache of compiled code, disabled at its first error."""

    def cursor(self, factory=None):
        return super().cursor(_Cursor)

    def commit(self) -> None:
        try:
            super().commit()
        except sqlite3.Error as error:
            disable_cache(error)


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, parameters=()):
        try:
            return super().execute(sql, parameters)
        except sqlite3.Error as error:
            if "no such table" not in str(error):  # of an empty cache
                disable_cache(error)
            return super().execute("SELECT NULL WHERE 0")


def disable_cache(error: Exception) -> None:
    """Disables tinygrad's cache of compiled code, with one line on stderr."""
    if CACHELEVEL.value:
        print(f"tinygrad's cache {CACHEDB} cannot be used ({error}): everything is compiled anew",
              file=sys.stderr)
    CACHELEVEL.value = 0


def check_cache() -> None:
    """Opens tinygrad's cache so that none of its errors, such as a full disk, ends the program."""
    try:
        os.makedirs(os.path.dirname(CACHEDB), exist_ok=True)
        cache = sqlite3.connect(CACHEDB, timeout=60, isolation_level="IMMEDIATE", factory=_Cache)
        sqlite3.Connection.cursor(cache).execute("PRAGMA journal_mode=WAL").fetchone()
        if not os.access(CACHEDB, os.W_OK):
            raise PermissionError("it cannot be written")
        helpers._db_connection = cache
    except (OSError, sqlite3.Error) as error:
        disable_cache(error)


def shield_workers() -> None:
    """Keeps Ctrl-C, which a terminal sends to all, from the processes that tinygrad 0.14 compiles
    in: each would print a traceback, and the step that waits for it would not end."""
    try:
        from tinygrad.engine.worker import _WorkerProcess
    except ImportError:  # 0.13
        return
    start = _WorkerProcess._Popen

    def shielded(process):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which it inherits
        try:
            return start(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    _WorkerProcess._Popen = staticmethod(shielded)


@functools.cache
def default() -> str:
    """The device that tensors live on, e.g. "CPU" or "CUDA". Raises DeviceError without one."""
    prepare()
    try:
        name = Device.DEFAULT
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(NO_COMPILER) from error
    _open(name, f"DEV={DEV}" if DEV.device else repr(name))
    return name


def _open(device: str, name: str) -> str:
    """The canonical name of a device. Raises DeviceError (with `name`) if it cannot be opened.
    """
    try:
        canonical = Device.canonicalize(device)
        kind = canonical.partition(":")[0]
        if kind in CANNOT_COMPUTE:
            raise DeviceError(f"device {name} cannot compute: choose auto, cpu, cuda, metal or "
                              "another that does")
        if kind == "CPU":
            _check_compiler()  # before tinygrad looks for one and fails in its own words
            compilations()  # which Ctrl-C does not reach
        else:
            Device[canonical]
    except DeviceError:
        raise
    except ModuleNotFoundError as error:
        raise DeviceError(f"there is no device {name}: choose auto, cpu, cuda, metal or another "
                          "that tinygrad knows") from error
    except Exception as error:  # whatever a driver raises: the device cannot be opened
        raise DeviceError(f"device {name} cannot be used here: {_first_line(error)}") from error
    return canonical


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def launched() -> tuple[int, int]:
    """Which of how many processes this is that `mpirun`, or another launcher of MPI, started."""
    for name in ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_"):
        rank, size = os.environ.get(name + "RANK", ""), os.environ.get(name + "SIZE", "")
        if rank.isdigit() and size.isdigit():
            return int(rank), int(size)
    return 0, 1


def choose(name: str, index: int = 0) -> str:
    """Makes `name` ("auto", "cpu", "cuda", "metal", "cuda:1", ...) the default device.

    Of a name without a number it is device `index` of the kind; there is one CPU. Returns the
    canonical name. Raises DeviceError if it cannot be opened.
    """
    prepare()
    if index and ":" not in name and not (kind := choose(name)).startswith("CPU"):
        return choose(f"{kind}:{index}")
    if name.lower() != "auto":
        if name.upper().startswith("CPU:") and name[4:] != "0":
            raise DeviceError(f"there is no device {name!r}: there is one CPU, cpu")
        DEV.value = _open(name.upper(), repr(name))
        default.cache_clear()
    return default()


def several(count: int) -> tuple[str, ...]:
    """The names of `count` devices of the default one's kind, beginning with it. Raises DeviceError
    if there are fewer."""
    if count == 1:
        return (default(),)
    kind, _, first = default().partition(":")
    names = tuple(Device.canonicalize(f"{kind}:{int(first or 0) + i}") for i in range(count))
    for i, name in enumerate(names):
        try:
            Device[name]
        except Exception as error:  # whatever a driver raises: the device cannot be opened
            raise DeviceError(f"devices={count}: {name} cannot be used here "
                              f"({_first_line(error)}): choose {i}") from error
    return names


def gathered(tensor: Tensor) -> Tensor:
    """A tensor on several devices, whole on each of them; to be realized."""
    if tensor.uop.axis is None:
        return tensor
    return Tensor(tensor.uop.copy_to_device(tensor.device))


def _check_compiler() -> None:
    compiler = os.environ.get("CC", "clang")
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise DeviceError(NO_COMPILER if "CC" not in os.environ else
                          f"CC={compiler} cannot be run: name a clang, or unset CC") from error
    if "clang" not in done.stdout:
        raise DeviceError(f"CC={compiler} is not clang, which tinygrad's CPU device needs: "
                          "name one, or unset CC")


def describe() -> str:
    """The device that computes, in one line."""
    name = default()
    if not name.startswith("CPU"):
        return f"{name} ({model})" if (model := gpu_name()) else name
    compiler = os.environ.get("CC") or shutil.which("clang")
    return f"CPU ({machine.cpu_count()} cores, {platform.machine()}, compiler {compiler})"


def gpu_name() -> str:
    """The driver's name of the default device, such as "NVIDIA H200"; "" if it is unknown."""
    opened = Device[default()]
    if hasattr(opened, "cu_device"):  # CUDA
        from tinygrad.runtime.autogen import cuda

        text = ctypes.create_string_buffer(256)
        cuda.cuDeviceGetName(text, len(text), opened.cu_device)
        return text.value.decode()
    return getattr(opened, "device_name", "")  # OpenCL's


def peak_flops(dtype: str = "float32") -> Callable[[], float | None]:
    """A function that returns the FLOP/s of the default device, which model FLOPs utilization is
    measured against: those of a GPU's datasheet, None where the device is unknown, or on a CPU what
    it reached in a few milliseconds (see kernels/cpu/peak.py)."""
    if default().startswith("CPU"):
        return cpu_peak.peak_flops(dtype)
    return functools.partial(machine.gpu_peak_flops, gpu_name(), dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on a CPU it is an OSError of mmap."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def memory() -> int:
    """Bytes of memory that the default device can have: this machine's on a CPU, elsewhere more
    than any GPU has."""
    return machine.memory() if default().startswith("CPU") else 1 << 40


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raises ValueError if `needed` bytes, the size of `what`, are more than `memory`."""
    if needed > (there := memory()):
        raise ValueError(f"{what} take {needed / 1e9:,.1f} GB of memory, and {default()} has "
                         f"{there / 1e9:,.1f} GB: {remedy}")


def free_memory() -> None:
    """Frees unreferenced tensors and tinygrad's cache of buffers."""
    gc.collect()
    free_cached()


def free_cached() -> None:
    """Frees tinygrad's cache of buffers."""
    Device[default()].synchronize()
    if hasattr(allocator := Device[default()].allocator, "free_cache"):
        allocator.free_cache()


def tensor_of(array: np.ndarray) -> Tensor:
    """A realized tensor with a copy of array; of uint16 are the bits of bfloat16."""
    dtype = dtypes.bfloat16 if array.dtype == np.uint16 else _from_np_dtype(array.dtype)
    tensor = Tensor.empty(*array.shape, dtype=dtype)
    tensor.uop.base.buffer.ensure_allocated()
    write(tensor, array)
    return tensor


def _array_dtype(tensor: Tensor) -> np.dtype:
    """The dtype of a tensor's memory as an array: bfloat16 is its bits in uint16."""
    return np.dtype(np.uint16 if tensor.dtype == dtypes.bfloat16 else _to_np_dtype(tensor.dtype))


def write(tensor: Tensor, data) -> None:
    """Writes data into the memory of a realized tensor, which compiled steps read; bfloat16 is
    given as its bits in uint16.

    On the CPU there is no intermediate copy, whatever the array's dtype and strides. On several
    devices each gets its rows, or all of them if the tensor is not sharded.
    """
    buffers, dtype, axis = buffers_of(tensor), _array_dtype(tensor), tensor.uop.axis
    array = np.asarray(data).reshape(tensor.shape)
    parts = [array] * len(buffers) if axis is None else np.split(array, len(buffers), axis)
    if buffers[0].device.startswith("CPU"):
        for buffer, part in zip(buffers, parts, strict=True):
            Device[buffer.device].synchronize()
            there = np.frombuffer(buffer.as_memoryview(force_zero_copy=True), dtype)
            there.reshape(part.shape)[...] = part
    elif hasattr(buffers[0], "copyin"):  # tinygrad 0.13
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copyin(np.ascontiguousarray(part, dtype).data)
    else:  # tinygrad 0.14
        whole = Tensor(np.ascontiguousarray(array, dtype))
        tensor.assign(whole.shard_like(tensor)).realize()


def buffers_of(tensor: Tensor) -> list:
    """The memory of a realized tensor, on each of its devices."""
    uop = tensor.uop.base
    if uop.axis is not None:  # 0.14's base is above what is sharded
        uop = uop.src[0].base
    return getattr(uop.realized, "bufs", [uop.realized])


def read(tensor: Tensor, rows: slice = slice(None)) -> np.ndarray:
    """A realized tensor, or some of its rows, as an array; bfloat16 as its bits in uint16. On the
    CPU without the graph that Tensor.numpy() builds."""
    if isinstance(tensor.device, tuple) or not tensor.device.startswith("CPU"):
        bits = tensor.dtype == dtypes.bfloat16
        return (tensor.bitcast(dtypes.uint16) if bits else tensor).numpy()[rows]
    Device[tensor.device].synchronize()
    data = tensor.uop.base.realized.as_memoryview(force_zero_copy=True)
    array = np.frombuffer(data, _array_dtype(tensor)).reshape(tensor.shape)
    return (array[rows] if tensor.ndim else array).copy()
