"""Compiles the C files of this folder with tinygrad's own clang and runs them as tinygrad kernels.

Of tinygrad's private interfaces, 0.13's and 0.14's, those that custom kernels need are touched here
and in kernels/workgroup.py alone. What this file asks of a C file: the entry is the first function
that is not inlined (the loader jumps to the beginning), nothing of libc is called, and no variable
is static.
"""

import atexit
import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.codegen import to_program
from tinygrad.dtype import _to_np_dtype
from tinygrad.engine.realize import get_runtime
from tinygrad.helpers import diskcache_get
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp

from tinygpt.kernels.jit import constant
from tinygpt.machine import cpu_count, cpu_info

FOLDER = Path(__file__).parent
IS_014 = "target" in ProgramInfo.__dataclass_fields__
WORKER_STACK = 8 << 20  # packed matrices and tiles lie on it
WORKSPACE_BYTES = 64 << 20  # for packed matrices and partial sums; touched only as far as needed


@functools.cache
def source(file: str, **defines: str | int) -> tuple[str, str]:
    """A C file with its includes and defines, and a name for it, in which numbers and types (whose
    names are in lower case) stand."""
    def read(name: str) -> str:
        text = (FOLDER / name).read_text(encoding="utf-8")
        return re.sub(r'^#include "(.*)"$', lambda m: included(m[1]), text, flags=re.M)

    seen: set[str] = set()

    def included(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return read(name)

    name = "_".join([file.removesuffix(".c"), *(f"{k}{v}" for k, v in defines.items()
                                                if isinstance(v, int) or k.islower())]).lower()
    lines = [f"#define {k} {v}\n" for k, v in (defines | {"NAME": name}).items()]
    return name, f"// for {processor()}\n" + "".join(lines) + read(file)


@functools.cache
def processor() -> str:
    """A name for what this processor can do: what is compiled for it may not run on another, which
    may share tinygrad's cache."""
    lines = re.findall(r"^(?:flags|Features|model name)\s*:.*$", cpu_info(), re.M)
    return hashlib.sha256("".join([platform.machine(), *sorted(set(lines))]).encode()
                          ).hexdigest()[:12]


def program(name: str, code: str, buffers, outputs: int, flops: int) -> UOp:
    """A tinygrad program that is C source; the first `outputs` of the buffers are written."""
    sink = UOp.sink(*[b.base for b in buffers],
                    arg=KernelInfo(name=name, estimates=Estimates(ops=flops)))
    linear = UOp(Ops.LINEAR, src=(*sink.src, sink))
    facts = dict(name=name, globals=tuple(range(len(buffers))), outs=tuple(range(outputs)),
                 ins=tuple(range(outputs, len(buffers))))
    text = UOp(Ops.SOURCE, arg=code)
    if IS_014:
        info = ProgramInfo(**facts, target=Device["CPU"].renderer.target)
        return UOp(Ops.PROGRAM, src=(sink, linear, text), arg=info)
    return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.DEVICE, arg="CPU"), linear, text),
               arg=ProgramInfo(**facts))


def function(name: str, code: str):
    """The compiled C function as a ctypes function."""
    slot = UOp.param(0, dtypes.uint64, (1,)) if IS_014 else UOp.placeholder((1,), dtypes.uint64, 0)
    runtime = get_runtime("CPU", to_program(program(name, code, [slot], 1, 0),
                                            Device["CPU"].renderer))
    runtime.fxn.keep_alive = runtime
    return runtime.fxn


