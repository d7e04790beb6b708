"""Shared by the fault campaigns: child processes with a time limit and faults in their file calls,
and a table of tries and failures."""

import argparse
import csv
import ctypes
import datetime
import gc
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).parent / "faults.csv"
FIELDS = ["date", "script", "campaign", "tries", "failures", "seconds", "seed", "versions"]

COUNT, KILL, TEAR, FULL, READONLY, FAIL_ONCE = range(6)  # as bench/faults.c has them
MEGABYTES = 1500  # limit of a child, including the imports of its parent
ADDRESSES = 16 << 30  # bytes of address space of a child, to protect the machine


class Failed(Exception):
    """A case that failed; the first line of the message is the reason."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status, or minus the number of its signal, and its output."""

    status: int
    out: str
    err: str
    seconds: float
    megabytes: float
    timed_out: bool

    def __str__(self) -> str:
        how = "timed out" if self.timed_out else f"status {self.status}"
        err = re.sub(r"(.)\1{30,}", r"\1\1\1...", self.err)  # long arguments
        return f"{how}, {self.seconds:.1f} s, {self.megabytes:.0f} MB: {err[-600:]!r}"

    def refusal(self, name: str = "") -> str:
        """The error line of a command, which has to begin with name."""
        check(self.status == 2 and "Traceback" not in self.err, f"not refused in one line: {self}")
        lines = self.err.splitlines()
        own = [line for line in lines if line.startswith(name)]
        check(len(own) == 1 and own[0] == lines[-1], f"not one line with the error: {self}")
        return lines[-1]


def check(holds: bool, message: object) -> None:
    """Raises Failed with the message unless holds is true."""
    if not holds:
        raise Failed(str(message))


def child(function: Callable[[], int | None], folder: Path, seconds: float = 30,
          kill_after: float | None = None) -> Outcome:
    """Runs function in a forked process whose working directory is folder.

    Its result is the exit status. The process is killed after kill_after seconds, if given, and
    timed out after `seconds`.
    """
    out, err = os.memfd_create("out"), os.memfd_create("err")
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        _be_child(function, folder, out, err)
    handle = os.pidfd_open(pid)
    limit = seconds if kill_after is None else min(seconds, kill_after)
    late = not select.select([handle], [], [], limit)[0]
    if late:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL) if kill_after is None else os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    texts = [_whole(descriptor) for descriptor in (out, err)]
    for descriptor in (handle, out, err):
        os.close(descriptor)
    return Outcome(os.waitstatus_to_exitcode(status), *texts, time.perf_counter() - start,
                   usage.ru_maxrss / 1024, late and kill_after is None)


def _be_child(function, folder: Path, out: int, err: int) -> None:
    import resource

    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for fd, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8",  # noqa: SIM115
                                    errors="backslashreplace", closefd=False))
        os.chdir(folder)
        status = function() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:  # noqa: BLE001 - a child must not return into its parent's code
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status & 255)


def _whole(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")


# ---- faults in file calls

def load_shim() -> None:
    """Restarts this script with bench/faults.c preloaded, which makes file calls fail."""
    if os.environ.get("FAULT_SHIM"):
        return
    if sys.platform != "linux":
        sys.exit("faults in file calls need Linux: run this campaign there")
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    shim = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", shim,
                    Path(__file__).with_name("faults.c"), "-ldl"], check=True)
    os.execve(sys.executable, [sys.executable, *sys.argv],
              os.environ | {"LD_PRELOAD": str(shim), "FAULT_SHIM": str(shim), "DEV": "CPU"})


def armed(folder: Path, kind: int, at: int, function: Callable[[], int | None]):
    """A function for `child` in which file call number `at` in folder has a fault of that kind.

    With COUNT there is no fault, and the last line on stdout is the number of calls.
    """
    def run() -> int | None:
        shim = ctypes.CDLL(os.environ["FAULT_SHIM"])
        shim.fault_calls.restype = ctypes.c_long
        shim.fault_arm(str(folder).encode(), kind, ctypes.c_long(at))
        status = function()
        if kind == COUNT:
            print(shim.fault_calls(), flush=True)
        return status
    return run


# ---- campaigns

class Campaign:
    """One kind of fault. `case` injects one or more faults, raises Failed if the result is wrong,
    and returns their number. A case depends only on its number and on rng, seeded with it."""

    name = ""
    weight = 1.0  # relative share of the time
    most: int | None = None  # number of different cases, if it is limited

    def prepare(self, folder: Path) -> None:
        """Creates the files that the cases start from, in folder. Runs once, in the parent process,
        which must not compute with tinygrad; use `child` for that."""

    def case(self, number: int, rng: np.random.Generator, folder: Path) -> int:
        raise NotImplementedError


