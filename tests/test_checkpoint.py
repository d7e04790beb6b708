"""Checkpoint files: written atomically, and validated when read."""

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt import GPT
from tinygpt import checkpoint
from tinygpt.checkpoint import CheckpointError

ROOT = Path(__file__).parent.parent
METADATA = {"model_config": {"n_layer": 2}, "iter_num": 7, "best_val_loss": 1.5, "tokenizer": None,
         "words": "na\u00efve \U0001f600 \"quoted\"\n"}


@pytest.fixture
def tensors(rng):
    return {"model.a": rng.standard_normal((3, 5), np.float32),
            "model.b.c": np.zeros(0, np.float32), "optimizer.step": np.array([3.0], np.float32),
            "model.scalar": np.array(2.5, np.float32), "ids": np.arange(4, dtype=np.int32)}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---- round trips

def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, tensors):
    path = checkpoint.save(tmp_path / "deep" / "er" / "ckpt_7.safetensors", tensors, METADATA)
    loaded, metadata = checkpoint.load(path)
    assert loaded.keys() == tensors.keys()
    for key, array in tensors.items():
        assert loaded[key].dtype == array.dtype and loaded[key].shape == array.shape
        assert loaded[key].tobytes() == array.tobytes()
    assert {k: metadata[k] for k in METADATA} == METADATA == json.loads(json.dumps(METADATA))
    assert checkpoint.load_metadata(str(path)) == metadata
    assert os.listdir(path.parent) == ["ckpt_7.safetensors"]


def test_the_metadata_are_json_strings_with_format_and_version(tmp_path, tensors):
    raw = checkpoint.save(tmp_path / "a.safetensors", tensors, METADATA).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    texts = json.loads(raw[8:8 + length])["__metadata__"]
    assert all(isinstance(v, str) for v in texts.values())
    metadata = {k: json.loads(v) for k, v in texts.items()}
    assert metadata["format"] == checkpoint.FORMAT
    assert metadata["tinygrad"].startswith("0.") and metadata["model_config"] == {"n_layer": 2}


def test_infinite_losses_survive(tmp_path, tensors):
    """Before the first evaluation the best loss is infinite."""
    path = checkpoint.save(tmp_path / "a.safetensors", tensors,
                           METADATA | {"best_val_loss": float("inf")})
    assert checkpoint.load_metadata(path)["best_val_loss"] == float("inf")


def test_part_selects_by_prefix(tensors):
    assert checkpoint.part(tensors, "model.").keys() == {"a", "b.c", "scalar"}
    assert checkpoint.part(tensors, "ema.") == {}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, tensors, umask, mode):
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path / "ckpt_1.safetensors", tensors, METADATA)
        checkpoint.mark_best(path)
        assert os.umask(umask) == umask  # saving does not change it
    finally:
        os.umask(before)
    for made in (path, tmp_path / checkpoint.BEST):
        assert made.stat().st_mode & 0o777 == mode


def test_shapes_are_compared_by_name(tensors):
    checkpoint.check_shapes({"a": (2, 3)}, {"a": (2, 3)})
    for shapes in ({"a": (3, 2)}, {}, {"a": (2, 3), "b": (1,)}):
        with pytest.raises(CheckpointError, match=r"file.*(a|b)"):
            checkpoint.check_shapes(shapes, {"a": (2, 3)}, "file")


def test_a_different_setting_is_named_with_both_values():
    checkpoint.check_same("file", {"n_layer": 2, "dropout": 0.1}, {"n_layer": 2, "dropout": 0.2},
                          ignore=("dropout",))
    with pytest.raises(CheckpointError, match=r"file.*n_layer=2.*n_layer=3"):
        checkpoint.check_same("file", {"n_layer": 2}, {"n_layer": 3})


# ---- a save that fails or is killed

@pytest.mark.parametrize("step", ["checkpoint.write", "safetensors_file.os.fsync"])
def test_a_failed_save_changes_nothing(tmp_path, tensors, monkeypatch, step):
    path = checkpoint.save(tmp_path / "ckpt_7.safetensors", tensors, METADATA)
    before = files(tmp_path)

    def fails(*args):
        if step == "checkpoint.write":
            args[0].write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"tinygpt.{step}", fails)
    with pytest.raises(CheckpointError, match=r"ckpt_7.*No space left") as caught:
        checkpoint.save(path, tensors | {"more": np.ones(9)}, METADATA)
    assert "\n" not in str(caught.value) and files(tmp_path) == before


