"""Time of cross-entropy over GPT-2's vocabulary, forward and backward, against PyTorch:

    python bench/cross_entropy.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tinygrad import Tensor, TinyJit
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import in_turn, record
from tinygpt import device, kernels
from tinygpt.machine import cpu_count

N, V = 1024, 50257


def ours(logits: np.ndarray, targets: np.ndarray):
    x, y = Tensor(logits).realize(), Tensor(targets.astype(np.int32)).realize()

    @TinyJit
    def step(x, y):
        loss = kernels.cross_entropy(x, y)
        return Tensor.realize(loss, *loss.gradient(x))

    return lambda: step(x, y).item()


def theirs(logits: np.ndarray, targets: np.ndarray):
    x, y = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(targets)

    def step():
        x.grad = None
        loss = F.cross_entropy(x, y)
        loss.backward()
        return loss.item()
    return step


def main() -> None:
    device.prepare()
    torch.set_num_threads(cpu_count())
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(N, V)).astype(np.float32), rng.integers(0, V, N)
    times = in_turn({"ours": ours(logits, targets), "torch": theirs(logits, targets)}, seconds=8)
    record("cross_entropy.py", f"{N} x {V}", times["ours"], "torch", times["torch"])


if __name__ == "__main__":
    main()
