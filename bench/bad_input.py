"""Tests the commands with bad input:

    python bench/bad_input.py --minutes 10

Every flag of every command gets values of the wrong type, range and kind. A command has to end with
status 0, or with status 2 and one line on stderr: no traceback, no files after an error, within a
limit of time and memory. Training uses the steps of bench/light.py.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("DEV", "CPU")
import generate
import train
from bench import campaign, damage, light
from bench.campaign import ROOT, Campaign, Outcome, check, child
from gpt import GPTConfig, TrainConfig
from tinygpt import check as check_command
from tinygpt import evaluate
from tinygpt.config import SampleConfig

SECONDS, MEGABYTES = 20, 2000
BIG = ("99999999", str(10**9), "1e9", str(10**30))
WORDS = ("", " ", "-1", "0", "1", "2", "0.5", "1.5", "-0.5", *BIG, str(-10**30), "9" * 5000,
         "1e308", "1e-320", "1e400", "auto", "gtp2", "nan", "inf", "-inf", "0x10",
         "1_0", "true", "False", "None", "null", "[]", "[1, 2]", "1,2", "{}", "x", "-", "--", "*",
         "\u00e9", "\udcff\udcfe", "\ud800", "line\nbreak", "a" * 100_000, "gone/file", "text.txt",
         "empty.txt", "latin1.txt", "utf16.txt", "binary.bin", "fifo", "folder", "loop",
         "base.safetensors", "tokens", "gpt2", ".", "/dev/zero", "/dev/full", "/dev/null",
         "/proc/self/mem")
LOOSE = (["stray"], ["-x"], ["--"], ["-"], ["--=3"], ["--config"], ["--config", "fifo"],
         ["--config", "/dev/zero"], ["--config", "folder"], ["--preset"], ["--preset", "gtp2"],
         ["--resume", "--eval_only"], ["--eval_only"], ["\udcff"], [""], ["--\ud800", "1"])
# Settings for which a large number is valid and takes long.
PATIENT = ("max_iters", "max_new_tokens", "eval_iters", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Command:
    """A command: its main(argv), the dataclasses of its settings, and valid flags, positional ones
    first."""

    name: str
    main: Callable[[list[str]], int]
    settings: tuple[type, ...]
    flags: tuple[str, ...]

    @property
    def prefix(self) -> str:
        return f"{self.name}:"


def commands() -> list[Command]:
    tiny = [str(flag) for flag in light.FLAGS]
    return [
        Command("train.py", train.main, (GPTConfig, TrainConfig),
                (*tiny, "--max_iters", "2", "--out_dir", "new")),
        Command("generate.py", generate.main, (generate.GenerateConfig, SampleConfig),
                ("--checkpoint", "base.safetensors", "--prompt", "a", "--max_new_tokens", "2")),
        Command("evaluate", evaluate.main, (evaluate.EvaluateConfig,),
                ("base.safetensors", "text.txt")),
        Command("check", short_check, (check_command.CheckConfig,),
                ("--checkpoint", "base.safetensors"))]


def short_check(argv: list[str]) -> int:
    """tinygpt.check without the checks of kernels and models, which take a minute."""
    check_command.code_checks = lambda *_: []
    return check_command.main(argv)


@functools.cache
def flags_of(command: Command) -> list[tuple[str, int | None]]:
    """The flags of a command, each with its position if it is positional."""
    place, found = 0, []
    for field in (f for cls in command.settings for f in fields(cls)):
        positional = command.name == "evaluate" and field.name in ("checkpoint", "text")
        found.append((field.name, place if positional else None))
        place += positional
    return found


def make_files(folder: Path) -> None:
    """Creates the files of bench/damage.py and the others in WORDS."""
    damage.make_files(folder)
    place = folder / "files"
    (place / "folder").mkdir()
    (place / "loop").symlink_to("loop")
    (place / "empty.txt").touch()
    (place / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1") * 100)
    (place / "utf16.txt").write_bytes(light.TEXT.encode("utf-16"))
    (place / "binary.bin").write_bytes(bytes(range(256)) * 3 + b"\1")


class Words(Campaign):
    """Each flag of a command with each of the words, in several notations."""

    def __init__(self, command: Command):
        self.command, self.name = command, f"flags-of-{command.name.removesuffix('.py')}"
        self.flags = flags_of(command)
        self.weight = len(self.flags) / 20 + 0.5
        self.most = 2 * len(self.flags) * len(WORDS)

    def prepare(self, folder: Path) -> None:
        done = child(lambda: make_files(folder), folder, 120)
        check(done.status == 0, done)

    def case(self, number, rng, folder):
        name, place = self.flags[number % len(self.flags)]
        word = WORDS[(number // len(self.flags) * 7 + number) % len(WORDS)]
        argv = list(self.command.flags)
        if place is not None:
            argv[place] = word
        else:
            argv += self.write(name, word, rng)
        done = run(self.command, argv, folder)
        shown = [w if len(w) < 200 else f"{w[:20]}..." for w in argv[len(self.command.flags):]]
        what = f"{self.command.name} {name} {shown or word[:40]!r}"
        patient = name in PATIENT and word in BIG
        judge(self.command, done, what, patient)
        return 1

    def write(self, name: str, word: str, rng) -> list[str]:
        flag = f"--{name.replace('_', '-')}" if rng.random() < 0.3 else f"--{name}"
        way = rng.random()
        if way < 0.3:
            return [f"{flag}={word}"]
        if way < 0.8:
            return [flag, word]
        if way < 0.85:
            return [flag]
        if way < 0.9:
            return [flag, word, flag, word]
        if way < 0.92:
            return LOOSE[int(rng.integers(len(LOOSE)))]
        if way < 0.96:
            at = int(rng.integers(2, len(flag)))
            return [flag[:at] + flag[at + 1:], word]
        return [flag, word, "--config", "out/config.json"]


class Configs(Campaign):
    """--config with JSON values of any kind."""

    name, weight = "values-in-a-config", 1.0
    prepare = Words.prepare

    def case(self, number, rng, folder):
        command = commands()[0]
        names = [f.name for cls in command.settings for f in fields(cls)]
        name = names[number % len(names)]
        value = damage.HOSTILE[number // len(names) % len(damage.HOSTILE)]
        files = {"json": json.dumps({name: value}), "deep": "[" * 100_000,
                 "deep object": '{"n_layer": ' * 5000, "empty": "", "list": "[1]"}
        kind = "json" if rng.random() < 0.95 else list(files)[int(rng.integers(len(files)))]
        damage.link(folder.parent / "files", folder)
        (folder / "given.json").write_text(files[kind])
        done = run(command, [*command.flags, "--config", "given.json"], folder)
        patient = name in PATIENT and isinstance(value, int) and value >= 10**9
        judge(command, done, f"--config {name}={str(value)[:60]!r} ({kind})", patient)
        return 1


class Surroundings(Campaign):
    """Environment variables, closed streams and missing devices, in separate processes."""

    name, weight = "environment-and-streams", 1.0
    prepare = Words.prepare
    environments = (
        {}, {"DEV": "NONSENSE"}, {"DEV": "CUDA"}, {"DEV": "CPU:1"}, {"DEV": ""}, {"DEV": "METAL"},
        {"CC": "/gone/cc"}, {"CC": "/bin/true"}, {"XDG_CACHE_HOME": "/dev/null"}, {"HOME": "/gone"},
        {"TIKTOKEN_CACHE_DIR": "/dev/null"}, {"PMI_RANK": "x", "PMI_SIZE": "2"}, {"LANG": "C"},
        {"PYTHONIOENCODING": "ascii"}, {"TMPDIR": "/gone"}, {"COLUMNS": "x"})
    streams = ("", "0<&-", "1>&-", "2>&-", "1>&- 2>&-", ">/dev/full", "2>/dev/full", "| true",
               "2>&1 | true")
    lines = ("train.py FLAGS --max_iters 2 --out_dir new", "-m tinygpt.evaluate BASE text.txt",
             "generate.py --checkpoint BASE --prompt a --max_new_tokens 2",
             "generate.py --checkpoint BASE --prompt - --max_new_tokens 2",
             "generate.py --checkpoint BASE --interactive --max_new_tokens 2",
             "train.py --help", "generate.py --help", "train.py FLAGS --device cuda",
             "generate.py --checkpoint BASE --device nonsense", "generate.py --nonsense 1")

    def case(self, number, rng, folder):
        damage.link(folder.parent / "files", folder)
        line = self.lines[number % len(self.lines)]
        rest = number // len(self.lines)
        env, stream = self.environments[0], self.streams[rest // 2 % len(self.streams)]
        if rest % 2:
            env, stream = self.environments[rest // 2 % len(self.environments)], ""
        script, *words = line.replace("FLAGS", " ".join(map(str, light.FLAGS))).replace(
            "BASE", "base.safetensors").split()
        name = "evaluate" if script == "-m" else script
        script = script if script == "-m" else str(ROOT / script)
        shell = f'exec "$0" "$@" {stream}'
        try:
            done = subprocess.run(["sh", "-c", shell, sys.executable, script, *words], cwd=folder,
                                  env={**os.environ, "PYTHONPATH": str(ROOT), **env}, text=True,
                                  capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise campaign.Failed(f"{line} {env} {stream}: over 60 s") from None
        what = f"{line} {env} {stream}: status {done.returncode} {done.stderr[-600:]!r}"
        check(done.returncode in (0, 2, 141), what)
        check("Traceback" not in done.stderr and "Exception ignored" not in done.stderr, what)
        if done.returncode == 2 and "2>" not in stream and "|" not in stream:
            own = [text for text in done.stderr.splitlines() if text.startswith(f"{name}: ")]
            check(len(own) == 1 and done.stderr.endswith(f"{own[0]}\n"), f"not one line: {what}")
            # a full stdout fails after status lines, such as the name of the checkpoint
            check(stream == ">/dev/full" or done.stderr == f"{own[0]}\n", f"not one line: {what}")
        return 1


def run(command: Command, argv: list[str], folder: Path) -> Outcome:
    """Runs a command in a child, in a folder with the files in WORDS."""
    damage.link(folder.parent / "files", folder)
    if not (folder / "fifo").exists():
        os.mkfifo(folder / "fifo")

    def call() -> int:
        light.cache_in(folder)
        light.use_light_steps()
        sys.argv[0] = command.name
        return command.main(argv)
    (folder / "data" / "cache").mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*"))
    done = child(call, folder, SECONDS)
    left = sorted(str(p.relative_to(folder)) for p in set(folder.rglob("*")) - before)
    if done.status == 2 and "out of memory" not in done.err:  # not predictable
        check(not left, f"{argv[len(command.flags):]} was refused and left {left}: {done}")
    return done


def judge(command: Command, done: Outcome, what: str, patient: bool) -> None:
    """Raises Failed unless the command ended as required."""
    if patient and done.timed_out:
        return
    what = f"{what}: {done}"
    fine = (0, 1, 2) if command.name == "check" else (0, 2)  # 1: a check failed
    check(done.status in fine and not done.timed_out, what)
    check(done.megabytes < MEGABYTES, what)
    check("Traceback" not in done.err, what)
    if done.status == 2:
        check(len(done.err.splitlines()) == 1 and done.err.startswith(command.prefix)
              and not done.out, f"not one line: {what}")


def campaigns() -> list[Campaign]:
    return [*map(Words, commands()), Configs(), Surroundings()]


if __name__ == "__main__":
    light.warm_up()
    sys.exit(campaign.main("bad_input.py", __doc__, campaigns, 10))