def test_a_folder_that_cannot_be_created_is_an_error_of_one_line(tmp_path, tensors):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file") as caught:
        checkpoint.save(tmp_path / "file" / "ckpt_1.safetensors", tensors, METADATA)
    assert "\n" not in str(caught.value)


def test_files_of_a_killed_save_are_ignored_and_removed(tmp_path, tensors):
    (tmp_path / ".ckpt_7.safetensors.part").write_bytes(b"half")
    path = checkpoint.save(tmp_path / "ckpt_7.safetensors", tensors, METADATA)
    (tmp_path / ".ckpt_8.safetensors.part").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == path == checkpoint.best_of_newest_run(tmp_path)
    checkpoint.rotate(tmp_path, 1)
    assert os.listdir(tmp_path) == ["ckpt_7.safetensors"]


SAVES = """
import resource, sys
from pathlib import Path
import numpy as np
from tinygpt import checkpoint

out, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
n = 0
while True:
    n += 1
    try:
        path = checkpoint.save(out / f"ckpt_{n % 3}.safetensors",
                               {"model.a": np.full(300_000, n, np.float32)},
                               {"model_config": {}, "iter_num": n})
    except checkpoint.CheckpointError as error:
        sys.exit(str(error))
    checkpoint.mark_best(path)
    print(n, flush=True)
"""


def saving(folder: Path, limit: int) -> subprocess.Popen:
    """A process that keeps saving 1.2 MB, under three names in turn."""
    return subprocess.Popen([sys.executable, "-c", SAVES, str(folder), str(limit)],
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "ckpt_1.safetensors", {"model.a": np.ones(5)}, METADATA)
    before = files(tmp_path)
    process = saving(tmp_path, limit=600_000)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1 and message.count("\n") == 1 and "cannot be written" in message
    assert files(tmp_path) == before


def test_every_file_is_complete_when_a_save_is_killed(tmp_path):
    rng = np.random.default_rng()  # not seeded: it must pass at any moment
    for _ in range(3):
        process = saving(tmp_path, limit=0)
        first = process.stdout.readline()  # there is a checkpoint from now on
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert first == "1\n"
        found = sorted(tmp_path.glob("*.safetensors"))
        assert len(found) >= 2
        for path in found:
            tensors, metadata = checkpoint.load(path)
            assert (tensors["model.a"] == metadata["iter_num"]).all()


# ---- damaged and hostile files

