"""Damaged files of data and tokenizers: refused in a line that names them, or read correctly."""

import copy
import json
import os
from functools import partial

import numpy as np
import pytest
from conftest import VERSES
from tokens import ids_of, text_of

from tinygpt.data import DataError, token_files
from tinygpt.data.load import load_data, read_tokens
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, fingerprint, load_tokenizer
from tinygpt.huggingface import tokenizer_json

TRIES = 40  # of each kind; 1,000 passed once
WRONG = (None, True, -1, 0, 0.5, 10**30, float("inf"), "", "x", "\ud800", [], [[]], {}, {"a": 1})


pytestmark = pytest.mark.usefixtures("cache")


def damaged(raw: bytes, rng) -> bytes:
    """Bytes with one kind of damage."""
    at, length = int(rng.integers(len(raw) + 1)), int(rng.integers(1, 9))
    noise = rng.bytes(length)
    return [raw[:at], raw[:at] + raw[at + length:], raw[:at] + noise + raw[at + length:],
            raw[:at] + noise + raw[at:], raw[:at] + b"\0" * length + raw[at + length:],
            raw[:at] + raw[:at], raw[at:], raw[:at] + b'"' + raw[at + 1:],
            raw[:at] + b"[" * 50_000 + raw[at:]][int(rng.integers(9))]


def with_a_wrong_value(value, rng):
    """JSON with one value replaced by another type, or left out."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[int(rng.integers(len(keys)))]
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.4:
            break
        place = inner
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = WRONG[int(rng.integers(len(WRONG)))]
    return value


def result(read):
    """The result of read(), or None if it raises ValueError in one line."""
    try:
        return read()
    except ValueError as error:
        assert str(error).isprintable() and str(error), error
        return None


def test_token_caches(tmp_path, cache, rng):
    path = tmp_path / "verses.txt"
    path.write_text(VERSES * 3)
    whole = load_data(path, "bpe", 280)
    folder = next(cache.iterdir())
    for name in ("meta.json", "train.bin", "val.bin"):
        good = (folder / name).read_bytes()
        for _ in range(TRIES):
            (folder / name).write_bytes(damaged(good, rng))
            for source in (path, folder):
                data = result(lambda: load_data(source, "bpe", 280))  # noqa: B023
                assert data is None or (data.fingerprint == whole.fingerprint and fingerprint(
                    data.tokenizer) == fingerprint(whole.tokenizer))
            ids = result(lambda: read_tokens(folder, None))
            assert ids is None or np.array_equal(ids, whole.val)
        (folder / name).write_bytes(good)


def test_old_meta_json_of_wrong_types(tmp_path, rng):
    """Without a checksum a changed value may go unnoticed; unreadable files are refused."""
    ids = np.arange(200, dtype=np.uint16)
    for name in ("train", "val"):
        ids.tofile(tmp_path / f"{name}.bin")
    meta = {"files": [["some.txt", 9, 10]], "made_with": "--tokenizer bpe --vocab_size 280",
            "train_bytes": 400, "val_bytes": 400, "dtype": "<u2",
            "tokenizer": BPETokenizer.train(VERSES, 280).to_json()}
    assert set(meta) == token_files.OLD_KEYS
    for _ in range(2 * TRIES):
        (tmp_path / "meta.json").write_text(json.dumps(with_a_wrong_value(meta, rng)))
        data = result(lambda: load_data(tmp_path, "bpe", 280))
        assert data is None or len(data.train) * data.train.itemsize == 400


@pytest.mark.parametrize("name", ["some.txt", "some.jsonl"])
def test_texts(tmp_path, rng, name):
    path = tmp_path / name
    lines = [json.dumps({"text": f"{n} na\u00efve \u4f60"}, ensure_ascii=n % 2) for n in range(30)]
    good = ("\n".join(lines) if name == "some.jsonl" else VERSES + "na\u00efve \u4f60\n").encode()
    for _ in range(TRIES):
        raw = damaged(good, rng)
        path.write_bytes(raw)
        data = result(lambda: load_data(path, "byte", 256))
        if data is not None and name == "some.txt":
            found = data.tokenizer.decode_bytes(ids_of(data))
            assert found == raw.removeprefix(b"\xef\xbb\xbf")
        elif data is not None:
            text = text_of(data)
            lines = filter(str.strip, raw.decode().split("\n"))
            assert text == "\n".join(filter(None, (json.loads(line)["text"] for line in lines)))


@pytest.mark.parametrize("tokenizer", [BPETokenizer.train(VERSES, 280), ByteTokenizer()],
                         ids=["bpe", "byte"])
def test_tokenizers(tmp_path, rng, tokenizer):
    files = tokenizer_json.dump(tokenizer, 64)["tokenizer.json"]
    path = tmp_path / "tokenizer.json"
    good = json.dumps(files).encode()
    for n in range(2 * TRIES):
        if n % 2:
            path.write_bytes(damaged(good, rng))
        else:
            path.write_text(json.dumps(with_a_wrong_value(files, rng)))
        found = result(lambda: tokenizer_json.read(tmp_path))
        ids = found and result(partial(found.encode, VERSES))
        assert not ids or (max(ids) < found.vocab_size and isinstance(found.decode(ids), str))
        result(lambda: load_tokenizer(with_a_wrong_value(tokenizer.to_json(), rng)))


def test_a_tokenizer_json_of_ten_tokens_has_ten_tokens(tmp_path):
    files = tokenizer_json.dump(BPETokenizer.train(VERSES, 257), 64)["tokenizer.json"]
    content = files["added_tokens"][0]["content"]
    files["model"]["vocab"] = {chr(97 + i): i for i in range(10)} | {content: 10}
    files["added_tokens"][0]["id"] = 10
    (tmp_path / "tokenizer.json").write_text(json.dumps(files))
    found = tokenizer_json.read(tmp_path)
    assert found.vocab_size == 11 and found.decode(found.encode("abc")) == "abc"
    del files["added_tokens"][0]["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(files))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged, or not supported"):
        tokenizer_json.read(tmp_path)


def test_a_tokenizer_json_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    for raw in (b"", b'{"model": ', b"\xff", b"[" * 100_000):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
            tokenizer_json.read(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is a pipe"):
        tokenizer_json.read(tmp_path)
