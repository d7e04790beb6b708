"""What this machine has: CPUs, memory, and what a GPU's datasheet says."""

import functools
import math
import os
from contextlib import suppress
from pathlib import Path

# FLOP/s in bfloat16 and float16, dense, on tensor cores, and in float32 without them, of NVIDIA's
# datasheets, by the words of a device's name; V100 and T4 have no bfloat16
GPU_PEAKS = {
    "H200": (989e12, 67e12), "H100 PCIe": (756e12, 51e12), "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12), "A10": (125e12, 31.2e12), "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12), "V100": (125e12, 15.7e12), "T4": (65e12, 8.1e12),
    "RTX 4090": (165e12, 82.6e12), "RTX 3090": (71e12, 35.6e12),
}


def cpus() -> frozenset[int]:
    """The CPUs that this process may use, by number."""
    known = hasattr(os, "sched_getaffinity")
    return frozenset(os.sched_getaffinity(0) if known else range(os.cpu_count()))


@functools.cache
def cpu_count() -> int:
    """How many CPUs this process may use: those it may run on, or fewer by a container's quota."""
    return max(1, math.ceil(min(len(cpus()), cpu_quota())))


def cpu_quota() -> float:
    """As many CPUs' time a container's quota allows; infinite without one."""
    with suppress(OSError, ValueError):  # no such control group, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return quota / period
    return math.inf


def cpu_info() -> str:
    """What Linux writes about its processors, a line for each property; "" on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def memory() -> int:
    """Bytes of memory: this machine's, or fewer by a container's limit."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # another system, or no limit
        return there


def gpu_peak_flops(name: str, dtype: str) -> float | None:
    """FLOP/s of a GPU by its driver's name for it, such as "NVIDIA H200", and by dtype; None for
    a GPU that is not in GPU_PEAKS."""
    words = set(name.replace("-", " ").split())
    for known, (half, single) in GPU_PEAKS.items():
        if words.issuperset(known.split()):
            return single if dtype == "float32" else half
    return None
