"""Token files: train.bin and val.bin, and meta.json with their metadata.

The files of a folder are opened together, so that they belong to one build even if the folder is
replaced meanwhile, and are verified with the checksums in meta.json. nanoGPT's files, which have no
meta.json, are read too.
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

IN_MEMORY = 256 << 20  # maximum size in bytes of a token file that is read as a whole
BLOCK = 1 << 22  # ids per chunk of an array that may not fit in memory
KEYS = {"made_with", "files", "dtype", "tokenizer"}  # in every meta.json
OLD_KEYS = KEYS | {"train_bytes", "val_bytes"}  # the keys before checksums were added
LARGEST_VOCABULARY = 5 << 16  # assumed for files without a meta.json


class MissingFile(DataError):
    """A file or folder that does not exist."""


class TokenFile:
    """The ids (n,) in a file that is too large to be read as a whole: len, dtype, and slices.

    Not a memory map: if a mapped file is truncated, a signal ends the process. Here reading raises
    DataError.
    """

    def __init__(self, file: BinaryIO, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self._file = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        self._length = os.fstat(file.fileno()).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        """The id at index, or the ids of a slice of step 1."""
        if not isinstance(index, slice):
            position = range(self._length)[index]
            return self[position:position + 1][0]
        start, stop, step = index.indices(self._length)
        assert step == 1, "only contiguous ids can be read"
        size = max(0, stop - start) * self.dtype.itemsize
        try:
            raw = os.pread(self._file.fileno(), size, start * self.dtype.itemsize)
        except OSError as error:
            raise DataError(f"{self.path} can no longer be read ({reason(error)}): start again"
                            ) from error
        if len(raw) != size:
            raise DataError(f"{self.path} became shorter while it was read: create it again")
        return np.frombuffer(raw, self.dtype)


Ids = np.ndarray | TokenFile


def chunks(ids: Ids) -> Iterator[np.ndarray]:
    """Yields ids in chunks, for files that are larger than memory."""
    return (ids[i:i + BLOCK] for i in range(0, len(ids), BLOCK))


def digest(ids: Ids) -> str:
    """A hash of ids that does not depend on their dtype: that of their bytes as uint16, or as
    uint32 if an id is above 65535."""
    ids16 = ids.dtype.itemsize <= 2 or all(part.max() < 1 << 16 for part in chunks(ids))
    total = xxhash.xxh3_64()
    for part in chunks(ids):
        total.update(np.ascontiguousarray(part, dtype="<u2" if ids16 else "<u4"))
    return total.hexdigest()


class TokenFolder:
    """The token files in a folder and its meta.json, opened together; a context manager.

    names: the files, without .bin. remedy: advice for messages about damage. meta: the content of
    meta.json, {} if there is none. Raises MissingFile if a file does not exist, DataError if
    meta.json is damaged.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = ("train", "val"),
                 remedy: str = "create it again"):
        self.folder, self.remedy, self.meta = folder, remedy, {}
        self._files: dict[str, BinaryIO] = {}
        try:
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise MissingFile(f"{folder} cannot be opened ({reason(error)})") from error
        try:  # through its descriptor: another folder may take its name meanwhile
            for name in names:
                self._files[name] = open_file(folder / f"{name}.bin", directory)
            with suppress(FileNotFoundError), open_file(folder / "meta.json", directory) as file:
                self.meta = self._parse_meta(file.read())
        except FileNotFoundError as error:
            self.close()
            raise MissingFile(f"there is no {folder / error.filename}") from error
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
        """The ids of each file and the checksum of its bytes. Raises DataError if one is damaged.
        """
        if self.meta:
            dtype = np.dtype(self.meta["dtype"])
        else:
            dtype = _guess_dtype(self.folder, self._files.values())
        return {name: self._read(name, file, dtype) for name, file in self._files.items()}

    def _read(self, name: str, file: BinaryIO, dtype: np.dtype) -> tuple[Ids, str]:
        path, size = self.folder / f"{name}.bin", os.fstat(file.fileno()).st_size
        expected = self.meta.get(f"{name}_bytes", size)
        if size == 0 or size % dtype.itemsize or expected != size:
            raise DataError(f"{path} is damaged: it has {size} bytes"
                            + (f" instead of {expected!a}" if expected != size else "")
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
            meta = load_with_checksum(raw, old_keys=OLD_KEYS)
            if (set(meta) >= KEYS and meta["dtype"] in ("<u2", "<u4")
                    and isinstance(meta["made_with"], str) and meta["made_with"].isprintable()):
                load_tokenizer(meta["tokenizer"])
                return meta
        except (ValueError, TypeError):
            pass
        raise DataError(f"{self.folder / 'meta.json'} is damaged: {self.remedy}")


def write_meta(folder: Path, meta: dict) -> None:
    """Writes meta.json with the sizes and checksums of train.bin and val.bin in folder."""
    for name in ("train", "val"):
        with open_file(folder / f"{name}.bin") as file:
            meta = meta | {f"{name}_bytes": os.fstat(file.fileno()).st_size,
                           f"{name}_checksum": checksum(file)}
    part = folder / ".meta.json.part"
    part.write_bytes(dump_with_checksum(meta))
    part.replace(folder / "meta.json")


def dump_with_checksum(value: dict) -> bytes:
    """JSON with a checksum of itself, for `load_with_checksum`."""
    return json.dumps(value | {"checksum": _json_checksum(value)}).encode()


def load_with_checksum(raw: bytes, old_keys: set[str] = frozenset()) -> dict:
    """The JSON object that `dump_with_checksum` wrote, or one without a checksum that has no keys
    besides old_keys. Raises ValueError if it was changed."""
    try:
        value = json.loads(raw)
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    checksum = value.pop("checksum", None)
    if not set(value) <= old_keys if checksum is None else checksum != _json_checksum(value):
        raise ValueError("its checksum does not match")
    return value


def _json_checksum(value: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())


def _guess_dtype(folder: Path, files) -> np.dtype:
    """The dtype of files without a meta.json: uint16, as nanoGPT writes them, unless every second
    word is small enough to be the upper half of a uint32 id."""
    for file in files:
        raw = os.pread(file.fileno(), BLOCK, 0)
        upper = np.frombuffer(raw[:len(raw) // 4 * 4], "<u2")[1::2]
        if (os.fstat(file.fileno()).st_size % 4 or len(upper) < 8
                or (upper >= LARGEST_VOCABULARY >> 16).any()):
            return np.dtype("<u2")
    print(f"{folder} has no meta.json; its ids look like uint32 and are read as such",
          file=sys.stderr)
    return np.dtype("<u4")


# ---- one process at a time writes a folder, which appears only when it is complete

@contextmanager
def locked(folder: Path):
    """Waits until no other process holds the lock of folder. Yields whether it was locked: not if
    the file system has no locks or is not writable."""
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
    """The descriptor of the lock file at path, locked; None if that is impossible."""
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
            pass  # its previous holder has just deleted it
        except OSError:  # a file system without locks
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _wait_for(lock: int, name: str) -> None:
    """Locks a file, with a message if that takes more than a second. Raises OSError."""
    for _ in range(20):
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    print(f"waiting for another process that tokenizes {name}", file=sys.stderr)
    fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def new_folder(folder: Path, clean: bool):
    """Yields a temporary folder that replaces `folder` at the end, or is removed after an error.
    clean: remove what killed processes left, too."""
    prefix = f".{folder.name}.part_"
    if clean:
        for leftover in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    part = folder.with_name(prefix + secrets.token_hex(8))
    try:
        part.mkdir()
        yield part
        publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def publish(part: Path, folder: Path) -> None:
    """Renames the folder `part` to `folder`, and removes what had that name."""
    while True:
        try:
            part.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = folder.with_name(f".{folder.name}.part_{secrets.token_hex(8)}")
        with suppress(FileNotFoundError):  # another process has just moved it
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
