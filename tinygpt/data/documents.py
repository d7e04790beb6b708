"""Text files -> the documents in them."""

import json
import os
import stat
import time
from pathlib import Path
from typing import BinaryIO

import xxhash

from tinygpt.data import DataError
from tinygpt.data.tokenizer import Tokenizer

UTF8_BOM = b"\xef\xbb\xbf"
# The marks that other encodings begin with; UTF-32's first, which begins as UTF-16's does.
OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32",
              b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
SPECIAL = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
           (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))

BLOCK = 1 << 22  # bytes that are read in one go of what may not fit in memory
RECENT = 2.0  # seconds within which two changes of a file may have the same time


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document, where the tokenizer has one."""
    return getattr(tokenizer, "end_of_text", None)


def open_file(path: Path, folder: int | None = None) -> BinaryIO:
    """Opens a regular file for reading; with a folder's descriptor the file of that name in it.

    Raises DataError for a pipe, a device or a folder, at once where reading would wait or never
    end, and where the file cannot be opened; FileNotFoundError where there is none.
    """
    try:
        where = path if folder is None else path.name
        descriptor = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({what_is_special(path) or reason(error)}): name a "
                        "file that can") from error
    if (what := _what(os.fstat(descriptor).st_mode)) is not None:
        os.close(descriptor)
        remedy = "name a file in it" if what == "a folder" else "write its content to a file first"
        raise DataError(f"{path} is {what}, not a file: {remedy}")
    return open(descriptor, "rb")


def check_readable(path: Path) -> None:
    """Raises DataError unless path is a regular file that can be opened."""
    try:
        open_file(path).close()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}): name a file that can") from error


def what_is_special(path: Path) -> str | None:
    """What stands at path where that is no regular file, in words; None also where nothing does."""
    try:
        return _what(os.stat(path).st_mode)
    except (OSError, ValueError):
        return None


def _what(mode: int) -> str | None:
    return next((what for is_one, what in SPECIAL if is_one(mode)), None)


def reason(error: Exception) -> str:
    """What the operating system says of an error, without its number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises DataError."""
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}): name a file that can") from error


def checksum(file: BinaryIO) -> str:
    """A hash (xxh3, 64 bits, in hexadecimal digits) of a file from its beginning."""
    found, start = xxhash.xxh3_64(), 0
    while block := os.pread(file.fileno(), BLOCK, start):
        found.update(block)
        start += len(block)
    return found.hexdigest()


def _checksum_of(path: Path) -> str:
    """The checksum of a regular file. Raises DataError."""
    try:
        with open_file(path) as file:
            return checksum(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}): name a file that can") from error


def read_text(path: Path) -> str:
    """A UTF-8 file, without a byte order mark. Raises DataError that names what is wrong."""
    return decode(path, read_bytes(path))


def read_documents(files: list[Path], text_field: str) -> list[str]:
    """The documents of UTF-8 files; see `documents_in`."""
    return [text for path in files for text in documents_in(path, read_bytes(path), text_field)]


def documents_in(path: Path, raw: bytes, text_field: str) -> list[str]:
    """The documents in the content of a file: each line of a .jsonl, else all of it. Raises
    DataError that names what is wrong."""
    text = decode(path, raw)
    return parse_jsonl(path, text, text_field) if is_jsonl(path) else [text]


def is_jsonl(path: Path) -> bool:
    """Whether a file has a JSON object in each line."""
    return path.suffix.lower() == ".jsonl"


def are_documents(files: list[Path]) -> bool:
    """Whether files are more than one text."""
    return len(files) > 1 or is_jsonl(files[0])


def parse_jsonl(path: Path, text: str, text_field: str, offset: int = 0) -> list[str]:
    """The texts of a file with a JSON object in each line, but for empty ones; text is what the
    file holds from byte offset on."""
    found = []
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
            found.append(document)
    return found


def _document(line: str, text_field: str) -> str:
    """The text in a line of JSON. Raises ValueError that says what the line has instead."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_kind(value)}, not a JSON object with the field {text_field!a},")
    if text_field not in value:
        names = ", ".join(map(ascii, value))
        raise ValueError(f"no field {text_field!a} (name one of {names[:200]} with --text_field)"
                         if value else f"no field {text_field!a}, but an empty object")
    if not isinstance(value[text_field], str):
        raise ValueError(f"{_kind(value[text_field])}, not a string, in the field {text_field!a}")
    return value[text_field]


