"""The threads that the C kernels share.

Private interfaces of tinygrad: in 0.13 two finalizers are replaced, HCQGraph's and
HCQAllocatorBase's, and CPUWorker is the thread that runs the CPU's kernels.
"""

import atexit
import ctypes
import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from tinygrad import Device, Tensor

from tinygpt.kernels.cpu.compile import function, source
from tinygpt.kernels.jit import IS_014, constant
from tinygpt.machine import cpu_count

WORKER_STACK = 8 << 20  # packed matrices and tiles lie on it
WORKSPACE_BYTES = 64 << 20  # for packed matrices and partial sums; touched only as far as needed


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
        work = function(*source("worker.c", "worker"))
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
        with suppress(RuntimeError):  # of a kernel that failed, which was reported
            Device["CPU"].synchronize()
        generation = (self.words[self.TICKET] >> 32) + 1
        self.words[self.JOBS + generation % 16 * 8 + 2] = 0  # a job of no tasks
        self.words[self.STOP] = 1
        self.words[self.TICKET] = generation << 32
        for semaphore in self._semaphore_addresses:
            self._post(ctypes.c_void_p(semaphore))
        for worker in self._workers:
            worker.join(1)


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
    """What pool.h calls shared_t, (3,) uint64."""
    return constant(np.array([pool().address, pool().workspace, WORKSPACE_BYTES], np.uint64), "CPU")


def off_the_worker(finalizer: Callable[..., None]) -> Callable[..., None]:
    """Defers a finalizer that waits for the thread that runs the CPU's kernels, where that thread
    itself calls it and would deadlock, until another thread calls one.

    In tinygrad 0.13 that thread also runs Python, and so the garbage collector may run on it.
    """
    deferred: list[tuple] = []

    def finalize(*args) -> None:
        on_the_worker = isinstance(threading.current_thread(), CPUWorker)
        deferred.append(args)
        while deferred and not on_the_worker:
            finalizer(*deferred.pop())
    return finalize


if not IS_014:
    from tinygrad.runtime.graph.hcq import HCQGraph
    from tinygrad.runtime.ops_cpu import CPUWorker
    from tinygrad.runtime.support.hcq import HCQAllocatorBase

    HCQGraph.__del__ = off_the_worker(HCQGraph.__del__)
    HCQAllocatorBase._free = off_the_worker(HCQAllocatorBase._free)