@dataclass
class Tally:
    """The results of a campaign."""

    campaign: str
    tries: int = 0
    seconds: float = 0.0
    failures: list[tuple[int, str]] = None


def main(script: str, description: str, make: Callable[[], Sequence[Campaign]],
         minutes: float) -> int:
    """The command line of a script of campaigns. Returns the exit status."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=minutes, help="of all campaigns in total")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="run only these campaigns")
    parser.add_argument("--case", type=int, help="run only this case")
    parser.add_argument("--most", type=int, help="maximum number of cases of each campaign")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help=f"append to {RECORD.name}")
    args = parser.parse_args()
    campaigns = make()
    names = [c.name for c in campaigns]
    if unknown := set(args.only or names) - set(names):
        parser.error(f"there is no campaign {', '.join(unknown)}: choose from {', '.join(names)}")
    campaigns = [c for c in campaigns if c.name in (args.only or names)]
    gc.collect()
    gc.freeze()  # so that children do not copy the memory of imported modules
    tallies, left = [], args.minutes * 60
    weights = [c.weight for c in campaigns]
    for i, campaign in enumerate(campaigns):
        tallies.append(_run(campaign, args, left * weights[i] / sum(weights[i:])))
        left -= tallies[-1].seconds
        _print(script, tallies[-1], args.seed)
    if args.record:
        _record(script, tallies, args.seed)
    tries, failures = sum(t.tries for t in tallies), sum(len(t.failures) for t in tallies)
    print(f"{'all':28}{tries:8}{failures:10}{sum(t.seconds for t in tallies):9.0f} s")
    return 1 if failures else 0


def _run(campaign: Campaign, args, seconds: float) -> Tally:
    """Runs cases in parallel processes until the time is over."""
    start = time.perf_counter()
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix=f"faults-{campaign.name}-")))
    tally = Tally(campaign.name, failures=[])
    try:
        campaign.prepare(folder)
        workers = [] if args.case is None else [args.case]
        for first in range(args.processes) if args.case is None else ():
            pid = os.fork()
            if not pid:
                _work(campaign, args, first, start + seconds, folder)
            workers.append(pid)
        if args.case is not None:
            _cases(campaign, [args.case], args.seed, np.inf, folder, tally)
            return tally
        for first, pid in enumerate(workers):
            os.waitpid(pid, 0)
            found = json.loads((folder / f"tally_{first}.json").read_text())
            tally.tries += found["tries"]
            tally.failures += map(tuple, found["failures"])
        tally.failures.sort()
    except Failed as failure:
        tally.failures.append((-1, f"cannot start: {failure}"))
    finally:
        tally.seconds = time.perf_counter() - start
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def _work(campaign: Campaign, args, first: int, end: float, folder: Path) -> None:
    """One of the processes: every n-th case, and a file of their results."""
    tally = Tally(campaign.name, failures=[])
    most = min(args.most or sys.maxsize, campaign.most or sys.maxsize)
    try:
        _cases(campaign, range(first, most, args.processes), args.seed, end, folder, tally)
    except BaseException:  # noqa: BLE001 - a worker must not return into its parent's code
        tally.failures.append((-1, f"the campaign itself: {traceback.format_exc()}"))
    (folder / f"tally_{first}.json").write_text(json.dumps(vars(tally)))
    os._exit(0)


def _cases(campaign: Campaign, numbers, seed: int, end: float, folder: Path, tally: Tally) -> None:
    for number in numbers:
        if time.perf_counter() > end:
            break
        place = folder / f"case_{number}"
        place.mkdir()
        try:
            rng = np.random.default_rng([seed, zlib.crc32(campaign.name.encode()), number])
            tally.tries += campaign.case(number, rng, place)
        except Failed as failure:
            tally.tries += 1
            tally.failures.append((number, str(failure)))
        shutil.rmtree(place, ignore_errors=True)


def _print(script: str, tally: Tally, seed: int) -> None:
    print(f"{tally.campaign:28}{tally.tries:8}{len(tally.failures):10}{tally.seconds:9.0f} s",
          flush=True)
    shown = tally.failures if os.environ.get("FAULTS_ALL") else tally.failures[:1]
    for number, message in shown:
        print(f"    python bench/{script} --only {tally.campaign} --seed {seed} --case {number}\n"
              f"    {message}", flush=True)


def _record(script: str, tallies: list[Tally], seed: int) -> None:
    from importlib.metadata import version

    new = not RECORD.exists()
    with RECORD.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for tally in tallies:
            writer.writerow(dict(
                date=datetime.date.today().isoformat(), script=script, campaign=tally.campaign,
                tries=tally.tries, failures=len(tally.failures), seconds=round(tally.seconds),
                seed=seed, versions=f"tinygrad {version('tinygrad')}"))
