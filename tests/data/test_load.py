"""Text or .bin files -> token ids."""

import itertools
import json
import os

import numpy as np
import pytest

from gpt import GPT, GPTConfig, TrainConfig
from tinygpt.data import DataError, token_files
from tinygpt.data import load as module
from tinygpt.data.load import TokenData, load_data
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from train import train

pytestmark = pytest.mark.usefixtures("cache")

# ---- load_data

def decoded(data: TokenData) -> tuple[str, str]:
    return data.tokenizer.decode(data.train.tolist()), data.tokenizer.decode(data.val.tolist())


def split_as_nanogpt(text: str) -> tuple[str, str]:
    n = len(text)
    return text[:int(n * 0.9)], text[int(n * 0.9):]


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_a_text_file_is_split_in_characters_as_nanogpt_splits(tmp_path, text, kind):
    text += "\u4f60\U0001f600 na\u00efve " * 30  # so that bytes would be cut elsewhere
    path = tmp_path / "some.txt"
    path.write_bytes(text.encode())
    data = load_data(path, kind, 300)
    assert decoded(data) == split_as_nanogpt(text)
    assert data.train.dtype == data.val.dtype == np.uint16
    assert data.source == str(path)


def test_crlf_and_a_missing_last_newline_are_kept(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"one\r\ntwo\r\nthree\rfour")
    assert "".join(decoded(load_data(path, "byte", 256))) == "one\r\ntwo\r\nthree\rfour"


def test_a_folder_and_a_glob_are_all_their_files_in_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for name, text in (("b.txt", "the second one"), ("a.txt", "the first"),
                       (".hidden", "not this one"), ("c.md", "and the third")):
        (folder / name).write_text(text)

    def all_of(source):
        return "".join(decoded(load_data(source, "byte", 256))).split("\n")

    assert all_of(folder) == ["the first", "the second one", "and the third"]
    assert all_of(str(folder / "*.txt")) == ["the first", "the second one"]
    assert all_of(f"{folder}/[bc]*") == ["the second one", "and the third"]


def test_a_string_of_text_is_text(text, cache):
    data = load_data(text, "char", 0)
    assert decoded(data) == split_as_nanogpt(text) and list(cache.iterdir()) == []


def test_a_tokenizer_that_is_given_is_used(text, text_file):
    tokenizer = CharTokenizer.train(text + "xyz")
    for source in (text, text_file, str(text_file)):
        data = load_data(source, tokenizer, 0)
        assert data.tokenizer is tokenizer and decoded(data) == split_as_nanogpt(text)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32, list])
def test_an_array_of_ids_is_taken_as_it_is(dtype):
    ids = list(range(95)) if dtype is list else np.arange(95, dtype=dtype)
    data = load_data(ids, "bpe", 1024)
    assert data.train.tolist() == list(range(85)) and data.val.tolist() == list(range(85, 95))
    assert data.tokenizer is None and data.bytes_per_token() is None


@pytest.mark.parametrize("ids", [np.zeros((3, 3), int), np.zeros(9), np.array([1, -1]), [[1], [2]],
                                 np.array(["a"]), [1.5, 2.0]], ids=repr)
def test_arrays_that_are_no_ids_are_refused(ids):
    with pytest.raises(DataError, match="token ids"):
        load_data(ids, "bpe", 1024)


def nanogpt_folder(folder, ids=range(200)):
    """What nanoGPT's prepare.py leaves: bare uint16 files."""
    folder.mkdir()
    np.array(list(ids), dtype=np.uint16).tofile(folder / "train.bin")
    np.arange(50, dtype=np.uint16).tofile(folder / "val.bin")
    return folder


def test_nanogpts_own_files_are_taken_as_they_are(tmp_path):
    data = load_data(nanogpt_folder(tmp_path / "bins"), "byte", 256)
    assert data.train.tolist() == list(range(200)) and data.val.tolist() == list(range(50))
    assert data.tokenizer.vocab_size == 256 and data.train.dtype == np.dtype("<u2")


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_bare_bins_need_a_tokenizer_that_is_known_without_the_text(tmp_path, kind):
    folder = nanogpt_folder(tmp_path / "bins")
    with pytest.raises(DataError, match=r"bins.*meta\.json.*--tokenizer gpt2"):
        load_data(folder, kind, 1024)


