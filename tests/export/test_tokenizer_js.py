"""The page's tokenizer in JavaScript against ours, which is tiktoken's, on thousands of texts."""

import json
import subprocess

import numpy as np
import pytest
from browser import node

from tinygpt.data.tokenizer import BPETokenizer, end_of_text, make_tokenizer
from tinygpt.export.characters import ranges
from tinygpt.export.html import PAGE, describe_tokenizer

PIECES = [
    "'s", "'S", "'ll", "'re'", "'ve", "'d ", " 't", "the ", "The", "  ", "   x", "\n", "\n\n ",
    "\r\n", "\t", "12", " 3\u00bd", "a1", "1a", "_", "<|endoftext|>", "...", " --", "\u00a0",
    "\x85", "\ufeff", "\u180e", "\u200b", "\u2028", "\u3000 ", "\x00", "\x1c", "caf\u00e9",
    "e\u0301", "\u0f71", "\u4f60\u597d", "\u0660", "\u2167", "\u00b2", "\u1c89", "\ua7dc",
    "\U0001d7d8", "\U000105c0", "\U00016d40", "\U0001f468\u200d\U0001f469", "\U0001f44b\U0001f3fd",
    "\ufffd", "\uffff", "\U0010ffff", "\ue000"]


@pytest.fixture(scope="module")
def texts():
    """Texts of pieces that are hard to split, and of characters of every plane."""
    rng = np.random.default_rng(11)
    bounds = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    mixed = ["".join(rng.choice(PIECES, rng.integers(1, 12))) for _ in range(3000)]
    spread = ["".join(chr(rng.integers(*bounds[b])) for b in rng.integers(0, 5, 20))
              for _ in range(500)]
    long = ["a" * 3000, " " * 3000 + "x", "\n \t" * 1000, "\u00e9" * 2000, "abc" * 1000]
    return ["", *PIECES, *mixed, *spread, *long]


@pytest.fixture(scope="module")
def bpe(texts):
    """A tokenizer with merges inside and across these characters."""
    return BPETokenizer.train(" ".join(texts[:2000]), 900)


PROGRAM = (PAGE / "tokenizer.js").read_text() + """
const { data, texts, ids } = JSON.parse(require("fs").readFileSync(0));
const tokenizer = new Tokenizer(data);
const orError = (f) => { try { return f(); } catch (error) { return error.message; } };
console.log(JSON.stringify({ encoded: texts.map((text) => orError(() => tokenizer.encode(text))),
                             decoded: ids.map((row) => tokenizer.decode(row)),
                             end: tokenizer.endOfText ?? null }));
"""


def run(tokenizer, texts: list[str], ids: list[list[int]]) -> dict:
    """What tokenizer.js makes of texts and of rows of ids."""
    given = {"data": describe_tokenizer(tokenizer), "texts": texts, "ids": ids}
    done = subprocess.run([node(), "-e", PROGRAM], input=json.dumps(given).encode(), check=True,
                          capture_output=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "char", "byte"])
def test_ids_and_texts_are_those_of_our_tokenizer(kind, texts, bpe, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_files")
    tokenizer = bpe if kind == "bpe" else make_tokenizer(kind, "".join(texts), 0)
    rng = np.random.default_rng(13)
    rows = [rng.integers(0, tokenizer.vocab_size, 12).tolist() for _ in range(2000)]
    found = run(tokenizer, texts, rows)
    for text, ids in zip(texts, found["encoded"], strict=True):
        assert ids == tokenizer.encode(text), ascii(text)
    assert found["decoded"] == [tokenizer.decode(row) for row in rows]
    assert found["end"] == end_of_text(tokenizer)


def test_letters_and_numbers_are_those_that_tiktoken_knows():
    """"a" or "1" merges with the first byte of a character only where both are in one word."""
    edges = {c + step for pattern in (r"\p{L}", r"\p{N}") for ends in ranges(pattern)
             for c in ends for step in (-1, 0, 1)}
    points = sorted(edges | set(range(0x80, 0x110000, 97)))
    chars = [chr(c) for c in points if c >= 0x80 and not 0xD800 <= c < 0xE000]
    firsts = sorted({c.encode()[:1] for c in chars})
    tokenizer = BPETokenizer.from_tokens([bytes([b]) for b in range(256)]
                                         + [start + b for start in (b"a", b"1") for b in firsts])
    words = [start + c for start in "a1" for c in chars]
    for word, ids in zip(words, run(tokenizer, words, [])["encoded"], strict=True):
        assert ids == tokenizer.encode(word), ascii(word)


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_half_of_a_surrogate_pair_is_refused(kind, bpe):
    tokenizer = bpe if kind == "bpe" else make_tokenizer(kind, "ab", 0)
    for answer in run(tokenizer, ["a\ud800b", "\udc00", "ab\udbff"], [])["encoded"]:
        assert "half of a surrogate pair" in answer


def test_characters_that_a_char_tokenizer_lacks_are_named():
    answer, = run(make_tokenizer("char", "ab", 0), ["a\U0001f600bc"], [])["encoded"]
    assert "\U0001f600" in answer and '"c"' in answer and '"b"' not in answer
