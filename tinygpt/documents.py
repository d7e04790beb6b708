"""Text files -> the documents in them."""

import json
from pathlib import Path

from tinygpt.tokenizer import Tokenizer


class DataError(ValueError):
    """Data that is missing, unreadable, or does not fit what is asked of it."""


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document, where the tokenizer has one."""
    return getattr(tokenizer, "end_of_text", None)


def read_documents(files: list[Path], text_field: str) -> list[str]:
    """The documents of UTF-8 files: each line of a .jsonl, else each file. Raises DataError that
    names what is wrong."""
    found = []
    for path in files:
        text = read_text(path)
        found += parse_jsonl(path, text, text_field) if is_jsonl(path) else [text]
    return found


def is_jsonl(path: Path) -> bool:
    """Whether a file has a JSON object in each line."""
    return path.suffix.lower() == ".jsonl"


def are_documents(files: list[Path]) -> bool:
    """Whether files are more than one text."""
    return len(files) > 1 or is_jsonl(files[0])


def parse_jsonl(path: Path, text: str, text_field: str) -> list[str]:
    """The texts of a file with a JSON object in each line, but for empty ones."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no JSON in line {number} ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get(text_field), str):
            fields = ", ".join(value) if isinstance(value, dict) and value else "no fields"
            raise DataError(f"{path} has no text in the field {text_field!r} in line {number}, "
                            f"which has {fields}: name another with --text_field")
        if value[text_field]:
            found.append(value[text_field])
    return found


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises DataError that names what is wrong."""
    try:
        return decode(path, path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def decode(path: Path, raw: bytes, offset: int = 0) -> str:
    """The text that bytes of a file, from offset on, are. Raises DataError where they are none."""
    if b"\0" in raw:
        raise DataError(f"{path} is binary, not text: it has a zero byte at "
                        f"{offset + raw.index(0)}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {offset + error.start}: convert it first"
                        ) from error
