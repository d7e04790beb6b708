"""Checkpoints: one safetensors file each, written whole or not at all, and never unpickled.

`ckpt_<iter>.safetensors` is what a run can go on from, `best.safetensors` the one with the lowest
validation loss. Tensors are named `model.*`, `optimizer.*`; the header's `__metadata__` holds one
JSON string per fact.
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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "tinygpt-1"
BEST = "best.safetensors"
RUN_FILES = ("ckpt_*.safetensors", BEST, "lora.safetensors", "metrics.jsonl", "loss.png",
             "tensorboard", "config.json")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, does not fit, or cannot be written."""


def name(iter_num: int) -> str:
    """The file name of the checkpoint after that many steps."""
    return f"ckpt_{iter_num}.safetensors"


def save(path: Path, tensors: dict[str, np.ndarray], facts: dict) -> Path:
    """Writes tensors and facts (JSON values) to path, atomically, and returns path.

    The file appears under its name only when it is whole and on the disk. Raises CheckpointError
    where it cannot be written; what stood at path before stays.
    """
    facts = facts | {"format": FORMAT, "tinygrad": version("tinygrad")}
    metadata = {k: json.dumps(v) for k, v in facts.items()}
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata)
        part.chmod(0o666 & ~_umask())
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink()
        raise CheckpointError(f"{path} cannot be written ({error}): "
                              "what was saved before is untouched") from error
    return path


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
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path.with_name(BEST)} cannot be written ({error})") from error


def load(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the facts of a checkpoint. Raises CheckpointError."""
    facts = load_metadata(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {k: file.get_tensor(k) for k in names}, facts
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use another one") from error


def load_metadata(path: str | Path) -> dict:
    """The facts of a checkpoint, without its tensors. Raises CheckpointError."""
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no checkpoint {path}: train one with train.py, "
                              "or name another")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}): "
                              "use another one") from error
    if metadata.get("format") != json.dumps(FORMAT) or "model_config" not in metadata:
        raise CheckpointError(f"{path} was not saved by this project")
    try:
        return {k: json.loads(v) for k, v in metadata.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}): use another one") from error


def part(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with prefix, under what follows it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def check_shapes(arrays: dict[str, np.ndarray], wanted: dict[str, tuple],
                 path: str | Path = "the state") -> None:
    """Raises CheckpointError unless the arrays have exactly the wanted names and shapes."""
    for key in sorted(set(wanted) ^ set(arrays)):
        raise CheckpointError(f"{path} {'has no' if key in wanted else 'has an unknown'} "
                              f"tensor {key}")
    for key, shape in wanted.items():
        if tuple(arrays[key].shape) != tuple(shape):
            raise CheckpointError(f"{path} has {key} of shape {tuple(arrays[key].shape)}, "
                                  f"the model needs {tuple(shape)}")


def check_same(path: str | Path, theirs: dict, ours: dict, ignore: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError where a setting of the checkpoint differs from ours."""
    for key in ours:
        if key not in ignore and theirs.get(key) != ours[key]:
            raise CheckpointError(f"{path} has {key}={theirs.get(key)}, but {key}={ours[key]} was "
                                  "asked for: use the same, or start a new run")


def model_kind(facts: dict) -> str:
    """The model that a checkpoint's metadata names: "gpt" or "bigram"."""
    return facts.get("model", "gpt")


def check_kind(path: str | Path, facts: dict, kind: str) -> None:
    """Raises CheckpointError where a checkpoint is not of the model `kind`."""
    if (theirs := model_kind(facts)) not in ("gpt", "bigram"):
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
    for path in out_dir.glob(".*.safetensors.part"):
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
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        folder = os.open(out_dir, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"out_dir {out_dir} cannot be made ({error.strerror}): name another"
                              ) from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"a run is writing into {out_dir}: name another --out_dir, or "
                                  "wait for its end") from error
        except OSError:
            pass  # not every file system can
        yield
    finally:
        os.close(folder)
        with suppress(OSError):  # of one that is not empty
            for path in made:
                path.rmdir()


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