class Compilations:
    """Compiles sources in threads of its own while Python makes the graph that will ask for them.

    tinygrad's compiler, which is asked for what its cache lacks, then waits for them instead.
    Ctrl-C, which a terminal sends to clang too, does not end it half-way.
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
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # clang inherits it
        try:
            return self.tinygrads(code)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def compile(self, code: str) -> bytes:
        begun = self.begun.pop(code, None)
        return begun.result() if begun else self.compile_now(code)


compilations = functools.cache(Compilations)


class Pool:
    """`threads` - 1 workers, Python threads parked inside compiled C; pool.h has the protocol."""

    # 64-bit words of pool_t
    TICKET, THREADS, SPINS, POST, WAIT, STOP, SEMAPHORES, JOBS = 0, 16, 17, 18, 19, 20, 88, 152
    WORDS = JOBS + 16 * 8

    def __init__(self, threads: int):
        self.threads, self.process = threads, os.getpid()
        self._memory = mmap.mmap(-1, self.WORDS * 8 + WORKSPACE_BYTES,  # private: not a fork's too
                                 mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.workspace = self.address + self.WORDS * 8
        self.words = (ctypes.c_uint64 * self.WORDS).from_address(self.address)
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            libc.dispatch_semaphore_create.restype = ctypes.c_void_p
            libc.dispatch_semaphore_create.argtypes = [ctypes.c_long]
            post, wait = libc.dispatch_semaphore_signal, libc.dispatch_semaphore_wait
            semaphores = [libc.dispatch_semaphore_create(0) for _ in range(threads - 1)]
        else:
            post, wait = libc.sem_post, libc.sem_wait
            self._semaphores = [ctypes.create_string_buffer(64) for _ in range(threads - 1)]
            for semaphore in self._semaphores:
                libc.sem_init(semaphore, 0, 0)
            semaphores = [ctypes.addressof(s) for s in self._semaphores]
        self.words[self.THREADS], self.words[self.SPINS] = threads, 20000
        self.words[self.POST] = ctypes.cast(post, ctypes.c_void_p).value
        self.words[self.WAIT] = ctypes.cast(wait, ctypes.c_void_p).value
        for i, semaphore in enumerate(semaphores):
            self.words[self.SEMAPHORES + i] = semaphore
        self._post, self._semaphore_addresses = post, semaphores
        work = function(*source("worker.c"))
        stack = threading.stack_size(WORKER_STACK)
        self._workers = [threading.Thread(target=work, daemon=True, args=[
            ctypes.c_uint64(self.address), ctypes.c_uint64(i)]) for i in range(threads - 1)]
        for worker in self._workers:
            worker.start()
        threading.stack_size(stack)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Lets the workers return, which they must before their code is unmapped."""
        if os.getpid() != self.process:  # a fork, which has no workers
            return
        with suppress(RuntimeError):  # of a kernel that failed, and has been told
            Device["CPU"].synchronize()
        generation = (self.words[self.TICKET] >> 32) + 1
        self.words[self.JOBS + generation % 16 * 8 + 2] = 0  # a job of no tasks
        self.words[self.STOP] = 1
        self.words[self.TICKET] = generation << 32
        for semaphore in self._semaphore_addresses:
            self._post(ctypes.c_void_p(semaphore))
        for worker in self._workers:
            worker.join(1)


def off_the_worker(finalizer: Callable[..., None]) -> Callable[..., None]:
    """A finalizer that waits for the CPU's thread of kernels, put off where that very thread runs
    it, which would wait for itself for ever: until another thread calls one.

    tinygrad 0.13's thread is Python's too, so that the garbage collector may run on it.
    """
    put_off: list[tuple] = []

    def finalize(*args) -> None:
        on_the_worker = isinstance(threading.current_thread(), CPUWorker)
        put_off.append(args)
        while put_off and not on_the_worker:
            finalizer(*put_off.pop())
    return finalize


if not IS_014:
    from tinygrad.runtime.graph.hcq import HCQGraph
    from tinygrad.runtime.ops_cpu import CPUWorker
    from tinygrad.runtime.support.hcq import HCQAllocatorBase

    HCQGraph.__del__ = off_the_worker(HCQGraph.__del__)
    HCQAllocatorBase._free = off_the_worker(HCQAllocatorBase._free)


@functools.cache
def amx() -> str:
    """"real" where this processor multiplies bfloat16 in AMX tiles and Linux lets this process
    use them, else ""."""
    if platform.machine() != "x86_64" or "amx_bf16" not in cpu_info():
        return ""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    refused = ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)
    return "" if refused else "real"


MOST_THREADS = 64  # as many semaphores as pool_t has
_threads = min(cpu_count(), MOST_THREADS)


def set_threads(threads: int) -> None:
    """How many threads the kernels use, 64 at most; has an effect before the first of them runs."""
    if threads < 1:
        raise ValueError(f"threads={threads} is out of range: choose a value at least 1")
    global _threads
    _threads = min(threads, MOST_THREADS)


@functools.cache
def pool() -> Pool:
    """The pool that all kernels share."""
    return Pool(_threads)


@functools.cache
def table() -> Tensor:
    """(3,) uint64: the addresses of the pool and of its workspace, and the workspace's bytes."""
    return constant(np.array([pool().address, pool().workspace, WORKSPACE_BYTES], np.uint64), "CPU")


@functools.cache
def constants(dtype, *values: float) -> Tensor:
    """A small tensor that never changes."""
    return constant(np.array(values, _to_np_dtype(dtype)), "CPU")


