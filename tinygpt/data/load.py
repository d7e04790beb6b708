"""Text, conversations or .bin files -> token ids."""

import glob
import hashlib
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinygpt import device
from tinygpt.data import DataError, shards, token_files
from tinygpt.data.conversations import are_conversations, load_conversations
from tinygpt.data.documents import (
    TextFiles,
    are_documents,
    read_documents,
    reason,
    special_kind,
)
from tinygpt.data.download import download
from tinygpt.data.token_data import TokenData, check_length
from tinygpt.data.token_files import Ids, MissingFile, TokenFolder, digest
from tinygpt.data.tokenizer import (
    Tokenizer,
    end_of_text,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
)

DATA_DIR = Path(__file__).parents[2] / "data"
SHIPPED = DATA_DIR / "lantern_and_tide.txt"
LARGE = 256 << 20  # bytes of text above which it is tokenized in shards
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_data(source, tokenizer: str | Tokenizer, vocab_size: int, block_size: int = 1,
              text_field: str = "text") -> TokenData:
    """Token ids of `source`, split 90 to 10 as nanoGPT does.

    source: the name "shakespeare"; a path or glob of text files; a folder of them; a folder with
    train.bin and val.bin; text itself (a string with a line break); or a 1-d array of token ids.
    A .jsonl file has a document in each line, at text_field, or a conversation, at "messages": then
    a ChatData is returned. Several documents, and those of a .jsonl, are separated by an
    end-of-text id, or by a line break if the tokenizer has no such id.
    tokenizer: a tokenizer, or the kind of tokenizer to make. Raises DataError, also if a split
    has fewer than block_size + 1 tokens, or ValueError from a tokenizer; nothing is cached then.
    """
    if not isinstance(source, str | Path):
        return _from_ids(source, None if isinstance(tokenizer, str) else tokenizer)
    if isinstance(source, str) and "\n" in source:
        return replace(_from_text([source], tokenizer, vocab_size, "a string of text", False),
                       is_named=False)
    if str(source) == "shakespeare":
        source = shakespeare()
    if not str(source):
        raise DataError("data is empty: give a text file, a folder or a glob")
    if os.path.isfile(Path(source) / "train.bin"):
        return _from_token_files(Path(source), tokenizer, vocab_size)
    files = _text_files(str(source))
    if are_conversations(files, text_field):
        return load_conversations(files, str(source), tokenizer, vocab_size)
    if not isinstance(tokenizer, str):
        return _from_text(read_documents(files, text_field), tokenizer, vocab_size, str(source),
                          are_documents(files))
    text = TextFiles(files, text_field, LARGE)
    return _from_cache(text, str(source), tokenizer, vocab_size, block_size)


def text_size(source: str) -> int | None:
    """The bytes of the text files that `load_data` would read; None for files of tokens. Raises
    DataError if there is no data."""
    if os.path.isfile(Path(source) / "train.bin"):
        return None
    return sum(os.path.getsize(file) for file in _text_files(source))


def shakespeare() -> Path:
    """Tiny Shakespeare, downloaded once; if that fails, the play that ships with this project."""
    path = _cache_root() / "tinyshakespeare.txt"
    try:
        return download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    except DataError as error:
        print(f"{error}; training on {SHIPPED.name}, which comes with this project",
              file=sys.stderr)
        return SHIPPED


def _text_files(source: str) -> list[Path]:
    path = Path(source)
    if (kind := special_kind(path)) not in (None, "a folder"):
        raise DataError(f"{source} is {kind}, not a file: write its content to a file first")
    try:
        if kind == "a folder":
            files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        else:
            files = [path] if os.path.isfile(path) else sorted(map(Path, glob.glob(source)))
    except OSError as error:
        raise DataError(f"{source} cannot be read ({reason(error)}): choose readable data"
                        ) from error
    files = [p for p in files if p.is_file()]
    if not files:
        raise DataError(f"there is no data at {source[:300]}: give a text file, a folder or glob "
                        "of them, or a folder with train.bin and val.bin (in a script also text "
                        "itself, with a line break in it)")
    return files


def _split(text):
    """The first 90% and the rest, split where nanoGPT splits."""
    return text[:int(len(text) * 0.9)], text[int(len(text) * 0.9):]


