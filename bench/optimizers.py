"""Validation bits per byte of the default model with each optimizer at several learning rates, and
with each schedule, after the same number of steps of 16 rows; writes optimizers.csv and .png:

    python bench/optimizers.py mytext.txt [--steps 1000]
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

BENCH = Path(__file__).parent
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "adamw8bit": (1e-3, 2e-3, 4e-3),
         "lion": (1e-4, 3e-4, 1e-3), "muon": (5e-3, 1e-2, 2e-2)}
SCHEDULES = ("cosine", "linear", "wsd", "constant")


def run(data: str, steps: int, **flags) -> list[tuple[int, float]]:
    """Bits per byte at each evaluation of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(BENCH.parent / "train.py"), "--data", data,
                   "--max_iters", str(steps), "--eval_interval", str(steps // 5),
                   "--eval_iters", "50", "--batch_size", "16", "--out_dir", folder]
        subprocess.run(command + [f"--{k}={v}" for k, v in flags.items()], check=True,
                       stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [r for r in map(json.loads, lines) if "bits_per_byte" in r]
    return [(r["iter"], r["bits_per_byte"]) for r in evaluations]


def draw(curves: dict[tuple[str, str, str], list]) -> None:
    """The best learning rate of each optimizer on the left, schedules on the right."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    best = {name: min((k for k in curves if k[0] == name and k[2] == "cosine"),
                      key=lambda k: curves[k][-1][1]) for name in RATES}
    winner = min(best.values(), key=lambda k: curves[k][-1][1])
    for axes, keys, place in ((left, best.values(), 0),
                              (right, [(*winner[:2], s) for s in SCHEDULES], 2)):
        for key in keys:
            steps, bits = zip(*curves[key][1:], strict=True)
            label = key[place] + (f" at {key[1]}" if place == 0 else "")
            axes.plot(steps, bits, ".-", label=f"{label}: {bits[-1]:.3f}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylabel("validation, bits per byte")
    left.set_title("optimizers, cosine schedule")
    right.set_title(f"schedules, {winner[0]} at {winner[1]}")
    figure.savefig(BENCH / "optimizers.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":\n\n")[0])
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    curves = {}

    def add(optimizer: str, rate: float, schedule: str) -> float:
        key = optimizer, f"{rate:g}", schedule
        curves[key] = run(args.data, args.steps, optimizer=optimizer, learning_rate=rate,
                          schedule=schedule)
        print(*key, f"{curves[key][-1][1]:.4f} bits per byte", flush=True)
        return curves[key][-1][1]

    found = {(name, rate): add(name, rate, "cosine")
             for name, rates in RATES.items() for rate in rates}
    for schedule in SCHEDULES[1:]:
        add(*min(found, key=found.get), schedule)
    with open(BENCH / "optimizers.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["optimizer", "learning_rate", "schedule", "step", "bits_per_byte"])
        writer.writerows([*key, *point] for key, points in curves.items() for point in points)
    draw(curves)


if __name__ == "__main__":
    main()
