"""Times peers in turn and appends the results to a CSV file."""

import contextlib
import csv
import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from tinygpt.machine import cpu_count

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = ["date", "script", "case", "unit", "ours", "peer", "theirs", "ratio", "machine",
          "versions"]


def in_turn(peers: dict[str, Callable[[], object]], seconds: float = 4.0,
            rounds: int = 5) -> dict[str, float]:
    """Median milliseconds per call of each peer, measured in turn after two warm-up calls.

    Each peer runs for seconds / rounds in a round.
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


@dataclass(frozen=True)
class Table:
    """A CSV file of results of one machine."""

    path: Path
    machine: str

    def record(self, script: str, case: str, ours: float, peer: str = "",
               theirs: float | None = None, unit: str = "ms") -> None:
        """Prints and appends a result, with that of the peer if there is one."""
        compared = ("" if theirs is None else
                    f"   {peer} {theirs:9.2f} {unit}   ratio {ours / theirs:.2f}")
        print(f"{case:32} ours {ours:9.2f} {unit}{compared}", flush=True)
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(dict(
                date=datetime.date.today().isoformat(), script=script, case=case, unit=unit,
                ours=f"{ours:.3f}", peer=peer, theirs="" if theirs is None else f"{theirs:.3f}",
                ratio="" if theirs is None else f"{ours / theirs:.3f}", machine=self.machine,
                versions=_versions()))


def record(*result) -> None:
    """`Table.record` for results.csv and this machine's processor."""
    Table(RESULTS, f"{_processor()}, {cpu_count()} cpus").record(*result)


def _versions() -> str:
    found = []
    for name in ("tinygrad", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return " ".join(found)


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in info.splitlines()
                 if line.startswith("model name")), platform.machine())
    features = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in info]
    return f"{name} ({features[0] if features else 'no avx2'})"
