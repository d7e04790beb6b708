"""Text or .bin files -> token ids -> batches in an order that can be resumed."""

import glob
import hashlib
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinygpt import device
from tinygpt.data import DataError, shards, token_files
from tinygpt.data.documents import (
    TextFiles,
    are_documents,
    end_of_text,
    read_documents,
    reason,
    what_is_special,
)
from tinygpt.data.download import download
from tinygpt.data.token_files import Ids, Missing, TokenFolder, chunks, digest
from tinygpt.data.tokenizer import Tokenizer, fingerprint, load_tokenizer, make_tokenizer

DATA_DIR = Path(__file__).parents[2] / "data"
SHIPPED = DATA_DIR / "lantern_and_tide.txt"
LARGE = 256 << 20  # bytes of text above which tokens are made in shards
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class TokenData:
    """Token ids of the training and the validation split (1-d, unsigned), and what made them.

    tokenizer is None where bare ids were given. source says where they come from: a path or a
    glob where is_named, else in words. fingerprint is a hash of the ids of both splits. made is the
    cache that was written for them, if one was.
    """

    train: Ids
    val: Ids
    tokenizer: Tokenizer | None
    source: str
    is_named: bool = True
    fingerprint: str = ""
    made: Path | None = None

    def __post_init__(self):
        self.fingerprint = self.fingerprint or f"{digest(self.train)}-{digest(self.val)}"

    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes that a validation token stands for, end-of-text for none; None without
        a tokenizer."""
        return self.tokenizer and mean_bytes(self.val, self.tokenizer, self.source)

    def describe(self) -> dict:
        """What a checkpoint says of the data, as JSON values, for `check_same`."""
        return {"source": self.source, "fingerprint": self.fingerprint,
                "training_tokens": len(self.train), "validation_tokens": len(self.val)}

    def check_same(self, path: Path, theirs: dict | None) -> None:
        """Raises DataError unless the checkpoint at path, which has `theirs` of `describe`, was
        trained on these ids; one that does not say (None) may have been."""
        ours = self.describe()
        if theirs is None or (isinstance(theirs, dict)
                              and theirs.get("fingerprint") == self.fingerprint):
            return
        if not isinstance(theirs, dict) or not ours.keys() <= theirs.keys():
            raise DataError(f"{path} has damaged metadata of its data: use another one")
        names = ["{source} ({training_tokens} training and {validation_tokens} validation tokens, "
                 "fingerprint {fingerprint})".format(**data) for data in (theirs, ours)]
        raise DataError(f"{path} was trained on {names[0]}, which is other data than {names[1]}: "
                        "resume with the same, or start a new run from it with --init_from")

    def forget(self) -> None:
        """Deletes the cache that was written for these ids: what they were asked for is refused."""
        if self.made is not None:
            shutil.rmtree(self.made, ignore_errors=True)


def mean_bytes(ids: Ids, tokenizer: Tokenizer, source: str, skip: int = 0) -> float | None:
    """Mean UTF-8 bytes that the ids behind the first `skip` stand for, or None where that is 0.
    Raises DataError on an id outside the tokenizer's vocabulary."""
    lengths, total = tokenizer.token_lengths(), 0
    for part in chunks(ids):
        if (largest := part.max()) >= tokenizer.vocab_size:
            raise DataError(f"{source} has token id {largest}, but the tokenizer "
                            f"{tokenizer.vocab_size} ids: is it another tokenizer's?")
        total += int(lengths[part].sum())
    total -= int(lengths[ids[:skip]].sum())
    return total / (len(ids) - skip) if total else None


