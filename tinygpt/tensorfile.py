"""safetensors files one tensor at a time, so that a model that is read or written never lies in
memory twice. The format: 8 bytes of header length, a JSON header, the tensors' bytes."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LONGEST_HEADER = 100_000_000  # the format's own limit


class TensorFileError(ValueError):
    """A safetensors file that is missing, damaged, or of a kind that is not read here."""


class TensorFile:
    """The tensors of a safetensors file: `shapes` by name, and `read` for one of them.

    Raises TensorFileError where the file is not whole.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                    raise ValueError("its header is cut off")
                header = json.loads(file.read(length))
            self.metadata = header.pop("__metadata__", None) or {}
            self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            self._start, self._entries, end = 8 + length, header, 0
            for name, entry in header.items():
                end = max(end, self._check(name, entry))
            if size != self._start + end:
                raise ValueError(f"it has {size} bytes, its header tells of {self._start + end}")
        except OSError as error:
            raise TensorFileError(f"{path} cannot be read ({error.strerror})") from error
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise TensorFileError(f"{path} is no whole safetensors file ({error}): delete it, and "
                                  "copy or download it again") from error

    def _check(self, name: str, entry: dict) -> int:
        """Where the tensor's bytes end. Raises ValueError where they cannot be what it says."""
        begin, end = entry["data_offsets"]
        shape, dtype = self.shapes[name], entry["dtype"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name} has no sizes")
        if dtype in DTYPES and end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise ValueError(f"{name} does not have the bytes of its shape")
        return end

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32 or float16; bfloat16 is widened. Raises TensorFileError."""
        dtype = self._entries[name]["dtype"]
        if dtype not in DTYPES:
            raise TensorFileError(f"{self.path} has {name} in {dtype}: convert it to F32, F16 or "
                                  "BF16")
        shape = self.shapes[name]
        try:
            array = np.fromfile(self.path, DTYPES[dtype], math.prod(shape),
                                offset=self._start + self._entries[name]["data_offsets"][0])
        except OSError as error:
            raise TensorFileError(f"{self.path} cannot be read ({error.strerror})") from error
        if dtype == "BF16":
            array = array.astype("<u4")
            array <<= 16
            array = array.view("<f4")
        return array.reshape(shape)


def write(path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterable[np.ndarray],
          metadata: dict[str, str]) -> None:
    """Writes float32 arrays, which come one by one in the order of shapes, and syncs the file."""
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            assert array.shape == shape, name
            file.write(np.ascontiguousarray(array, "<f4").data)
            del array  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
