"""Byte-level BPE between our tokenizers and Hugging Face's tokenizer.json.

There a byte is written as a printable character, and a merge as the pair that it joins; ours knows
the tokens by rank only (tiktoken), so that a pair is found by splitting the token with the merges
that come before it.
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
    """The files, name -> JSON, from which transformers makes this tokenizer; {} where it cannot.

    Raises ValueError where the tokens of a BPE were not made by merging two at a time.
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
    """The tokenizer of a tokenizer.json. Raises ValueError that names the file where it is not one
    of ours: byte-level BPE with GPT-2's pattern, tokens in the order of merges, end-of-text last.
    """
    raw = read_bytes(path)
    try:
        return _tokenizer(json.loads(raw))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no byte-level BPE with GPT-2's pattern and its "
                         "tokens in the order of their merges, which is all that is read here"
                         ) from error


def _tokenizer(data: dict) -> Tokenizer:
    tokens = _tokens(data)
    added = [(entry["id"], entry["content"]) for entry in data["added_tokens"]]
    if tokens == [bytes([b]) for b in range(256)] and not added:
        return ByteTokenizer()
    if added != [(len(tokens), END_OF_TEXT)]:
        raise ValueError("other added tokens than end-of-text, the last")
    return BPETokenizer.from_tokens(tokens)


def _tokens(data: dict) -> list[bytes]:
    """The bytes of each id but the added ones. Raises ValueError and the like on what is not as
    `dump` writes it in all that changes ids."""
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
        raise ValueError("not as ours are")
    if merges != [_split(token, ranks) for token in tokens[256:]]:
        raise ValueError("merges in another order than the tokens")
    return tokens


def _split(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens of which the merges before its own make this one."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = min(found)
        if best >= ranks[token]:
            break
        i = found.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f"the token {token!r} is not made of two that come before it")
    return parts[0], parts[1]


def _text(token: bytes) -> str:
    return "".join(CHAR_OF_BYTE[b] for b in token)


def _bytes(text: str) -> bytes:
    return bytes(BYTE_OF_CHAR[c] for c in text)
