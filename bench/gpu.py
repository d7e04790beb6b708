"""Tests on a GPU, and measures attention, the GPT-2 124M train step, decoding, startup and BEAM
against PyTorch, in at most 25 minutes:

    DEV=CUDA python bench/gpu.py [tests] [attention] [train] [decode] [startup] [beam]

Runs all parts by default, the most important first, each in its own process for at most 8 minutes,
so that a failure does not affect the others. Results are appended to bench/gpu.csv at once. PyTorch
is measured if it is installed with support for the GPU. The exit status is 1 if a part failed.
"""

import argparse
import csv
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from tinygrad.device import CompileError
from tinygrad.helpers import GlobalCounters

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import measure
from tinygpt import device

ROOT = Path(__file__).parent.parent
CSV = Path(__file__).with_name("gpu.csv")
HAS_TORCH = importlib.util.find_spec("torch") is not None
# tests that run on the device
TESTS = ("kernels/test_flash.py", "kernels/test_kernels.py", "kernels/test_attention.py",
         "kernels/test_cached_attention.py", "kernels/test_draw.py", "kernels/test_updates.py",
         "test_gpt.py", "test_own_loop.py", "training/test_optim.py", "model/test_recompute.py")
LENGTHS = (256, 1024, 4096, 16384)
ATTENTION = [(dtype, backward, D, T) for dtype, backward, D in (  # with gradients or without
    ("bfloat16", False, 64), ("bfloat16", True, 64), ("bfloat16", False, 128),
    ("bfloat16", True, 128), ("float32", True, 64)) for T in LENGTHS]
TOKENS, WIDTH = 16384, 768  # of attention: rows x length, heads x head size
ERROR = 0.02  # largest error of attention, relative to the largest value
BEAMS = (0, 2, 4)
MINUTES = 8


def record(part: str, case: str, unit: str, ours: float, peer: str = "",
           theirs: float | None = None) -> None:
    measure.Table(CSV, device.describe()).record(part, case, ours, peer, theirs, unit)


def tests() -> None:
    """The tests of kernels and models on the device, and `python -m tinygpt.check`."""
    files = [f"tests/{name}" for name in TESTS]
    workers = str(min(8, os.cpu_count() or 1))
    python = [sys.executable, "-m"]
    check = subprocess.Popen([*python, "tinygpt.check"], cwd=ROOT)
    done = subprocess.run([*python, "pytest", "-q", "-p", "no:benchmark", "-n", workers, *files],
                          cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout[-3000:], flush=True)
    for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-200:]):
        record("tests", f"pytest, {what}", "tests", float(count))
    assert check.wait() == done.returncode == 0, "tests failed"


def attention() -> None:
    """Flash attention against the portable implementation and PyTorch."""
    from bench.attention import ours, theirs

    for dtype, backward, D, T in ATTENTION:
        shape = TOKENS // T, T, WIDTH // D, D
        arrays = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in range(4)]
        make = {name: partial(ours, arrays, name, dtype, backward)
                for name in ("flash", "portable")}
        if HAS_TORCH:
            make["torch"] = partial(theirs, arrays, dtype, backward)
        compare(f"{dtype}, B {shape[0]}, T {T}, D {D}, {'gradients' if backward else 'y'}", make)


def compare(case: str, make: dict) -> None:
    """Times implementations of attention in turn and compares their results with flash."""
    peers, results = {}, {}
    for name, build in make.items():
        try:
            peers[name] = build()
            results[name] = [as_array(x) for x in peers[name]()]
        except (RuntimeError, MemoryError, CompileError) as error:
            peers.pop(name, None)
            print(f"{case}, {name}: {type(error).__name__}: {error}"[:300], flush=True)
    times = measure.in_turn(peers, seconds=0.5)
    for name in ("portable", "torch"):
        if {"flash", name} <= times.keys():
            record("attention", case, "ms", times["flash"], name, times[name])
            for what, x, y in zip("yqkv", results["flash"], results[name], strict=False):
                error = np.abs(x - y).max() / np.abs(y).max()
                assert error < ERROR, f"{case}: flash and {name} differ by {error:.2e} in {what}"


def as_array(x) -> np.ndarray:
    return x.float().numpy() if hasattr(x, "uop") else x.float().cpu().numpy()


