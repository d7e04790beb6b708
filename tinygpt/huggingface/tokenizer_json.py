"""Converts byte-level BPE tokenizers to and from Hugging Face's tokenizer.json.

That file writes a byte as a printable character and lists merges as pairs of tokens. tiktoken has
only tokens by rank, so the pair of a token is found by splitting it with the merges before it.
"""

import json
from itertools import pairwise
from pathlib import Path

from tinygpt.data.documents import read_bytes
from tinygpt.data.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, Tokenizer

_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
CHAR_OF_BYTE = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
BYTE_OF_CHAR = {c: b for b, c in CHAR_OF_BYTE.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}


def dump(tokenizer: Tokenizer | None, block_size: int) -> dict[str, dict]:
    """The files, name -> JSON, of this tokenizer for transformers; {} if it has no such tokenizer.

    Raises ValueError if a BPE token is not the merge of two others.
    """
    if isinstance(tokenizer, BPETokenizer):
        tokens, special = tokenizer.tokens(), END_OF_TEXT
    elif isinstance(tokenizer, ByteTokenizer):
        tokens, special = [bytes([b]) for b in range(256)], None
    else:
        return {}
    ranks = {token: i for i, token in enumerate(tokens)}
    merges = [_split(token, ranks) for token in tokens if len(token) > 1]
    vocab = {_text(token): i for token, i in ranks.items()}
    added = []
    if special:
        vocab[special] = len(tokens)
        added = [{"id": len(tokens), "content": special, "single_word": False, "lstrip": False,
                  "rstrip": False, "normalized": False, "special": True}]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
             "normalizer": None, "pre_tokenizer": BYTE_LEVEL, "post_processor": None,
             "decoder": BYTE_LEVEL,
             "model": {"type": "BPE", "dropout": None, "unk_token": None,
                       "continuing_subword_prefix": None, "end_of_word_suffix": None,
                       "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                       "vocab": vocab, "merges": [[_text(a), _text(b)] for a, b in merges]}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
                "clean_up_tokenization_spaces": False}
    if special:
        settings |= {"bos_token": special, "eos_token": special}
    return {"tokenizer.json": whole, "tokenizer_config.json": settings}


def read(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises ValueError that names the file unless it is a
    byte-level BPE with GPT-2's pattern, tokens in the order of merges, end-of-text last."""
    raw = read_bytes(path)
    try:
        return _tokenizer(json.loads(raw))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not a byte-level BPE with GPT-2's pattern and its "
                         "tokens in the order of their merges: only these can be read") from error


def _tokenizer(data: dict) -> Tokenizer:
    tokens = _tokens(data)
    added = [(entry["id"], entry["content"]) for entry in data["added_tokens"]]
    if tokens == [bytes([b]) for b in range(256)] and not added:
        return ByteTokenizer()
    if added != [(len(tokens), END_OF_TEXT)]:
        raise ValueError("the added tokens are not end-of-text alone")
    return BPETokenizer.from_tokens(tokens)


def _tokens(data: dict) -> list[bytes]:
    """The bytes of each id except the added ones. Raises ValueError, KeyError, ... if anything that
    affects ids is not as `dump` writes it."""
    model, before = data["model"], data["pre_tokenizer"]
    plain = (model["type"] == "BPE" and not data.get("normalizer") and before["type"] == "ByteLevel"
             and not before["add_prefix_space"] and before.get("use_regex", True)
             and (data.get("post_processor") or BYTE_LEVEL)["type"] == "ByteLevel"
             and not any(model.get(k) for k in ("dropout", "unk_token", "byte_fallback",
                                                "continuing_subword_prefix",
                                                "end_of_word_suffix", "ignore_merges")))
    added = {entry["content"] for entry in data["added_tokens"]}
    ids = {i: text for text, i in model["vocab"].items() if text not in added}
    tokens = [_bytes(ids[i]) for i in range(len(ids))]
    ranks = {token: i for i, token in enumerate(tokens)}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = [(_bytes(a), _bytes(b)) for a, b in pairs]
    if not plain or len(ranks) != len(tokens) or any(len(token) != 1 for token in tokens[:256]):
        raise ValueError("unsupported options or tokens")
    if merges != [_split(token, ranks) for token in tokens[256:]]:
        raise ValueError("the merges are not in the order of the tokens")
    return tokens


def _split(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge into this one, by the merges of lower rank."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = min(found)
        if best >= ranks[token]:
            break
        i = found.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f"the token {token!r} is not the merge of two tokens before it")
    return parts[0], parts[1]


def _text(token: bytes) -> str:
    return "".join(CHAR_OF_BYTE[b] for b in token)


def _bytes(text: str) -> bytes:
    return bytes(BYTE_OF_CHAR[c] for c in text)
