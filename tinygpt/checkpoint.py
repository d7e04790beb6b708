"""Checkpoints: one safetensors file each, written atomically and never unpickled.

A run resumes from `ckpt_<iter>.safetensors`; `best.safetensors` has the lowest validation loss.
Tensors are named `model.*`, `optimizer.*`, `ema.*`; the values of the header's `__metadata__` are
JSON.
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
    """A checkpoint that is missing, damaged, does not match, or cannot be written."""


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value) -> bool:
    """Whether a JSON value is a number, or infinite as the best loss before any evaluation."""
    return (type(value) is float and value == value) or (
        type(value) is int and abs(value) < 2**53)


def _is_positive(value) -> bool:
    return _is_number(value) and 0 < value < float("inf")


# The metadata and their types; a script may add others.
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
    """An open checkpoint; `header` is its validated metadata. Raises CheckpointError."""

    error = CheckpointError
    remedy = "use another checkpoint"

    def __init__(self, path: str | Path):
        if not os.path.isfile(path):
            raise CheckpointError(f"there is no checkpoint {path}: train one with train.py, "
                                  "or name another")
        super().__init__(path)
        try:
            self.header = self._read_metadata()
        except CheckpointError:
            self.close()
            raise

    def part(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors with prefix, by name without it."""
        return part(self.shapes, prefix)

    def read_part(self, prefix: str) -> dict[str, np.ndarray]:
        """The tensors with prefix, by name without it."""
        return {name: self.read(prefix + name) for name in self.part(prefix)}

    def _read_metadata(self) -> dict:
        if not is_ours(self) or "model_config" not in self.metadata:
            raise CheckpointError(f"{self.path} was not saved by this project")
        try:
            header = {k: json.loads(v) for k, v in self.metadata.items()}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} has damaged metadata ({one_line(error)}): "
                                  f"{self.remedy}") from error
        _check_values(header, self.path)
        return header


def _check_values(header: dict, path: Path) -> None:
    for key, (kind, is_valid) in VALUES.items():
        if key in header and not is_valid(header[key]):
            raise CheckpointError(f"{path} has {key}={one_line(header[key])}, which is not {kind}")


def is_ours(file: TensorFile) -> bool:
    """Whether an open safetensors file is a checkpoint of this project."""
    return file.metadata.get("format") == json.dumps(FORMAT)


def name(iter_num: int) -> str:
    """The file name of the checkpoint of a step."""
    return f"ckpt_{iter_num}.safetensors"


def tokenizer_of(file: Checkpoint) -> Tokenizer | None:
    """The tokenizer in a checkpoint's metadata. Raises CheckpointError."""
    if not file.header.get("tokenizer"):
        return None
    try:
        tokenizer = load_tokenizer(file.header["tokenizer"])
    except ValueError as error:
        raise CheckpointError(f"{file.path} has a tokenizer that cannot be used "
                              f"({one_line(error)}): {file.remedy}") from error
    size = file.header["model_config"].get("vocab_size")
    if not isinstance(size, int) or tokenizer.vocab_size > size:
        raise CheckpointError(f"{file.path} has a tokenizer of {tokenizer.vocab_size} ids, but "
                              f"vocab_size={one_line(size)}: {file.remedy}")
    return tokenizer


def save(path: Path, tensors: dict[str, np.ndarray], metadata: dict) -> Path:
    """Writes tensors and metadata (JSON values) to path, atomically, and returns path.

    The file gets its name only when it is complete and synced. Raises CheckpointError if it cannot
    be written, or if metadata or tensors are invalid; an older file at path is unchanged then.
    """
    texts = _as_json(metadata | {"format": FORMAT, "tinygrad": version("tinygrad")}, path)
    # the widest dtype first, so that each tensor is aligned
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    layout = {name: (tensors[name].shape, NAMES[tensors[name].dtype]) for name in order}
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part, layout, (tensors[name] for name in order), texts)
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, TensorFileError) as error:
        with suppress(OSError):
            part.unlink()
        raise CheckpointError(f"{path} cannot be written ({error}): "
                              "what was saved before is unchanged") from error
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
    """Writes a small file atomically. Raises CheckpointError."""
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
    """Makes best.safetensors, in the folder of path, the same file as path."""
    part = path.with_name(f".{BEST}.part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, part)
        part.replace(path.with_name(BEST))
        part.unlink(missing_ok=True)  # a rename does nothing if both are the same file
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path.with_name(BEST)} cannot be written ({error})") from error


def is_of_step(path: Path, iter_num: int) -> bool:
    """Whether path is a readable checkpoint of that step."""
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
    """The items whose names begin with prefix, by name without it."""
    return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}


def check_shapes(saved: dict[str, tuple], ours: dict[str, tuple],
                 path: str | Path = "the state") -> None:
    """Raises CheckpointError unless saved has exactly the names and shapes of ours."""
    for key in sorted(set(ours) ^ set(saved)):
        raise CheckpointError(f"{path} {'has no' if key in ours else 'has an unknown'} "
                              f"tensor {key}")
    for key, shape in ours.items():
        if tuple(saved[key]) != tuple(shape):
            raise CheckpointError(f"{path} has {key} of shape {tuple(saved[key])}, "
                                  f"the model needs {tuple(shape)}")


