"""Reads and writes safetensors files one tensor at a time, each with a checksum.

The format: 8 bytes of header length, a JSON header, the tensors' bytes. Files written here have
two more entries in the header's `__metadata__`: `xxh3_64`, the XXH3 hash of every tensor's bytes,
and `xxh3_64_header`, the hash of the rest of the header. Files without them are read too.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from xxhash import xxh3_64

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
          "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
          "BOOL": "|b1"}
FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}
LONGEST_HEADER = 100_000_000  # the limit of the format
MOST_AXES = 16
PIECE = 1 << 19  # bytes per read: hashed and checked while in the CPU's cache
SUMS, HEADER_SUM = "xxh3_64", "xxh3_64_header"
BAD_VALUES = "has NaN or infinite values"


class TensorFileError(ValueError):
    """A safetensors file that is missing, damaged, or not supported."""


class TensorFile:
    """An open safetensors file: `metadata`, `shapes` by name, and `read` for one of the tensors.

    Header and tensors come from one open file, even if its path is replaced meanwhile. Raises
    TensorFileError if the file is damaged. Use it in a `with` statement, or `close` it.
    """

    error: type[ValueError] = TensorFileError
    remedy = "delete it, and copy or download it again"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not os.path.isfile(path):
            raise self.error(f"{path} is not a file: name a .safetensors file")
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115, close() does
        except OSError as error:
            raise self.error(f"{path} cannot be read ({error.strerror})") from error
        try:
            self._read_header()
        except OSError as error:
            self.close()
            raise self.error(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            self.close()
            if isinstance(error, self.error):
                raise
            raise self.error(f"{path} is not a complete safetensors file ({one_line(error)}): "
                             f"{self.remedy}") from error

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor, as the format names it, by the tensor's name."""
        return {name: entry["dtype"] for name, entry in self._entries.items()}

    def read_float(self, name: str, widen: bool = True) -> np.ndarray:
        """As `read`; also raises TensorFileError if the tensor is not floating-point."""
        if (dtype := self._entries[name]["dtype"]) not in FLOATS:
            raise self.error(f"{self.path} has {name} in {dtype}: convert it to F32, F16 or BF16")
        return self.read(name, widen)

    def read(self, name: str, widen: bool = True) -> np.ndarray:
        """One tensor; bfloat16 is widened to float32, or else returned as its bits in uint16.

        Raises TensorFileError that names the file and the tensor if its dtype is not in DTYPES, its
        checksum differs, or a value is not finite.
        """
        entry, digest = self._entries[name], xxh3_64()
        dtype = entry["dtype"]
        if dtype not in DTYPES:
            raise self.error(f"{self.path} has {name} in {dtype}: convert it to F32, F16 or BF16")
        array = np.empty(math.prod(entry["shape"]), DTYPES[dtype])
        finite, size = True, PIECE // array.itemsize
        try:
            self._file.seek(self._start + entry["data_offsets"][0])
            for i in range(0, len(array), size):
                piece = array[i:i + size]
                self._read_into(memoryview(piece).cast("B"))
                digest.update(piece)
                finite = finite and _is_finite(piece, dtype)
        except OSError as error:
            raise self.error(f"{self.path} cannot be read ({error.strerror})") from error
        if self._sums and digest.hexdigest() != self._sums.get(name):
            raise self.error(f"{self.path} is damaged: the checksum of {name} does not match: "
                             f"{self.remedy}")
        if not finite:
            raise self.error(f"{self.path}: {name} {BAD_VALUES}: {self.remedy}")
        return (widened(array) if dtype == "BF16" and widen else array).reshape(entry["shape"])

    def _read_into(self, buffer: memoryview) -> None:
        while len(buffer):
            if not (n := self._file.readinto(buffer)):
                raise self.error(f"{self.path} became shorter while it was read: try again")
            buffer = buffer[n:]

    def _read_header(self) -> None:
        """Reads and checks the header. Raises ValueError."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError("its header is cut off")
        text = bytearray(length)
        self._read_into(memoryview(text))
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not strings")
        self._start, self._entries, end = 8 + length, header, 0
        for begin, after, name in sorted(_span(name, entry) for name, entry in header.items()):
            if begin != end:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            end = after
        if size != self._start + end:
            raise ValueError(f"it has {size} bytes, its header describes {self._start + end}")
        self._sums = _take_sums(metadata, header)
        self.metadata: dict[str, str] = metadata


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as its bits in uint16, as float32."""
    wide = bits.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