def _split_documents(texts: list[str]) -> tuple[list[str], list[str]]:
    """Splits documents as `_split` would split them when joined by line breaks; the document at
    the split is cut in two."""
    left = int((sum(map(len, texts)) + len(texts) - 1) * 0.9)
    for i, text in enumerate(texts):
        if len(text) >= left:
            return [*texts[:i], text[:left]], [text[left:], *texts[i + 1:]]
        left -= len(text) + 1
    return texts, []


def _join(texts: list[str], tokenizer: Tokenizer, are_documents: bool) -> list[int]:
    """The ids of documents, separated by end-of-text; none follows the last one, which may be cut
    off."""
    end = end_of_text(tokenizer)
    if not are_documents or end is None:
        return tokenizer.encode("\n".join(texts))
    return [i for text in texts for i in (*tokenizer.encode(text), end)][:-1]


def _from_ids(ids, tokenizer: Tokenizer | None) -> TokenData:
    try:
        ids = np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        raise DataError(f"token ids do not form an array ({error}): give a 1-d array") from error
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
        # characters have to cover the whole text; merges are learned from the training split
        corpus = "\n".join(texts if tokenizer == "char" else parts[0])
        tokenizer = make_tokenizer(tokenizer, corpus, vocab_size)
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    ids = [np.array(_join(part, tokenizer, are_documents), dtype=dtype) for part in parts]
    return TokenData(*ids, tokenizer, source)


def is_token_file(path: Path) -> bool:
    """Whether path is a .bin or a folder with val.bin, which `read_tokens` reads."""
    return path.suffix == ".bin" or (path / "val.bin").is_file()


def read_tokens(path: Path, tokenizer: Tokenizer | None) -> Ids:
    """The ids (1-d, unsigned) in a .bin, or in the val.bin of a folder.

    Raises DataError if it is damaged, or if the meta.json next to it names another tokenizer than
    the one given (None accepts any).
    """
    folder, name = (path, "val") if path.is_dir() else (path.parent, path.stem)
    with TokenFolder(folder, (name,), _remedy(folder)) as opened:
        if opened.meta and tokenizer is not None:
            _check_tokenizer(folder, opened.meta, tokenizer)
        return opened.read()[name][0]


def _from_token_files(folder: Path, tokenizer: str | Tokenizer, vocab_size: int) -> TokenData:
    with TokenFolder(folder, remedy=_remedy(folder)) as opened:
        return _from_folder(opened, tokenizer, vocab_size, str(folder))


def _from_folder(opened: TokenFolder, tokenizer: str | Tokenizer, vocab_size: int,
                 source: str) -> TokenData:
    meta, folder = opened.meta, opened.folder
    if meta:
        made_with = meta["made_with"]
        if not isinstance(tokenizer, str):
            _check_tokenizer(folder, meta, tokenizer)
        elif made_with != _made_with(tokenizer, vocab_size):
            raise DataError(f"{folder} was made with {made_with}, not "
                            f"{_made_with(tokenizer, vocab_size)}: use the same settings")
        tokenizer = load_tokenizer(meta["tokenizer"])
    elif tokenizer in ("bpe", "char"):
        raise DataError(f"{folder} has no meta.json that names its tokenizer: pass "
                        "--tokenizer gpt2 (or byte), or the text itself as --data")
    elif isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, "", vocab_size)
    splits = opened.read().values()
    # the checksum of a uint16 file equals the digest of its ids
    digests = [checksum if ids.dtype.itemsize == 2 else digest(ids) for ids, checksum in splits]
    return TokenData(*(ids for ids, _ in splits), tokenizer, source, fingerprint="-".join(digests))


def _check_tokenizer(folder: Path, meta: dict, tokenizer: Tokenizer) -> None:
    made_with = fingerprint(load_tokenizer(meta["tokenizer"]))
    if (given := fingerprint(tokenizer)) != made_with:
        raise DataError(f"{folder} was made with another tokenizer ({meta['made_with']}, "
                        f"fingerprint {made_with}) than the one given ({tokenizer.kind}, "
                        f"fingerprint {given}): use the same tokenizer, or give the text")


