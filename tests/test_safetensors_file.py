"""safetensors files: checksums, invalid headers, and files replaced while they are read."""

import functools
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from conftest import ROOT
from safetensors.numpy import load_file, save_file
from tiny import TINY

from gpt import GPT
from tinygpt import checkpoint, safetensors_file
from tinygpt.checkpoint import CheckpointError
from tinygpt.huggingface import pretrained
from tinygpt.model import lora
from tinygpt.safetensors_file import TensorFile, TensorFileError


@pytest.fixture
def tensors(rng):
    return {"model.a": rng.standard_normal((300, 5), np.float32),
            "model.empty": np.zeros((0, 3), np.float32), "model.scalar": np.array(2.5, np.float32),
            "optimizer.codes": rng.integers(0, 256, (7, 3)).astype(np.uint8),
            "wide": rng.standard_normal(4), "half": rng.standard_normal(9).astype(np.float16),
            "ids": np.arange(4, dtype=np.int32), "flags": np.array([True, False])}


HEADER = {"model_config": {"n_layer": 1}, "iter_num": 7}


def parts(path: Path) -> tuple[dict, bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8:8 + length]), raw[8 + length:]


def put(path: Path, header: dict, body: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def without_sums(path: Path, change=lambda header: None) -> Path:
    """Removes the checksums, as in older files, and applies change to the header."""
    header, body = parts(path)
    for key in (safetensors_file.SUMS, safetensors_file.HEADER_SUM):
        del header["__metadata__"][key]
    change(header)
    return put(path, header, body)


@functools.cache
def tiny_bytes(seed: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return GPT(TINY, seed).save_checkpoint(1, None, folder).read_bytes()


def tiny(folder: Path, seed: int = 1) -> Path:
    """A checkpoint of a tiny model, as `save_checkpoint` writes it."""
    path = folder / checkpoint.name(1)
    checkpoint.write_atomically(path, tiny_bytes(seed))
    return path


@functools.cache
def tiny_model() -> GPT:
    return GPT(TINY)


def refused(read, path: Path, *says: str) -> None:
    """Checks that read(path) raises one line with the file's name and the texts."""
    with pytest.raises(ValueError) as caught:
        read(path)
    for text in (str(path), *says):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).isascii()


# ---- other programs

def test_files_are_exchanged_with_the_safetensors_library(tmp_path, tensors):
    path = checkpoint.save(tmp_path / "x.safetensors", tensors, HEADER)
    theirs = load_file(path)
    save_file(tensors, tmp_path / "y.safetensors", {"format": "pt"})
    with TensorFile(tmp_path / "y.safetensors") as file:
        ours = {name: file.read(name) for name in file.shapes}
    for found in (theirs, ours):
        assert found.keys() == tensors.keys()
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


def test_the_checksums_are_xxh3_of_each_tensors_bytes(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(safetensors_file, "PIECE", 64)  # so that a tensor has several
    path = checkpoint.save(tmp_path / "x.safetensors", tensors, HEADER)
    sums = json.loads(parts(path)[0]["__metadata__"]["xxh3_64"])
    assert sums == {k: xxhash.xxh3_64_hexdigest(a.tobytes()) for k, a in tensors.items()}
    loaded, header = checkpoint.load(path)
    assert "xxh3_64" not in header and loaded["model.a"].tobytes() == tensors["model.a"].tobytes()


# ---- damage

@pytest.mark.parametrize("name", ["model.a", "optimizer.codes", "model.scalar", "flags"])
def test_a_flipped_bit_is_found_with_its_file_and_tensor(tmp_path, tensors, name, rng):
    path = checkpoint.save(tmp_path / "x.safetensors", tensors, HEADER)
    header, body = parts(path)
    begin, end = header[name]["data_offsets"]
    raw = bytearray(path.read_bytes())
    place = len(raw) - len(body) + int(rng.integers(begin, end))
    raw[place] ^= 1
    path.write_bytes(raw)
    refused(checkpoint.load, path, name, "checksum")


def test_every_reader_finds_the_flipped_bit(tmp_path):
    """In a checkpoint, in adapters, and in a folder in Hugging Face's layout."""
    model = GPT(TINY)
    model.save_pretrained(tmp_path / "folder")
    lora.attach(model, 2, 4.0, "h.*", 0)
    adapters = lora.save(model, model.state_dict(), {"model_config": {}}, tmp_path)
    files = {tiny(tmp_path): (GPT.from_checkpoint, GPT.from_pretrained, checkpoint.load,
                              GPT(TINY).load_checkpoint),
             adapters: (lambda path: lora.load(GPT(TINY), path),),
             tmp_path / "folder" / "model.safetensors": (GPT.from_pretrained,)}
    for path, readers in files.items():
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 64
        path.write_bytes(raw)
        for read in readers:
            refused(read, path, "checksum")


def test_a_changed_but_valid_header_is_found(tmp_path):
    path = tiny(tmp_path)
    header, body = parts(path)
    config = json.loads(header["__metadata__"]["model_config"]) | {"norm_eps": 0.5}
    header["__metadata__"]["model_config"] = json.dumps(config)
    refused(GPT.from_checkpoint, put(path, header, body), "checksum of its header")
    header["__metadata__"].pop(safetensors_file.HEADER_SUM)
    refused(GPT.from_checkpoint, put(path, header, body), "checksum of its header")


def test_the_order_of_the_keys_in_a_header_does_not_matter(tmp_path):
    path = tiny(tmp_path)
    header, body = parts(path)
    metadata = dict(reversed(header.pop("__metadata__").items()))
    put(path, dict(reversed(header.items())) | {"__metadata__": metadata}, body)
    GPT.from_checkpoint(path)


def test_files_without_checksums_still_load(tmp_path):
    path = tiny(tmp_path)
    expected, _ = checkpoint.load(path)
    found, _ = checkpoint.load(without_sums(path))
    assert all(np.array_equal(found[k], a) for k, a in expected.items())
    assert GPT.from_checkpoint(path).config == TINY


# ---- files that are replaced

def test_a_replaced_file_is_read_as_it_was(tmp_path):
    first, second = (GPT(TINY, seed).state_dict() for seed in (1, 2))
    path = tiny(tmp_path, 1)
    with checkpoint.Checkpoint(path) as file:
        tiny(tmp_path, 2)
        for name, weight in first.items():
            assert np.array_equal(file.read(f"model.{name}"), weight.numpy())
    tiny(tmp_path, 1)
    with pretrained.open_pretrained(path) as found:
        tiny(tmp_path, 2)
        model = GPT(TINY, seed=3)
        found.fill(model.state_dict())
    for name, weight in model.state_dict().items():
        assert np.array_equal(weight.numpy(), first[name].numpy())
        assert name.endswith("bias") or weight.ndim == 1 or (
            not np.array_equal(weight.numpy(), second[name].numpy()))


SAVES = """
import sys
import time
from pathlib import Path
import numpy as np
from tinygpt import checkpoint
n = 0
while True:
    n += 1
    checkpoint.save(Path(sys.argv[1]), {f"model.{i}": np.full(20_000, n, np.float32)
                                        for i in range(8)}, {"model_config": {}, "iter_num": n})
    print(n, flush=True)
"""


def test_reads_during_saves_never_mix_two_saves(tmp_path):
    path = tmp_path / "x.safetensors"
    process = subprocess.Popen([sys.executable, "-c", SAVES, path], stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        process.stdout.readline()  # there is a file from now on
        seen, reads, deadline = set(), 0, time.monotonic() + 60
        while reads < 60 or (len(seen) == 1 and time.monotonic() < deadline):
            reads += 1
            with checkpoint.Checkpoint(path) as file:
                values = {float(v) for name in file.shapes for v in file.read(name)[[0, -1]]}
                assert values == {float(file.header["iter_num"])}
                seen |= values
        assert len(seen) > 1
    finally:
        process.kill()
        process.communicate()


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path):
    path = tiny(tmp_path)
    with checkpoint.Checkpoint(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="shorter"):
            file.read_part("model.")


def test_no_file_stays_open(tmp_path):
    """After a read and after one that failed."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no list of open files here")
    path = tiny(tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(path.read_bytes()[:-1])

    def names() -> list[str]:
        return [os.readlink(f) for f in folder.iterdir() if f.is_symlink() and os.path.exists(f)]

    errors = []  # they refer to the objects that failed
    for read in (GPT.from_checkpoint, GPT.from_pretrained, checkpoint.load_metadata):
        read(path)
        with pytest.raises(ValueError) as caught:
            read(bad)
        errors.append(caught)
    with pytest.raises(ValueError):
        GPT.from_pretrained(path, n_layer=7)
    assert not [name for name in names() if name.startswith(str(tmp_path))]


# ---- values that are not finite

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_value_that_is_not_finite_is_refused_in_and_out(tmp_path, value, dtype, monkeypatch):
    monkeypatch.setattr(safetensors_file, "PIECE", 64)
    path, array = tmp_path / "x.safetensors", np.ones(1000, dtype)
    checkpoint.save(path, {"model.a": array}, HEADER)
    before = path.read_bytes()
    array[-1] = value
    with pytest.raises(CheckpointError, match=r"x.safetensors.*model\.a has NaN or infinite"):
        checkpoint.save(path, {"model.a": array}, HEADER)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    metadata = {"format": json.dumps(checkpoint.FORMAT), "model_config": "{}"}
    save_file({"model.a": array}, path, metadata)
    refused(checkpoint.load, path, "model.a has NaN or infinite")


@pytest.mark.parametrize(("bits", "good"), [(0x3F80, True), (0x7F80, False), (0xFFC0, False)])
def test_bfloat16_is_widened_and_checked(tmp_path, bits, good):
    header = {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    path = put(tmp_path / "x.safetensors", header, struct.pack("<HH", 0xC000, bits))
    with TensorFile(path) as file:
        if good:
            assert file.read("a").tolist() == [-2.0, 1.0]
        else:
            refused(lambda _: file.read("a"), path, "a has NaN or infinite")


def test_every_reader_refuses_nan_weights(tmp_path):
    model = GPT(TINY)
    folder = model.save_pretrained(tmp_path / "folder")
    files = {tiny(tmp_path): (GPT.from_checkpoint, GPT.from_pretrained, GPT(TINY).load_checkpoint),
             folder / "model.safetensors": (GPT.from_pretrained,)}
    for path, readers in files.items():
        without_sums(path, lambda header: header["__metadata__"].setdefault("format", "pt"))
        raw = bytearray(path.read_bytes())
        raw[-4:] = struct.pack("<f", np.nan)
        path.write_bytes(raw)
        for read in readers:
            refused(read, path, "NaN")
    model.ln_f.weight.assign(model.ln_f.weight * np.inf).realize()
    with pytest.raises(ValueError, match=r"ln_f\.weight has NaN or infinite"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- invalid headers

def changed(tmp_path: Path, **values) -> Path:
    """A checkpoint without checksums whose metadata has these values, JSON texts."""
    return without_sums(tiny(tmp_path), lambda header: header["__metadata__"].update(values))


DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize("key", checkpoint.VALUES)
@pytest.mark.parametrize("value", ["NaN", "[[1]]", '["a"]', '"text"', '{"a": 1}', "-1", "1.5e999",
                                   "true", DEEP, "1" * 400])
def test_metadata_of_the_wrong_type_is_refused_by_every_reader(tmp_path, key, value):
    path = changed(tmp_path, **{key: value})
    try:
        _, is_valid = checkpoint.VALUES[key]
        good = is_valid(json.loads(value))
    except RecursionError:
        good = False
    for read in (checkpoint.load_metadata, checkpoint.load, GPT.from_checkpoint,
                 GPT.from_pretrained, lambda path: lora.load(tiny_model(), path)):
        if not good:
            refused(read, path)
        else:
            try:
                read(path)
            except ValueError as error:
                assert "\n" not in str(error) and str(path) in str(error)


SIZES = ("n_layer", "n_head", "n_embd", "n_inner", "vocab_size", "block_size", "n_kv_head")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [10**9, 10**15, 10**400, float("inf"), "7", [7], True, 0, -3])
def test_sizes_that_do_not_match_the_tensors_are_refused_at_once(tmp_path, name, value):
    """Before memory is allocated or names are made."""
    config = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 256, "block_size": 8}
    path = changed(tmp_path, model_config=json.dumps(config | {name: value}))
    for read in (GPT.from_checkpoint, GPT.from_pretrained):
        refused(read, path)


def test_shapes_are_those_of_the_model_and_cost_no_memory():
    assert GPT.shapes(TINY) == {k: w.shape for k, w in GPT(TINY).state_dict().items()}


@pytest.mark.parametrize("entry", [
    {"dtype": ["F32"]}, {"shape": [True]}, {"shape": 1}, {"shape": [1] * 100}, {"shape": [1.0]},
    {"data_offsets": [0]}, {"data_offsets": [0, 4, 8]}, {"data_offsets": ["0", "4"]},
    {"data_offsets": None}, {"dtype": None}], ids=str)
def test_entries_of_the_wrong_type_are_refused(tmp_path, entry):
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry
    refused(TensorFile, put(tmp_path / "x.safetensors", {"a": one}, b"\0" * 4))


def test_tensors_relabelled_as_integers_are_refused(tmp_path):
    from tinygpt.training.optim import AdamW
    model = GPT(TINY)
    path = model.save_checkpoint(1, AdamW(model.state_dict()), tmp_path)
    whole = path.read_bytes()
    for name in ("model.wte.weight", "optimizer.m.wte.weight", "optimizer.step"):
        path.write_bytes(whole)
        without_sums(path, lambda header, name=name: header[name].update(dtype="I32"))
        refused(lambda path: GPT(TINY).load_checkpoint(path, AdamW(model.state_dict())), path,
                name.partition(".")[2])


@pytest.mark.parametrize("tokenizer", [
    [1], {"kind": ["bpe"]}, {"kind": "bpe", "tokens": 5}, {"kind": "bpe", "tokens": ["AA=="]},
    {"kind": "char", "chars": ["a"]}, {"kind": "char", "chars": 5}, {"kind": "char", "chars": ""},
    {"kind": "char", "chars": "aa"}, {"kind": "char", "chars": "\ud800"}, {"kind": "char"},
    {"kind": "char", "chars": "".join(map(chr, range(300)))}], ids=lambda t: str(t)[:40])
def test_an_invalid_or_too_large_tokenizer_is_refused(tmp_path, tokenizer):
    path = changed(tmp_path, tokenizer=json.dumps(tokenizer))
    for read in (GPT.from_checkpoint, GPT.from_pretrained, tiny_model().load_checkpoint):
        refused(read, path, "tokenizer")


def test_metadata_that_cannot_be_read_back_is_not_written(tmp_path):
    model = GPT(TINY)
    for metadata in ({"best_val_loss": float("nan")}, {"iter_num": "7"}, {"x": object()},
                     {"stale_evaluations": -1}):
        with pytest.raises(ValueError):
            model.save_checkpoint(1, None, tmp_path, metadata)
    for iter_num in (True, -1, 1.5):
        with pytest.raises(ValueError, match="iter_num"):
            model.save_checkpoint(iter_num, None, tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = model.save_checkpoint(np.int64(3), None, tmp_path, {"best_val_loss": float("inf")})
    assert checkpoint.load_metadata(path)["iter_num"] == 3


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_path_that_is_not_a_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    refused(TensorFile, path)
    refused(GPT.from_checkpoint, path)
    with pytest.raises(TensorFileError):
        checkpoint.load(path)
