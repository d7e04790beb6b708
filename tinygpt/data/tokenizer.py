"""Text to token ids and back: byte-level BPE, characters, bytes, or a tokenizer.json.

`to_json()` returns everything about a tokenizer; it is saved in checkpoints, and `load_tokenizer`
restores the tokenizer from it without other files or downloads.
"""

import base64
import codecs
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import rustbpe
import tiktoken
import tokenizers
import xxhash

# how GPT-2 splits text into words (its published encoder, and tiktoken's "gpt2")
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
LONGEST_RUN = 500_000
LONG_RUN = re.compile(rf"\s{{{LONGEST_RUN},}}")


class Tokenizer(Protocol):
    """The interface of every tokenizer. Ids are 0..vocab_size-1."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of text. Raises ValueError that names the characters without an id."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 bytes of ids; end-of-text has none. Raises ValueError on an id out of range.
        """

    def decode(self, ids: list[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""

    def stream(self) -> "ByteStream | TextStream":
        """What decodes one id after another; see `StreamDecoder`."""

    def to_json(self) -> dict:
        """JSON values for `load_tokenizer`."""


class _Base:
    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_lengths(self) -> np.ndarray:
        """The number of bytes of each id (V,)."""
        return np.array([len(self.decode_bytes([i])) for i in range(self.vocab_size)])

    def stream(self) -> "ByteStream":
        return ByteStream(self)

    def _check_ids(self, ids: list[int]) -> None:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary 0..{self.vocab_size - 1}")


class BPETokenizer(_Base):
    """Byte-level byte-pair encoding (arXiv:1508.07909) with tiktoken.

    `BPETokenizer()` is GPT-2's tokenizer, from tiktoken's files; `BPETokenizer.train` trains one.
    The last id, `end_of_text`, ends a document: `encode` never returns it, `decode` skips it.
    """

    kind = "bpe"

    def __init__(self, encoding: tiktoken.Encoding | None = None):
        self._encoding = encoding or _gpt2_encoding()
        self.vocab_size = self._encoding.n_vocab
        self.end_of_text = self._encoding.eot_token

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BPETokenizer":
        """Trains a tokenizer of at most vocab_size ids, 257 or more, on the pairs of text."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} is too small for bpe: choose 257 or more "
                             "(256 bytes and end-of-text), or --tokenizer byte")
        if vocab_size >= 1 << 31:
            raise ValueError(f"vocab_size={vocab_size} is too large for bpe: choose one below 2^31")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator([_check_text(text)], vocab_size - 1, pattern=GPT2_PATTERN)
        return cls.from_tokens([bytes(token) for token, _ in trainer.get_mergeable_ranks()])

    @classmethod
    def from_tokens(cls, tokens: list[bytes]) -> "BPETokenizer":
        """The tokenizer with these tokens in order of rank, followed by end-of-text.

        Raises ValueError unless they are distinct, not empty, and include all 256 bytes.
        """
        distinct = set(tokens)
        missing = 256 - len({bytes([b]) for b in range(256)} & distinct)
        if missing or b"" in distinct or len(distinct) < len(tokens):
            raise ValueError(f"{len(tokens)} tokens have duplicates or an empty one, or lack "
                             f"{missing} of the 256 bytes")
        return cls(_encoding(tokens))

    def encode(self, text: str) -> list[int]:
        if run := LONG_RUN.search(_check_text(text)):
            raise ValueError(f"the text has more than {LONGEST_RUN:,} blanks in a row, from "
                             f"character {run.start()} on, which tiktoken cannot encode: shorten "
                             "them")
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check_ids(ids)
        return self._encoding.decode_bytes([i for i in ids if i != self.end_of_text])

    def to_json(self) -> dict:
        return {"kind": self.kind, "tokens": [base64.b64encode(t).decode() for t in self.tokens()]}

    @classmethod
    def from_json(cls, data: dict) -> "BPETokenizer":
        if not isinstance(data["tokens"], list):
            raise ValueError("tokens is not a list")
        return cls.from_tokens([base64.b64decode(t, validate=True) for t in data["tokens"]])

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
        """The tokenizer with exactly the characters of text, sorted."""
        return cls("".join(sorted(set(_check_text(text)))))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[c] for c in text]
        except KeyError:
            missing = sorted(set(_check_text(text)) - set(self._ids))
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise ValueError("the tokenizer has only the characters of its training text; it "
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
            raise ValueError("chars is not a string of distinct characters")
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


class HFTokenizer(_Base):
    """A tokenizer.json, read by Hugging Face's `tokenizers`.

    `begin_of_text` are the ids that it puts before a text, `end_of_text` the one that ends a
    document, None if it is unknown. Special tokens in a text are plain text, and `decode` skips
    their ids. chat_template is in Jinja, special_tokens are the texts that it knows by names such
    as "bos_token". Raises ValueError where the file cannot be used.
    """

    kind = "hf"

    def __init__(self, data: dict, end_of_text: int | None = None,
                 chat_template: str | None = None, special_tokens: dict[str, str] | None = None):
        self.data, self.end_of_text = data, end_of_text
        self.chat_template, self.special_tokens = chat_template, special_tokens or {}
        with _rust_errors("this tokenizer.json cannot be used"):
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._tokenizer.encode_special_tokens = True  # as the text that they are
            whole = self._tokenizer.encode("a", add_special_tokens=True)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        if not self.vocab_size:
            raise ValueError("this tokenizer.json has no tokens")
        if end_of_text is not None and not 0 <= end_of_text < self.vocab_size:
            raise ValueError(f"end_of_text={end_of_text} is outside the vocabulary 0.."
                             f"{self.vocab_size - 1}")
        self.begin_of_text = [i for i, _ in itertools.takewhile(
            lambda pair: pair[1], zip(whole.ids, whole.special_tokens_mask, strict=True))]

    def encode(self, text: str) -> list[int]:
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of text, and the number of characters up to the end of each."""
        with _rust_errors("the text cannot be encoded by this tokenizer"):
            found = self._tokenizer.encode(_check_text(text), add_special_tokens=False)
        return found.ids, [end for _, end in found.offsets]

    def decode(self, ids: list[int]) -> str:
        self._check_ids(ids)
        with _rust_errors("the ids cannot be decoded by this tokenizer"):
            return self._tokenizer.decode([i for i in ids if i != self.end_of_text])

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.decode(ids).encode("utf-8")

    def stream(self) -> "TextStream":
        return TextStream(self)

    def token_lengths(self) -> np.ndarray:
        """The number of bytes that each id adds to a text (V,)."""
        added = self._tokenizer.get_added_tokens_decoder()
        return np.array([self._length(i, added) for i in range(self.vocab_size)])

    def _length(self, i: int, added: dict) -> int:
        token = self._tokenizer.id_to_token(i)
        if token is None or i == self.end_of_text or (i in added and added[i].special):
            return 0
        if i in added:
            return len(token.encode("utf-8"))
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return 1  # a part of a character
        if self._is_byte_level:
            return len(token)  # which has a character for each byte
        return len(self.decode_bytes([self._word, i])) - len(self.decode_bytes([self._word]))

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(self.data.get("decoder"))

    @functools.cached_property
    def _word(self) -> int:
        """Some token, since the first of a text may lose a blank."""
        return self.encode("a")[-1]

    def to_json(self) -> dict:
        chat = {"chat_template": self.chat_template, "special_tokens": self.special_tokens}
        return {"kind": self.kind, "tokenizer": self.data, "end_of_text": self.end_of_text,
                **(chat if self.chat_template is not None else {})}

    @classmethod
    def from_json(cls, data: dict) -> "HFTokenizer":
        if not isinstance(data["tokenizer"], dict) or type(data["end_of_text"]) not in (
                int, type(None)):
            raise ValueError("tokenizer is not an object, or end_of_text not an id")
        template, names = data.get("chat_template"), data.get("special_tokens", {})
        if not isinstance(template, str | None) or not isinstance(names, dict) or not all(
                isinstance(text, str) for text in names.values()):
            raise ValueError("chat_template is not text, or special_tokens not texts by name")
        return cls(data["tokenizer"], data["end_of_text"], template, names)


# what makes a tokenizer of each kind, from a text and the size of a vocabulary
TOKENIZERS = {
    "bpe": BPETokenizer.train, "gpt2": lambda text, vocab_size: BPETokenizer(),
    "char": lambda text, vocab_size: CharTokenizer.train(text),
    "byte": lambda text, vocab_size: ByteTokenizer()}


def load_tokenizer(data: dict) -> Tokenizer:
    """The tokenizer of which data is the `to_json()`. Raises ValueError if data is invalid."""
    kinds = {cls.kind: cls for cls in (BPETokenizer, CharTokenizer, ByteTokenizer, HFTokenizer)}
    try:
        return kinds[data["kind"]].from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this does not describe a tokenizer ({error!r})") from error


def fingerprint(tokenizer: Tokenizer | None) -> str | None:
    """A hash (XXH3, 64 bits, hexadecimal) that is equal for tokenizers that give the same ids; None
    without a tokenizer."""
    if tokenizer is None:
        return None
    data = {name: value for name, value in tokenizer.to_json().items()
            if name not in ("chat_template", "special_tokens")}  # a text's ids do not depend on
    return xxhash.xxh3_64_hexdigest(json.dumps(data, sort_keys=True).encode())


def make_tokenizer(kind: str, text: str, vocab_size: int) -> Tokenizer:
    """A tokenizer of that kind; text is what bpe and char learn from. Raises ValueError on a kind
    that there is not."""
    if kind not in TOKENIZERS:
        raise ValueError(f"there is no tokenizer {kind!r}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind](text, vocab_size)


def end_of_text(tokenizer: Tokenizer | None) -> int | None:
    """The id that ends a document, if the tokenizer has one."""
    return getattr(tokenizer, "end_of_text", None)


def default_prompt(tokenizer: Tokenizer) -> str:
    """A line break, or the first token of a tokenizer that has none."""
    try:
        tokenizer.encode("\n")
    except ValueError:  # a tokenizer of characters
        return tokenizer.decode([0])
    return "\n"


def begin_of_text(tokenizer: Tokenizer | None) -> list[int]:
    """The ids that a text begins with; most tokenizers have none."""
    return getattr(tokenizer, "begin_of_text", [])


def up_to_end(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[int]:
    """Yields ids up to the first end-of-text, if the tokenizer has one."""
    end = end_of_text(tokenizer)
    return itertools.takewhile(lambda i: i != end, ids)


class StreamDecoder:
    """Decodes ids one at a time without splitting characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._stream = tokenizer.stream()

    def push(self, token: int) -> str:
        """The characters that are complete with this id."""
        return self._stream.push(token)

    def finish(self) -> str:
        """The rest: U+FFFD if the last character is incomplete."""
        return self._stream.finish()


class ByteStream:
    """A StreamDecoder for tokenizers whose ids have bytes of their own."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class TextStream:
    """A StreamDecoder for tokenizers with which the text of an id depends on those before it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ones that gave text, and those since then
        self._known = 0  # how many of these have given it

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self.finish()
        if not text or text.endswith("\ufffd"):  # perhaps a part of a character
            return ""
        self._ids, self._known = self._ids[self._known:], len(self._ids) - self._known
        return text

    def finish(self) -> str:
        before = self._tokenizer.decode(self._ids[:self._known])
        return self._tokenizer.decode(self._ids)[len(before):]


def _show(char: str) -> str:
    """A character, if it is printable, and its code point."""
    code = f"U+{ord(char):04X}"
    return f"{char!r} ({code})" if char.isprintable() and char != " " else code


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!a} at character {error.start} is half of a "
                         "surrogate pair, not text: remove it") from None
    return text


@functools.cache
def _gpt2_encoding() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises; a cached file needs none
        raise ValueError(
            "GPT-2's tokenizer files are not cached and cannot be downloaded "
            f"({type(error).__name__}): connect once, name a folder that holds them in "
            "TIKTOKEN_CACHE_DIR, or choose --tokenizer bpe") from error


@contextmanager
def _rust_errors(what: str):
    """Turns the errors of a library in Rust, which has one type for all, into ValueError."""
    try:
        yield
    except BaseException as error:  # a panic is not an Exception
        if isinstance(error, ValueError) or (
                type(error) is not Exception and type(error).__name__ != "PanicException"):
            raise
        raise ValueError(f"{what} ({' '.join(str(error).split())[:200]})") from None


def _encoding(tokens: list[bytes]) -> tiktoken.Encoding:
    with _rust_errors(f"tiktoken cannot use these {len(tokens)} tokens"):
        return tiktoken.Encoding("tinygpt", pat_str=GPT2_PATTERN,
                                 mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                 special_tokens={END_OF_TEXT: len(tokens)})
