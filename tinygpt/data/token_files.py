"""Token ids in files: train.bin and val.bin, and the meta.json that describes them.

What is read in one go is of one build, whatever happens to the folder meanwhile, and is checked
against the checksums in meta.json, where it has them. nanoGPT's files, which come without one, are
read too.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from tinygpt.data import DataError
from tinygpt.data.documents import checksum, open_file, reason
from tinygpt.data.tokenizer import load_tokenizer

IN_MEMORY = 256 << 20  # bytes up to which a file of ids is read as a whole
BLOCK = 1 << 22  # ids that are looked at in one go of what may not fit in memory
KEYS = {"made_with", "files", "dtype", "tokenizer"}  # that every meta.json has
OLD_KEYS = KEYS | {"train_bytes", "val_bytes"}  # and all that it had before there were checksums
LARGEST_VOCABULARY = 5 << 16  # that files without a meta.json are expected to be of


class Missing(DataError):
    """A file, or a folder, that is not there."""


class TokenFile:
    """The ids (n,) in a file too large to be read as a whole: len, dtype, and windows as slices.

    No memory map, because a file that is truncated under one ends the process by a signal; here
    reading raises DataError then.
    """

    def __init__(self, file: BinaryIO, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self._file = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        self._length = os.fstat(file.fileno()).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        """The id at index, or the ids of a slice whose step is 1."""
        if not isinstance(index, slice):
            at = range(self._length)[index]
            return self[at:at + 1][0]
        start, stop, step = index.indices(self._length)
        assert step == 1, "only what is contiguous in the file can be read"
        size = max(0, stop - start) * self.dtype.itemsize
        try:
            raw = os.pread(self._file.fileno(), size, start * self.dtype.itemsize)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read any more ({reason(error)})") from error
        if len(raw) != size:
            raise DataError(f"{self.path} has become shorter while it is read: make it again")
        return np.frombuffer(raw, self.dtype)


Ids = np.ndarray | TokenFile


def chunks(ids: Ids) -> Iterator[np.ndarray]:
    """The ids piece by piece, so that what is larger than memory is never in it as a whole."""
    return (ids[i:i + BLOCK] for i in range(0, len(ids), BLOCK))


def digest(ids: Ids) -> str:
    """A hash of ids that does not depend on their type: of the bytes of a file of theirs, in
    uint16, or in uint32 where one is above 65535."""
    ids16 = ids.dtype.itemsize <= 2 or all(part.max() < 1 << 16 for part in chunks(ids))
    found = xxhash.xxh3_64()
    for part in chunks(ids):
        found.update(np.ascontiguousarray(part, dtype="<u2" if ids16 else "<u4"))
    return found.hexdigest()


class TokenFolder:
    """The files of ids in a folder and its meta.json, opened together.

    meta is {} where there is no meta.json. names are those of the files without .bin. Raises
    Missing where one is not there, DataError where meta.json is damaged. Close it after use, as a
    context manager does. remedy is what a message says of damage.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = ("train", "val"),
                 remedy: str = "make it again"):
        self.folder, self.remedy, self.meta = folder, remedy, {}
        self._files: dict[str, BinaryIO] = {}
        try:
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Missing(f"{folder} cannot be opened ({reason(error)})") from error
        try:  # of one folder, even if another takes its name meanwhile
            for name in names:
                self._files[name] = open_file(folder / f"{name}.bin", directory)
            with suppress(FileNotFoundError), open_file(folder / "meta.json", directory) as file:
                self.meta = self._parse_meta(file.read())
        except FileNotFoundError as error:
            self.close()
            raise Missing(f"there is no {folder / error.filename}") from error
        except (DataError, OSError) as error:
            self.close()
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder} cannot be read ({reason(error)}); {remedy}") from error
        finally:
            os.close(directory)

    def __enter__(self) -> "TokenFolder":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self) -> dict[str, tuple[Ids, str]]:
        """The ids of each file, and the checksum of its bytes. Raises DataError where one is
        damaged."""
        if self.meta:
            dtype = np.dtype(self.meta["dtype"])
        else:
            dtype = _guess_dtype(self.folder, self._files.values())
        return {name: self._read(name, file, dtype) for name, file in self._files.items()}

    def _read(self, name: str, file: BinaryIO, dtype: np.dtype) -> tuple[Ids, str]:
        path, size = self.folder / f"{name}.bin", os.fstat(file.fileno()).st_size
        wanted = self.meta.get(f"{name}_bytes", size)
        if size == 0 or size % dtype.itemsize or wanted != size:
            raise DataError(f"{path} is damaged: it has {size} bytes"
                            + (f" instead of {wanted!a}" if wanted != size else "")
                            + f"; {self.remedy}")
        try:
            if size <= IN_MEMORY:
                raw = file.read()
                found = xxhash.xxh3_64_hexdigest(raw)
                ids = np.frombuffer(raw[:len(raw) // dtype.itemsize * dtype.itemsize], dtype)
            else:
                ids, found = TokenFile(file, path, dtype), checksum(file)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({reason(error)}); {self.remedy}") from error
        if self.meta.get(f"{name}_checksum", found) != found or len(ids) * dtype.itemsize != size:
            raise DataError(f"{path} is damaged: its checksum is {found}, not "
                            f"{self.meta.get(f'{name}_checksum')} as in meta.json; {self.remedy}")
        return ids, found

    def _parse_meta(self, raw: bytes) -> dict:
        try:
            meta = parse_sealed(raw, old_keys=OLD_KEYS)
            if (set(meta) >= KEYS and meta["dtype"] in ("<u2", "<u4")
                    and isinstance(meta["made_with"], str) and meta["made_with"].isprintable()):
                load_tokenizer(meta["tokenizer"])
                return meta
        except (ValueError, TypeError):
            pass
        raise DataError(f"{self.folder / 'meta.json'} is damaged: {self.remedy}")


def write_meta(folder: Path, meta: dict) -> None:
    """Writes meta.json, with the sizes and checksums of the train.bin and val.bin there."""
    for name in ("train", "val"):
        with open_file(folder / f"{name}.bin") as file:
            meta = meta | {f"{name}_bytes": os.fstat(file.fileno()).st_size,
                           f"{name}_checksum": checksum(file)}
    part = folder / ".meta.json.part"
    part.write_bytes(sealed(meta))
    part.replace(folder / "meta.json")


def sealed(value: dict) -> bytes:
    """JSON with a checksum of itself, for `parse_sealed`."""
    return json.dumps(value | {"checksum": _seal(value)}).encode()


def parse_sealed(raw: bytes, old_keys: set[str] = frozenset()) -> dict:
    """What was `sealed`; also an object without a checksum that has old_keys at most. Raises
    ValueError where it was changed since."""
    try:
        value = json.loads(raw)
    except RecursionError as error:
        raise ValueError("JSON that is too deep") from error
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    found = value.pop("checksum", None)
    if found != _seal(value) if found is not None else not set(value) <= old_keys:
        raise ValueError("not what its checksum says")
    return value


def _seal(value: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())


def _guess_dtype(folder: Path, files) -> np.dtype:
    """The type of ids in files without a meta.json: uint16 as nanoGPT writes them, unless every
    second word is one that the upper half of a uint32 would be."""
    for file in files:
        raw = os.pread(file.fileno(), BLOCK, 0)
        upper = np.frombuffer(raw[:len(raw) // 4 * 4], "<u2")[1::2]
        if (os.fstat(file.fileno()).st_size % 4 or len(upper) < 8
                or (upper >= LARGEST_VOCABULARY >> 16).any()):
            return np.dtype("<u2")
    print(f"{folder} has no meta.json, and its ids look like uint32: they are read as such",
          file=sys.stderr)
    return np.dtype("<u4")


# ---- one process at a time makes a folder, and the others see all of it or nothing

@contextmanager
def locked(folder: Path):
    """While one process makes a folder, another waits here. Yields whether there is a lock: where
    no file can be made or locked, nothing is."""
    path = folder.with_name(f".{folder.name}.lock")
    lock = _lock(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            with suppress(OSError):
                path.unlink()
            os.close(lock)


def _lock(path: Path) -> int | None:
    """The descriptor of a lock file, which is this process's alone."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            _wait_for(lock, path.name[1:-5])
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass  # the process before has just deleted it
        except OSError:  # not every file system can
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _wait_for(lock: int, what: str) -> None:
    """Locks a file; says so where that takes more than a second. Raises OSError."""
    for _ in range(20):
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    print(f"waiting for another process, which makes the tokens of {what}", file=sys.stderr)
    fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def new_folder(folder: Path, clean: bool):
    """A folder of a name of its own, to be filled, that takes the place of `folder` at the end; or
    vanishes where the filling fails. With clean what a killed process left goes too."""
    beside = f".{folder.name}.part_"
    if clean:
        for left in folder.parent.glob(f"{beside}*"):
            shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(beside + secrets.token_hex(8))
    try:
        part.mkdir()
        yield part
        publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def publish(part: Path, folder: Path) -> None:
    """Gives the folder `part` the name `folder`; what has it goes, as a whole too."""
    while True:
        try:
            part.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = folder.with_name(f".{folder.name}.part_{secrets.token_hex(8)}")
        with suppress(FileNotFoundError):  # moved by another process just now
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