def test_bare_bins_take_a_tokenizer_that_is_given(tmp_path):
    tokenizer = CharTokenizer.train("".join(map(chr, range(250))))
    assert load_data(nanogpt_folder(tmp_path / "bins"), tokenizer, 0).tokenizer is tokenizer


@pytest.mark.parametrize("size", [0, 7])
def test_bins_of_half_an_id_or_none_are_refused(tmp_path, size):
    folder = nanogpt_folder(tmp_path / "bins")
    (folder / "val.bin").write_bytes(b"\1" * size)
    with pytest.raises(DataError, match=rf"val\.bin.*{size} bytes"):
        load_data(folder, "byte", 256)


def test_a_missing_val_bin_is_named(tmp_path):
    folder = nanogpt_folder(tmp_path / "bins")
    (folder / "val.bin").unlink()
    with pytest.raises(DataError, match=r"no .*val\.bin"):
        load_data(folder, "byte", 256)


def test_bytes_per_token_is_that_of_the_validation_text(text):
    data = load_data(text, "bpe", 300)
    size = len(split_as_nanogpt(text)[1].encode())
    assert data.bytes_per_token() == pytest.approx(size / len(data.val), rel=1e-12)


def test_more_than_65536_ids_are_kept_in_32_bits(text_file, monkeypatch):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode(self, text):
            return [69_999 - b for b in text.encode()]

        def to_json(self):
            return {"kind": "wide"}

    monkeypatch.setattr(module, "make_tokenizer", lambda *args: Wide())
    for user in (module, token_files):
        monkeypatch.setattr(user, "load_tokenizer", lambda data: Wide())
    text = text_file.read_text()
    for data in (load_data(text_file, "byte", 0), load_data(text_file, "byte", 0)):
        assert data.train.dtype == np.dtype("<u4")
        assert data.train.tolist() == Wide().encode(split_as_nanogpt(text)[0])


# ---- the cache

@pytest.fixture
def readings(monkeypatch):
    """Counts how often a text is tokenized, which begins with a new tokenizer."""
    seen = []
    make = module.make_tokenizer

    def counted(*args):
        seen.append(args)
        return make(*args)

    monkeypatch.setattr(module, "make_tokenizer", counted)
    return seen


def same(a: TokenData, b: TokenData) -> bool:
    return (np.array_equal(a.train, b.train) and np.array_equal(a.val, b.val)
            and a.tokenizer.to_json() == b.tokenizer.to_json())


def test_a_second_load_reads_the_cache_only(text_file, readings, cache):
    first = load_data(text_file, "bpe", 300)
    assert len(readings) == 1
    assert same(load_data(str(text_file), "bpe", 300), first) and len(readings) == 1
    files = {p.name for p in cache.glob("*/*")}
    assert files == {"train.bin", "val.bin", "meta.json"} and len(list(cache.iterdir())) == 1


def test_a_changed_text_is_read_again(text_file, readings):
    load_data(text_file, "char", 0)
    changed = text_file.read_text().replace("harbour", "HARBOUR")  # of the same length
    text_file.write_text(changed)
    os.utime(text_file, ns=(1, 1))
    assert "".join(decoded(load_data(text_file, "char", 0))) == changed and len(readings) == 2


def test_a_file_more_in_a_folder_is_noticed(tmp_path, readings):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the first text")
    load_data(folder, "byte", 256)
    (folder / "b.txt").write_text("second")
    assert "".join(decoded(load_data(folder, "byte", 256))) == "the first text\nsecond"