def raw_file(path: Path, header, body: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file byte by byte."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


SMALL = {"block_size": 4, "vocab_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}
META = {"format": json.dumps(checkpoint.FORMAT), "model_config": json.dumps(SMALL)}
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def refused(path) -> str:
    """The message of load, which has one line and the file's name."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(ValueError):
        GPT.from_checkpoint(path)
    return str(caught.value)


def test_a_file_written_byte_by_byte_is_read(tmp_path):
    """The next tests change this file."""
    path = raw_file(tmp_path / "x.safetensors", {"__metadata__": META, "a": ONE}, b"\0\0\x80?")
    tensors, metadata = checkpoint.load(path)
    assert tensors["a"].tolist() == [1.0] and metadata["model_config"] == SMALL


@pytest.mark.parametrize("header, body, length", [
    (b"", b"", None), (b"", b"", 0), (b"{}", b"", 2**63), (b"{}", b"", 2**64 - 1),
    (b"{}", b"", 10**8 + 1), (b"{}", b"", 3), (b"{}", b"", 1), (b"not JSON", b"", None),
    (b"[" * 10_000, b"", None), (b"\xff\xfe{}", b"", None), (b"[]", b"", None),
    ({"__metadata__": META, "a": {**ONE, "data_offsets": [0, 8]}}, b"0000", None),
    ({"__metadata__": META, "a": {**ONE, "data_offsets": [4, 0]}}, b"0000", None),
    ({"__metadata__": META, "a": {**ONE, "data_offsets": [2**40, 2**40 + 4]}}, b"0000", None),
    ({"__metadata__": META, "a": {**ONE, "data_offsets": [-4, 0]}}, b"0000", None),
    ({"__metadata__": META, "a": ONE, "b": ONE}, b"0000", None),
    ({"__metadata__": META, "a": ONE, "b": {**ONE, "data_offsets": [2, 6]}}, b"000000", None),
    ({"__metadata__": META, "a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, b"0" * 12, None),
    ({"__metadata__": META, "a": {**ONE, "shape": [2]}}, b"0000", None),
    ({"__metadata__": META, "a": {**ONE, "shape": [-1]}}, b"0000", None),
    ({"__metadata__": META, "a": {**ONE, "shape": [2**62, 2**62]}}, b"0000", None),
    ({"__metadata__": META, "a": {**ONE, "dtype": "F31"}}, b"0000", None),
    ({"__metadata__": META, "a": ONE}, b"0000more", None),
    ({"__metadata__": META, "a": ONE}, b"", None),
    ({"__metadata__": META, "a": "text"}, b"0000", None),
    ({"__metadata__": [1], "a": ONE}, b"0000", None),
    ({"__metadata__": {**META, "iter_num": 5}, "a": ONE}, b"0000", None),
], ids=str)
def test_a_hostile_header_is_refused(tmp_path, header, body, length):
    refused(raw_file(tmp_path / "x.safetensors", header, body, length))


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 1), ("F8_E5M2", 1)])
def test_a_dtype_that_numpy_lacks_is_refused(tmp_path, dtype, size):
    one = {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}
    refused(raw_file(tmp_path / "x.safetensors", {"__metadata__": META, "a": one}, b"1" * size))


@pytest.mark.parametrize("value", ["", "{", "[" * 100_000, "nothing"],
                         ids=["empty", "cut", "deep", "word"])
def test_metadata_that_is_not_json_is_refused(tmp_path, value):
    refused(raw_file(tmp_path / "x.safetensors", {"__metadata__": {**META, "iter_num": value}}))


@pytest.mark.parametrize("config", [
    [1], "text", None, 5, *({**SMALL, **odd} for odd in (
        {"no_such_field": 1}, {"n_layer": "7"}, {"n_layer": None}, {"n_layer": -1},
        {"n_layer": 1.5}, {"norm": ["layernorm"]}))],
    ids=lambda config: str(config)[-40:])
def test_an_invalid_model_config_is_a_value_error(tmp_path, config):
    path = raw_file(tmp_path / "x.safetensors",
                    {"__metadata__": {**META, "model_config": json.dumps(config)}})
    with pytest.raises(ValueError) as caught:
        GPT.from_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path, rng):
    contents = {"empty": b"", "short": b"1234567", "text": b"To be, or not to be\n" * 50,
                "pickle": pickle.dumps({"model": [1.0]}, protocol=2),
                "zeros": b"\0" * 4096,
                **{f"random {n}": rng.bytes(n) for n in (8, 9, 100, 5000)}}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused(path)


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    refused(path)
    assert not (tmp_path / "sprung").exists()


def test_a_truncated_file_is_refused_at_every_length(tmp_path, tensors):
    whole = checkpoint.save(tmp_path / "x.safetensors", tensors, METADATA).read_bytes()
    path = tmp_path / "cut.safetensors"
    n = len(whole)
    for length in [*range(0, 20), *range(20, n - 8, 37), *range(n - 8, n)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut"):
            checkpoint.load(path)


def test_damaged_headers_are_read_or_refused(tmp_path, tensors, rng):
    whole = checkpoint.save(tmp_path / "x.safetensors", tensors, METADATA).read_bytes()
    path = tmp_path / "bad.safetensors"
    for _ in range(300):
        raw = bytearray(whole)
        for place in rng.integers(0, len(raw) - 60, rng.integers(1, 4)):
            raw[place] = rng.integers(0, 256)
        path.write_bytes(raw)
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "np", "a": "b"},
                                      {"format": '"tinygpt-0"', "model_config": "{}"},
                                      {"format": '"tinygpt-1"'}], ids=str)
def test_another_projects_file_is_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file({"wte.weight": np.ones((2, 2), np.float32)}, path, metadata)
    assert "was not saved by this project" in refused(path)


@pytest.mark.parametrize("name", ["none.safetensors", "", "x" * 5000], ids=["none", "dir", "long"])
def test_a_missing_checkpoint_is_named(tmp_path, name):
    assert "there is no checkpoint" in refused(tmp_path / name)


# ---- files that are kept, found and moved

def touch(folder: Path, *names: str, age: float = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{folder.name} {name}")
        os.utime(folder / name, (time.time() - age,) * 2)


def test_rotate_keeps_the_newest_by_number(tmp_path):
    touch(tmp_path, *map(checkpoint.name, (1000, 250, 999, 90, 10000)), checkpoint.BEST,
          "metrics.jsonl", "config.json")
    touch(tmp_path, checkpoint.name(10001), age=10**6)  # the age does not matter
    checkpoint.rotate(tmp_path, 3)
    assert {p.name for p in tmp_path.iterdir()} == {
        "ckpt_10001.safetensors", "ckpt_10000.safetensors", "ckpt_1000.safetensors",
        checkpoint.BEST, "metrics.jsonl", "config.json"}


def test_rotate_leaves_files_that_a_user_named(tmp_path):
    mine = {"ckpt_good.safetensors", "ckpt_5_copy.safetensors", "x.safetensors"}
    touch(tmp_path, *mine, *map(checkpoint.name, (1, 2, 3)))
    checkpoint.rotate(tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == mine | {"ckpt_3.safetensors"}


def test_newest_is_the_highest_number(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    touch(tmp_path, checkpoint.BEST, "ckpt_notes.safetensors", "ckpt_3.txt")
    assert checkpoint.newest(tmp_path) is None
    touch(tmp_path, "ckpt_9.safetensors", "ckpt_10.safetensors", "ckpt_-99.safetensors")
    assert checkpoint.newest(tmp_path).name == "ckpt_10.safetensors"


def test_best_of_newest_run_looks_one_folder_down(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*train\.py"):
        checkpoint.best_of_newest_run(tmp_path)
    touch(tmp_path / "old", checkpoint.BEST, "ckpt_9000.safetensors", age=100)
    touch(tmp_path / "new", "ckpt_9.safetensors", "ckpt_10.safetensors", age=50)
    assert checkpoint.best_of_newest_run(tmp_path) == tmp_path / "new" / "ckpt_10.safetensors"
    touch(tmp_path / "new", checkpoint.BEST, age=60)  # older than the last, and the best
    assert checkpoint.best_of_newest_run(tmp_path) == tmp_path / "new" / checkpoint.BEST
    touch(tmp_path, "ckpt_1.safetensors", age=10)
    assert checkpoint.best_of_newest_run(tmp_path) == tmp_path / "ckpt_1.safetensors"


def test_the_best_checkpoint_can_be_marked_again(tmp_path, tensors):
    """A rename between two names of one file does nothing and leaves both."""
    path = checkpoint.save(tmp_path / "ckpt_7.safetensors", tensors, METADATA)
    for _ in range(2):
        checkpoint.mark_best(path)
        assert sorted(os.listdir(tmp_path)) == ["best.safetensors", "ckpt_7.safetensors"]


def test_mark_best_replaces_the_best_file(tmp_path, tensors, monkeypatch):
    (tmp_path / ".best.safetensors.part").write_text("left by a killed run")
    for n, linked in ((1, True), (2, False)):  # with hard links, and without
        if not linked:
            monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(95, "no")))
        path = checkpoint.save(tmp_path / checkpoint.name(n), tensors, METADATA | {"iter_num": n})
        checkpoint.mark_best(path)
        best = tmp_path / checkpoint.BEST
        assert best.read_bytes() == path.read_bytes()
        path.unlink()  # as rotate does
        assert checkpoint.load_metadata(best)["iter_num"] == n
    assert os.listdir(tmp_path) == [checkpoint.BEST]


def test_saving_again_does_not_change_the_best_file(tmp_path, tensors):
    path = checkpoint.save(tmp_path / checkpoint.name(5), tensors, METADATA | {"iter_num": 5})
    checkpoint.mark_best(path)
    checkpoint.save(path, tensors, METADATA | {"iter_num": 6})
    assert checkpoint.load_metadata(tmp_path / checkpoint.BEST)["iter_num"] == 5


def test_set_aside_moves_a_run_and_overwrites_nothing(tmp_path):
    run = ("ckpt_10.safetensors", checkpoint.BEST, "metrics.jsonl", "loss.png", "config.json")
    touch(tmp_path, "mine.txt")
    assert checkpoint.set_aside(tmp_path) is None
    touch(tmp_path / "run_2", "precious.txt")
    moved = []
    for _ in range(3):
        touch(tmp_path, *run)
        moved.append(checkpoint.set_aside(tmp_path))
        assert {p.name for p in moved[-1].iterdir()} == set(run)
    assert len(set(moved)) == 3 and tmp_path / "run_2" not in moved
    assert files(tmp_path / "run_2") == {"precious.txt": b"run_2 precious.txt"}
    assert {p.name for p in tmp_path.iterdir()} == {"mine.txt", "run_2", *(p.name for p in moved)}
    assert checkpoint.set_aside(tmp_path) is None  # nothing is left to move
