"""A whole train step (forward, backward, clipping, AdamW), ours and PyTorch's in turn, eager and
with --compile also through torch.compile, which takes a minute or two and a C++ compiler.

    python bench/train_step.py [A] [B] [124M] [--bfloat16 | --float16] [--compile]
        [--kernels portable] [--profile]

--profile prints instead how long each kind of kernel of our step takes.
"""

import argparse
import contextlib
import io
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tinygrad import Context

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import in_turn, record
from bench.peer import PeerGPT, enter_torch, torch_device
from gpt import GPT, GPTConfig
from tinygpt.data.load import TokenData
from tinygpt.kernels import use
from tinygpt.machine import cpu_count
from tinygpt.training.config import TrainConfig
from tinygpt.training.run import prepare

# layers, heads, width, block, batch, vocabulary
CASES = {"A": (4, 4, 128, 64, 12, 512), "B": (6, 6, 384, 256, 12, 512),
         "124M": (12, 12, 768, 256, 4, 50257), "GPU": (12, 12, 768, 1024, 12, 50304)}


def flops(case: str) -> int:
    """Floating-point operations of a step, as nanoGPT counts them (arXiv:2204.02311)."""
    L, _, C, T, B, V = CASES[case]
    weights = 12 * L * C * C + V * C
    return (6 * weights + 12 * L * C * T) * B * T


def ours(case: str, dtype: str, kernels: str, data: np.ndarray):
    L, H, C, T, B, V = CASES[case]
    model = GPT(GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V))
    config = TrainConfig(batch_size=B, dtype=dtype, out_dir=tempfile.mkdtemp())
    use(kernels)
    run = prepare(model, config, TokenData(data, data, None, "random"))

    return lambda: run.step(1e-3)


def theirs(case: str, dtype: str, data: np.ndarray, compile: bool = False):
    L, H, C, T, B, V = CASES[case]
    enter_torch()
    device = torch_device()
    model = PeerGPT(L, H, C, T, V).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    call = torch.compile(model) if compile else model
    rng = np.random.default_rng(0)

    def step():
        enter_torch()
        rows = np.stack([data[i:i + T + 1] for i in rng.integers(0, len(data) - T - 1, B)])
        rows = torch.from_numpy(rows.astype(np.int64)).to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = call(rows[:, :-1], rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()
    return step


def profile(case: str, dtype: str, kernels: str, data: np.ndarray, steps: int = 20) -> None:
    """Prints the milliseconds a step of each kind of kernel, as tinygrad shows them."""
    with Context(JIT=2):  # captured, but not as a graph
        step = ours(case, dtype, kernels, data)
        for _ in range(3):
            step()
        with Context(DEBUG=2), contextlib.redirect_stdout(io.StringIO()) as shown:
            for _ in range(steps):
                step()
    took, calls = Counter(), Counter()
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())  # without colours
    line = re.compile(r"^\*{3} +\S+ +\d+ +(\S+).*? tm +([\d.]+)(us|ms)/", re.M)
    for name, time, unit in line.findall(text):
        took[name] += float(time) * (1 if unit == "ms" else 1e-3) / steps
        calls[name] += 1
    print(f"{case} {dtype}, {sum(took.values()):.2f} ms in {sum(calls.values()) // steps} kernels")
    for name, ms in took.most_common(20):
        print(f"{calls[name] // steps:4} {ms:9.3f} ms {ms / sum(took.values()):6.1%}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["A", "B", "124M"], metavar="|".join(CASES))
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--float16", action="store_true")
    parser.add_argument("--kernels", default="auto", help="which of ours")
    parser.add_argument("--compile", action="store_true", help="torch.compile as a peer too")
    parser.add_argument("--profile", action="store_true", help="ours alone, by kernel")
    parser.add_argument("--seconds", type=float, default=20, help="for each of them")
    args = parser.parse_args()
    torch.set_num_threads(cpu_count())
    dtype = "bfloat16" if args.bfloat16 else "float16" if args.float16 else "float32"
    for case in args.cases:
        data = np.random.default_rng(0).integers(0, CASES[case][-1], 100_000).astype(np.uint16)
        if args.profile:
            profile(case, dtype, args.kernels, data)
            continue
        peers = {"ours": ours(case, dtype, args.kernels, data),
                 "torch": theirs(case, dtype, data)}
        if args.compile:
            peers["torch.compile"] = theirs(case, dtype, data, compile=True)
        times = in_turn(peers, args.seconds)
        for peer in list(peers)[1:]:
            record("train_step.py", f"{case} {dtype}, kernels {args.kernels}", times["ours"], peer,
                   times[peer])


if __name__ == "__main__":
    main()
