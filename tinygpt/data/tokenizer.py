"""Text to token ids and back: byte-level BPE, characters, or bytes.

A tokenizer is written whole into `to_json()`, which travels inside a checkpoint, and
`load_tokenizer` makes it again without any file or download.
"""

import base64
import codecs
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import rustbpe
import tiktoken
import xxhash

# GPT-2's rule of where a word ends (its published encoder, and tiktoken's "gpt2")
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
LONGEST_RUN = 500_000
LONG_RUN = re.compile(rf"\s{{{LONGEST_RUN},}}")


class Tokenizer(Protocol):
    """What every tokenizer offers. Ids are 0..vocab_size-1."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of text. Raises ValueError that names a character it has no ids for."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 bytes that ids stand for, an end-of-text for none. Raises ValueError on an id
        out of range."""

    def decode(self, ids: list[int]) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""

    def to_json(self) -> dict:
        """Everything that `load_tokenizer` needs, as JSON values."""


class _Base:
    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_lengths(self) -> np.ndarray:
        """The number of bytes (V,) that each id stands for."""
        return np.array([len(self.decode_bytes([i])) for i in range(self.vocab_size)])

    def _check_ids(self, ids: list[int]) -> None:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary 0..{self.vocab_size - 1}")


class BPETokenizer(_Base):
    """Byte-level byte-pair encoding (arXiv:1508.07909), by tiktoken.

    `BPETokenizer()` is GPT-2's, with tiktoken's own files; `BPETokenizer.train` makes one for a
    text. The last id, `end_of_text`, ends a document: no text encodes to it, and it is decoded to
    no text.
    """

    kind = "bpe"

    def __init__(self, encoding: tiktoken.Encoding | None = None):
        self._encoding = encoding or _gpt2_encoding()
        self.vocab_size = self._encoding.n_vocab
        self.end_of_text = self._encoding.eot_token

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BPETokenizer":
        """The tokenizer of at most vocab_size ids, 257 or more, that merges what is commonest."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} is too small for bpe: choose 257 or more "
                             "(256 bytes and end-of-text), or --tokenizer byte")
        if vocab_size >= 1 << 31:
            raise ValueError(f"vocab_size={vocab_size} is too large for bpe: choose one below 2^31")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator([_check_text(text)], vocab_size - 1, pattern=GPT2_PATTERN)
        return cls.of([bytes(token) for token, _ in trainer.get_mergeable_ranks()])

    @classmethod
    def of(cls, tokens: list[bytes]) -> "BPETokenizer":
        """The tokenizer of these tokens, in order of rank, and end-of-text after them.

        Raises ValueError unless they are all different, none is empty, and every byte is one.
        """
        distinct = set(tokens)
        missing = 256 - len({bytes([b]) for b in range(256)} & distinct)
        if missing or b"" in distinct or len(distinct) < len(tokens):
            raise ValueError(f"{len(tokens)} tokens that are not all different, or of which one is "
                             f"empty, or that lack {missing} of the 256 bytes")
        return cls(_encoding(tokens))

    def encode(self, text: str) -> list[int]:
        if run := LONG_RUN.search(_check_text(text)):
            raise ValueError(f"the text has more than {LONGEST_RUN:,} blanks in a row, from "
                             f"character {run.start()} on, more than tiktoken takes: shorten them")
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check_ids(ids)
        return self._encoding.decode_bytes([i for i in ids if i != self.end_of_text])

    def to_json(self) -> dict:
        return {"kind": self.kind, "tokens": [base64.b64encode(t).decode() for t in self.tokens()]}

    @classmethod
    def from_json(cls, data: dict) -> "BPETokenizer":
        if not isinstance(data["tokens"], list):
            raise ValueError("tokens that are no list")
        return cls.of([base64.b64decode(t, validate=True) for t in data["tokens"]])

    def tokens(self) -> list[bytes]:
        """The bytes of every id but end-of-text, in order of rank."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size - 1)]