def check_arrays(arrays: dict[str, np.ndarray], state: dict[str, Tensor],
                 path: str | Path = "the state") -> None:
    """Raises CheckpointError unless arrays match state in names, shapes, and whether they are
    floating-point."""
    check_shapes({k: a.shape for k, a in arrays.items()}, {k: t.shape for k, t in state.items()},
                 path)
    for key, tensor in state.items():
        if (arrays[key].dtype.kind == "f") != dtypes.is_float(tensor.dtype):
            raise CheckpointError(f"{path} has {key} in {arrays[key].dtype}, where "
                                  f"{tensor.dtype.name} is needed: use another checkpoint")


def check_same(path: str | Path, saved: dict, ours: dict, ignore: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError if a setting of the checkpoint differs from ours."""
    for key in ours:
        if key not in ignore and saved.get(key) != ours[key]:
            raise CheckpointError(f"{path} has {key}={saved.get(key)}, but {key}={ours[key]} was "
                                  "asked for: use the same value, or start a new run")


def model_kind(header: dict) -> str:
    """The kind of model in a checkpoint's metadata: "gpt" or "bigram"."""
    return header.get("model", "gpt")


def check_kind(path: str | Path, header: dict, kind: str) -> None:
    """Raises CheckpointError unless a checkpoint has a model of that kind. Its header was
    validated."""
    if (saved := model_kind(header)) != kind:
        raise CheckpointError(f"{path} has a {saved} model, not a {kind} model: train with "
                              f"--model {saved}, or start a new run")


def newest(out_dir: Path) -> Path | None:
    """The checkpoint of the highest step in out_dir."""
    return max(_numbered(out_dir), key=_iter_num, default=None)


def best_of_newest_run(out_dir: Path) -> Path:
    """The best checkpoint of the run that was saved last in out_dir or a folder in it.

    Raises CheckpointError if there is none.
    """
    found = [*out_dir.glob("*.safetensors"), *out_dir.glob("*/*.safetensors")]
    if not found:
        raise CheckpointError(f"there is no checkpoint in {out_dir}: run train.py first, "
                              "or name one with --checkpoint")
    run = max(found, key=lambda path: path.stat().st_mtime).parent
    best = run / BEST
    return best if best.exists() else max(run.glob("*.safetensors"), key=_iter_num)


def rotate(out_dir: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, and partial files."""
    for path in sorted(_numbered(out_dir), key=_iter_num)[:-keep]:
        path.unlink(missing_ok=True)
    delete_partial_files(out_dir)


def delete_partial_files(out_dir: Path) -> None:
    """Deletes the incomplete files of a killed run."""
    for pattern in RUN_FILES:
        for path in out_dir.glob(f".{pattern}.part"):
            path.unlink(missing_ok=True)


def check_out_dir(out_dir: Path) -> None:
    """Raises CheckpointError if a run cannot be written to out_dir, or if its config.json is not
    that of a run. Creates nothing."""
    existing = next((path for path in (out_dir, *out_dir.parents) if path.exists()), Path("."))
    if not existing.is_dir():
        raise CheckpointError(f"out_dir {out_dir}: {existing} is a file: name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"out_dir {out_dir}: {existing} is not writable: name another folder")
    if (settings := out_dir / "config.json").exists():
        try:
            is_ours = "out_dir" in json.loads(settings.read_bytes())
        except (OSError, ValueError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise CheckpointError(f"{settings} is not that of a run and would be overwritten: name "
                                  "another --out_dir")


@contextmanager
def locked(out_dir: Path):
    """Creates out_dir if necessary and locks it, so that one run at a time writes to it. A new
    folder that is empty at the end is removed. Raises CheckpointError."""
    new_folders, folder = _lock(out_dir)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in new_folders:
                path.rmdir()
        os.close(folder)


def _lock(out_dir: Path) -> tuple[list[Path], int]:
    """The folders created for out_dir, and its locked descriptor. Raises CheckpointError."""
    new_folders = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        folder = os.open(out_dir, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"out_dir {out_dir} cannot be created ({error.strerror}): name "
                              "another folder") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise CheckpointError(f"a run is writing to {out_dir}: name another --out_dir, or wait "
                              "for its end") from error
    except OSError:
        pass  # a file system without locks
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(folder), os.stat(out_dir)):
            return new_folders, folder
    os.close(folder)  # another run has removed the empty folder
    return _lock(out_dir)


def set_aside(out_dir: Path) -> Path | None:
    """Moves the run in out_dir to a new folder in it, and returns that folder."""
    files = [path for pattern in RUN_FILES for path in out_dir.glob(pattern)]
    if all(path.name == "config.json" for path in files):  # a run without a step
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
    """The checkpoints of a run, without files that a user has named."""
    return [path for path in out_dir.glob("ckpt_*.safetensors") if _iter_num(path) >= 0]


def _iter_num(path: Path) -> int:
    found = re.fullmatch(r"ckpt_(\d+)", path.stem)
    return int(found[1]) if found else -1


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # a file system that cannot sync folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
