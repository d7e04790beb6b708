"""Text or .bin files -> memory-mapped token ids -> batches in an order that can be resumed."""

import glob
import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinygpt import device, shards
from tinygpt.documents import DataError, are_documents, end_of_text, read_documents
from tinygpt.download import download
from tinygpt.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

DATA_DIR = Path(__file__).parent.parent / "data"
SHIPPED = DATA_DIR / "lantern_and_tide.txt"
LARGE = 256 << 20  # bytes of text above which tokens are made in shards
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class TokenData:
    """Token ids of the training and the validation split (1-d, unsigned), and what made them.

    tokenizer is None where bare ids were given. source says where they come from: a path or a
    glob where is_named, else in words.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer | None
    source: str
    is_named: bool = True

    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes that a validation token stands for, end-of-text for none; None without
        a tokenizer."""
        if self.tokenizer is None:
            return None
        if (largest := self.val.max()) >= self.tokenizer.vocab_size:
            raise DataError(f"{self.source} has token id {largest}, but the tokenizer "
                            f"{self.tokenizer.vocab_size} ids: is it another tokenizer's?")
        lengths = self.tokenizer.token_lengths()
        if (end := end_of_text(self.tokenizer)) is not None:
            lengths[end] = 0
        step = 1 << 22  # so that a split larger than memory is never in it as a whole
        parts = (self.val[i:i + step] for i in range(0, len(self.val), step))
        return sum(int(lengths[part].sum()) for part in parts) / len(self.val) or None


class Batches:
    """Batches of windows of a token array, as a pure function of their number.

    An epoch is every window of block_size tokens once, in an order and from an offset drawn from
    (seed, epoch). Raises DataError where the array is shorter than a window and its next token.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int):
        check_length(tokens, block_size)
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed = seed
        self.windows = max(1, len(tokens) // block_size - 1)  # a random offset uses the rest
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number`, 0 the first: ids and the ids that follow them, both (B, T) int32."""
        positions = np.arange(self.batch_size) + number * self.batch_size
        return self._cut([self._start(int(p)) for p in positions])

    def spread(self, count: int):
        """`count` batches of windows spread evenly over the array, always the same."""
        last = (len(self.tokens) - 1) // self.block_size - 1
        index = np.linspace(0, last, count * self.batch_size).round().astype(np.int64)
        for rows in index.reshape(count, self.batch_size) * self.block_size:
            yield self._cut(rows)

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            slack = len(self.tokens) - 1 - self.windows * self.block_size
            offset = rng.integers(0, min(slack, self.block_size - 1) + 1)
            self._epoch = epoch, offset + rng.permutation(self.windows) * self.block_size
        return int(self._epoch[1][index])

    def _cut(self, starts) -> tuple[np.ndarray, np.ndarray]:
        T = self.block_size
        rows = np.stack([self.tokens[s:s + T + 1] for s in starts]).astype(np.int64)
        if rows.max() >= np.iinfo(np.int32).max:
            raise DataError(f"token id {rows.max()} does not fit in 31 bits")
        return rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)


def check_length(tokens: np.ndarray, block_size: int) -> None:
    """Raises DataError unless a window and the token after it fit into a split."""
    if len(tokens) < block_size + 1:
        raise DataError(f"a split of the data has {len(tokens)} tokens, fewer than block_size + 1 "
                        f"= {block_size + 1}: give more text or a smaller --block_size")


def load_data(source, tokenizer: str | Tokenizer, vocab_size: int, block_size: int = 1,
              text_field: str = "text") -> TokenData:
    """Token ids of whatever `source` is, split 90 to 10 as nanoGPT splits.

    source: the name "shakespeare"; a path or glob of text files; a folder of them; a folder with
    train.bin and val.bin; text itself (a string with a line break); or a 1-d array of token ids.
    A .jsonl file has a document, at text_field, in each line. The end of each document, where
    there are several or they are JSON, is an end-of-text id, or a line break between them where
    the tokenizer has no such id. tokenizer: one, or the kind of one to make. Raises DataError,
    also where a split is shorter than block_size + 1 tokens, or ValueError from a tokenizer;
    nothing is cached then.
    """
    if not isinstance(source, str | Path):
        return _from_ids(source, None if isinstance(tokenizer, str) else tokenizer)
    if isinstance(source, str) and "\n" in source:
        return replace(_from_text([source], tokenizer, vocab_size, "a string of text", False),
                       is_named=False)
    if str(source) == "shakespeare":
        source = shakespeare()
    if not str(source):
        raise DataError("no data is named: give a text file, a folder or a glob")
    if os.path.isfile(Path(source) / "train.bin"):
        return _from_bins(Path(source), tokenizer, vocab_size)
    files = _text_files(str(source))
    if not isinstance(tokenizer, str):
        return _from_text(read_documents(files, text_field), tokenizer, vocab_size, str(source),
                          are_documents(files))
    return _from_cache(files, str(source), tokenizer, vocab_size, block_size, text_field)