def _is_finite(array: np.ndarray, dtype: str) -> bool:
    """Whether no number of a dtype of the format is NaN or infinite; BF16 is given as its bits."""
    if dtype == "BF16":
        return bool(((array & 0x7f80) != 0x7f80).all())
    return dtype not in FLOATS or bool(np.isfinite(array).all())


def _span(name: str, entry) -> tuple[int, int, str]:
    """The begin and end of a tensor's bytes, and its name. Raises ValueError on an invalid entry or
    if shape and dtype do not have that number of bytes."""
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name} is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)
            and len(offsets) == 2 and len(shape) <= MOST_AXES
            and all(type(n) is int and n >= 0 for n in (*shape, *offsets))):
        raise ValueError(f"{name} has no dtype, shape and offsets")
    begin, end = offsets
    if begin > end or (dtype in DTYPES and (
            end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize)):
        raise ValueError(f"the bytes of {name} do not match its shape")
    return begin, end, name


def _take_sums(metadata: dict[str, str], entries: dict) -> dict[str, str]:
    """Removes the checksums of the tensors, {} if there are none, from metadata and returns them.

    Raises ValueError if the checksum of the header does not match.
    """
    expected, text = metadata.pop(HEADER_SUM, None), metadata.pop(SUMS, None)
    if expected is None and text is None:
        return {}
    sums = json.loads(text or "null")
    if not isinstance(sums, dict) or sums.keys() != entries.keys() or (
            json.dumps(_header_sum(metadata, entries, sums)) != expected):
        raise ValueError("the checksum of its header does not match")
    return sums


def _header_sum(metadata: dict, entries: dict, sums: dict) -> str:
    """The checksum of a header without offsets; the order of its keys does not matter."""
    kinds = {name: [entry["dtype"], entry["shape"]] for name, entry in entries.items()}
    text = json.dumps([metadata, kinds, sums], sort_keys=True)
    return xxh3_64(text.encode()).hexdigest()


def write(path: Path, layout: dict[str, tuple[tuple[int, ...], str]],
          arrays: Iterable[np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays with their checksums, and syncs the file to the disk.

    layout: shapes and dtypes (names of DTYPES) by name; arrays are in its order, those of BF16 as
    their bits in uint16. Raises
    TensorFileError that names a tensor with NaN or infinite values.
    """
    entries, end = {}, 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + np.dtype(DTYPES[dtype]).itemsize * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    sums = dict.fromkeys(layout, "0" * 16)
    with open(path, "wb") as file:
        file.write(_header(entries, metadata, sums))  # of the final length; the checksums follow
        for name, array in zip(layout, arrays, strict=True):
            shape, dtype = layout[name]
            assert array.shape == tuple(shape), name
            sums[name] = _write_array(file, name, dtype, np.ascontiguousarray(array, DTYPES[dtype]))
            del array  # before the next one is created
        file.seek(0)
        file.write(_header(entries, metadata, sums))
        file.flush()
        os.fsync(file.fileno())


def _write_array(file, name: str, dtype: str, array: np.ndarray) -> str:
    """Writes an array in pieces and returns its checksum."""
    flat, digest = array.reshape(-1), xxh3_64()
    size = PIECE // array.itemsize
    for i in range(0, len(flat), size):
        piece = flat[i:i + size]
        if not _is_finite(piece, dtype):
            raise TensorFileError(f"{name} {BAD_VALUES}")
        digest.update(piece)
        file.write(piece.data)
    return digest.hexdigest()


def _header(entries: dict, metadata: dict[str, str], sums: dict[str, str]) -> bytes:
    metadata = metadata | {SUMS: json.dumps(sums),
                           HEADER_SUM: json.dumps(_header_sum(metadata, entries, sums))}
    text = json.dumps({"__metadata__": metadata} | entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def one_line(value) -> str:
    """An error or a JSON value as printable ASCII of at most 200 characters."""
    text = str(value) if isinstance(value, Exception) else reprlib.repr(value)
    return re.sub(r"[^\x20-\x7e]+", "?", text[:200])
