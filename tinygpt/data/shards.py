"""Tokenizes text larger than memory, in several processes; an interrupted build is resumed.

The text is cut into pieces, a pool of processes encodes each piece into a shard, and the shards are
concatenated at the end. A resumed build keeps the shards that are complete.
"""

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from tinygpt.data import DataError
from tinygpt.data.documents import (
    TextFiles,
    are_documents,
    check_encoding,
    decode,
    is_jsonl,
    open_file,
    parse_jsonl,
    read_bytes,
    unreadable,
)
from tinygpt.data.token_files import dump_with_checksum, load_with_checksum
from tinygpt.data.tokenizer import Tokenizer, end_of_text, load_tokenizer, make_tokenizer
from tinygpt.machine import cpu_count

PIECE = 32 << 20  # maximum bytes of text in a shard
LEARN = 64 << 20  # bytes of text from which bpe learns its merges
# A line break across which no tokenizer makes a token.
SAFE = re.compile(rb"[!-~]\n(?=[!-~])")


@dataclass(frozen=True)
class Piece:
    """Bytes start..end of a file. ends: whether a document ends there."""

    path: str
    start: int
    end: int
    ends: bool


def build(folder: Path, text: TextFiles, kind: str, vocab_size: int, signature: dict,
          processes: int | None = None) -> tuple[Tokenizer, np.dtype]:
    """Writes folder/train.bin and folder/val.bin, which gets the last tenth of the text's bytes.

    Every document ends with end-of-text, or a line break if the tokenizer has no such id; a single
    plain file is not a document and gets neither. bpe learns from the first 64 MB. signature, JSON
    values: an interrupted build is resumed if it is equal. Returns the tokenizer and the dtype of
    the ids. Raises DataError, or OSError if the disk fails.
    """
    files, text_field = text.files, text.text_field
    pieces = cut(files)
    if len(pieces) < 2:
        raise DataError(f"{files[0]} has no line break at which it can be split for validation: "
                        "break it into lines, or give several files")
    plan = {"pieces": list(map(asdict, pieces)), **signature}
    tokenizer = _prepare(folder, plan)
    if tokenizer is None:
        print(f"{len(pieces)} shards: training the tokenizer", file=sys.stderr)
        tokenizer = _learn(kind, vocab_size, pieces, text_field)
        _write(folder / "plan.json", dump_with_checksum(plan | {"made": tokenizer.to_json()}))
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    separator = None
    if are_documents(files):
        end = end_of_text(tokenizer)
        separator = tokenizer.encode("\n") if end is None else [end]
    jobs = [(piece, folder / f"shard_{n:05}.bin") for n, piece in enumerate(pieces)]
    _encode_all(jobs, (tokenizer.to_json(), dtype.str, separator, text_field), processes)
    train = len(pieces) - max(1, len(pieces) // 10)
    for name, part in (("train", jobs[:train]), ("val", jobs[train:])):
        with open(folder / f"{name}.bin", "wb") as file:
            for _, path in part:
                if (ids := _read_shard(path)) is None:
                    raise DataError(f"{path} is damaged: run again, which replaces it")
                file.write(ids)
    for path in (*(path for _, path in jobs), folder / "plan.json"):
        path.unlink()
    return tokenizer, dtype


def cut(files: list[Path]) -> list[Piece]:
    """Cuts files into pieces that can be encoded independently, at least a hundred if the files
    are large enough."""
    sizes = [path.stat().st_size for path in files]
    length = max(1, min(PIECE, sum(sizes) // 100))
    pieces = []
    for path, size in zip(files, sizes, strict=True):
        jsonl, start = is_jsonl(path), 0
        with open_file(path) as file:
            check_encoding(path, os.pread(file.fileno(), 4096, 0))
            while start < size:
                end = _safe_end(file, start + length, size, jsonl)
                pieces.append(Piece(str(path), start, end, end == size and not jsonl))
                start = end
    return pieces


def _safe_end(file, position: int, size: int, jsonl: bool) -> int:
    """The first offset from position on at which the file can be cut, or its end."""
    rest = b""
    while position < size:
        file.seek(position)
        block = rest + file.read(1 << 16)
        found = block.find(b"\n") if jsonl else (match.end() - 1 if (match := SAFE.search(block))
                                                 else -1)
        if found >= 0:
            return position - len(rest) + found + 1
        position += len(block) - len(rest)
        rest = block[-2:]
    return size


def texts_of(piece: Piece, text_field: str) -> list[str]:
    """The documents, or the part of one, in a piece. Raises DataError."""
    path = Path(piece.path)
    try:
        with open_file(path) as file:
            file.seek(piece.start)
            raw = file.read(piece.end - piece.start)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) != piece.end - piece.start:
        raise DataError(f"{path} became shorter while it was read: start again")
    text = decode(path, raw, piece.start)
    return parse_jsonl(path, text, text_field, piece.start) if is_jsonl(path) else [text]


def _prepare(folder: Path, plan: dict) -> Tokenizer | None:
    """Returns the tokenizer of an interrupted build with this plan; otherwise empties folder."""
    try:
        saved = load_with_checksum(read_bytes(folder / "plan.json"))
        tokenizer = load_tokenizer(saved.pop("made"))
        if saved == plan:
            return tokenizer
    except (ValueError, KeyError):
        pass  # missing or damaged
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


def _learn(kind: str, vocab_size: int, pieces: list[Piece], text_field: str) -> Tokenizer:
    if kind == "char":
        chars = {"\n"}
        for piece in pieces:
            chars.update(*texts_of(piece, text_field))
        return make_tokenizer(kind, "".join(chars), vocab_size)
    texts, left = [], LEARN
    for piece in pieces if kind == "bpe" else ():
        texts += texts_of(piece, text_field)
        left -= piece.end - piece.start
        if left <= 0:
            break
    return make_tokenizer(kind, "\n".join(texts), vocab_size)


def _encode_all(jobs: list[tuple[Piece, Path]], settings: tuple, processes: int | None) -> None:
    """Writes the missing shards, with a progress bar in bytes of text."""
    missing = [(piece, path) for piece, path in jobs if _read_shard(path) is None]
    sizes = {path: piece.end - piece.start for piece, path in jobs}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="encoding",
              initial=sum(sizes.values()) - sum(sizes[path] for _, path in missing),
              disable=not sys.stderr.isatty()) as bar:
        for path in _encoded(missing, settings, processes or cpu_count()):
            bar.update(sizes[path])


def _encoded(jobs: list[tuple[Piece, Path]], settings: tuple, processes: int) -> Iterable[Path]:
    """Encodes pieces and yields the path of each finished shard."""
    if processes == 1 or len(jobs) < 2:
        _init_worker(*settings)
        yield from (encode(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _init_worker,
                               settings)
    try:
        for done in as_completed([pool.submit(encode, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise DataError("a process that encodes the text was stopped: in a script, put the code "
                        "under if __name__ == '__main__'; otherwise memory may be too small"
                        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _init_worker(tokenizer: dict, dtype: str, separator: list[int] | None, text_field: str
                 ) -> None:
    """Sets what `encode` uses in this process."""
    global _settings
    _settings = load_tokenizer(tokenizer), np.dtype(dtype), separator, text_field
    if parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C


def encode(piece: Piece, path: Path) -> Path:
    """Writes the shard of a piece atomically and returns its path."""
    tokenizer, dtype, separator, text_field = _settings
    ids: list[int] = []
    for text in texts_of(piece, text_field):
        ids += tokenizer.encode(text)
        if separator and (piece.ends or piece.path.endswith(".jsonl")):
            ids += separator
    raw = np.array(ids, dtype).tobytes()
    return _write(path, raw + xxhash.xxh3_64_digest(raw))


def _read_shard(path: Path) -> memoryview | None:
    """The bytes of the ids in a shard, without the checksum at its end; None if it is damaged or
    missing."""
    try:
        raw = memoryview(read_bytes(path))
    except DataError:
        return None
    return raw[:-8] if xxhash.xxh3_64_digest(raw[:-8]) == raw[-8:] else None


def _write(path: Path, data: bytes) -> Path:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    return part.replace(path)
