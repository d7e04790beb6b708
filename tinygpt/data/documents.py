"""Reads text files and splits them into documents."""

import json
import os
import stat
import time
from pathlib import Path
from typing import BinaryIO

import xxhash

from tinygpt.data import DataError

UTF8_BOM = b"\xef\xbb\xbf"
# Byte order marks of other encodings; UTF-32 comes first because its mark begins with UTF-16's.
OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32",
              b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
SPECIAL_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
                 (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))

BLOCK = 1 << 22  # bytes per read of a file that may not fit in memory
MTIME_RESOLUTION = 2.0  # seconds within which two changes may leave the same modification time


def open_file(path: Path, folder: int | None = None) -> BinaryIO:
    """Opens a regular file for reading; with a folder's descriptor, the file of that name in it.

    Raises DataError if the file cannot be opened or is a pipe, a device or a folder (without
    waiting for data), FileNotFoundError if it does not exist.
    """
    try:
        target = path if folder is None else path.name
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if (kind := _special_kind(os.fstat(descriptor).st_mode)) is not None:
        os.close(descriptor)
        remedy = "name a file in it" if kind == "a folder" else "write its content to a file first"
        raise DataError(f"{path} is {kind}, not a file: {remedy}")
    return open(descriptor, "rb")


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a file that cannot be read."""
    return DataError(f"{path} cannot be read ({special_kind(path) or reason(error)}): choose a "
                     "readable file")


def check_readable(path: Path) -> None:
    """Raises DataError unless path is a regular file that can be opened."""
    try:
        open_file(path).close()
    except OSError as error:
        raise unreadable(path, error) from error


def special_kind(path: Path) -> str | None:
    """What path is if it exists and is not a regular file: "a folder", "a pipe", ..."""
    try:
        return _special_kind(os.stat(path).st_mode)
    except (OSError, ValueError):
        return None


def _special_kind(mode: int) -> str | None:
    return next((kind for is_kind, kind in SPECIAL_KINDS if is_kind(mode)), None)


def reason(error: Exception) -> str:
    """The message of an error; of an OSError without its number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises DataError."""
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error


def checksum(file: BinaryIO) -> str:
    """The XXH3 hash (64 bits, hexadecimal) of a whole file."""
    digest, offset = xxhash.xxh3_64(), 0
    while block := os.pread(file.fileno(), BLOCK, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def _file_checksum(path: Path) -> str:
    """The checksum of a regular file. Raises DataError."""
    try:
        with open_file(path) as file:
            return checksum(file)
    except OSError as error:
        raise unreadable(path, error) from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises DataError."""
    return decode(path, read_bytes(path))


def read_documents(files: list[Path], text_field: str) -> list[str]:
    """The documents of UTF-8 files; see `documents_in`."""
    return [text for path in files for text in documents_in(path, read_bytes(path), text_field)]


def documents_in(path: Path, raw: bytes, text_field: str) -> list[str]:
    """The documents in the content of a file: one per line of a .jsonl, else the whole text.
    Raises DataError."""
    text = decode(path, raw)
    return parse_jsonl(path, text, text_field) if is_jsonl(path) else [text]


def is_jsonl(path: Path) -> bool:
    """Whether a file has a JSON object in each line."""
    return path.suffix.lower() == ".jsonl"


def are_documents(files: list[Path]) -> bool:
    """Whether files hold separate documents instead of one text."""
    return len(files) > 1 or is_jsonl(files[0])


def parse_jsonl(path: Path, text: str, text_field: str, offset: int = 0) -> list[str]:
    """The non-empty texts of a file with a JSON object in each line; `text` is its content from
    byte offset on."""
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = _document(line, text_field)
            document.encode("utf-8")
        except UnicodeEncodeError as error:
            number += _lines_before(path, offset)
            raise DataError(f"{path} has half of a surrogate pair, {document[error.start]!a}, in "
                            f"the text of line {number}: remove it") from error
        except ValueError as error:
            number += _lines_before(path, offset)
            raise DataError(f"{path} has {error} in line {number}") from error
        if document:
            documents.append(document)
    return documents


def parse_json(line: str | bytes):
    """The value of a line of JSON. Raises ValueError with what is wrong."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON ({getattr(error, 'msg', error)})") from error


def _document(line: str, text_field: str) -> str:
    """The text in a line of JSON. Raises ValueError with what the line has instead."""
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError(f"{_json_type(value)}, not a JSON object with the field {text_field!a},")
    if text_field not in value:
        names = ", ".join(map(ascii, value))
        raise ValueError(f"no field {text_field!a} (name one of {names[:200]} with --text_field)"
                         if value else f"no field {text_field!a}, but an empty object")
    if not isinstance(value[text_field], str):
        kind = _json_type(value[text_field])
        raise ValueError(f"{kind}, not a string, in the field {text_field!a}")
    return value[text_field]


def _json_type(value) -> str:
    """The type of a JSON value in words; null, true and false as they are."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")