class Batches:
    """Batches of windows of a token array, as a pure function of their number.

    An epoch is every window of block_size tokens once, in an order and from an offset drawn from
    (seed, epoch). Raises DataError where the array is shorter than a window and its next token.
    """

    def __init__(self, tokens: Ids, block_size: int, batch_size: int, seed: int):
        check_length(tokens, block_size)
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed = seed
        self.windows = max(1, len(tokens) // block_size - 1)  # a random offset uses the rest
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number`, 0 the first: ids and the ids that follow them, both (B, T) int32."""
        positions = np.arange(self.batch_size) + number * self.batch_size
        return self._cut([self._start(int(p)) for p in positions])

    def spread(self, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number` of `count` with windows spread evenly over the array, always the same."""
        last = (len(self.tokens) - 1) // self.block_size - 1
        positions = np.arange(self.batch_size) + number * self.batch_size
        index = (positions * (last / max(1, count * self.batch_size - 1))).round().astype(np.int64)
        return self._cut(index * self.block_size)

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


def check_length(tokens: Ids, block_size: int) -> None:
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
    text = TextFiles(files, text_field, LARGE)
    return _from_cache(text, str(source), tokenizer, vocab_size, block_size)


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
    if (what := what_is_special(path)) not in (None, "a folder"):
        raise DataError(f"{source} is {what}, not a file: write its content to a file first")
    try:
        if what is not None:
            files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        else:
            files = [path] if os.path.isfile(path) else sorted(map(Path, glob.glob(source)))
    except OSError as error:
        raise DataError(f"{source} cannot be read ({reason(error)}): name data that can"
                        ) from error
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
    try:
        ids = np.asarray(ids)
    except ValueError as error:  # of lists of different lengths
        raise DataError(f"token ids cannot be an array ({error})") from error
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


def read_tokens(path: Path, tokenizer: Tokenizer | None) -> Ids:
    """The ids (1-d, unsigned) in a .bin, or in the val.bin of a folder.

    Raises DataError where it is damaged, or where a meta.json beside it says that another
    tokenizer, unless None, made it.
    """
    folder, name = (path, "val") if path.is_dir() else (path.parent, path.stem)
    with TokenFolder(folder, (name,), _remedy(folder)) as opened:
        if opened.meta and tokenizer is not None:
            _check_tokenizer(folder, opened.meta, tokenizer)
        return opened.read()[name][0]


def _from_bins(folder: Path, tokenizer: str | Tokenizer, vocab_size: int) -> TokenData:
    with TokenFolder(folder, remedy=_remedy(folder)) as opened:
        return _of_opened(opened, tokenizer, vocab_size, str(folder))


def _of_opened(opened: TokenFolder, tokenizer: str | Tokenizer, vocab_size: int,
               source: str) -> TokenData:
    meta, folder = opened.meta, opened.folder
    if meta:
        made_with = meta["made_with"]
        if not isinstance(tokenizer, str):
            _check_tokenizer(folder, meta, tokenizer)
        elif made_with != _made_with(tokenizer, vocab_size):
            raise DataError(f"{folder} was made with {made_with}, not "
                            f"{_made_with(tokenizer, vocab_size)}: ask for the same")
        tokenizer = load_tokenizer(meta["tokenizer"])
    elif tokenizer in ("bpe", "char"):
        raise DataError(f"{folder} has no meta.json that names its tokenizer: pass "
                        "--tokenizer gpt2 (or byte), or the text itself as --data")
    elif isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, "", vocab_size)
    splits = opened.read().values()
    # the checksum of a file of uint16 is the digest of its ids
    digests = [checksum if ids.dtype.itemsize == 2 else digest(ids) for ids, checksum in splits]
    return TokenData(*(ids for ids, _ in splits), tokenizer, source, fingerprint="-".join(digests))


def _check_tokenizer(folder: Path, meta: dict, tokenizer: Tokenizer) -> None:
    made_with = fingerprint(load_tokenizer(meta["tokenizer"]))
    if (given := fingerprint(tokenizer)) != made_with:
        raise DataError(f"{folder} was made with another tokenizer ({meta['made_with']}, "
                        f"fingerprint {made_with}) than the one given ({tokenizer.kind}, "
                        f"fingerprint {given}): use its own, or the text")


def _made_with(kind: str, vocab_size: int) -> str:
    return f"--tokenizer {kind}" + (f" --vocab_size {vocab_size}" if kind == "bpe" else "")


def _remedy(folder: Path) -> str:
    if folder.resolve().parent == _cache_root().resolve():
        return f"delete {folder} to have it made again"
    return "make it again"


# ---- the cache of text files

def _from_cache(text: TextFiles, source: str, kind: str, vocab_size: int,
                block_size: int) -> TokenData:
    """The tokens of text files, from the cache where it is of their content."""
    label = hashlib.sha256(f"{Path(source).resolve()} {_made_with(kind, vocab_size)}".encode())
    folder = _cache_root() / f"{Path(text.files[0]).stem}-{kind}-{label.hexdigest()[:10]}"
    data = _find(folder, text, kind, vocab_size)
    if data is None:
        with token_files.locked(folder) as alone:
            data = _find(folder, text, kind, vocab_size)  # another process may have made it
            if data is None and text.is_large:
                _make_in_shards(folder, text, kind, vocab_size)
                data = _find(folder, text, kind, vocab_size)
            elif data is None:
                data = _make(folder, text, kind, vocab_size, block_size, alone)
    return replace(data, source=source)


def _find(folder: Path, text: TextFiles, kind: str, vocab_size: int) -> TokenData | None:
    """What is in the cache, if it is of this text."""
    try:
        with TokenFolder(folder, remedy=_remedy(folder)) as opened:
            if opened.meta and text.is_described_by(opened.meta):
                return _of_opened(opened, kind, vocab_size, str(folder))
    except Missing:
        pass
    return None


def _make(folder: Path, text: TextFiles, kind: str, vocab_size: int, block_size: int,
          alone: bool) -> TokenData:
    """The tokens of a text that is not large, which are put into the cache where that can be."""
    data = _from_text(text.documents(), kind, vocab_size, ", ".join(map(str, text.files[:3])),
                      are_documents(text.files))
    for ids in (data.train, data.val):
        check_length(ids, block_size)
    try:
        with token_files.new_folder(folder, clean=alone) as part:
            for name, ids in (("train", data.train), ("val", data.val)):
                # not by tofile, which does not notice a disk that is full when it closes the file
                little = ids.astype(ids.dtype.newbyteorder("<"))
                (part / f"{name}.bin").write_bytes(little.data)
            token_files.write_meta(part, _meta(text, kind, vocab_size, data.tokenizer,
                                               data.train.dtype))
        data.made = folder
    except OSError as error:
        print(f"the tokens cannot be kept in {folder} ({reason(error)}): they are made again "
              "the next time", file=sys.stderr)
    return data


def _make_in_shards(folder: Path, text: TextFiles, kind: str, vocab_size: int) -> None:
    """The cache of text that may be larger than memory. What a stopped build leaves stays."""
    part = folder.with_name(f".{folder.name}.shards")
    signature = {"files": text.describe()["files"], "made_with": _made_with(kind, vocab_size)}
    try:
        tokenizer, dtype = shards.build(part, text.files, text.text_field, kind, vocab_size,
                                        signature)
        text.check_unchanged()
        token_files.write_meta(part, _meta(text, kind, vocab_size, tokenizer, dtype))
        token_files.publish(part, folder)
    except OSError as error:
        raise DataError(f"tokens cannot be made in {part} ({reason(error)}): make room, and what "
                        "is there already is used again") from error


def _meta(text: TextFiles, kind: str, vocab_size: int, tokenizer: Tokenizer,
          dtype: np.dtype) -> dict:
    """What meta.json says of the tokens of a text."""
    return text.describe() | {"made_with": _made_with(kind, vocab_size),
                              "dtype": dtype.newbyteorder("<").str,
                              "tokenizer": tokenizer.to_json()}


def _cache_root() -> Path:
    """data/cache, or where that cannot be written the user's cache."""
    root = DATA_DIR / "cache"
    with suppress(OSError):
        root.mkdir(exist_ok=True)
    return root if os.access(root, os.W_OK) else device.cache_dir() / "data"