class CharTokenizer(_Base):
    """One id for each character of `chars`, in that order."""

    kind = "char"

    def __init__(self, chars: str):
        self.chars = chars
        self.vocab_size = len(chars)
        self._ids = {c: i for i, c in enumerate(chars)}

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The tokenizer of exactly the characters that text has, sorted."""
        return cls("".join(sorted(set(_check_text(text)))))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[c] for c in text]
        except KeyError:
            missing = sorted(set(_check_text(text)) - set(self._ids))
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise ValueError("the tokenizer, which has the characters of its training text only, "
                             f"lacks {', '.join(map(_show, missing[:10]))}{more}") from None

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check_ids(ids)
        return "".join(self.chars[i] for i in ids).encode("utf-8")

    def to_json(self) -> dict:
        return {"kind": self.kind, "chars": self.chars}

    @classmethod
    def from_json(cls, data: dict) -> "CharTokenizer":
        chars = data["chars"]
        if not isinstance(chars, str) or not chars or len(set(chars)) < len(chars):
            raise ValueError("chars that are no string of one or more different characters")
        return cls(_check_text(chars))


class ByteTokenizer(_Base):
    """The 256 bytes of UTF-8."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(_check_text(text).encode("utf-8"))

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check_ids(ids)
        return bytes(ids)

    def to_json(self) -> dict:
        return {"kind": self.kind}

    @classmethod
    def from_json(cls, data: dict) -> "ByteTokenizer":
        return cls()


# what makes a tokenizer of each kind, from a text and the size of a vocabulary
TOKENIZERS = {
    "bpe": BPETokenizer.train, "gpt2": lambda text, vocab_size: BPETokenizer(),
    "char": lambda text, vocab_size: CharTokenizer.train(text),
    "byte": lambda text, vocab_size: ByteTokenizer()}


def load_tokenizer(data: dict) -> Tokenizer:
    """The tokenizer that to_json() described. Raises ValueError where it describes none."""
    kinds = {cls.kind: cls for cls in (BPETokenizer, CharTokenizer, ByteTokenizer)}
    try:
        return kinds[data["kind"]].from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this describes no tokenizer ({error!r})") from error


def fingerprint(tokenizer: Tokenizer | None) -> str | None:
    """A hash (xxh3, 64 bits, in hexadecimal digits) that two tokenizers share where they give the
    same ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    return xxhash.xxh3_64_hexdigest(json.dumps(tokenizer.to_json(), sort_keys=True).encode())


def make_tokenizer(kind: str, text: str, vocab_size: int) -> Tokenizer:
    """A tokenizer of that kind; text is what bpe and char learn from. Raises ValueError on a kind
    that there is not."""
    if kind not in TOKENIZERS:
        raise ValueError(f"there is no tokenizer {kind!r}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind](text, vocab_size)


def up_to_end(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[int]:
    """The ids before the first end-of-text, where the tokenizer has one: those of one document."""
    end = getattr(tokenizer, "end_of_text", None)
    return itertools.takewhile(lambda i: i != end, ids)


class StreamDecoder:
    """Turns ids that come one at a time into text, and never splits a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this id completes."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is left: U+FFFD where the last character is incomplete."""
        return self._utf8.decode(b"", final=True)


def _show(char: str) -> str:
    """A character as itself, where that can be seen, and as its code point."""
    code = f"U+{ord(char):04X}"
    return f"{char!r} ({code})" if char.isprintable() and char != " " else code


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!a} at character {error.start} is half of a "
                         "surrogate pair and no text: remove it") from None
    return text


@functools.cache
def _gpt2_encoding() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises; a cached file needs none
        raise ValueError(
            "GPT-2's tokenizer files are neither cached nor to be downloaded "
            f"({type(error).__name__}): connect once, name a folder that holds them in "
            "TIKTOKEN_CACHE_DIR, or choose --tokenizer bpe") from error


def _encoding(tokens: list[bytes]) -> tiktoken.Encoding:
    try:
        return tiktoken.Encoding("tinygpt", pat_str=GPT2_PATTERN,
                                 mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                 special_tokens={END_OF_TEXT: len(tokens)})
    except BaseException as error:  # a panic in Rust, which arrives here as no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tiktoken takes no such {len(tokens)} tokens ({error})") from None