def _lines_before(path: Path, offset: int) -> int:
    """The number of lines that end before byte offset."""
    if not offset:
        return 0
    with open_file(path) as file:
        count, remaining = 0, offset
        while remaining > 0 and (block := file.read(min(remaining, BLOCK))):
            count, remaining = count + block.count(b"\n"), remaining - len(block)
    return count


def decode(path: Path, raw: bytes, offset: int = 0) -> str:
    """Decodes the bytes of a file from offset on, without a UTF-8 byte order mark. Raises
    DataError if they are not UTF-8."""
    if offset == 0:
        check_encoding(path, raw)
        if raw.startswith(UTF8_BOM):
            raw, offset = raw[len(UTF8_BOM):], len(UTF8_BOM)
    if b"\0" in raw:
        raise DataError(f"{path} is binary, not text: it has a zero byte at "
                        f"{offset + raw.index(0)}: choose a text file")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {offset + error.start}: convert it first, "
                        "for instance with iconv -f LATIN1 -t UTF-8") from error


def check_encoding(path: Path, head: bytes) -> None:
    """Raises DataError if the first bytes of a file are UTF-16 or UTF-32."""
    name = next((name for mark, name in OTHER_BOMS.items() if head.startswith(mark)), None)
    if name is None and len(head := head[:4096]) >= 8:
        # without a mark: Latin letters in UTF-16 have a zero in every second byte
        zeros = [head[i::2].count(0) / len(head[i::2]) for i in (0, 1)]
        if max(zeros) > 0.7 and min(zeros) < 0.1:
            name = "UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE"
    if name is not None:
        raise DataError(f"{path} is {name}, not UTF-8: convert it with iconv -f {name} -t UTF-8")


class TextFiles:
    """Text files that make one data set, identified by hashes of their content.

    is_large: they have more than `large` bytes in all and must not be read as a whole. Raises
    DataError if one cannot be read.
    """

    def __init__(self, files: list[Path], text_field: str, large: int):
        self.files, self.text_field = files, text_field
        self._paths = [str(path.resolve()) for path in files]
        self._options = [["documents", text_field]] if are_documents(files) else []
        self._stats = self._stat()
        self.is_large = sum(size for size, *_ in self._stats) > large
        if self.is_large:
            newest = max(changed for _, _, changed, _ in self._stats) / 1e9
            age = time.time() - newest
            time.sleep(min(MTIME_RESOLUTION, max(0.0, MTIME_RESOLUTION - age)))
            self._stats = self._stat()
        self._hashes: list[str] | None = None

    def describe(self) -> dict:
        """Metadata as JSON values: `files`, the path and hash of each file and the options of
        reading them; `stats`, the result of `os.stat` for each."""
        files = [*map(list, zip(self._paths, self._hash({}), strict=True)), *self._options]
        return {"files": files, "stats": self._stats}

    def matches(self, metadata: dict) -> bool:
        """Whether metadata, as `describe` returned it earlier, has the same content. A large file
        whose size, times and inode are unchanged is not read again."""
        if "stats" in metadata:
            known = {path: (stats, digest) for (path, digest), stats in zip(
                metadata["files"], metadata["stats"], strict=False)}
            self._hash(known if self.is_large else {})
            return metadata["files"] == self.describe()["files"]
        # older caches have the size and the modification time instead of a hash
        old = [[path, *stats[:2]] for path, stats in zip(self._paths, self._stats, strict=True)]
        return metadata["files"] == old + self._options

    def check_unchanged(self) -> None:
        """Raises DataError if a file was changed since it was hashed."""
        for path, before, now in zip(self.files, self._stats, self._stat(), strict=True):
            if before != now:
                raise DataError(f"{path} was changed while it was read: start again")

    def documents(self) -> list[str]:
        """The documents of files that are not large. Raises DataError. The hashes become those of
        the content read here."""
        contents = [read_bytes(path) for path in self.files]
        self._hashes = [xxhash.xxh3_64_hexdigest(raw) for raw in contents]
        return [text for path, raw in zip(self.files, contents, strict=True)
                for text in documents_in(path, raw, self.text_field)]

    def _hash(self, known: dict[str, tuple]) -> list[str]:
        if self._hashes is None:
            self._hashes = []
            for path, stats in zip(self._paths, self._stats, strict=True):
                before, digest = known.get(path, (None, ""))
                self._hashes.append(digest if before == stats else _file_checksum(Path(path)))
        return self._hashes

    def _stat(self) -> list[list[int]]:
        """Size, modification and status change times (ns) and inode of each file."""
        try:
            stats = [os.stat(path) for path in self.files]
        except OSError as error:
            raise unreadable(Path(error.filename), error) from error
        return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]
