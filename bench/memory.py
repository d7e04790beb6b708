"""Peak memory of attention over 4096 positions, forward and backward, against PyTorch, each in its
own process:

    python bench/memory.py
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record

SHAPE = (1, 4096, 12, 64)  # B, T, H, D


def peak() -> float:
    """Peak memory of this process, in MB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    # of this program alone: Linux's ru_maxrss has that of the process that started it too
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def added(peer: str) -> float:
    """MB that a step adds to the memory of its inputs and of the imported library."""
    import bench.attention as attention
    from tinygpt import device

    device.prepare()
    arrays = [np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) for _ in range(4)]
    step = {"ours": lambda: attention.ours(arrays, "auto", "float32"),
            "torch": lambda: attention.theirs(arrays, "float32")}[peer]()
    before = peak()
    for _ in range(3):
        step()
    return peak() - before


def main() -> None:
    if len(sys.argv) > 1:
        print(added(sys.argv[1]))
        return
    ours, theirs = (float(subprocess.run([sys.executable, __file__, peer], check=True, text=True,
                                         stdout=subprocess.PIPE).stdout)
                    for peer in ("ours", "torch"))
    record("memory.py", "attention B 1, T 4096, H 12, D 64", ours, "torch", theirs, "MB")


if __name__ == "__main__":
    main()
