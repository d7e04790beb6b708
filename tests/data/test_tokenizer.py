"""Text -> ids -> text, for every tokenizer."""

import base64
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import requests
import tiktoken.registry

from tinygpt.data import tokenizer as module
from tinygpt.data.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
)

SHARED = Path(__file__).parents[3] / "shared" / "tiktoken"

TEXTS = [
    "",
    " ",
    "ROMEO:\nIs the day so young?\n\n",
    "it's, we'll, they've: don't  'tis   3 and 42nd",
    "tabs\tand\r\nreturns\v\f\x00\x07\x1b[0m\x7f\x85",
    "<|endoftext|> is plain text <|endoftext|>",
    "caf\u00e9 cafe\u0301 \u0f40\u0f71\u0f72 \u0928\u093f",  # composed and combining
    "\u4f60\u597d\uff0c\u4e16\u754c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",  # emoji, joined
    "\U0001f44b\U0001f3fd",  # and with a skin tone
    "\ufeff\u200b\u2028\u2029\ufffd\uffff\U0010ffff",
    " \n \n\n  x  \n ",
]


def random_text(rng, length: int) -> str:
    """Characters of every plane and width, no surrogates, with runs of plain ASCII between."""
    bounds = [(0, 0x80), (0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000),
              (0x1F300, 0x1F700), (0x10000, 0x110000)]
    which = rng.integers(0, len(bounds), length)
    return "".join(chr(rng.integers(*bounds[i])) for i in which)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(3)
    return TEXTS + [random_text(rng, n) for n in (1, 2, 5, 50, 500)]


@pytest.fixture(scope="module")
def play():
    """Text with repeated words, from which merges can be learned."""
    rng = np.random.default_rng(5)
    words = ["the", "harbour", "sleeps", "and", "I", "walk", "with", "a", "lead", "ROMEO:\n",
             "it's", "caf\u00e9", "12", "  ", "\n\n", "\U0001f600"]
    return " ".join(words[i] for i in rng.integers(0, len(words), 3000))


@pytest.fixture(scope="module")
def bpe(play):
    return BPETokenizer.train(play, 320)


@pytest.fixture(params=["bpe", "char", "byte"])
def tokenizer(request, play, texts):
    return make_tokenizer(request.param, play + "".join(texts), 400)


def test_any_text_round_trips(tokenizer, texts):
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode("utf-8")


def test_bpe_and_bytes_round_trip_text_they_never_saw(bpe, texts):
    for tokenizer in (bpe, ByteTokenizer()):
        for text in texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_in_a_text_is_plain_text(bpe):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.end_of_text == bpe.vocab_size - 1 not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


def test_the_end_of_a_document_is_decoded_to_no_text(bpe):
    ids = [*bpe.encode("one"), bpe.end_of_text, *bpe.encode("two")]
    stream = StreamDecoder(bpe)
    assert bpe.decode(ids) == "".join(map(stream.push, ids)) + stream.finish() == "onetwo"
    assert bpe.token_lengths()[bpe.end_of_text] == 0 < bpe.token_lengths()[:-1].min()


def test_token_lengths_count_bytes(tokenizer, texts):
    lengths = tokenizer.token_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    for text in texts:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode("utf-8"))


# ---- byte-pair encoding against its definition

