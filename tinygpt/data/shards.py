"""Text larger than memory -> token files, in shards, by several processes, resumable.

The text is cut into pieces, each is encoded into a shard of its own by whichever process is free,
and the shards are put together at the end. What is there already when a stopped build is started
again is not made again.
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

from tinygpt.data.documents import (
    DataError,
    are_documents,
    check_encoding,
    decode,
    end_of_text,
    is_jsonl,
    open_file,
    parse_jsonl,
    read_bytes,
    reason,
)
from tinygpt.data.token_files import parse_sealed, sealed
from tinygpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from tinygpt.machine import cpu_count

PIECE = 32 << 20  # bytes of text in a shard, at most
LEARN = 64 << 20  # bytes that the merges of bpe are learned from
# A line break at which no tokenizer joins what is before it with what is behind it.
SAFE = re.compile(rb"[!-~]\n(?=[!-~])")


@dataclass(frozen=True)
class Piece:
    """Bytes start..end of a file; ends: whether a document ends with them."""

    path: str
    start: int
    end: int
    ends: bool


def build(folder: Path, files: list[Path], text_field: str, kind: str, vocab_size: int,
          signature: dict, processes: int | None = None) -> tuple[Tokenizer, np.dtype]:
    """Makes folder/train.bin and val.bin, the last tenth of the bytes, of text files.

    Every document ends with end-of-text, or where the tokenizer has none a line break; a single
    plain file is no document and just its text. bpe learns from the first 64 MB. signature, JSON
    values, says when a build that was stopped is still the same. Returns the tokenizer and the
    type of the ids. Raises DataError; OSError where the disk does.
    """
    pieces = cut(files)
    if len(pieces) < 2:
        raise DataError(f"{files[0]} has no line break at which validation text could be cut off: "
                        "break it into lines, or give several files")
    plan = {"pieces": list(map(asdict, pieces)), **signature}
    tokenizer = _prepare(folder, plan)
    if tokenizer is None:
        print(f"{len(pieces)} shards: learning the tokenizer", file=sys.stderr)
        tokenizer = _learn(kind, vocab_size, pieces, text_field)
        _write(folder / "plan.json", sealed(plan | {"made": tokenizer.to_json()}))
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    separator = None
    if are_documents(files):
        end = end_of_text(tokenizer)
        separator = tokenizer.encode("\n") if end is None else [end]
    jobs = [(piece, folder / f"shard_{n:05}.bin") for n, piece in enumerate(pieces)]
    _encode_all(jobs, (tokenizer.to_json(), dtype.str, separator, text_field), processes)
    train = len(pieces) - max(1, len(pieces) // 10)
    for name, part in (("train", jobs[:train]), ("val", jobs[train:])):
        with open(folder / f"{name}.bin", "wb") as whole:
            for _, path in part:
                if (ids := _read_shard(path)) is None:
                    raise DataError(f"{path} is damaged: start the same again, which makes it anew")
                whole.write(ids)
    for path in (*(path for _, path in jobs), folder / "plan.json"):
        path.unlink()
    return tokenizer, dtype


def cut(files: list[Path]) -> list[Piece]:
    """The files in pieces that can be encoded by themselves, a hundred or more where they are
    large enough."""
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
    """The first place from position on where the file can be cut, or its end."""
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
    """The documents of a piece, or the part of one. Raises DataError."""
    path = Path(piece.path)
    try:
        with open_file(path) as file:
            file.seek(piece.start)
            raw = file.read(piece.end - piece.start)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)})") from error
    if len(raw) != piece.end - piece.start:
        raise DataError(f"{path} has become shorter while it is read: start again")
    text = decode(path, raw, piece.start)
    return parse_jsonl(path, text, text_field, piece.start) if is_jsonl(path) else [text]


def _prepare(folder: Path, plan: dict) -> Tokenizer | None:
    """Makes folder ready for the plan; the tokenizer where it was begun already."""
    try:
        found = parse_sealed(read_bytes(folder / "plan.json"))
        tokenizer = load_tokenizer(found.pop("made"))
        if found == plan:
            return tokenizer
    except (ValueError, KeyError):
        pass  # none, or half of one
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


def _encode_all(jobs: list[tuple[Piece, Path]], how: tuple, processes: int | None) -> None:
    """Makes the shards that are missing, with a progress bar in bytes of text."""
    missing = [(piece, path) for piece, path in jobs if _read_shard(path) is None]
    sizes = {path: piece.end - piece.start for piece, path in jobs}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="encoding",
              initial=sum(sizes.values()) - sum(sizes[path] for _, path in missing),
              disable=not sys.stderr.isatty()) as bar:
        for path in _encoded(missing, how, processes or cpu_count()):
            bar.update(sizes[path])


def _encoded(jobs: list[tuple[Piece, Path]], how: tuple, processes: int) -> Iterable[Path]:
    """Encodes pieces and yields the path of each as it is done."""
    if processes == 1 or len(jobs) < 2:
        _start(*how)
        yield from (encode(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _start, how)
    try:
        for done in as_completed([pool.submit(encode, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise DataError("the processes that encode the text ended: in a script, keep what it does "
                        "under if __name__ == '__main__'; else there may be too little memory"
                        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer: dict, dtype: str, separator: list[int] | None, text_field: str) -> None:
    """What every process keeps."""
    global _how
    _how = load_tokenizer(tokenizer), np.dtype(dtype), separator, text_field
    if parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def encode(piece: Piece, path: Path) -> Path:
    """Writes the shard of a piece, whole or not at all, and returns its path."""
    tokenizer, dtype, separator, text_field = _how
    ids: list[int] = []
    for text in texts_of(piece, text_field):
        ids += tokenizer.encode(text)
        if separator and (piece.ends or piece.path.endswith(".jsonl")):
            ids += separator
    raw = np.array(ids, dtype).tobytes()
    return _write(path, raw + xxhash.xxh3_64_digest(raw))


def _read_shard(path: Path) -> memoryview | None:
    """The bytes of the ids in a shard, before the checksum that it ends with; None where it is
    damaged or not there."""
    try:
        raw = memoryview(read_bytes(path))
    except DataError:
        return None
    return raw[:-8] if xxhash.xxh3_64_digest(raw[:-8]) == raw[-8:] else None


def _write(path: Path, data: bytes) -> Path:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    return part.replace(path)