def train(kernels: tuple[str, ...] = ("auto", "portable"), with_torch: bool = HAS_TORCH) -> None:
    """A train step of GPT-2 124M with 12 x 1024 tokens against PyTorch, eager and compiled."""
    from bench.train_step import CASES, flops, ours, theirs

    *_, T, B, V = CASES["GPU"]
    data = np.random.default_rng(0).integers(0, V, 1_000_000).astype(np.uint16)
    times, memory = {}, {}
    if with_torch:
        import torch

        # before anything of ours, which sets CC, where Triton looks for its compiler too
        for name in ("torch eager", "torch compiled"):
            step = theirs("GPU", "bfloat16", data, compile=name == "torch compiled")
            times[name] = measure.in_turn({name: step}, seconds=5)[name]
            memory[name] = torch.cuda.max_memory_allocated() / 1e9
            del step
            torch.cuda.empty_cache()
    for name, gigabytes in memory.items():
        record("train", f"{name}, memory", "GB", gigabytes)
    for name in kernels:
        start = time.perf_counter()
        step = ours("GPU", "bfloat16", name, data)
        step()
        step()
        record("train", f"124M, kernels {name}, two steps that compile", "s",
               time.perf_counter() - start)
        mine = measure.in_turn({name: step}, seconds=5)[name]
        for peer, other in times.items():
            record("train", f"124M, kernels {name}, a step", "ms", mine, peer, other)
        record("train", f"124M, kernels {name}", "tokens/s", B * T / mine * 1e3)
        record("train", f"124M, kernels {name}, memory", "GB", GlobalCounters.mem_used / 1e9)
        record("train", f"124M, kernels {name}, FLOP/s", "T", flops("GPU") / mine / 1e9)
        del step
        device.free_memory()


def decode() -> None:
    """Decoding with GPT-2 124M against PyTorch, per token."""
    from bench.decode import KINDS, ours, theirs, works

    prompt, count = works("124M")["per token"]
    peers = {kind: ours("124M", kind) for kind in KINDS}
    if HAS_TORCH:
        peers["torch"] = theirs("124M")
    peers = {name: partial(write, prompt, count) for name, write in peers.items()}
    times = {name: ms / count for name, ms in measure.in_turn(peers, seconds=5).items()}
    for kind in KINDS:
        record("decode", f"124M {kind}, a token", "ms", times[kind],
               "torch" if HAS_TORCH else "", times.get("torch"))


def startup() -> None:
    """Seconds of the commands: train, resume, sample."""
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out_dir", folder, "--eval_interval", "20", "--eval_iters", "2"]
        commands = {
            "train.py, 20 steps": ["train.py", "--data", "data/lantern_and_tide.txt", "--max_iters",
                                   "20", *out],
            "train.py, 20 more steps": ["train.py", "--resume", "--max_iters", "40", *out],
            "generate.py, 100 tokens": ["generate.py", "--prompt", "ROMEO:", "--max_new_tokens",
                                        "100", "--checkpoint", f"{folder}/best.safetensors"],
        }
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            record("startup", name, "s", time.perf_counter() - start)


def beam() -> None:
    """The train step of the portable kernels with tinygrad's kernel search (BEAM)."""
    for width in BEAMS:
        code = "from bench import gpu; gpu.train(('portable',), with_torch=False)"
        print(f"BEAM={width}:", flush=True)
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                       env=os.environ | {"BEAM": str(width)})


PARTS = {f.__name__: f for f in (tests, attention, train, decode, startup, beam)}


def run_in_process(part: str) -> str:
    """Runs a part in its own process; returns its error, or ""."""
    command = [sys.executable, __file__, part, "--here"]
    try:
        code = subprocess.run(command, timeout=60 * MINUTES).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {MINUTES} minutes"
    return f"failed with exit status {code}" if code else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":\n\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="|".join(PARTS))
    parser.add_argument("--here", action="store_true", help="in this process, without a time limit")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]}: choose from {', '.join(PARTS)}")
    if args.here:
        for part in args.parts:
            PARTS[part]()
        return
    first = sum(1 for _ in CSV.open()) if CSV.exists() else 0
    errors = {part: run_in_process(part) for part in args.parts}
    if CSV.exists():
        for row in list(csv.reader(CSV.open()))[first:]:
            print("  ".join(row[1:8]))
    for part, error in errors.items():
        print(f"{part}: {error or 'ok'}")
    sys.exit(any(errors.values()))


if __name__ == "__main__":
    main()
