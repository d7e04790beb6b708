"""How many floating-point operations a second the CPUs reach in nothing but multiply-adds."""

import ctypes
import functools
import time
from collections.abc import Callable

import numpy as np

from tinygpt.kernels.cpu.compile import bfloat16_defines, compilations, function, source
from tinygpt.kernels.cpu.threads import pool
from tinygpt.machine import cpu_quota

ROUNDS, BURSTS = 20_000, 64  # of peak.c: some 40 us each


def peak_flops(dtype: str) -> Callable[[], float]:
    """A function that returns the FLOP/s of the threads that the kernels use, in the arithmetic of
    matrix products of that dtype, as far as a container's quota allows.

    Its first call measures for a few milliseconds; what it runs is compiled in the background from
    now on.
    """
    defines = bfloat16_defines() if dtype == "bfloat16" else {}
    name, code = source("peak.c", "_".join(["peak", *defines]).lower(), (
        *defines.items(), ("ROUNDS", ROUNDS), ("BURSTS", BURSTS)))
    compilations().begin(code)
    return functools.partial(_measure, name, code)


@functools.cache
def _measure(name: str, code: str) -> float:
    run = function(name, code)
    run.restype = ctypes.c_long
    threads, clock = pool().threads, ctypes.CDLL(None).clock_gettime
    seconds = np.zeros((threads, BURSTS, 2))
    flops = run(*map(ctypes.c_uint64, (pool().address, ctypes.cast(clock, ctypes.c_void_p).value,
                                       time.CLOCK_MONOTONIC, seconds.ctypes.data)))
    # the median, since other processes may interrupt a burst
    rates = flops / np.median(np.diff(seconds)[..., 0], axis=1)  # of each thread
    return float(rates.sum()) * min(1.0, cpu_quota() / threads)
