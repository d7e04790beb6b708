"""Causal attention, forward and backward, ours and PyTorch's in turn: python bench/attention.py

    python bench/attention.py [--bfloat16] [--kernels flash portable tinygrad]

Several kernels are timed in the same run; `tinygrad` is tinygrad's own attention. On a GPU
(`DEV=CUDA python bench/attention.py --kernels flash portable`, or DEV=METAL) PyTorch computes there
too.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tinygrad import Device, Tensor, TinyJit, dtypes
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import in_turn, record
from bench.peer import enter_torch, synchronize, torch_device
from tinygpt import device, kernels
from tinygpt.machine import cpu_count

CASES = [(12, 64, 4, 32), (12, 256, 6, 64), (1, 4096, 12, 64)]  # B, T, H, D


def ours(arrays: list[np.ndarray], implementation: str, dtype: str, backward: bool = True):
    """A call returns y and, with `backward`, the gradients of q, k and v."""
    q, k, v, dy = (Tensor(a).cast(getattr(dtypes, dtype)).realize() for a in arrays)

    @TinyJit
    def step(q, k, v, dy):
        heads = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, T, D)
        if implementation == "tinygrad":
            y = heads[0].scaled_dot_product_attention(*heads[1:], is_causal=True).transpose(1, 2)
        else:
            y = kernels.attention(*heads, implementation=implementation).transpose(1, 2)
        results = [y, *(y.gradient(q, k, v, gradient=dy) if backward else [])]
        results = [kernels.stored(result) for result in results]  # not copied, as in a model
        Tensor.realize(*results)
        return results

    def call():
        results = step(q, k, v, dy)
        Device[Device.DEFAULT].synchronize()
        return results
    return call


def theirs(arrays: list[np.ndarray], dtype: str, backward: bool = True):
    enter_torch()
    q, k, v, dy = (torch.from_numpy(a).to(torch_device(), getattr(torch, dtype)) for a in arrays)
    for x in (q, k, v):
        x.requires_grad_(backward)

    def step():
        enter_torch()
        q.grad = k.grad = v.grad = None
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        if backward:
            y.backward(dy)
        synchronize()
        return [y.detach(), *([q.grad, k.grad, v.grad] if backward else [])]
    return step


def main() -> None:
    device.prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--kernels", default=["auto"], nargs="+",
                        help="which of ours; tinygrad: its own attention")
    parser.add_argument("--seconds", type=float, default=6, help="for each peer and case")
    args = parser.parse_args()
    torch.set_num_threads(cpu_count())
    dtype = "bfloat16" if args.bfloat16 else "float32"
    for B, T, H, D in CASES:
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=(B, T, H, D)).astype(np.float32) for _ in range(4)]
        peers = {name: ours(arrays, name, dtype) for name in args.kernels}
        times = in_turn(peers | {"torch": theirs(arrays, dtype)}, args.seconds)
        for name in args.kernels:
            record("attention.py", f"B {B}, T {T}, H {H}, D {D}, {dtype}, {Device.DEFAULT}, {name}",
                   times[name], "torch", times["torch"])


if __name__ == "__main__":
    main()
