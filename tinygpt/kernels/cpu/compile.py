"""Compiles the C files of this folder with tinygrad's own clang.

What this asks of a C file: the entry is the first function that is not inlined (the loader jumps to
the beginning), nothing of libc is called, and no variable is static.

Private interfaces of tinygrad, 0.13's and 0.14's: a program's UOps with ProgramInfo, KernelInfo and
Estimates, to_program, get_runtime, diskcache_get, and the compiler of the CPU's renderer, whose
`compile` is replaced.
"""

import ctypes
import functools
import hashlib
import platform
import re
import signal
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tinygrad import Device, UOp, dtypes
from tinygrad.codegen import to_program
from tinygrad.engine.realize import get_runtime
from tinygrad.helpers import diskcache_get
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

from tinygpt.kernels.jit import IS_014
from tinygpt.machine import cpu_count, cpu_info

FOLDER = Path(__file__).parent
# What clang calls to round a number to bfloat16 where a processor has no instruction for it. The
# loader finds no library with it, so that every source with such numbers has its own.
ROUNDS_TO_BFLOAT16 = """
__bf16 __truncsfbf2(float x) {
  unsigned bits = __builtin_bit_cast(unsigned, x);
  unsigned rounded = x == x ? bits + 32767 + (bits >> 16 & 1) : bits | 1 << 22;
  return __builtin_bit_cast(__bf16, (unsigned short)(rounded >> 16));
}
"""


@functools.cache
def source(file: str, name: str, defines: tuple[tuple[str, str | int], ...] = ()
           ) -> tuple[str, str]:
    """The name, and a C file with its includes and defines, of which NAME is one."""
    return name, f"// for {processor()}\n" + with_includes(FOLDER, file, name, defines)


def with_includes(folder: Path, file: str, name: str,
                  defines: tuple[tuple[str, str | int], ...]) -> str:
    """The text of a C file, its defines and NAME before it, and each file that it includes once."""
    seen: set[str] = set()

    def read(name: str) -> str:
        text = (folder / name).read_text(encoding="utf-8")
        return re.sub(r'^#include "(.*)"$', lambda m: included(m[1]), text, flags=re.M)

    def included(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return read(name)

    return "".join(f"#define {k} {v}\n" for k, v in (*defines, ("NAME", name))) + read(file)


@functools.cache
def processor() -> str:
    """A hash of this processor's features: code compiled for it may not run on another processor,
    which may share tinygrad's cache."""
    lines = re.findall(r"^(?:flags|Features|model name)\s*:.*$", cpu_info(), re.M)
    return hashlib.sha256("".join([platform.machine(), *sorted(set(lines))]).encode()
                          ).hexdigest()[:12]


@functools.cache
def bfloat16_products() -> str:
    """How this processor multiplies bfloat16: "amx" in tiles, where Linux lets this process use
    them, "dot" in pairs (AVX512_BF16, Arm's BF16), or "" not at all."""
    if "amx_bf16" in cpu_info():
        arch_prctl, request_permission, tile_data = 158, 0x1023, 18
        if not ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data):
            return "amx"
    if sys.platform == "darwin":
        there, size = ctypes.c_int(0), ctypes.c_size_t(4)
        ctypes.CDLL(None).sysctlbyname(b"hw.optional.arm.FEAT_BF16", ctypes.byref(there),
                                       ctypes.byref(size), None, ctypes.c_size_t(0))
        return "dot" if there.value else ""
    return "dot" if re.search(r"^(flags|Features)\s*:.* (avx512_)?bf16\b", cpu_info(), re.M) else ""


@functools.cache
def bfloat16_defines() -> dict[str, int]:
    """What chooses between the micro kernels of gemm.h for bfloat16 activations; says once where
    there is none for bfloat16."""
    if kind := bfloat16_products():
        return {kind.upper(): 1}
    warnings.warn("this processor has no AMX, AVX512_BF16 or Arm BF16: matrix products of bfloat16 "
                  "run in float32, and are not faster", stacklevel=2)
    return {}


@functools.cache
def integer_defines() -> dict[str, int]:
    """What chooses the micro kernel of gemm.h for matrices of integers."""
    return {"VNNI": 1} if "avx512_vnni" in cpu_info() else {}


def program(name: str, code: str, buffers, outputs: int, flops: int, device: str = "CPU",
            **launch) -> UOp:
    """A tinygrad program that is source for a device; the first `outputs` of the buffers are
    written. launch: a GPU's global_size and local_size."""
    sink = UOp.sink(*[b.base for b in buffers],
                    arg=KernelInfo(name=name, estimates=Estimates(ops=flops)))
    linear = UOp(Ops.LINEAR, src=(*sink.src, sink))
    fields = dict(name=name, globals=tuple(range(len(buffers))), outs=tuple(range(outputs)),
                  ins=tuple(range(outputs, len(buffers))), **launch)
    text = UOp(Ops.SOURCE, arg=code)
    if IS_014:
        info = ProgramInfo(**fields, target=Device[device].renderer.target)
        return UOp(Ops.PROGRAM, src=(sink, linear, text), arg=info)
    return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.DEVICE, arg=device), linear, text),
               arg=ProgramInfo(**fields))


def function(name: str, code: str):
    """The compiled C function as a ctypes function."""
    slot = UOp.param(0, dtypes.uint64, (1,)) if IS_014 else UOp.placeholder((1,), dtypes.uint64, 0)
    runtime = get_runtime("CPU", to_program(program(name, code, [slot], 1, 0),
                                            Device["CPU"].renderer))
    runtime.fxn.keep_alive = runtime
    return runtime.fxn


class Compilations:
    """Compiles sources in background threads while Python still builds the graph that uses them.

    tinygrad's compiler then waits for such a source instead of compiling it. clang runs with SIGINT
    blocked, because a terminal sends Ctrl-C to it too.
    """

    def __init__(self):
        self.compiler = Device["CPU"].renderer.compiler
        self.tinygrads, self.compiler.compile = self.compiler.compile, self.compile
        self.seen: set[str] = set()
        self.begun: dict[str, Future] = {}
        self.threads = ThreadPoolExecutor(cpu_count())

    def begin(self, code: str) -> None:
        key = self.compiler.cachekey
        if code not in self.seen and (key is None or diskcache_get(key, code) is None):
            self.begun[code] = self.threads.submit(self.compile_now, code)
        self.seen.add(code)

    def compile_now(self, code: str) -> bytes:
        if "__bf16" in code:
            code += ROUNDS_TO_BFLOAT16
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # clang inherits it
        try:
            return self.tinygrads(code)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def compile(self, code: str) -> bytes:
        begun = self.begun.pop(code, None)
        return begun.result() if begun else self.compile_now(code)


compilations = functools.cache(Compilations)