def _made_with(kind: str, vocab_size: int) -> str:
    return f"--tokenizer {kind}" + (f" --vocab_size {vocab_size}" if kind == "bpe" else "")


def _remedy(folder: Path) -> str:
    if folder.resolve().parent == _cache_root().resolve():
        return f"delete {folder}, and it is created again"
    return "create it again"


# ---- the cache of text files

def _from_cache(text: TextFiles, source: str, kind: str, vocab_size: int,
                block_size: int) -> TokenData:
    """The tokens of text files, from the cache if it matches their content."""
    label = hashlib.sha256(f"{Path(source).resolve()} {_made_with(kind, vocab_size)}".encode())
    folder = _cache_root() / f"{Path(text.files[0]).stem}-{kind}-{label.hexdigest()[:10]}"
    data = _read_cache(folder, text, kind, vocab_size)
    if data is None:
        with token_files.locked(folder) as has_lock:
            data = _read_cache(folder, text, kind, vocab_size)  # another process may have made it
            if data is None and text.is_large:
                _tokenize_in_shards(folder, text, kind, vocab_size)
                data = _read_cache(folder, text, kind, vocab_size)
            elif data is None:
                data = _tokenize(folder, text, kind, vocab_size, block_size, has_lock)
    return replace(data, source=source)


def _read_cache(folder: Path, text: TextFiles, kind: str, vocab_size: int) -> TokenData | None:
    """The tokens in a cache folder, if they are those of this text."""
    try:
        with TokenFolder(folder, remedy=_remedy(folder)) as opened:
            if opened.meta and text.matches(opened.meta):
                return _from_folder(opened, kind, vocab_size, str(folder))
    except MissingFile:
        pass
    return None


def _tokenize(folder: Path, text: TextFiles, kind: str, vocab_size: int, block_size: int,
              has_lock: bool) -> TokenData:
    """Tokenizes a text that is not large, and writes the cache if possible."""
    data = _from_text(text.documents(), kind, vocab_size, ", ".join(map(str, text.files[:3])),
                      are_documents(text.files))
    for ids in (data.train, data.val):
        check_length(ids, block_size)
    try:
        with token_files.new_folder(folder, clean=has_lock) as part:
            for name, ids in (("train", data.train), ("val", data.val)):
                # not tofile, which ignores a full disk when it closes the file
                little = ids.astype(ids.dtype.newbyteorder("<"))
                (part / f"{name}.bin").write_bytes(little.data)
            token_files.write_meta(part, _meta(text, kind, vocab_size, data.tokenizer,
                                               data.train.dtype))
        data.new_cache = folder
    except OSError as error:
        print(f"the tokens cannot be cached in {folder} ({reason(error)}): the next run tokenizes "
              "again", file=sys.stderr)
    return data


def _tokenize_in_shards(folder: Path, text: TextFiles, kind: str, vocab_size: int) -> None:
    """Writes the cache of text that may be larger than memory; an interrupted build is resumed."""
    part = folder.with_name(f".{folder.name}.shards")
    signature = {"files": text.describe()["files"], "made_with": _made_with(kind, vocab_size)}
    try:
        tokenizer, dtype = shards.build(part, text, kind, vocab_size, signature)
        text.check_unchanged()
        token_files.write_meta(part, _meta(text, kind, vocab_size, tokenizer, dtype))
        token_files.publish(part, folder)
    except OSError as error:
        raise DataError(f"tokens cannot be written to {part} ({reason(error)}): free disk space "
                        "and run again, which resumes") from error


def _meta(text: TextFiles, kind: str, vocab_size: int, tokenizer: Tokenizer,
          dtype: np.dtype) -> dict:
    """The content of meta.json without sizes and checksums."""
    return text.describe() | {"made_with": _made_with(kind, vocab_size),
                              "dtype": dtype.newbyteorder("<").str,
                              "tokenizer": tokenizer.to_json()}


def _cache_root() -> Path:
    """data/cache, or the user's cache folder if data/cache is not writable."""
    root = DATA_DIR / "cache"
    with suppress(OSError):
        root.mkdir(exist_ok=True)
    return root if os.access(root, os.W_OK) else device.cache_dir() / "data"
