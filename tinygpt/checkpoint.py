"""Checkpoints: one safetensors file each, written whole or not at all, and never unpickled.

`ckpt_<iter>.safetensors` is what a run resumes from, `best.safetensors` the one with the lowest
validation loss. Tensors are named `model.*`, `optimizer.*`, `ema.*`; the values of the header's
`__metadata__` are JSON.
"""

import fcntl
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt.data.tokenizer import Tokenizer, load_tokenizer
from tinygpt.safetensors_file import NAMES, TensorFile, TensorFileError, one_line, write

FORMAT = "tinygpt-1"
BEST = "best.safetensors"
RUN_FILES = ("ckpt_*.safetensors", BEST, "lora.safetensors", "metrics.jsonl", "loss.png",
             "tensorboard", "config.json")


class CheckpointError(TensorFileError):
    """A checkpoint that is missing, damaged, does not fit, or cannot be written."""


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value) -> bool:
    """Whether a JSON value is a number or infinite: the best loss is, before an evaluation."""
    return (type(value) is float and value == value) or (
        type(value) is int and abs(value) < 2**53)


def _is_positive(value) -> bool:
    return _is_number(value) and 0 < value < float("inf")


# What a header's values are; a script may add others of its own
VALUES = {
    "model": ("gpt or bigram", lambda v: v in ("gpt", "bigram")),
    "model_config": ("an object", lambda v: isinstance(v, dict)),
    "train_config": ("an object", lambda v: isinstance(v, dict)),
    "tokenizer": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "lora_tokenizer": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "lora_alpha": ("a number above 0 or null", lambda v: v is None or _is_positive(v)),
    "iter_num": ("a number of steps", _is_count),
    "stale_evaluations": ("a number of evaluations", _is_count),
    "best_val_loss": ("a number", _is_number),
    "is_best": ("true or false", lambda v: isinstance(v, bool)),
    "loss_scale": ("an object", lambda v: isinstance(v, dict)),
    "gradient_norms": ("a list of numbers",
                       lambda v: isinstance(v, list) and all(map(_is_number, v))),
}


class Checkpoint(TensorFile):
    """An open checkpoint: `header` has its metadata, checked. Raises CheckpointError."""

    error = CheckpointError
    remedy = "use another one"

    def __init__(self, path: str | Path):
        if not os.path.isfile(path):
            raise CheckpointError(f"there is no checkpoint {path}: train one with train.py, "
                                  "or name another")
        super().__init__(path)
        try:
            self.header = self._checked()
        except CheckpointError:
            self.close()
            raise

    def part(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors whose names begin with prefix, under what follows it."""
        return part(self.shapes, prefix)

    def read_part(self, prefix: str) -> dict[str, np.ndarray]:
        """The tensors whose names begin with prefix, under what follows it."""
        return {name: self.read(prefix + name) for name in self.part(prefix)}

    def _checked(self) -> dict:
        if not is_ours(self) or "model_config" not in self.metadata:
            raise CheckpointError(f"{self.path} was not saved by this project")
        try:
            header = {k: json.loads(v) for k, v in self.metadata.items()}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} has damaged metadata ({one_line(error)}): "
                                  "use another one") from error
        _check_values(header, self.path)
        return header


def _check_values(header: dict, path: Path) -> None:
    for key, (kind, holds) in VALUES.items():
        if key in header and not holds(header[key]):
            raise CheckpointError(f"{path} has {key}={one_line(header[key])}, which is not {kind}")


def is_ours(file: TensorFile) -> bool:
    """Whether an open safetensors file says that this project wrote it."""
    return file.metadata.get("format") == json.dumps(FORMAT)


def name(iter_num: int) -> str:
    """The file name of the checkpoint after that many steps."""
    return f"ckpt_{iter_num}.safetensors"


def tokenizer_of(file: Checkpoint) -> Tokenizer | None:
    """The tokenizer in a checkpoint's metadata. Raises CheckpointError."""
    if not file.header.get("tokenizer"):
        return None
    try:
        tokenizer = load_tokenizer(file.header["tokenizer"])
    except ValueError as error:
        raise CheckpointError(f"{file.path} has a tokenizer that cannot be used "
                              f"({one_line(error)}): use another one") from error
    size = file.header["model_config"].get("vocab_size")
    if not isinstance(size, int) or tokenizer.vocab_size > size:
        raise CheckpointError(f"{file.path} has a tokenizer of {tokenizer.vocab_size} ids, but "
                              f"vocab_size={one_line(size)}: use another one")
    return tokenizer


def save(path: Path, tensors: dict[str, np.ndarray], metadata: dict) -> Path:
    """Writes tensors and metadata (JSON values) to path, atomically, and returns path.

    The file appears under its name only when it is whole and on the disk. Raises CheckpointError
    where it cannot be written, metadata has a value that cannot be read back, or a tensor has NaN
    or infinite values; what stood at path before stays.
    """
    texts = _as_json(metadata | {"format": FORMAT, "tinygrad": version("tinygrad")}, path)
    # the widest first, so that each tensor is aligned
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    like = {name: (tensors[name].shape, NAMES[tensors[name].dtype]) for name in order}
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part, like, (tensors[name] for name in order), texts)
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, TensorFileError) as error:
        with suppress(OSError):
            part.unlink()
        raise CheckpointError(f"{path} cannot be written ({error}): "
                              "what was saved before is untouched") from error
    return path