def bpe_reference(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Greedy merging: in each piece of the pattern, the pair of the lowest rank first."""
    ids = []
    for piece in regex.findall(GPT2_PATTERN, text):
        parts = [bytes([b]) for b in piece.encode("utf-8")]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            i = int(np.argmin(pairs))
            if pairs[i] == len(ranks):
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def tokens_of(tokenizer: BPETokenizer) -> list[bytes]:
    return [base64.b64decode(t) for t in tokenizer.to_json()["tokens"]]


def test_bpe_merges_the_lowest_rank_first(bpe, play, texts):
    ranks = {token: rank for rank, token in enumerate(tokens_of(bpe))}
    for text in [play[:4000], *texts]:
        assert bpe.encode(text) == bpe_reference(text, ranks)


def test_bpe_learns_the_commonest_pairs_of_its_text():
    tokenizer = BPETokenizer.train("ab ab ab ab ab ab\ncd\ncd\ncd\ncd", 259)
    merges = tokens_of(tokenizer)[256:]
    assert sorted(tokens_of(tokenizer)[:256]) == [bytes([i]) for i in range(256)]
    assert merges == [b"ab", b" ab"]  # five times after a space, four times 'cd'


@pytest.mark.parametrize("size", [257, 258, 300])
def test_bpe_has_the_requested_vocabulary(play, size):
    assert BPETokenizer.train(play, size).vocab_size == size


def test_bpe_of_a_text_with_nothing_to_merge_has_bytes_and_end_of_text():
    assert BPETokenizer.train("x\n", 1024).vocab_size == 257


def test_bpe_training_is_deterministic(play, bpe):
    assert BPETokenizer.train(play, 320).to_json() == bpe.to_json()


@pytest.mark.parametrize("size", [256, 2**31, 10**30])
def test_a_vocabulary_that_bpe_cannot_have_is_refused(play, size):
    with pytest.raises(ValueError, match=f"vocab_size={size}"):
        BPETokenizer.train(play, size)


def test_a_panic_of_tiktoken_is_an_error(monkeypatch):
    class PanicException(BaseException):  # as pyo3 derives its own
        pass

    def panics(*args, **kwargs):
        raise PanicException("no entry found for key")

    monkeypatch.setattr(module.tiktoken, "Encoding", panics)
    with pytest.raises(ValueError, match="tiktoken"):
        BPETokenizer.train("some text", 260)


def test_a_fingerprint_depends_on_the_ids(play, bpe):
    def one(tokenizer):
        return fingerprint(load_tokenizer(json.loads(json.dumps(tokenizer.to_json()))))

    others = [BPETokenizer.train(play, 319), ByteTokenizer(), CharTokenizer("ab"),
              CharTokenizer("ba")]
    assert one(bpe) == fingerprint(bpe)
    assert len({fingerprint(tokenizer) for tokenizer in [bpe, *others]}) == 5


@pytest.mark.parametrize("space", [" ", "\n"])
def test_a_million_blanks_are_text_or_a_clear_error(bpe, space):
    """tiktoken's pattern backtracks over blanks, and its overflow is no Exception."""
    text = "x" + space * 1_000_000 + "x"
    try:
        ids = bpe.encode(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert bpe.decode(ids) == text


# ---- errors

def test_char_names_the_characters_it_lacks():
    tokenizer = CharTokenizer.train("abc")
    says = r"lacks U\+000A, 'd' \(U\+0064\), '\u4f60' \(U\+4F60\)$"
    with pytest.raises(ValueError, match=says) as caught:
        tokenizer.encode("ab\u4f60d\n")
    assert "'a'" not in str(caught.value) and "\n" not in str(caught.value)


def test_char_has_exactly_the_characters_of_its_text_in_order():
    tokenizer = CharTokenizer.train("hello, \U0001f600")
    assert tokenizer.chars == " ,ehlo\U0001f600"
    assert tokenizer.encode("ole") == [5, 4, 2]


@pytest.mark.parametrize("bad", ["\ud800", "ab\udfffcd", "\udc80" * 3])
def test_lone_surrogates_are_refused_in_one_line(tokenizer, bad):
    with pytest.raises(ValueError, match=r"\\ud") as caught:
        tokenizer.encode(bad)
    assert type(caught.value) is ValueError  # not UnicodeEncodeError
    assert "\n" not in str(caught.value) and str(caught.value).isascii()


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_lone_surrogates_are_refused_in_a_training_text(kind):
    with pytest.raises(ValueError, match="surrogate") as caught:
        make_tokenizer(kind, "plain text \ud83d", 300)
    assert type(caught.value) is ValueError


def test_ids_out_of_range_are_refused(tokenizer):
    size = tokenizer.vocab_size
    for bad in (-1, size, size + 5, 2**40):
        with pytest.raises(ValueError, match=rf"token id {bad} .*0\.\.{size - 1}"):
            tokenizer.decode([0, bad])
        with pytest.raises(ValueError, match=f"token id {bad}"):
            StreamDecoder(tokenizer).push(bad)


# ---- saving and loading

def test_json_preserves_ids_and_bytes(tokenizer, texts):
    again = load_tokenizer(json.loads(json.dumps(tokenizer.to_json())))
    assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
    for text in texts:
        assert again.encode(text) == tokenizer.encode(text)
    for i in range(tokenizer.vocab_size):
        assert again.decode_bytes([i]) == tokenizer.decode_bytes([i])


BYTES = [base64.b64encode(bytes([b])).decode() for b in range(256)]
WITHOUT_A_BYTE = BYTES[:-1]


@pytest.mark.parametrize("data", [
    None, [], {}, 5, {"kind": "word"}, {"kind": []}, {"kind": "bpe"}, {"kind": "char"},
    {"kind": "char", "chars": 5}, {"kind": "bpe", "tokens": 5}, {"kind": "bpe", "tokens": [5]},
    {"kind": "bpe", "tokens": []}, {"kind": "bpe", "tokens": ["no base 64!"]},
    {"kind": "bpe", "tokens": WITHOUT_A_BYTE}, {"kind": "bpe", "tokens": WITHOUT_A_BYTE[:10]},
    {"kind": "bpe", "tokens": BYTES + BYTES[:1]}, {"kind": "bpe", "tokens": [*BYTES, ""]},
    {"kind": "bpe", "tokens": dict.fromkeys(BYTES)}, {"kind": "char", "chars": ""},
    {"kind": "char", "chars": "aba"}, {"kind": "char", "chars": ["a", "b"]},
    {"kind": "char", "chars": "a\ud800"},
], ids=lambda data: ascii(data)[:40])
def test_json_that_does_not_describe_a_tokenizer_is_refused(data):
    with pytest.raises(ValueError, match="does not describe a tokenizer") as caught:
        load_tokenizer(data)
    assert "\n" not in str(caught.value)


# ---- streaming

def test_a_stream_never_splits_a_character(tokenizer, texts):
    for text in texts:
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(i) for i in tokenizer.encode(text)]
        assert stream.finish() == ""
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_stream_of_any_bytes_equals_their_decoding(rng):
    """Invalid UTF-8 becomes the same U+FFFD as when it is decoded at once."""
    tokenizer = ByteTokenizer()
    for _ in range(100):
        ids = rng.integers(0, 256, 40).tolist()
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_finish_returns_a_character_that_is_cut_off():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(b) for b in "\u20ac".encode()[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


# ---- GPT-2's own

@pytest.fixture
def fresh_gpt2(monkeypatch):
    """Forgets an encoding that was loaded before, here and in tiktoken."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    module._gpt2_encoding.cache_clear()
    yield
    module._gpt2_encoding.cache_clear()


@pytest.fixture
def gpt2(fresh_gpt2, monkeypatch):
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not SHARED.is_dir():
            pytest.skip("no files: TIKTOKEN_CACHE_DIR is not set, ../shared/tiktoken not there")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED))
    return BPETokenizer()


def test_gpt2_gives_the_published_ids(gpt2, texts):
    assert gpt2.vocab_size == 50257 and gpt2.end_of_text == 50256
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("ROMEO:\n") == [33676, 4720, 25, 198]
    assert 50256 not in gpt2.encode("<|endoftext|>")
    assert all(gpt2.decode(gpt2.encode(text)) == text for text in texts)


def test_gpt2_needs_no_files_once_it_is_in_json(gpt2, texts, monkeypatch, tmp_path):
    data = json.loads(json.dumps(gpt2.to_json()))
    expected = [gpt2.encode(text) for text in texts]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tiktoken.registry.ENCODINGS.clear()
    module._gpt2_encoding.cache_clear()
    again = load_tokenizer(data)
    assert again.vocab_size == 50257
    assert [again.encode(text) for text in texts] == expected


def test_without_files_and_network_gpt2_has_a_remedy(fresh_gpt2, monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise requests.ConnectionError("no route\nto host")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR") as caught:
        BPETokenizer()
    assert "--tokenizer bpe" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no tokenizer 'foo': choose one of bpe, gpt2, char, byte"):
        make_tokenizer("foo", "text", 300)


def test_equal_fingerprints_mean_equal_tokenizers():
    tokens = [bytes([b]) for b in range(256)]
    tokenizers = [ByteTokenizer(), CharTokenizer("ab"), CharTokenizer("ba"), CharTokenizer("abc"),
                  *(BPETokenizer.from_tokens(tokens + more)
                    for more in ([b"ab"], [b"ba"], [b"ab", b"ba"]))]
    prints = [fingerprint(t) for t in tokenizers]
    assert len(set(prints)) == len(prints) and all(len(p) == 16 for p in prints)
    again = [load_tokenizer(json.loads(json.dumps(t.to_json()))) for t in tokenizers]
    assert [fingerprint(t) for t in again] == prints
    assert fingerprint(ByteTokenizer()) == "30f38623554dfab2"  # stored in files: must not change
    assert fingerprint(None) is None
