"""Every flag of every command with values of the wrong type, range and kind.

    python bench/bad_input.py [--only FLAG] [--limit 100] [--idle]

Each case runs in a process of its own, in an empty folder, forked from one that has everything
loaded. A command has to end within 60 s with status 0, or with status 2, nothing on stdout and one
line on stderr that names what is wrong. Prints each case that does not, and the counts. With
--idle no step is taken and no token is drawn, which is faster by far.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DEV", "CPU")

import numpy as np

import generate
import train
from gpt import GPT, GPTConfig, SampleConfig, TrainConfig
from tinygpt import check, evaluate
from tinygpt.config import kind_of
from tinygpt.decoder import Decoder
from tinygpt.run import Run
from tinygpt.tokenizer import ByteTokenizer

SECONDS = 60
WORDS = {
    int: ["", "three", "1.5", "true", "nan", "-1", "0", "1", "1e3", "99999999", str(10 ** 30),
          "9" * 5000, "auto", "None"],
    float: ["", "fast", "nan", "inf", "-1", "0", "1e308", "1e-320", "true", "None", "9" * 400],
    bool: ["perhaps", "", "2", "true", "no", "None"],
    str: ["", "nonsense", "/dev/zero", "/dev/null", ".", "/", "pipe", "\udcff", "a" * 5000, "0",
          "-", "deep.json", "{}", "*", "gtp2", "damaged.safetensors"],
    tuple: ["", "x", "\udcff", "a" * 5000],
}
VALUES = [True, None, [], {}, "x", "", -1, 0, 1.5, 10 ** 30, 10 ** 400, 1e308, ["a"]]
TRAIN = ["--data=text.txt", "--tokenizer=byte", "--block_size=8", "--n_layer=1", "--n_head=2",
         "--n_embd=16", "--batch_size=2", "--eval_iters=1", "--log_interval=1", "--max_iters=2",
         "--max_minutes=0.0001", "--out_dir=out"]
GENERATE = ["--checkpoint=ckpt_1.safetensors", "--max_new_tokens=2"]
EVALUATE = ["ckpt_1.safetensors", "short.txt"]
COMMANDS = {"train.py": (train.main, TRAIN, (GPTConfig, TrainConfig)),
            "generate.py": (generate.main, GENERATE, (generate.GenerateConfig, SampleConfig)),
            "check": (check.main, ["--kernels=reference"], (check.CheckConfig,)),
            "evaluate": (evaluate.main, EVALUATE, (evaluate.EvaluateConfig,))}


def prepare(folder: Path) -> None:
    """What the commands find in their folder."""
    (folder / "text.txt").write_text("To sleep: perchance to dream.\n" * 40)
    (folder / "short.txt").write_text("To sleep: perchance to dream.\n")
    (folder / "deep.json").write_text("[" * 100000)
    (folder / "damaged.safetensors").write_bytes(b"\x40" + bytes(40))
    os.mkfifo(folder / "pipe")
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = ByteTokenizer()
    model.save_checkpoint(1, None, folder)


def cases():
    """(command, argv, files that are written before)"""
    for command, (_, base, classes) in COMMANDS.items():
        for f in [f for cls in classes for f in fields(cls)]:
            required = f.metadata.get("positional") == "required"
            for word in WORDS[kind_of(f)[0]]:
                if required:
                    at = [f.name for f in fields(evaluate.EvaluateConfig)].index(f.name)
                    yield command, [*base[:at], word, *base[at + 1:]], {}
                else:
                    yield command, [*base, f"--{f.name}={word}"], {}
            if not required:
                yield command, [*base, f"--{f.name}"], {}
                yield command, [*base, f"--{f.name[:-1]}", "1"], {}
            if command == "train.py":
                for value in VALUES:
                    yield command, [*base, "--config=a.json"], {"a.json": json.dumps(
                        {f.name: value})}
        for words in (["--prompt"], ["--config"], ["--config=pipe"], ["--config=deep.json"],
                      ["--config=/dev/zero"], ["--preset=gtp2"], ["--preset"], ["-x"], ["stray"],
                      ["--"], ["-"], ["--=3"], ["--resume"], ["--eval_only"]):
            yield command, [*base, *words], {}


def run(command: str, argv: list[str], files: dict[str, str], folder: Path) -> tuple[int, str, str]:
    """The status of a command that is forked off, -1 where it did not end, stdout and stderr."""
    for name, text in files.items():
        (folder / name).write_text(text)
    out, err = folder / ".out", folder / ".err"

    def work() -> int:
        os.setsid()
        for path, stream in ((out, sys.stdout), (err, sys.stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
        os.chdir(folder)
        signal.alarm(SECONDS)
        sys.argv[0] = command
        return COMMANDS[command][0](argv)

    status = in_child(work)
    return status, out.read_text(errors="replace"), err.read_text(errors="replace")


def in_child(work: Callable[[], object]) -> int:
    """The status of a process that is forked off to do some work."""
    child = os.fork()
    if not child:
        status = 1
        try:
            status = work() or 0
        except SystemExit as end:
            status = end.code
        except BaseException:  # noqa: BLE001 - what a command lets through is what is looked for
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def verdict(code: int, out: str, err: str) -> str:
    """"fine", "refused", or what is wrong."""
    if code < 0:
        return f"ended by signal {-code}"
    if "Traceback" in err:
        return "traceback"
    if code == 0:
        return "fine"
    if code != 2:
        return f"status {code}"
    return "refused" if out == "" and len(err.splitlines()) == 1 else "more than one line"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="cases whose words contain this")
    parser.add_argument("--limit", type=int, help="so many cases")
    parser.add_argument("--idle", action="store_true", help="compute nothing")
    asked = parser.parse_args()
    if asked.idle:
        Run.train = Run.evaluate_only = lambda run: None
        Decoder.run = lambda decoder, model, prompts, config: iter(
            np.zeros((2, len(prompts)), int))
    chosen = [case for case in cases() if not asked.only or asked.only in " ".join(case[1])]
    counts = Counter()
    with tempfile.TemporaryDirectory() as name:
        in_child(lambda: prepare(Path(name)))  # so that no thread of tinygrad's is in this one
        for command, argv, files in chosen[:asked.limit]:
            code, out, err = run(command, argv, files, Path(name))
            found = verdict(code, out, err)
            counts[found] += 1
            if found not in ("fine", "refused"):
                shown = " ".join(w[:60] for w in argv[len(COMMANDS[command][1]):] or argv)
                print(f"{found}: {command} {shown!r} {files}\n{err[-600:]}", flush=True)
    print(f"{sum(counts.values())} cases: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    return 0 if set(counts) <= {"fine", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