def _as_json(metadata: dict, path: Path) -> dict[str, str]:
    try:
        texts = {k: json.dumps(v) for k, v in metadata.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the metadata for {path} cannot be written as JSON "
                              f"({one_line(error)})") from error
    _check_values({k: json.loads(text) for k, text in texts.items()}, path)
    return texts


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a small file so that it is whole or what it was before. Raises CheckpointError."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise CheckpointError(f"{path} cannot be written ({error})") from error


def mark_best(path: Path) -> None:
    """Makes best.safetensors, beside path, the same file as path."""
    part = path.with_name(f".{BEST}.part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, part)
        part.replace(path.with_name(BEST))
        part.unlink(missing_ok=True)  # a rename does nothing where both are one file already
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path.with_name(BEST)} cannot be written ({error})") from error


def is_of_step(path: Path, iter_num: int) -> bool:
    """Whether a readable checkpoint of that many steps is at path."""
    try:
        return load_metadata(path).get("iter_num") == iter_num
    except CheckpointError:
        return False


def load(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the metadata of a checkpoint. Raises CheckpointError."""
    with Checkpoint(path) as file:
        return file.read_part(""), file.header


def load_metadata(path: str | Path) -> dict:
    """The metadata of a checkpoint, without its tensors. Raises CheckpointError."""
    with Checkpoint(path) as file:
        return file.header


def part(named: dict, prefix: str) -> dict:
    """What has a name that begins with prefix, under what follows it."""
    return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}


def check_shapes(theirs: dict[str, tuple], ours: dict[str, tuple],
                 path: str | Path = "the state") -> None:
    """Raises CheckpointError unless theirs has exactly the names and shapes of ours."""
    for key in sorted(set(ours) ^ set(theirs)):
        raise CheckpointError(f"{path} {'has no' if key in ours else 'has an unknown'} "
                              f"tensor {key}")
    for key, shape in ours.items():
        if tuple(theirs[key]) != tuple(shape):
            raise CheckpointError(f"{path} has {key} of shape {tuple(theirs[key])}, "
                                  f"the model needs {tuple(shape)}")


def check_arrays(arrays: dict[str, np.ndarray], state: dict[str, Tensor],
                 path: str | Path = "the state") -> None:
    """Raises CheckpointError unless the arrays have the names, the shapes and the kinds of number
    of a state's tensors."""
    check_shapes({k: a.shape for k, a in arrays.items()}, {k: t.shape for k, t in state.items()},
                 path)
    for key, tensor in state.items():
        if (arrays[key].dtype.kind == "f") != dtypes.is_float(tensor.dtype):
            raise CheckpointError(f"{path} has {key} in {arrays[key].dtype}, where "
                                  f"{tensor.dtype.name} is needed: use another one")


def check_same(path: str | Path, theirs: dict, ours: dict, ignore: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError where a setting of the checkpoint differs from ours."""
    for key in ours:
        if key not in ignore and theirs.get(key) != ours[key]:
            raise CheckpointError(f"{path} has {key}={theirs.get(key)}, but {key}={ours[key]} was "
                                  "asked for: use the same, or start a new run")


def model_kind(header: dict) -> str:
    """The model that a checkpoint's metadata names: "gpt" or "bigram"."""
    return header.get("model", "gpt")


def check_kind(path: str | Path, header: dict, kind: str) -> None:
    """Raises CheckpointError where a checkpoint is not of the model `kind`."""
    if (theirs := model_kind(header)) not in ("gpt", "bigram"):
        raise CheckpointError(f"{path} has a model {theirs!r}, which is none that there is here: "
                              "use another one")
    if theirs != kind:
        raise CheckpointError(f"{path} has a {theirs} model, not a {kind} model: train with "
                              f"--model {theirs}, or start a new run")


def newest(out_dir: Path) -> Path | None:
    """The checkpoint of the most steps in out_dir."""
    return max(_numbered(out_dir), key=_iter_num, default=None)


def best_of_newest_run(out_dir: Path) -> Path:
    """The best checkpoint of the run in out_dir, or below it, that was saved last.

    Raises CheckpointError where there is none.
    """
    found = [*out_dir.glob("*.safetensors"), *out_dir.glob("*/*.safetensors")]
    if not found:
        raise CheckpointError(f"there is no checkpoint in {out_dir}: run train.py first, "
                              "or name one with --checkpoint")
    run = max(found, key=lambda path: path.stat().st_mtime).parent
    best = run / BEST
    return best if best.exists() else max(run.glob("*.safetensors"), key=_iter_num)


def rotate(out_dir: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, and what an interrupted save left."""
    for path in sorted(_numbered(out_dir), key=_iter_num)[:-keep]:
        path.unlink(missing_ok=True)
    sweep(out_dir)


def sweep(out_dir: Path) -> None:
    """Deletes what a run that was killed has left half-written."""
    for pattern in RUN_FILES:
        for path in out_dir.glob(f".{pattern}.part"):
            path.unlink(missing_ok=True)


def check_out_dir(out_dir: Path) -> None:
    """Raises CheckpointError where out_dir cannot be the folder of a run, or has a config.json that
    is no run's. Makes nothing."""
    there = next((path for path in (out_dir, *out_dir.parents) if path.exists()), Path("."))
    if not there.is_dir():
        raise CheckpointError(f"out_dir {out_dir}: {there} is a file: name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"out_dir {out_dir}: {there} cannot be written: name another")
    if (settings := out_dir / "config.json").exists():
        try:
            is_ours = "out_dir" in json.loads(settings.read_bytes())
        except (OSError, ValueError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise CheckpointError(f"{settings} is not that of a run, which would write its own "
                                  "there: name another --out_dir")


@contextmanager
def locked(out_dir: Path):
    """Makes the folder of a run where it is not there, and while a run writes into it no other one
    does. A folder that was made and is left empty is removed. Raises CheckpointError."""
    made, folder = _lock(out_dir)
    try:
        yield
    finally:
        with suppress(OSError):  # of one that is not empty
            for path in made:
                path.rmdir()
        os.close(folder)


def _lock(out_dir: Path) -> tuple[list[Path], int]:
    """The folders that were made for out_dir, and its locked descriptor. Raises CheckpointError."""
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        folder = os.open(out_dir, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"out_dir {out_dir} cannot be made ({error.strerror}): name another"
                              ) from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise CheckpointError(f"a run is writing into {out_dir}: name another --out_dir, or "
                              "wait for its end") from error
    except OSError:
        pass  # not every file system can
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(folder), os.stat(out_dir)):
            return made, folder
    os.close(folder)  # another run has removed the folder, which it left empty
    return _lock(out_dir)


def set_aside(out_dir: Path) -> Path | None:
    """Moves the run that out_dir holds into a new folder below it, and returns that folder."""
    files = [path for pattern in RUN_FILES for path in out_dir.glob(pattern)]
    if all(path.name == "config.json" for path in files):  # of a run that never took a step
        return None
    number = 1
    while (folder := out_dir / f"run_{number}").exists():
        number += 1
    try:
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
    except OSError as error:
        raise CheckpointError(f"the run in {out_dir} cannot be moved to {folder} "
                              f"({error.strerror}): name another --out_dir") from error
    return folder


def _numbered(out_dir: Path) -> list[Path]:
    """The checkpoints of a run; a file that only looks like one is the user's own."""
    return [path for path in out_dir.glob("ckpt_*.safetensors") if _iter_num(path) >= 0]


def _iter_num(path: Path) -> int:
    found = re.fullmatch(r"ckpt_(\d+)", path.stem)
    return int(found[1]) if found else -1


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
