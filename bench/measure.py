"""Timing of peers in turn, and the file that keeps what was measured."""

import csv
import datetime
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tinygpt.kernels.cpu.launch import cpu_count

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = ["date", "script", "case", "unit", "ours", "peer", "theirs", "ratio", "machine",
          "versions"]


def in_turn(peers: dict[str, Callable[[], object]], seconds: float = 4.0,
            rounds: int = 5) -> dict[str, float]:
    """Median milliseconds of a call of each peer, measured A B A B ... after two calls to warm up.

    A round gives each peer seconds / rounds.
    """
    for call in peers.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, call in peers.items():
            end = time.perf_counter() + seconds / rounds
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                times[name].append(now - start)
                if now > end:
                    break
    return {name: float(np.median(t)) * 1e3 for name, t in times.items()}


def record(script: str, case: str, ours: float, peer: str, theirs: float,
           unit: str = "ms") -> None:
    """Prints one comparison and appends it to results.csv."""
    print(f"{case:32} ours {ours:9.2f} {unit}   {peer} {theirs:9.2f} {unit}   "
          f"ratio {ours / theirs:.2f}", flush=True)
    versions = " ".join(f"{name} {version(name)}" for name in ("tinygrad", "torch"))
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(dict(
            date=datetime.date.today().isoformat(), script=script, case=case, unit=unit,
            ours=f"{ours:.3f}", peer=peer, theirs=f"{theirs:.3f}", ratio=f"{ours / theirs:.3f}",
            machine=f"{_processor()}, {cpu_count()} cpus", versions=versions))


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in info.splitlines()
                 if line.startswith("model name")), platform.machine())
    features = [f for f in ("amx_bf16", "avx512f", "avx2") if f in info]
    return f"{name} ({features[0] if features else 'no avx2'})"
