"""Text files -> documents, and files that are refused."""

import itertools
import json

import pytest
from tokens import split_as_nanogpt, text_of, texts_of

from tinygpt.data import DataError
from tinygpt.data.load import load_data
from tinygpt.data.tokenizer import BPETokenizer

pytestmark = pytest.mark.usefixtures("cache")


DOCUMENTS = ["The harbour sleeps.", "Then walk them softly,\nlightly made.", "na\u00efve \u4f60",
             "ROMEO:\n\nI know her dreams. " * 9, "the last one"]


def write_jsonl(path, documents=DOCUMENTS, name="text"):
    lines = [json.dumps({"id": n, name: text}) for n, text in enumerate(documents)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


@pytest.fixture(params=["jsonl", "texts", "both"])
def documents(request, tmp_path):
    """The documents as one .jsonl, as text files, or as both kinds of files."""
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
def test_without_an_end_of_text_id_documents_are_separated_by_line_breaks(documents, kind):
    assert texts_of(load_data(documents, kind, 0)) == split_as_nanogpt("\n".join(DOCUMENTS))


def test_end_of_text_has_no_bytes(tmp_path):
    data = load_data(write_jsonl(tmp_path / "some.jsonl", ["ab"] * 100), "bpe", 257)
    val = "".join(data.tokenizer.decode([i]) for i in data.val if i != data.tokenizer.end_of_text)
    assert data.bytes_per_token() == pytest.approx(len(val) / len(data.val))


def test_each_text_field_is_a_text_of_its_own(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"a": f"first {n}", "b": f"second {n}"}) + "\n"
                            for n in range(9)))
    for name, word, is_new in (("a", "first", True), ("b", "second", True), ("b", "second", False)):
        data = load_data(path, "byte", 0, text_field=name)
        assert text_of(data) == "\n".join(f"{word} {n}" for n in range(9))
        assert (data.new_cache is not None) == is_new
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
def test_a_line_without_a_text_is_named(tmp_path, line, says):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = refusal(path)
    assert str(path) in message and says in message


# ---- files that are refused

def refusal(source, kind="bpe") -> str:
    with pytest.raises(ValueError) as caught:
        load_data(source, kind, 300)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["nothing.txt", "no/such/folder", "*.nothing", "[", "x" * 5000])
def test_missing_data_is_named(tmp_path, name):
    assert str(tmp_path / name)[:200] in refusal(str(tmp_path / name))


def test_an_empty_name_does_not_mean_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("what happens to lie here")
    monkeypatch.chdir(tmp_path)
    assert "data" in refusal("")


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
@pytest.mark.parametrize("content", [b"", b" \n\n ", b"a"])
def test_an_empty_file_is_named(tmp_path, kind, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    assert str(path) in refusal(path, kind) or content == b"a"  # which is only too short


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    message = refusal(path)
    assert str(path) in message and "binary" in message and " 8" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_named_with_the_command_that_converts_it(tmp_path, encoding):
    path = tmp_path / "wide.txt"
    path.write_bytes("The harbour sleeps, na\u00efve.".encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"{path} is {name}, not UTF-8: convert it with iconv -f {name} -t UTF-8" in refusal(path)


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfThe harbour\xef\xbb\xbf sleeps.\n")
    assert text_of(load_data(path, "byte", 0)) == "The harbour\ufeff sleeps.\n"
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