@dataclass(frozen=True)
class Kernel:
    """A C file and how it is called: its arguments are outputs, inputs, sizes and the pool."""

    file: str
    arguments: tuple[tuple[str, str], ...] = ()  # (C type, name), for files with ARGUMENTS
    defines: tuple[tuple[str, str | int], ...] = ()

    def __call__(self, outputs: list[Tensor], inputs: list[Tensor], sizes: tuple[int, ...],
                 gradient=None, flops: int = 0) -> list[Tensor]:
        """New tensors of the shapes and dtypes of `outputs`, as the kernel computes them.

        gradient takes the gradient of the first output and the kernel's own outputs and returns a
        gradient, or None, for each of `inputs`.
        """
        count, name, build = len(outputs), *self._program(len(outputs), sizes, flops)
        inputs = [plain(x) for x in inputs]
        arguments = [x.uop for x in (*inputs, constants(dtypes.int64, *sizes), table())]

        def backward(dy: UOp, call: UOp):
            made = [Tensor(call.gettuple(i)) for i in range(count)]
            grads = [g if g is None else g.reshape(x.shape).uop
                     for g, x in zip(gradient(Tensor(dy), made), inputs, strict=True)]
            return (*grads, None, None)

        # A function of its arguments: an output is a value, and has no memory until it is realized
        # that an assignment to it would write into. Flat memory is what tinygrad need not copy.
        written = [Tensor.empty(t.numel(), dtype=t.dtype, device="CPU").uop for t in outputs]
        body = [*written, *(uop.param_like(i) for i, uop in enumerate(arguments))]
        kernel = build(*(UOp.placeholder_like(x, slot=i) for i, x in enumerate(body))).call(*body)
        call = UOp.maketuple(*(buffer.after(kernel) for buffer in written)).call(
            *arguments, grad_fxn=gradient and backward, name=name, precompile=True)
        return [Tensor(call.gettuple(i)).reshape(t.shape) * 1 for i, t in enumerate(outputs)]

    def in_place(self, changed: list[Tensor], inputs: list[Tensor], sizes: tuple[int, ...],
                 flops: int = 0) -> list[Tensor]:
        """Runs a kernel that writes into realized tensors, and returns them as they are then."""
        _, build = self._program(len(changed), sizes, flops)
        inputs = [plain(x) for x in inputs]
        return Tensor.custom_kernel(*changed, *inputs, constants(dtypes.int64, *sizes), table(),
                                    fxn=build)[:len(changed)]

    def _program(self, outputs: int, sizes: tuple[int, ...], flops: int) -> tuple[str, Callable]:
        """The kernel's name, and what makes its program for some buffers, the outputs first."""
        defines = dict(self.defines)
        if self.arguments:
            defines["ARGUMENTS"] = " ".join(f"{kind} {name}," for kind, name in self.arguments)
        name, code = source(self.file, **defines)
        compilations().begin(code)
        return name, lambda *buffers: program(name, code, buffers, outputs, flops)


def plain(x: Tensor) -> Tensor:
    """x without what only names its dimensions anew around a kernel's output, which tinygrad would
    otherwise copy.

    Kernels get every size as an argument, so the shape that is left does not matter to them.
    """
    source, _, strides = memory(x)
    dense = [math.prod(x.shape[i + 1:]) for i in range(x.ndim)]
    same = all(a == b or n == 1 for a, b, n in zip(strides, dense, x.shape, strict=True))
    return source if same and source.numel() == x.numel() else x


def stored(x: Tensor) -> Tensor:
    """x in memory once it is realized; a kernel's output without a copy of it."""
    return plain(x).contiguous().reshape(x.shape)


def memory(x: Tensor) -> tuple[Tensor, int, tuple[int, ...]]:
    """The tensor in whose memory x lies, where x begins in it, and the strides of x.

    A kernel's output is seen through reshapes, permutations and slices; other views are their own
    memory, since tinygrad copies them for a kernel.
    """
    uop, moves = _valued(x.uop), []
    while uop.op in (Ops.RESHAPE, Ops.PERMUTE, Ops.SHRINK):
        moves.append(uop)
        uop = _valued(uop.src[0])
    own = x, 0, tuple(math.prod(x.shape[i + 1:]) for i in range(x.ndim))
    if uop.op is not Ops.GETTUPLE or not all(isinstance(n, int) for n in x.shape + uop.shape):
        return own
    whole = view = np.empty(uop.shape, np.uint8)  # numpy does the arithmetic, on bytes as elements
    for move in reversed(moves):
        if move.op is Ops.SHRINK:
            if not all(isinstance(m[0], int) for m in move.marg):
                return own
            view = view[tuple(slice(m[0], m[0] + n) for m, n in
                              zip(move.marg, move.shape, strict=True))]
        else:
            view = view.transpose(move.arg) if move.op is Ops.PERMUTE else view.reshape(move.shape)
        if not np.may_share_memory(view, whole):  # the reshape had to copy
            return own
    return Tensor(uop), view.ctypes.data - whole.ctypes.data, view.strides


def narrow(x: Tensor) -> Tensor:
    """What x was before it was cast from 16 bits to float32; x itself where it was not."""
    uop = _valued(x.uop)
    while uop.op is Ops.CONTIGUOUS:
        uop = _valued(uop.src[0])
    widened = uop.op is Ops.CAST and uop.dtype == dtypes.float32 and uop.src[0].dtype.itemsize == 2
    return Tensor(uop.src[0]) if widened else x


def _valued(uop: UOp) -> UOp:
    """uop without multiplications by one, which make values of kernels' outputs."""
    while uop.op is Ops.MUL:
        others = [x for x, y in (uop.src, uop.src[::-1])
                  if y.base.op is Ops.CONST and y.base.arg == 1]
        if not others:
            return uop
        uop = others[0]
    return uop


def untransposed(x: Tensor) -> Tensor | None:
    """What x is `transpose(1, 2)` of, where it is that; None elsewhere."""
    is_swap = x.uop.op is Ops.PERMUTE and tuple(x.uop.arg) == (0, 2, 1, 3)
    return Tensor(x.uop.src[0]) if is_swap else None
