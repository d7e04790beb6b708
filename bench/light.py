"""Runs of train.py for the fault campaigns, with a tiny model and steps in numpy instead of
compiled ones: a run writes all its files in a fifth of a second."""

import hashlib
import importlib
import json
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tinygrad import Tensor

import train
from bench.campaign import Outcome, child
from tinygpt import checkpoint, device

RUN = importlib.import_module("tinygpt.training.run")
DATA = sys.modules[train.load_data.__module__]
TEXT = "The harbour sleeps, and I that know her dreams\nMust wake and walk them with a lead.\n"
FLAGS = ("--data", "text.txt", "--tokenizer", "byte", "--block_size", "8", "--n_layer", "1",
         "--n_head", "2", "--n_embd", "16", "--batch_size", "4", "--eval_iters", "1",
         "--log_interval", "1", "--max_iters", "10", "--eval_interval", "2", "--patience", "0",
         "--out_dir", "out")


class LightSteps(RUN.Steps):
    """Weights and optimizer state decay, and a little of the batch is added."""

    def train(self, number, batch, *_):
        drawn = float(batch(number)[0].mean()) / 256
        parts = [*self.params.values(), *self.optimizer.state_dict().values()]
        parts += self.ema.state_dict().values() if self.ema else ()
        for tensor in parts:
            array = device.read(tensor)
            if array.dtype.kind == "f":
                device.write(tensor, array * 0.99 + drawn * 1e-3)
            else:
                device.write(tensor, array + 1)
        return self._value(parts), 1.0

    def evaluate(self, *_):
        return self._value(self.model.state_dict().values())

    def _value(self, tensors) -> float:
        """A hash of the tensors, between 1 and 2."""
        code = 0
        for tensor in tensors:
            code = zlib.crc32(device.read(tensor).tobytes(), code)
        return 1 + code / 2**32


def use_light_steps() -> None:
    """Replaces compiled steps, samples and pictures in this process."""
    RUN.Steps = LightSteps
    RUN.Run.sample = lambda run, model: None
    Figure.subplots = lambda figure, *_, **__: (_Nothing(), _Nothing())
    Figure.savefig = lambda figure, file, **_: file.write(b"a picture" * 100)


class _Nothing:
    """Axes that ignore every call."""

    def __getattr__(self, name):
        return lambda *_, **__: None


def warm_up() -> None:
    """Imports and initializes what each child would need, before the fork. Opens no device, because
    a child would not have its threads."""
    importlib.import_module("tinygrad.runtime.support.compiler_cpu")
    target = Tensor.empty(4)
    for tensor in (Tensor(np.ones(4, np.float32)), target.assign(target + 1), Tensor.zeros(4)):
        tensor.contiguous().schedule_linear()


def cache_in(folder: Path) -> None:
    """Sets the cache of tokens to folder/data."""
    if not (folder / "data").exists():
        (folder / "data").mkdir()
    DATA.DATA_DIR = folder / "data"


def run(folder: Path, *flags, light: bool = True):
    """A function for `child`: train.py with these flags and its cache in folder."""
    def call() -> int:
        cache_in(folder)
        if light:
            use_light_steps()
        sys.argv[0] = "train.py"  # the prefix of its messages
        return train.main([*FLAGS, *map(str, flags)])
    return call


def write_text(folder: Path) -> None:
    """Writes the training text of a run in folder."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")


def finished(folder: Path, *flags, light: bool = True) -> Outcome:
    """The outcome of a run in folder. Raises RuntimeError if it fails."""
    done = child(run(folder, *flags, light=light), folder, 120)
    if done.status:
        raise RuntimeError(f"the run that others are compared with failed: {done}")
    return done


# ---- the results of a run

def losses(out_dir: Path) -> list[list]:
    """The step and losses in each line of metrics.jsonl."""
    found = []
    for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.append([record["iter"], record.get("loss"), record.get("val_loss")])
    return found


def digest(tensors: dict) -> str:
    """A hash of the names, shapes and bits of arrays."""
    total = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        array = np.ascontiguousarray(array)
        total.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return total.hexdigest()


def saved(path: Path) -> list:
    """The step of a checkpoint and a digest of its tensors. Raises ValueError."""
    tensors, metadata = checkpoint.load(path)
    return [metadata.get("iter_num"), digest(tensors)]


def newest_step(out_dir: Path, seed: int) -> int:
    """The step of the newest checkpoint of the run with that seed, or -1."""
    with suppress(checkpoint.CheckpointError):
        if (path := checkpoint.newest(out_dir)) is not None:
            metadata = checkpoint.load_metadata(path)
            if metadata["train_config"]["seed"] == seed:
                return metadata["iter_num"]
    return -1
