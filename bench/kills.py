"""Campaigns of bench/faults.py with killed runs and failing disks: saved files are complete, and a
resumed run ends like an uninterrupted one, to the bit."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

from bench import damage, light
from bench.campaign import (
    COUNT,
    FAIL_ONCE,
    FULL,
    KILL,
    READONLY,
    ROOT,
    TEAR,
    Campaign,
    Failed,
    Outcome,
    armed,
    check,
    child,
)
from gpt import GPT, GPTConfig
from tinygpt import checkpoint

# The flags of runs; those with an odd index start in the folder of another run.
STARTS = ((), ("--keep", 1), ("--ema", "--seed", 4), ("--optimizer", "lion", "--schedule", "wsd"),
          ("--lora_rank", 2), ("--skip_spikes", 5, "--patience", 30))
FORMER_SEED = 99


class Kills(Campaign):
    """SIGKILL at each file call of a run, with half of the data written or none, and at further
    calls while it is resumed. The run ends like an uninterrupted one."""

    name, weight, fault = "kill-at-a-file-call", 7, (KILL, TEAR)

    def prepare(self, folder: Path) -> None:
        self.references: dict[int, tuple] = {}

    def reference(self, start: int, folder: Path) -> tuple:
        """The number of file calls of an uninterrupted run with these flags, how it ends, and a
        copy of the other run in its folder, if there is one."""
        if start not in self.references:
            place = folder / f"start_{start}_{os.getpid()}"
            place.mkdir()
            light.write_text(place)
            if start % 2:
                light.finished(place, "--seed", FORMER_SEED, "--max_iters", 2)
                shutil.copytree(place, place / "former")
            counted = child(armed(place, COUNT, 0, light.run(place, *STARTS[start])), place)
            check(counted.status == 0, counted)
            self.references[start] = (int(counted.out.splitlines()[-1]), ends(place / "out"),
                                      place / "former")
        return self.references[start]

    def case(self, number, rng, folder):
        start, nth = number % len(STARTS), number // len(STARTS)
        flags, (calls, wanted, former) = STARTS[start], self.reference(start, folder.parent)
        light.write_text(folder)
        if former.exists():
            shutil.copytree(former, folder, dirs_exist_ok=True)
        former_files = contents(folder / "out")
        # each call once, in an order that soon covers the whole run
        at = 1 + (nth + 1) * coprime(calls) % calls
        tries, kind = 0, self.fault[nth // calls % len(self.fault)]
        while True:
            step = light.newest_step(folder / "out", seed_of(flags))
            resume = ("--resume",) if step >= 0 else ()
            done = child(armed(folder, kind, at, light.run(folder, *flags, *resume)), folder)
            tries += 1
            self.after(done, folder, flags, step)
            if at == sys.maxsize:
                break
            at = int(rng.integers(1, calls)) if rng.random() < 0.5 else sys.maxsize
            kind = self.fault[int(rng.integers(len(self.fault)))] if at < sys.maxsize else COUNT
        check(done.status == 0, f"does not end: {done}")
        check_end(folder / "out", wanted)
        kept = contents(folder / "out")
        for name, data in former_files.items():
            check(data in kept.values(), f"{name} of the former run is lost")
        return tries - 1

    def after(self, done: Outcome, folder: Path, flags, step: int) -> None:
        """Raises Failed if the fault had other effects than allowed."""
        check(done.status in (0, -signal.SIGKILL) and not done.timed_out, done)
        check_whole(folder / "out")
        check(light.newest_step(folder / "out", seed_of(flags)) >= step, "a checkpoint is lost")


class DiskFaults(Kills):
    """A full disk or a read-only folder from each file call of a run on, or one failing call: an
    error line, nothing saved is lost, and the run can be resumed afterwards."""

    name, weight, fault = "disk-full-or-read-only", 2, (FULL, READONLY, FAIL_ONCE)

    def after(self, done, folder, flags, step):
        check(done.status in (0, 2, 141) and not done.timed_out, done)
        if done.status == 2:
            done.refusal("train.py:")
        check_whole(folder / "out")
        check(light.newest_step(folder / "out", seed_of(flags)) >= step, "a checkpoint is lost")


class LimitedFiles(Campaign):
    """Files with a size limit, as with `ulimit -f`."""

    name, weight, most = "files-of-limited-size", 0.4, 400

    def prepare(self, folder: Path) -> None:
        light.write_text(folder)
        light.finished(folder)
        self.wanted = ends(folder / "out")
        self.largest = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    def case(self, number, rng, folder):
        import resource

        light.write_text(folder)
        size = 1500 + int(self.largest * rng.random() * 1.2)  # large enough for the log

        def limited() -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return light.run(folder)()
        done = child(limited, folder)
        if done.status:
            done.refusal("train.py:")
        check_whole(folder / "out")
        resume = ("--resume",) if light.newest_step(folder / "out", 1337) >= 0 else ()
        done = child(light.run(folder, *resume), folder)
        check(done.status == 0, f"does not end: {done}")
        check_end(folder / "out", self.wanted)
        return 1


class KillsAtRandomTimes(Campaign):
    """SIGKILL at a random time, up to three times, of a run with its real, compiled steps."""

    name, weight = "kill-at-a-random-time", 1.5
    flags = ("--max_iters", 60, "--eval_interval", 10, "--learning_rate", 0.01)

    def prepare(self, folder: Path) -> None:
        light.write_text(folder)
        light.finished(folder, *self.flags, light=False)
        shutil.rmtree(folder / "out")
        self.seconds = light.finished(folder, *self.flags, light=False).seconds
        self.wanted = ends(folder / "out")

    def case(self, number, rng, folder):
        light.write_text(folder)
        kills = int(rng.integers(1, 4))
        for after in (*(self.seconds * rng.uniform(0.1, 1, kills)), None):
            resume = ("--resume",) if light.newest_step(folder / "out", 1337) >= 0 else ()
            done = child(light.run(folder, *self.flags, *resume, light=False), folder, 120, after)
            check(done.status in (0, -signal.SIGKILL) and not done.timed_out, done)
            check_whole(folder / "out")
        check(done.status == 0, f"does not end: {done}")
        check_end(folder / "out", self.wanted)
        return kills


class KillsOfCaches(Campaign):
    """SIGKILL and full disks during tokenization, in memory and in shards: the next run has the
    same tokens as without them."""

    name, weight = "kill-while-tokenizing", 1

    def prepare(self, folder: Path) -> None:
        self.wanted, self.calls = {}, {}
        for shards in (False, True):
            place = folder / f"shards_{shards}"
            place.mkdir()
            light.write_text(place)
            done = child(armed(place, COUNT, 0, damage.tokens(place, "text.txt", shards)), place)
            check(done.status == 0, done)
            *self.wanted[shards], calls = done.out.splitlines()
            self.calls[shards] = int(calls)

    def case(self, number, rng, folder):
        shards, nth = bool(number % 2), number // 2
        light.write_text(folder)
        read = damage.tokens(folder, "text.txt", shards)
        kinds, calls = (KILL, TEAR, FULL), self.calls[shards]
        done = child(armed(folder, kinds[nth // calls % 3], 1 + nth % calls, read), folder)
        if done.status != -signal.SIGKILL and done.status:
            done.refusal()
        again = child(read, folder)
        check(again.status == 0 and again.out.splitlines() == self.wanted[shards], again)
        left = [p.name for p in (folder / "data" / "cache").iterdir() if p.name.startswith(".")]
        check(shards or len(left) <= 1, f"{left} are left")
        return 1


class KillsOfExports(Campaign):
    """SIGKILL during an export: the folder is complete or does not exist."""

    name, weight = "kill-while-exporting", 0.6

    def prepare(self, folder: Path) -> None:
        self.wanted, self.calls = None, 0
        done = child(armed(folder, COUNT, 0, self.export), folder)
        check(done.status == 0, done)
        self.calls = int(done.out.splitlines()[-1])
        done = child(damage.pretrained("exported"), folder)
        check(done.status == 0, done)
        self.wanted = done.out

    def export(self) -> None:
        config = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16)
        GPT(config).save_pretrained("exported")

    def case(self, number, rng, folder):
        kind = (KILL, TEAR, FULL)[number // self.calls % 3]

        def export() -> int:
            try:
                self.export()
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            return 0
        done = child(armed(folder, kind, 1 + number % self.calls, export), folder)
        check(done.status in (0, 2, -signal.SIGKILL), done)
        if (folder / "exported").exists():
            read = child(damage.pretrained("exported"), folder)
            check(read.status == 0 and read.out == self.wanted, read)
        else:
            check(child(export, folder).status == 0, "cannot be exported again")
        return 1


class KilledRanks(Campaign):
    """SIGKILL of one of two processes under mpirun: the other ends too, and a resumed run equals an
    uninterrupted one."""

    name, weight = "kill-a-rank", 1
    flags = (*KillsAtRandomTimes.flags, "--gradient_accumulation_steps", 2, "--batch_size", 2)

    def start(self, folder: Path, *flags) -> subprocess.Popen:
        command = ["mpirun", "-n", "2", sys.executable, ROOT / "train.py", *light.FLAGS,
                   *self.flags, *flags]
        env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                            "FAULT_CASE": str(folder)}
        return subprocess.Popen(list(map(str, command)), cwd=folder, env=env, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def prepare(self, folder: Path) -> None:
        self.most = 0 if shutil.which("mpirun", path=f"{Path(sys.executable).parent}:"
                                      f"{os.environ['PATH']}") is None else None
        if self.most == 0:
            return
        light.write_text(folder)
        start = time.perf_counter()
        _, err = self.start(folder).communicate(timeout=120)
        check((folder / "out" / checkpoint.BEST).exists(), err)
        self.seconds, self.wanted = time.perf_counter() - start, ends(folder / "out")

    def case(self, number, rng, folder):
        light.write_text(folder)
        process = self.start(folder)
        time.sleep(self.seconds * float(rng.uniform(0.3, 0.95)))
        for pid in rank_of(folder, number % 2):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            _, err = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed("mpirun does not end") from None
        check("Traceback" not in err, err[-600:])
        check_whole(folder / "out")
        resume = ("--resume",) if light.newest_step(folder / "out", 1337) >= 0 else ()
        _, err = self.start(folder, *resume).communicate(timeout=120)
        check_end(folder / "out", self.wanted)
        return 1


# ---- checks

def seed_of(flags) -> int:
    return flags[flags.index("--seed") + 1] if "--seed" in flags else 1337


def contents(folder: Path) -> dict[str, bytes]:
    """The checkpoints below a folder."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def ends(out_dir: Path) -> dict:
    """The results of a finished run, for comparison."""
    return {"losses": light.losses(out_dir), "best": light.saved(out_dir / checkpoint.BEST),
            "last": light.saved(checkpoint.newest(out_dir))}


