"""Step time with several processes of one thread each, against a projection from the times of one
process and of an all-reduce. Then the projection for machines on a network of some GB/s:

    python bench/scaling.py [--ranks 1 2 4] [--project 2 4] [--network 10]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tinygrad import Device

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record
from gpt import GPT, GPTConfig
from tinygpt import kernels
from tinygpt.data.load import TokenData
from tinygpt.machine import cpu_count
from tinygpt.training.config import TrainConfig
from tinygpt.training.ranks import Ranks, world
from tinygpt.training.run import Run, prepare

SHAPE = GPTConfig(n_layer=4, n_head=4, n_embd=192, block_size=64, vocab_size=1024)
MICRO = 4  # micro-batches of 2 sequences in a step, for any number of processes
STEPS = 150


def make_run(ranks: Ranks) -> Run:
    data = np.random.default_rng(0).integers(0, SHAPE.vocab_size, 100_000).astype(np.uint16)
    config = TrainConfig(batch_size=2, gradient_accumulation_steps=MICRO,
                         out_dir=ranks.broadcast(tempfile.mkdtemp()))
    run = prepare(GPT(SHAPE), config, TokenData(data, data, None, "random"), ranks)
    for _ in range(2):  # compiled by the first
        run.step(1e-3)
    return run


def milliseconds(call, times: int = STEPS) -> float:
    """The fastest of several calls, which other processes delayed least."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e3


def pieces() -> list[float]:
    """Milliseconds of a micro-batch and of an update in one process."""
    run = make_run(Ranks())
    steps = run.steps

    def micro_batch():
        steps.accumulate(steps.key, steps.share, *steps.inputs)
        Device["CPU"].synchronize()
    return [milliseconds(micro_batch), milliseconds(lambda: steps.apply(steps.lr).tolist())]


def together(all_reduce: bool) -> list[float]:
    """Milliseconds of a step, or of its all-reduce only, under mpirun."""
    ranks = world()
    run = make_run(ranks)

    def sums():
        ranks.barrier()
        run.steps.buckets.all_sum()
    return [milliseconds(sums if all_reduce else lambda: run.step(1e-3))]


def measured(ranks: int, mode: str) -> list[float]:
    """The result of this script with --mode in that number of processes."""
    launcher = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)]
    out = subprocess.run([*(launcher if ranks > 1 else []), sys.executable, __file__, "--mode",
                          mode], check=True, text=True, stdout=subprocess.PIPE).stdout
    return [float(word) for word in out.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--project", type=int, nargs="*", default=[2, 4],
                        help="numbers of machines; they divide the micro-batches of a step")
    parser.add_argument("--network", type=float, default=1.25, help="GB/s; 1.25 is 10 Gb/s")
    parser.add_argument("--mode", choices=["pieces", "sums", "step"],
                        help="what a process measures")
    args = parser.parse_args()
    if args.mode:
        kernels.set_threads(1)
        found = pieces() if args.mode == "pieces" else together(args.mode == "sums")
        if world().is_main:
            print(*found)
        return
    cpus, (micro_batch, update) = cpu_count(), measured(1, "pieces")
    gradient = 4 * GPT(SHAPE, seed=None).num_params()
    print(f"a micro-batch {micro_batch:.1f} ms, an update {update:.1f} ms, gradients of "
          f"{gradient / 1e6:.1f} MB")
    for n in args.ranks:
        turns = max(1, n / cpus)  # processes beyond the CPUs wait
        sums = measured(n, "sums")[0] if n > 1 else 0.0
        projected = (MICRO / n * micro_batch + update) * turns + sums
        print(f"{n} processes: all-reduce {sums:.1f} ms")
        record("scaling.py", f"step, {n} processes, {cpus} cpus", measured(n, "step")[0],
               "projection", projected)
    for n in args.project:
        # a ring sends and receives each byte of the gradient 2 (n - 1) / n times
        sums = 2 * (n - 1) / n * gradient / args.network / 1e6
        step = MICRO / n * micro_batch + update + sums
        print(f"{n} machines, {args.network:g} GB/s: {step:.1f} ms a step, "
              f"{(MICRO * micro_batch + update) / step:.2f} times as fast as one")


if __name__ == "__main__":
    main()
