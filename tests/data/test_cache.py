"""The cache of the tokens of text files."""

import json
import os

import numpy as np
import pytest
from tokens import text_of

from tinygpt.data import DataError
from tinygpt.data.load import TokenData, load_data
from tinygpt.data.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("cache")


def same(a: TokenData, b: TokenData) -> bool:
    return (np.array_equal(a.train, b.train) and np.array_equal(a.val, b.val)
            and a.tokenizer.to_json() == b.tokenizer.to_json())


def test_a_second_load_reads_the_cache_only(text_file, cache):
    first, second = (load_data(source, "bpe", 300) for source in (text_file, str(text_file)))
    assert same(second, first) and first.new_cache is not None and second.new_cache is None
    files = {p.name for p in cache.glob("*/*")}
    assert files == {"train.bin", "val.bin", "meta.json"} and len(list(cache.iterdir())) == 1


def test_a_changed_text_is_tokenized_again(text_file):
    load_data(text_file, "char", 0)
    changed = text_file.read_text().replace("harbour", "HARBOUR")  # of the same length
    text_file.write_text(changed)
    os.utime(text_file, ns=(1, 1))
    assert text_of(load_data(text_file, "char", 0)) == changed


def test_a_new_file_in_a_folder_is_noticed(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the first text")
    load_data(folder, "byte", 256)
    (folder / "b.txt").write_text("second")
    assert text_of(load_data(folder, "byte", 256)) == "the first text\nsecond"


def test_each_tokenizer_has_a_cache_of_its_own(text_file, cache):
    wanted = [("bpe", 300), ("bpe", 310), ("char", 300), ("byte", 300)]
    first = [load_data(text_file, *what) for what in wanted]
    assert len({data.new_cache for data in first}) == len(list(cache.iterdir())) == len(wanted)
    again = [load_data(text_file, *what) for what in wanted]
    assert all(map(same, again, first)) and not any(data.new_cache for data in again)


def test_files_of_one_name_do_not_share_a_cache(tmp_path, cache):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(f"the text of folder {name}")
    for name in ("one", "two", "one"):
        data = load_data(tmp_path / name / "input.txt", "byte", 256)
        assert text_of(data) == f"the text of folder {name}"


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_truncated_cache_is_refused(text_file, cache, name):
    load_data(text_file, "byte", 256)
    path = next(cache.glob(f"*/{name}"))
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match=name) as caught:
        load_data(text_file, "byte", 256)
    assert "delete" in str(caught.value)


def damaged(**changes):
    return lambda meta: json.dumps({**json.loads(meta), **changes})


@pytest.mark.parametrize("damage", [
    lambda meta: "", lambda meta: meta[:40], lambda meta: "[]", lambda meta: "{}",
    lambda meta: "null", damaged(dtype="no type"), damaged(dtype="O"),
    damaged(dtype=None), damaged(dtype="<f4"), damaged(tokenizer={"kind": "?"}),
    damaged(tokenizer=None),
], ids=["empty", "cut", "list", "no keys", "null", "unknown dtype", "object dtype",
        "no dtype", "float dtype", "unknown tokenizer", "no tokenizer"])
def test_a_damaged_meta_json_is_refused(text_file, cache, damage):
    load_data(text_file, "byte", 256)
    path = next(cache.glob("*/meta.json"))
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError) as caught:
        load_data(text_file, "byte", 256)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("used", [("bpe", 300), ("char", 0), ("byte", 0)])
def test_a_cache_given_as_data_needs_its_own_tokenizer(text_file, cache, used):
    first = load_data(text_file, *used)
    folder = next(cache.iterdir())
    assert same(load_data(folder, *used), first)
    for other in {("bpe", 300), ("bpe", 301), ("char", 0), ("byte", 0)} - {used}:
        with pytest.raises(DataError, match=f"{used[0]}.*{other[0]}"):
            load_data(folder, *other)


def test_a_cache_given_as_data_refuses_another_tokenizer_object(text_file, cache, text):
    load_data(text_file, "char", 0)
    folder = next(cache.iterdir())
    mine = CharTokenizer.train(text)
    assert load_data(folder, mine, 0).tokenizer.to_json() == mine.to_json()
    with pytest.raises(DataError, match="tokenizer"):
        load_data(folder, CharTokenizer.train(text + "xyz"), 0)


def test_a_failed_load_leaves_no_cache(tmp_path, cache, monkeypatch):
    path = tmp_path / "short.txt"
    path.write_text("two words")
    with pytest.raises(DataError):
        load_data(path, "byte", 256, block_size=64)
    assert list(cache.iterdir()) == []