def check_end(out_dir: Path, wanted: dict) -> None:
    """Raises Failed unless a run has these results and left no partial files."""
    found = ends(out_dir)
    for what in ("best", "last"):
        check(found[what] == wanted[what], f"{what} is {found[what]}, not {wanted[what]}")
    for line, other in zip_longest(found["losses"], wanted["losses"]):
        check(line == other, f"metrics.jsonl has {line} where it should have {other}")
    left = [path.name for path in out_dir.rglob(".*")] + [p.name for p in out_dir.rglob("*.part")]
    check(not left, f"{left} are left")


def check_whole(out_dir: Path) -> None:
    """Raises Failed unless every file with its final name is complete."""
    for path in out_dir.rglob("[!.]*.safetensors"):
        try:
            checkpoint.load(path)
        except ValueError as error:
            raise Failed(f"not complete: {error}") from error
    for path in out_dir.rglob("config.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise Failed(f"{path} is not complete: {error}") from error
    for path in out_dir.rglob("loss.png"):
        check(path.stat().st_size > 0, f"{path} is empty")


def coprime(count: int) -> int:
    """A number above 0.6 count that is coprime to it."""
    return next(n for n in range(int(0.6 * count) + 1, 2 * count) if math.gcd(n, count) == 1)


def rank_of(folder: Path, rank: int) -> list[int]:
    """The processes of that rank that were started in folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if f"FAULT_CASE={folder}".encode() in words and f"PMI_RANK={rank}".encode() in words:
                found.append(int(path.parent.name))
    return found


def campaigns() -> list[Campaign]:
    return [Kills(), KillsAtRandomTimes(), KilledRanks(), KillsOfCaches(), KillsOfExports(),
            DiskFaults(), LimitedFiles()]
