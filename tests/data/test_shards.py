"""Text larger than memory: the same tokens as in memory, in several processes, resumable."""

import itertools
import json

import numpy as np
import pytest
from tokens import ids_of

from tinygpt.data import DataError, shards
from tinygpt.data import load as module
from tinygpt.data.documents import TextFiles
from tinygpt.data.load import load_data
from tinygpt.data.tokenizer import load_tokenizer

TEXT = ("ROMEO:\n\nThe harbour sleeps,  and\n I that know\n\n\nher dreams.\r\nna\u00efve\n\u4f60 "
        "\n\tMust \u3000\nwake\nand walk\nthem  \nwith a lead and line.\n") * 60


@pytest.fixture(autouse=True)
def small(cache, monkeypatch):
    """A size at which a little text is large."""
    monkeypatch.setattr(module, "LARGE", 1000)
    monkeypatch.setattr(shards, "cpu_count", lambda: 1)


@pytest.fixture(params=["text", "texts", "jsonl"])
def source(request, tmp_path):
    """A folder of text files and the documents in it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    if request.param == "text":
        (folder / "one.txt").write_bytes(TEXT.encode())
        return folder, [TEXT]
    texts = [f"{n}. {TEXT[:n * 97]}" for n in range(12)]
    if request.param == "texts":
        for n, text in enumerate(texts):
            (folder / f"{n:02}.txt").write_bytes(text.encode())
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder, texts


def build(folder, place, kind, processes=None):
    text = TextFiles(sorted(place.iterdir()), "text", 0)
    return shards.build(folder, text, kind, 300, {}, processes)


def expected(texts, tokenizer) -> list[int]:
    """The ids of all documents, each with its separator."""
    if len(texts) == 1:
        return tokenizer.encode(texts[0])
    end = getattr(tokenizer, "end_of_text", None)
    ends = tokenizer.encode("\n") if end is None else [end]
    return [i for text in texts for i in tokenizer.encode(text) + ends]


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_the_tokens_are_those_of_the_whole_text(source, kind):
    place, texts = source
    for _ in range(2):  # the second time from the cache
        data = load_data(place, kind, 300)
        found = ids_of(data)
        assert found == expected(texts, data.tokenizer)
        assert 0.05 < len(data.val) / len(found) < 0.2


def test_a_piece_begins_where_the_one_before_ends(source):
    place, _ = source
    pieces = shards.cut(sorted(place.iterdir()))
    assert len(pieces) > 10
    for one, two in itertools.pairwise(pieces):
        assert two.start == (one.end if one.path == two.path else 0)


def stops_after(count: int):
    """`shards.encode` interrupted after so many pieces, and the list of the paths that it wrote."""
    encode, done = shards.encode, []

    def stops(piece, path):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(path)
        return encode(piece, path)
    return stops, done


def test_several_processes_agree_and_an_interrupted_build_is_resumed(source, tmp_path, monkeypatch):
    place, _ = source
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    build(whole, place, "bpe", processes=2)
    encode = shards.encode
    stops, done = stops_after(7)
    monkeypatch.setattr(shards, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        build(stopped, place, "bpe")
    before = {path: path.stat().st_mtime_ns for path in done}
    again = []
    monkeypatch.setattr(shards, "encode", lambda piece, path: (
        again.append(path), encode(piece, path))[1])
    monkeypatch.setattr(shards, "make_tokenizer", None)  # it is not trained again
    tokenizer, dtype = build(stopped, place, "bpe")
    assert len(before) == 7 and not set(done) & set(again)
    for name in ("train.bin", "val.bin"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert {p.name for p in stopped.iterdir()} == {"train.bin", "val.bin"}
    assert load_tokenizer(tokenizer.to_json()).vocab_size == 300 and dtype == np.dtype("<u2")


def test_a_build_of_another_text_starts_again(source, tmp_path, monkeypatch):
    place, _ = source
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "plan.json").write_text('{"made": {"kind": "byte"}, "pieces": []}')
    (folder / "shard_00000.bin").write_bytes(b"of another text")
    build(folder, place, "byte")
    assert not (folder / "train.bin").read_bytes().startswith(b"of")


def test_an_error_in_a_piece_names_the_file_and_its_offset(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good text\n" * 300 + b"\xff")
    with pytest.raises(DataError, match=r"bad\.txt is not UTF-8 at byte 3000"):
        load_data(path, "byte", 0)


def test_a_text_without_line_breaks_is_refused(tmp_path, cache):
    path = tmp_path / "one_line.txt"
    path.write_bytes(b"word " * 300)
    with pytest.raises(DataError, match=r"one_line\.txt has no line break"):
        load_data(path, "byte", 0)
    assert list(cache.iterdir()) == []


def test_an_error_in_a_piece_names_the_line_of_the_file(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' * 300 + '{"text": 5}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl has a number, .* in line 301"):
        load_data(path, "byte", 0)


def test_utf16_is_refused_before_it_is_cut(tmp_path):
    path = tmp_path / "wide.txt"
    path.write_bytes(TEXT.encode("utf-16"))
    with pytest.raises(DataError, match=r"is UTF-16, .*iconv -f UTF-16 -t UTF-8"):
        load_data(path, "byte", 0)


def test_damaged_files_of_an_interrupted_build_are_replaced(source, tmp_path, monkeypatch, rng):
    place, _ = source
    whole = tmp_path / "whole"
    build(whole, place, "bpe")
    encode = shards.encode
    stops, done = stops_after(5)

    for damaged in ("plan.json", "shard_00002.bin", "shard_00003.bin"):
        done.clear()
        monkeypatch.setattr(shards, "encode", stops)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "part", place, "bpe")
        raw = bytearray((tmp_path / "part" / damaged).read_bytes())
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        (tmp_path / "part" / damaged).write_bytes(raw)
        monkeypatch.setattr(shards, "encode", encode)
        build(tmp_path / "part", place, "bpe")
        for name in ("train.bin", "val.bin"):
            assert (tmp_path / "part" / name).read_bytes() == (whole / name).read_bytes()
