"""Campaigns of bench/faults.py with concurrent processes: reads during saves, runs in one folder,
simultaneous tokenization, token files that are truncated."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from bench import damage, light
from bench.campaign import Campaign, Failed, Outcome, check, child
from bench.kills import check_end, ends
from gpt import GPT, GPTConfig
from tinygpt import checkpoint


class ReadsDuringSaves(Campaign):
    """A read while a run saves belongs to one save: all its tensors hold the same number."""

    name, weight = "reads-during-saves", 0.4
    config = GPTConfig(block_size=8, vocab_size=256, n_layer=2, n_head=2, n_embd=16)
    readers = ("load", "from_checkpoint", "from_pretrained")

    def save(self) -> None:
        model, number = GPT(self.config), 0
        shapes = {k: t.shape for k, t in model.state_dict().items()}
        while True:
            number += 1
            model.load_state_dict({k: np.full(s, number, np.float32) for k, s in shapes.items()})
            checkpoint.mark_best(model.save_checkpoint(number, out_dir="out"))
            checkpoint.rotate(Path("out"), 1)

    def read(self, reader: str, seconds: float) -> None:
        path, end, count = Path("out") / checkpoint.BEST, time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            if reader == "load":
                arrays = checkpoint.part(checkpoint.load(path)[0], "model.")
            else:
                arrays = {k: t.numpy() for k, t in getattr(GPT, reader)(path).state_dict().items()}
            numbers = {float(n) for array in arrays.values() for n in np.unique(array)}
            check(len(numbers) == 1, f"{reader} mixes the saves {numbers} in read {count}")
            count += 1
        print(count)

    def case(self, number, rng, folder):
        pid = os.fork()
        if not pid:
            os.chdir(folder)
            try:
                self.save()
            finally:
                os._exit(1)
        try:
            reader = self.readers[number % len(self.readers)]
            wait_for(folder / "out" / checkpoint.BEST)
            done = child(lambda: self.read(reader, 2), folder)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        check(done.status == 0, done)
        return int(done.out)


class RunsAtOnce(Campaign):
    """Two or three runs start in one folder at the same time: one locks it, the others are refused
    or start later, and nothing is lost."""

    name, weight = "runs-at-once", 0.5

    def prepare(self, folder: Path) -> None:
        light.write_text(folder)
        light.finished(folder)
        self.wanted = ends(folder / "out")

    def case(self, number, rng, folder):
        light.write_text(folder)
        delays = rng.uniform(0, 0.2, int(rng.integers(2, 4)))
        ended = at_once(folder, [lambda delay=delay: (time.sleep(delay), light.run(folder)())[1]
                                 for delay in delays])
        for done in ended:
            if done.status:
                check("is writing to" in done.refusal("train.py:"), done)
        good = sum(done.status == 0 for done in ended)
        check(good >= 1, f"all were refused: {ended[0]}")
        places = [folder / "out", *(folder / "out").glob("run_*")]
        check(len(places) == good, f"{good} runs, {len(places)} of them saved")
        for place in places:
            check_end(place, self.wanted)
        return len(ended)


class TokenizersAtOnce(Campaign):
    """Two to four processes tokenize the same new text, some while another text replaces it: all
    succeed, and each has the tokens of one of the texts."""

    name, weight = "tokenizing-at-once", 0.6

    def case(self, number, rng, folder):
        light.write_text(folder)
        shards, count = bool(number % 2), int(rng.integers(2, 5))

        def read() -> int:
            for _ in range(3):
                status = damage.tokens(folder, "text.txt", shards)()
            return status

        def replace() -> None:
            for letter in "abab":
                (folder / "next.txt").write_text(f"{letter} line\n" * 300)
                (folder / "next.txt").replace(folder / "text.txt")
                time.sleep(0.02)
        changed = not shards and number % 4 == 2
        ended = at_once(folder, [read] * count + [replace] * changed)
        wanted = set()
        for text in ["", "a line\n" * 300, "b line\n" * 300][:1 + 2 * changed]:
            place = folder / f"alone_{len(wanted)}"
            place.mkdir()
            (place / "text.txt").write_text(text or light.TEXT * 20)
            wanted |= {child(damage.tokens(place, "text.txt", shards), place).out.splitlines()[0]}
        for done in ended[:count]:
            check(done.status == 0 and set(done.out.splitlines()[::2]) <= wanted, done)
        return count


class ShrinkingTokens(Campaign):
    """A token file is truncated while a run reads it: one error line, or no effect."""

    name, weight = "tokens-that-shrink", 0.2

    def case(self, number, rng, folder):
        (folder / "text.txt").write_text(light.TEXT * 3000, encoding="utf-8")
        keep, step = int(rng.integers(0, 3)) * 4096, int(rng.integers(1, 9))
        name = ("train.bin", "val.bin")[number % 2]

        def run() -> int:
            train = light.LightSteps.train

            def step_and_shrink(steps, n, *rest):
                if n == step:
                    (path,) = folder.glob(f"data/cache/*/{name}")
                    os.truncate(path, keep)
                return train(steps, n, *rest)
            light.LightSteps.train = step_and_shrink
            return light.run(folder)()
        done = child(run, folder)
        check(done.status in (0, 2) and not done.timed_out, done)
        if done.status:
            check(name in done.refusal("train.py:"), f"does not name {name}: {done}")
        return 1


def wait_for(path: Path) -> None:
    for _ in range(2000):
        if path.exists():
            return
        time.sleep(0.01)
    raise Failed(f"{path} does not appear")


def at_once(folder: Path, functions: list) -> list[Outcome]:
    """Runs functions in children at the same time, and returns how each ended."""
    pipes = []
    for function in functions:
        read, write = os.pipe()
        if not os.fork():
            os.close(read)
            with suppress(OSError), open(write, "w") as file:
                json.dump(vars(child(function, folder)), file)
            os._exit(0)
        os.close(write)
        pipes.append(read)
    found = []
    for read in pipes:
        with open(read) as file:
            found.append(Outcome(**json.load(file)))
    for _ in pipes:
        os.wait()
    return found


def campaigns() -> list[Campaign]:
    return [ReadsDuringSaves(), RunsAtOnce(), TokenizersAtOnce(), ShrinkingTokens()]
