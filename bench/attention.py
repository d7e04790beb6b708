"""Causal attention, forward and backward, ours and PyTorch's in turn: python bench/attention.py"""

import sys
from pathlib import Path

import numpy as np
import torch
from tinygrad import Device, Tensor, TinyJit
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent.parent))
import tinygpt  # noqa: F401 (finds the compiler)
from bench.measure import in_turn, record
from tinygpt import kernels
from tinygpt.kernels.cpu.launch import cpu_count

CASES = [(12, 64, 4, 32), (12, 256, 6, 64), (1, 4096, 12, 64)]  # B, T, H, D


def ours(arrays: list[np.ndarray]):
    q, k, v, dy = (Tensor(a).realize() for a in arrays)

    @TinyJit
    def step(q, k, v, dy):
        heads = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, T, D)
        y = kernels.attention(*heads).transpose(1, 2)
        return Tensor.realize(y, *y.gradient(q, k, v, gradient=dy))

    def call():
        step(q, k, v, dy)
        Device["CPU"].synchronize()
    return call


def theirs(arrays: list[np.ndarray]):
    q, k, v = (torch.from_numpy(a).requires_grad_() for a in arrays[:3])
    dy = torch.from_numpy(arrays[3])

    def step():
        q.grad = k.grad = v.grad = None
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).backward(dy)
    return step


def main() -> None:
    torch.set_num_threads(cpu_count())
    for B, T, H, D in CASES:
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=(B, T, H, D)).astype(np.float32) for _ in range(4)]
        times = in_turn({"ours": ours(arrays), "torch": theirs(arrays)}, seconds=6)
        record("attention.py", f"B {B}, T {T}, H {H}, D {D}", times["ours"], "torch",
               times["torch"])


if __name__ == "__main__":
    main()