def test_each_tokenizer_has_a_cache_of_its_own(text_file, readings, cache):
    wanted = [("bpe", 300), ("bpe", 310), ("char", 300), ("byte", 300)]
    first = [load_data(text_file, *what) for what in wanted]
    assert len(readings) == len(list(cache.iterdir())) == len(wanted)
    assert all(same(load_data(text_file, *what), data)
               for what, data in zip(wanted, first, strict=True))
    assert len(readings) == len(wanted)


def test_files_of_one_name_do_not_share_a_cache(tmp_path, cache):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(f"the text of folder {name}")
    for name in ("one", "two", "one"):
        data = load_data(tmp_path / name / "input.txt", "byte", 256)
        assert "".join(decoded(data)) == f"the text of folder {name}"


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


@pytest.mark.parametrize("made", [("bpe", 300), ("char", 0), ("byte", 0)])
def test_a_cache_given_as_data_needs_its_own_tokenizer(text_file, cache, made):
    first = load_data(text_file, *made)
    folder = next(cache.iterdir())
    assert same(load_data(folder, *made), first)
    for other in {("bpe", 300), ("bpe", 301), ("char", 0), ("byte", 0)} - {made}:
        with pytest.raises(DataError, match=f"{made[0]}.*{other[0]}"):
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


# ---- documents

DOCUMENTS = ["The harbour sleeps.", "Then walk them softly,\nlightly made.", "na\u00efve \u4f60",
             "ROMEO:\n\nI know her dreams. " * 9, "the last one"]


def write_jsonl(path, documents=DOCUMENTS, name="text"):
    lines = [json.dumps({"id": n, name: text}) for n, text in enumerate(documents)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


@pytest.fixture(params=["jsonl", "texts", "both"])
def documents(request, tmp_path):
    """The documents as one .jsonl, as plain files, or some so and some so."""
    if request.param == "jsonl":
        return write_jsonl(tmp_path / "some.jsonl")
    folder = tmp_path / "folder"
    folder.mkdir()
    for n, text in enumerate(DOCUMENTS):
        if request.param == "both" and n % 2:
            write_jsonl(folder / f"{n}.jsonl", [text])
        else:
            (folder / f"{n}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("kind", ["bpe", "tokenizer"])
def test_documents_end_with_end_of_text(documents, kind):
    tokenizer = BPETokenizer.train("\n".join(DOCUMENTS), 270)
    for _ in range(2):  # the second time from the cache
        data = load_data(documents, "bpe" if kind == "bpe" else tokenizer, 270)
        end = data.tokenizer.end_of_text
        texts = []
        for ids in (data.train.tolist(), data.val.tolist()):
            breaks = [-1, *(n for n, i in enumerate(ids) if i == end), len(ids)]
            texts.append([data.tokenizer.decode(ids[a + 1:b])
                          for a, b in itertools.pairwise(breaks)])
        train, val = texts
        assert [*train[:-1], train[-1] + val[0], *val[1:]] == DOCUMENTS
        whole = "\n".join(DOCUMENTS)
        assert "\n".join(train) == split_as_nanogpt(whole)[0]


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_without_an_end_of_text_a_line_break_is_between_documents(documents, kind):
    assert decoded(load_data(documents, kind, 0)) == split_as_nanogpt("\n".join(DOCUMENTS))


def test_end_of_text_stands_for_no_bytes(tmp_path):
    data = load_data(write_jsonl(tmp_path / "some.jsonl", ["ab"] * 100), "bpe", 257)
    val = "".join(data.tokenizer.decode([i]) for i in data.val if i != data.tokenizer.end_of_text)
    assert data.bytes_per_token() == pytest.approx(len(val) / len(data.val))


def test_another_text_field_is_another_text(tmp_path, readings):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"a": f"first {n}", "b": f"second {n}"}) + "\n"
                            for n in range(9)))
    for name, word in (("a", "first"), ("b", "second"), ("b", "second")):
        text = "".join(decoded(load_data(path, "byte", 0, text_field=name)))
        assert text == "\n".join(f"{word} {n}" for n in range(9))
    assert len(readings) == 2
    with pytest.raises(DataError, match=r"'text' \(name one of 'a', 'b' with --text_field.*line 1"):
        load_data(path, "byte", 0)


