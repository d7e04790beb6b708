"""What model FLOPs utilization on a CPU is measured against."""

import ctypes

import numpy as np
import pytest

from tinygpt import device
from tinygpt.kernels.cpu import peak
from tinygpt.kernels.cpu.threads import pool

FLOPS, QUICK = 10**6, 1e-4  # of a burst, and its seconds


class Burst:
    """Stands for the C function: every burst is quick, except the first ten of each thread, during
    which another process had the core."""

    def __call__(self, pool_address, clock_gettime, clock, seconds) -> int:
        array = (ctypes.c_double * (pool().threads * peak.BURSTS * 2)).from_address(seconds.value)
        times = np.frombuffer(array).reshape(pool().threads, peak.BURSTS, 2)
        times[...] = 5, 5 + QUICK
        times[:, :10, 1] += 1
        return FLOPS


@pytest.mark.parametrize(("quota", "share"), [(float("inf"), 1), (0.5, 0.5 / pool().threads)])
def test_it_is_the_sum_of_threads_of_the_median_burst_within_the_quota(quota, share, monkeypatch):
    monkeypatch.setattr(peak, "function", lambda *_: Burst())
    monkeypatch.setattr(peak, "cpu_quota", lambda: quota)
    expected = pool().threads * FLOPS / QUICK * share
    assert peak._measure("fake", str(quota)) == pytest.approx(expected)


def test_this_processor_has_one_in_every_dtype():
    found = [device.peak_flops(dtype)() for dtype in ("float32", "bfloat16", "float16")]
    assert all(1e8 < one < 1e16 for one in found) and found[0] == found[2]
    assert device.peak_flops("float32")() == found[0]  # measured once
