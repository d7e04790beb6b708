"""Text or .bin files -> token ids."""

import numpy as np
import pytest
from tokens import split_as_nanogpt, text_of, texts_of

from gpt import GPT, GPTConfig, TrainConfig
from tinygpt.data import DataError, token_files
from tinygpt.data import load as module
from tinygpt.data.load import load_data
from tinygpt.data.tokenizer import ByteTokenizer, CharTokenizer
from train import train

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_a_text_file_is_split_in_characters_as_nanogpt_splits(tmp_path, text, kind):
    text += "\u4f60\U0001f600 na\u00efve " * 30  # so that bytes would be cut elsewhere
    path = tmp_path / "some.txt"
    path.write_bytes(text.encode())
    data = load_data(path, kind, 300)
    assert texts_of(data) == split_as_nanogpt(text)
    assert data.train.dtype == data.val.dtype == np.uint16
    assert data.source == str(path)


def test_crlf_and_a_missing_last_newline_are_kept(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"one\r\ntwo\r\nthree\rfour")
    assert text_of(load_data(path, "byte", 256)) == "one\r\ntwo\r\nthree\rfour"


def test_a_folder_and_a_glob_mean_all_their_files_in_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for name, text in (("b.txt", "the second one"), ("a.txt", "the first"),
                       (".hidden", "not this one"), ("c.md", "and the third")):
        (folder / name).write_text(text)

    def all_of(source):
        return text_of(load_data(source, "byte", 256)).split("\n")

    assert all_of(folder) == ["the first", "the second one", "and the third"]
    assert all_of(str(folder / "*.txt")) == ["the first", "the second one"]
    assert all_of(f"{folder}/[bc]*") == ["the second one", "and the third"]


def test_a_string_of_text_is_text(text, cache):
    data = load_data(text, "char", 0)
    assert texts_of(data) == split_as_nanogpt(text) and list(cache.iterdir()) == []


def test_a_tokenizer_that_is_given_is_used(text, text_file):
    tokenizer = CharTokenizer.train(text + "xyz")
    for source in (text, text_file, str(text_file)):
        data = load_data(source, tokenizer, 0)
        assert data.tokenizer is tokenizer and texts_of(data) == split_as_nanogpt(text)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32, list])
def test_an_array_of_ids_is_not_changed(dtype):
    ids = list(range(95)) if dtype is list else np.arange(95, dtype=dtype)
    data = load_data(ids, "bpe", 1024)
    assert data.train.tolist() == list(range(85)) and data.val.tolist() == list(range(85, 95))
    assert data.tokenizer is None and data.bytes_per_token() is None


@pytest.mark.parametrize("ids", [np.zeros((3, 3), int), np.zeros(9), np.array([1, -1]), [[1], [2]],
                                 np.array(["a"]), [1.5, 2.0]], ids=repr)
def test_arrays_that_are_not_ids_are_refused(ids):
    with pytest.raises(DataError, match="token ids"):
        load_data(ids, "bpe", 1024)


def nanogpt_folder(folder, ids=range(200)):
    """The files of nanoGPT's prepare.py: uint16 without a meta.json."""
    folder.mkdir()
    np.array(list(ids), dtype=np.uint16).tofile(folder / "train.bin")
    np.arange(50, dtype=np.uint16).tofile(folder / "val.bin")
    return folder


def test_nanogpts_own_files_are_read(tmp_path):
    data = load_data(nanogpt_folder(tmp_path / "bins"), "byte", 256)
    assert data.train.tolist() == list(range(200)) and data.val.tolist() == list(range(50))
    assert data.tokenizer.vocab_size == 256 and data.train.dtype == np.dtype("<u2")


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_bins_without_a_meta_json_refuse_tokenizers_that_need_the_text(tmp_path, kind):
    folder = nanogpt_folder(tmp_path / "bins")
    with pytest.raises(DataError, match=r"bins.*meta\.json.*--tokenizer gpt2"):
        load_data(folder, kind, 1024)


def test_bins_without_a_meta_json_take_a_given_tokenizer(tmp_path):
    tokenizer = CharTokenizer.train("".join(map(chr, range(250))))
    assert load_data(nanogpt_folder(tmp_path / "bins"), tokenizer, 0).tokenizer is tokenizer


@pytest.mark.parametrize("size", [0, 7])
def test_bins_without_a_whole_number_of_ids_are_refused(tmp_path, size):
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


def test_more_than_65536_ids_are_stored_in_32_bits(text_file, monkeypatch):
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


def test_training_refuses_ids_outside_the_vocabulary(tmp_path, capsys):
    model = GPT(GPTConfig(block_size=4, vocab_size=16, n_layer=1, n_head=1, n_embd=4))
    config = TrainConfig(out_dir=str(tmp_path / "run"), batch_size=2, eval_iters=2, max_iters=2)
    with pytest.raises(ValueError, match=r"token id (16|99).*vocabulary of 16"):
        train(model, config, np.array([1, 2, 3, 16, 99] * 40))


def test_bytes_per_token_refuses_ids_outside_the_vocabulary(tmp_path):
    folder = nanogpt_folder(tmp_path / "bins")
    np.array([1, 300, 2], dtype=np.uint16).tofile(folder / "val.bin")
    with pytest.raises(ValueError, match="300"):
        load_data(folder, "byte", 256).bytes_per_token()


def test_the_play_that_ships_is_read_if_the_download_fails(monkeypatch, capsys):
    def fails(*args):
        raise DataError("tinyshakespeare.txt cannot be downloaded (ConnectionError)")

    monkeypatch.setattr(module, "download", fails)
    assert module.shakespeare() == module.SHIPPED
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and module.SHIPPED.name in message