def shakespeare() -> Path:
    """Tiny Shakespeare, downloaded once, or where that fails the play that ships with us."""
    path = _cache_root() / "tinyshakespeare.txt"
    try:
        return download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    except DataError as error:
        print(f"{error}; training on {SHIPPED.name}, which comes with this project",
              file=sys.stderr)
        return SHIPPED


def _text_files(source: str) -> list[Path]:
    path = Path(source)
    if os.path.isdir(path):
        files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    else:
        files = [path] if os.path.isfile(path) else sorted(map(Path, glob.glob(source)))
    files = [p for p in files if p.is_file()]
    if not files:
        raise DataError(f"there is no data at {source[:300]}: give a text file, a folder or glob "
                        "of them, or a folder with train.bin and val.bin (in a script also text "
                        "itself, with a line break in it)")
    return files


def _split(text):
    """90 to 10, cut where nanoGPT cuts."""
    return text[:int(len(text) * 0.9)], text[int(len(text) * 0.9):]


def _split_documents(texts: list[str]) -> tuple[list[str], list[str]]:
    """Documents as _split cuts them where they stand behind one another, with a line break
    between two; the one that the cut meets goes on in the second part."""
    left = int((sum(map(len, texts)) + len(texts) - 1) * 0.9)
    for i, text in enumerate(texts):
        if len(text) >= left:
            return [*texts[:i], text[:left]], [text[left:], *texts[i + 1:]]
        left -= len(text) + 1
    return texts, []


def _join(texts: list[str], tokenizer: Tokenizer, are_documents: bool) -> list[int]:
    """The ids of documents with what ends them; of the last one of a split, which may be cut, no
    end."""
    end = end_of_text(tokenizer)
    if not are_documents or end is None:
        return tokenizer.encode("\n".join(texts))
    return [i for text in texts for i in (*tokenizer.encode(text), end)][:-1]


def _from_ids(ids, tokenizer: Tokenizer | None) -> TokenData:
    ids = np.asarray(ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any():
        raise DataError(f"token ids have shape {ids.shape} and dtype {ids.dtype}: "
                        "give a 1-d array of non-negative integers")
    return TokenData(*_split(ids), tokenizer, "an array of token ids", is_named=False)


def _from_text(texts: list[str], tokenizer: str | Tokenizer, vocab_size: int, source: str,
               are_documents: bool) -> TokenData:
    if not any(text.strip() for text in texts):
        raise DataError(f"{source} is empty: give text")
    parts = _split_documents(texts)
    if isinstance(tokenizer, str):
        # characters have to cover all of the text; merges are learned without the validation split
        learned = "\n".join(texts if tokenizer == "char" else parts[0])
        tokenizer = make_tokenizer(tokenizer, learned, vocab_size)
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    ids = [np.array(_join(part, tokenizer, are_documents), dtype=dtype) for part in parts]
    return TokenData(*ids, tokenizer, source)


def is_token_file(path: Path) -> bool:
    """Whether `read_tokens` reads it: a .bin, or a folder with val.bin."""
    return path.suffix == ".bin" or (path / "val.bin").is_file()


def read_tokens(path: Path, tokenizer: Tokenizer | None) -> np.ndarray:
    """The ids (1-d, unsigned) in a .bin, or in the val.bin of a folder.

    Raises DataError where it is damaged, or where a meta.json beside it tells that another
    tokenizer, unless None, made it.
    """
    folder, name = (path, "val") if path.is_dir() else (path.parent, path.stem)
    meta = _read_meta(folder) if (folder / "meta.json").is_file() else {}
    if meta and tokenizer is not None:
        _check_tokenizer(folder, meta, tokenizer)
    return _map_bin(folder, name, meta)


def _from_bins(folder: Path, tokenizer: str | Tokenizer, vocab_size: int) -> TokenData:
    meta = {}
    if (folder / "meta.json").is_file():
        meta = _read_meta(folder)
        made_with = meta["made_with"]
        if not isinstance(tokenizer, str):
            _check_tokenizer(folder, meta, tokenizer)
        elif made_with != _made_with(tokenizer, vocab_size):
            raise DataError(f"{folder} was made with {made_with}, not "
                            f"{_made_with(tokenizer, vocab_size)}: ask for the same")
        tokenizer = load_tokenizer(meta["tokenizer"])
    elif tokenizer in ("bpe", "char"):
        raise DataError(f"{folder} has no meta.json that tells its tokenizer: pass "
                        "--tokenizer gpt2 (or byte), or the text itself as --data")
    elif isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, "", vocab_size)
    splits = (_map_bin(folder, name, meta) for name in ("train", "val"))
    return TokenData(*splits, tokenizer, str(folder))


