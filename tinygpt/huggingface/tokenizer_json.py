"""The tokenizer of a folder in Hugging Face's layout, in and out."""

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from tinygpt.data.documents import read_bytes, read_text
from tinygpt.data.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    end_of_text,
)

# what tokenizers are stored in that only `transformers` can convert
OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json",
          "merges.txt")
# the printable character of each byte in the files of byte-level BPE
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
CHAR_OF_BYTE = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
BYTE_OF_CHAR = {c: b for b, c in CHAR_OF_BYTE.items()}


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, None if it has no file of one. Raises ValueError that names a file
    which cannot be read."""
    path = folder / "tokenizer.json"
    if not path.exists():
        if found := [name for name in OTHERS if (folder / name).exists()]:
            raise ValueError(f"{folder / found[0]} can be read only as a tokenizer.json: convert "
                             "it with transformers: AutoTokenizer.from_pretrained(folder)"
                             ".save_pretrained(folder)")
        return None
    data = _read_json(path)
    try:
        tokenizer = HFTokenizer(data)
        tokenizer = HFTokenizer(data, _end_of_text(folder, tokenizer), *_chat_template(folder))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or not supported: {error}") from error
    return tokenizer if tokenizer.chat_template else _as_ours(tokenizer) or tokenizer


def dump(tokenizer: Tokenizer | None, block_size: int) -> dict[str, dict]:
    """The files, name -> JSON, of this tokenizer for transformers; {} if it has no such tokenizer.

    Raises ValueError if a BPE token is not the merge of two others.
    """
    if isinstance(tokenizer, HFTokenizer):
        data = tokenizer.data
    elif isinstance(tokenizer, BPETokenizer):
        data = _written(tokenizer.tokens(), END_OF_TEXT)
    elif isinstance(tokenizer, ByteTokenizer):
        data = _written([bytes([b]) for b in range(256)], None)
    else:
        return {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
                "clean_up_tokenization_spaces": False}
    if (end := end_of_text(tokenizer)) is not None:
        token = Library.from_str(json.dumps(data)).id_to_token(end)
        settings |= {"bos_token": token, "eos_token": token}
    if getattr(tokenizer, "chat_template", None) is not None:
        settings |= tokenizer.special_tokens | {"chat_template": tokenizer.chat_template}
    return {"tokenizer.json": data, "tokenizer_config.json": settings}


def _read_json(path: Path) -> dict:
    raw = read_bytes(path)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return data


def _end_of_text(folder: Path, tokenizer: HFTokenizer) -> int | None:
    """The id that ends a document, from the settings in the folder of a tokenizer.json."""
    token = _special_tokens(_settings(folder)).get("eos_token")
    if token is not None:
        return Library.from_str(json.dumps(tokenizer.data)).token_to_id(token)
    for name in ("generation_config.json", "config.json"):
        if (path := folder / name).exists():
            end = _read_json(path).get("eos_token_id")
            end = end[0] if isinstance(end, list) and end else end
            if type(end) is int and 0 <= end < tokenizer.vocab_size:
                return end
    return None


def _settings(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    return _read_json(path) if path.exists() else {}


def _special_tokens(settings: dict) -> dict[str, str]:
    """The texts of special tokens by the names that chat templates have for them."""
    tokens = {name: token.get("content") if isinstance(token, dict) else token
              for name, token in settings.items() if name.endswith("_token")}
    return {name: text for name, text in tokens.items() if isinstance(text, str)}


def _chat_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template in a folder, None if it has none, and the special tokens it may name."""
    settings = _settings(folder)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t.get("template") for t in template
                         if isinstance(t, dict) and t.get("name") == "default"), None)
    if (path := folder / "chat_template.jinja").exists():
        template = read_text(path)
    return (template if isinstance(template, str) else None), _special_tokens(settings)


def _written(tokens: list[bytes], special: str | None) -> dict:
    """A byte-level BPE tokenizer with GPT-2's pattern as a tokenizer.json."""
    ranks = {token: i for i, token in enumerate(tokens)}
    merges = [_split(token, ranks) for token in tokens if len(token) > 1]
    vocab = {_text(token): i for token, i in ranks.items()} | (
        {special: len(tokens)} if special else {})
    made = Library(models.BPE(vocab, [(_text(a), _text(b)) for a, b in merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if special:
        made.add_special_tokens([AddedToken(special, special=True, normalized=False)])
    return json.loads(made.to_str())


def _as_ours(tokenizer: HFTokenizer) -> Tokenizer | None:
    """The same tokenizer for tiktoken, which is several times as fast, where GPT-2's pattern and
    merges are all that it has."""
    data = json.loads(Library.from_str(json.dumps(tokenizer.data)).to_str())
    added = [token["content"] for token in data["added_tokens"]]
    vocab = data["model"].get("vocab")
    try:
        tokens = [bytes(BYTE_OF_CHAR[c] for c in token)
                  for token in sorted(vocab, key=vocab.get) if token not in added]
        ours = BPETokenizer.from_tokens(tokens) if added else ByteTokenizer()
        written = _written(tokens, *added or [None])
    except (AttributeError, KeyError, TypeError, ValueError):  # of another model than BPE
        return None
    return ours if _meaning(data) == _meaning(written) else None


def _meaning(data: dict) -> list:
    """What the ids of a byte-level BPE follow from."""
    added = [(token["id"], token["content"]) for token in data["added_tokens"]]
    vocab = {k: i for k, i in data["model"]["vocab"].items() if (i, k) not in added}
    before = {k: v for k, v in (data["pre_tokenizer"] or {}).items() if k != "trim_offsets"}
    after = (data["post_processor"] or {"type": "ByteLevel"})["type"]  # which changes offsets alone
    return [data["model"] | {"vocab": vocab}, added, data["normalizer"], before, after]


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