@pytest.mark.parametrize("line, says", [
    ("{", "has invalid JSON (Expecting property name enclosed in double quotes) in line 3"),
    ("[1]", "has a list, not a JSON object with the field 'text', in line 3"),
    ('{"text": 5}', "has a number, not a string, in the field 'text' in line 3"),
    ('{"text": null}', "has null, not a string, in the field 'text' in line 3"),
    ("null", "has null, not a JSON object"), ("{}", "no field 'text', but an empty object in line"),
    ('{"a\\nb": 1}', r"no field 'text' (name one of 'a\nb' with --text_field) in line 3"),
    ("[" * 100_000, "has invalid JSON"),
    ('{"text": "\\ud83d"}', r"pair, '\ud83d', in the text of line 3"),
], ids=lambda value: value[:20])
def test_a_line_that_has_no_text_is_named(tmp_path, line, says):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = refusal(path)
    assert str(path) in message and says in message


# ---- what is refused, in one line that names it

def refusal(source, kind="bpe") -> str:
    with pytest.raises(ValueError) as caught:
        load_data(source, kind, 300)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["nothing.txt", "no/such/folder", "*.nothing", "[", "x" * 5000])
def test_missing_data_is_named(tmp_path, name):
    assert str(tmp_path / name)[:200] in refusal(str(tmp_path / name))


def test_the_current_folder_is_not_meant_by_an_empty_name(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("what happens to lie here")
    monkeypatch.chdir(tmp_path)
    assert "data" in refusal("")


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
@pytest.mark.parametrize("content", [b"", b" \n\n ", b"a"])
def test_an_empty_file_is_named(tmp_path, kind, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    assert str(path) in refusal(path, kind) or content == b"a"  # which is merely too short


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    message = refusal(path)
    assert str(path) in message and "binary" in message and " 8" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_named_with_what_converts_it(tmp_path, encoding):
    path = tmp_path / "wide.txt"
    path.write_bytes("The harbour sleeps, na\u00efve.".encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"{path} is {name}, not UTF-8: convert it with iconv -f {name} -t UTF-8" in refusal(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfThe harbour\xef\xbb\xbf sleeps.\n")
    assert "".join(decoded(load_data(path, "byte", 0))) == "The harbour\ufeff sleeps.\n"
    path.write_bytes(b"\xef\xbb\xbfThe \xff")
    assert "not UTF-8 at byte 7:" in refusal(path)


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xc3\x28h", b"cut \xe2\x82", b"\xed\xa0\x80"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, content):
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message and "UTF-8" in message


def test_one_bad_file_in_a_folder_is_named(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"bad \xff")
    assert str(folder / "b.txt") in refusal(folder)


def test_ids_beyond_the_vocabulary_stop_the_training(tmp_path, capsys):
    model = GPT(GPTConfig(block_size=4, vocab_size=16, n_layer=1, n_head=1, n_embd=4))
    config = TrainConfig(out_dir=str(tmp_path / "run"), batch_size=2, eval_iters=2, max_iters=2)
    with pytest.raises(ValueError, match=r"token id (16|99).*vocabulary of 16"):
        train(model, config, np.array([1, 2, 3, 16, 99] * 40))


def test_ids_beyond_the_tokenizer_are_told_where_bytes_are_counted(tmp_path):
    folder = nanogpt_folder(tmp_path / "bins")
    np.array([1, 300, 2], dtype=np.uint16).tofile(folder / "val.bin")
    with pytest.raises(ValueError, match="300"):
        load_data(folder, "byte", 256).bytes_per_token()


def test_without_shakespeare_the_play_that_ships_is_read(monkeypatch, capsys):
    def fails(*args):
        raise DataError("tinyshakespeare.txt cannot be downloaded (ConnectionError)")

    monkeypatch.setattr(module, "download", fails)
    assert module.shakespeare() == module.SHIPPED
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and module.SHIPPED.name in message