def _kind(value) -> str:
    """A JSON value in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")


def _lines_before(path: Path, offset: int) -> int:
    """How many lines of a file end before byte offset."""
    if not offset:
        return 0
    with open_file(path) as file:
        count, left = 0, offset
        while left > 0 and (block := file.read(min(left, BLOCK))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


def decode(path: Path, raw: bytes, offset: int = 0) -> str:
    """The text that bytes of a file, from offset on, are; a byte order mark of UTF-8 is dropped.
    Raises DataError where they are no UTF-8."""
    if offset == 0:
        check_encoding(path, raw)
        if raw.startswith(UTF8_BOM):
            raw, offset = raw[len(UTF8_BOM):], len(UTF8_BOM)
    if b"\0" in raw:
        raise DataError(f"{path} is binary, not text: it has a zero byte at "
                        f"{offset + raw.index(0)}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {offset + error.start}: convert it first, "
                        "for instance with iconv -f LATIN1 -t UTF-8") from error


def check_encoding(path: Path, head: bytes) -> None:
    """Raises DataError where the first bytes of a file are of UTF-16 or UTF-32."""
    name = next((name for mark, name in OTHER_BOMS.items() if head.startswith(mark)), None)
    if name is None and len(head := head[:4096]) >= 8:
        # most of what is written in Latin letters has a zero in every second byte
        zeros = [head[i::2].count(0) / len(head[i::2]) for i in (0, 1)]
        if max(zeros) > 0.7 and min(zeros) < 0.1:
            name = "UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE"
    if name is not None:
        raise DataError(f"{path} is {name}, not UTF-8: convert it with iconv -f {name} -t UTF-8")


class TextFiles:
    """Text files that are read as one text, and the hashes that tell their content apart.

    Files of more than `large` bytes together are never in memory as a whole. Raises DataError
    where one cannot be read.
    """

    def __init__(self, files: list[Path], text_field: str, large: int):
        self.files, self.text_field = files, text_field
        self._paths = [str(path.resolve()) for path in files]
        self._how = [["documents", text_field]] if are_documents(files) else []
        self._stats = self._stat()
        self.is_large = sum(size for size, *_ in self._stats) > large
        if self.is_large:
            newest = max(changed for _, _, changed, _ in self._stats) / 1e9
            time.sleep(min(RECENT, max(0.0, newest + RECENT - time.time())))
            self._stats = self._stat()
        self._hashes: list[str] | None = None

    def describe(self) -> dict:
        """What makes the text, as JSON values: `files`, the path and the hash of each, and how
        they are read; `stats`, what the operating system says of each."""
        return {"files": [*map(list, zip(self._paths, self._hash({}), strict=True)), *self._how],
                "stats": self._stats}

    def is_described_by(self, found: dict) -> bool:
        """Whether what `describe` gave, once, is of this content. Of large files, one of the same
        size, times and inode as then is not read again."""
        if "stats" in found:
            known = {path: (stats, digest) for (path, digest), stats in zip(
                found["files"], found["stats"], strict=False)}
            self._hash(known if self.is_large else {})
            return found["files"] == self.describe()["files"]
        # of a cache from before there were hashes, which had the time of the last change instead
        old = [[path, *stats[:2]] for path, stats in zip(self._paths, self._stats, strict=True)]
        return found["files"] == old + self._how

    def check_unchanged(self) -> None:
        """Raises DataError where a file was changed since it was hashed."""
        for path, before, now in zip(self.files, self._stats, self._stat(), strict=True):
            if before != now:
                raise DataError(f"{path} was changed while it was read: start again")

    def documents(self) -> list[str]:
        """The documents in files that are not large; from then on the hashes are those of what was
        read here. Raises DataError."""
        contents = [read_bytes(path) for path in self.files]
        self._hashes = [xxhash.xxh3_64_hexdigest(raw) for raw in contents]
        return [text for path, raw in zip(self.files, contents, strict=True)
                for text in documents_in(path, raw, self.text_field)]

    def _hash(self, known: dict[str, tuple]) -> list[str]:
        if self._hashes is None:
            self._hashes = []
            for path, stats in zip(self._paths, self._stats, strict=True):
                before, digest = known.get(path, (None, ""))
                self._hashes.append(digest if before == stats else _checksum_of(Path(path)))
        return self._hashes

    def _stat(self) -> list[list[int]]:
        """Size, times of the last change of content and of anything (ns), and inode of each."""
        try:
            found = [os.stat(path) for path in self.files]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({reason(error)})") from error
        return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in found]