def _map_bin(folder: Path, name: str, meta: dict) -> np.ndarray:
    path, dtype = folder / f"{name}.bin", np.dtype(meta.get("dtype", "<u2"))
    if not path.is_file():
        raise DataError(f"there is no {path}")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize or meta.get(f"{name}_bytes", size) != size:
        raise DataError(f"{path} is damaged: it has {size} bytes; {_remedy(folder)}")
    return np.memmap(path, dtype=dtype, mode="r")


def _check_tokenizer(folder: Path, meta: dict, tokenizer: Tokenizer) -> None:
    if tokenizer.to_json() != meta["tokenizer"]:
        raise DataError(f"{folder} was made with another tokenizer than the one given: use its "
                        "own, or the text")


def _made_with(kind: str, vocab_size: int) -> str:
    return f"--tokenizer {kind}" + (f" --vocab_size {vocab_size}" if kind == "bpe" else "")


def _read_meta(folder: Path) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        meta = None
    whole = isinstance(meta, dict) and {"made_with", "tokenizer", "files"} <= set(meta)
    try:
        if whole and meta.get("dtype") in ("<u2", "<u4"):
            load_tokenizer(meta["tokenizer"])
            return meta
    except ValueError:
        pass
    raise DataError(f"{folder / 'meta.json'} is damaged: {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    if folder.resolve().parent == _cache_root().resolve():
        return f"delete {folder} to have it made again"
    return "make it again"


def _from_cache(files: list[Path], source: str, kind: str, vocab_size: int, block_size: int,
                text_field: str) -> TokenData:
    """The tokens of text files, from the cache where it is newer than they are."""
    signature = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    if are_documents(files):
        signature.append(["documents", text_field])
    label = hashlib.sha256(f"{Path(source).resolve()} {_made_with(kind, vocab_size)}".encode())
    folder = _cache_root() / f"{Path(files[0]).stem}-{kind}-{label.hexdigest()[:10]}"
    if not (folder / "meta.json").is_file() or _read_meta(folder)["files"] != signature:
        meta = {"files": signature, "made_with": _made_with(kind, vocab_size)}
        if sum(f.stat().st_size for f in files) > LARGE:
            _cache_in_shards(folder, files, text_field, kind, vocab_size, meta)
        else:
            data = _from_text(read_documents(files, text_field), kind, vocab_size, source,
                              are_documents(files))
            for ids in (data.train, data.val):
                check_length(ids, block_size)
            _write_cache(folder, data, meta)
    data = _from_bins(folder, kind, vocab_size)
    data.source = source
    return data


def _write_cache(folder: Path, data: TokenData, meta: dict) -> None:
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        part.mkdir(parents=True, exist_ok=True)
        for name, ids in (("train", data.train), ("val", data.val)):
            ids.astype(ids.dtype.newbyteorder("<")).tofile(part / f"{name}.bin")
            meta[f"{name}_bytes"] = ids.nbytes
        meta |= {"dtype": data.train.dtype.newbyteorder("<").str,
                 "tokenizer": data.tokenizer.to_json()}
        (part / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise DataError(f"tokens cannot be cached in {folder} ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _cache_in_shards(folder: Path, files: list[Path], text_field: str, kind: str,
                     vocab_size: int, meta: dict) -> None:
    """The cache of text that may be larger than memory. What a stopped build leaves stays."""
    part = folder.with_name(f".{folder.name}.shards")
    try:
        tokenizer, dtype = shards.build(part, files, text_field, kind, vocab_size, meta)
        meta |= {f"{name}_bytes": (part / f"{name}.bin").stat().st_size
                 for name in ("train", "val")}
        meta |= {"dtype": dtype.str, "tokenizer": tokenizer.to_json()}
        (part / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise DataError(f"tokens cannot be made in {part} ({error.strerror}): make room, and what "
                        "is there already is used again") from error


def _cache_root() -> Path:
    """data/cache, or where that cannot be written the user's cache."""
    root = DATA_DIR / "cache"
    with suppress(OSError):
        root.mkdir(exist_ok=True)
    return root if os.access(root, os.W_OK) else device.cache_dir() / "data"
