"""Token files: they match their text, damage is found, and a read belongs to one build."""

import json
import os
import resource
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tokens import text_of

from tinygpt import device
from tinygpt.data import DataError, documents, token_files
from tinygpt.data import load as module
from tinygpt.data.load import load_data, read_tokens
from tinygpt.data.token_data import Batches, TokenData
from tinygpt.data.token_files import TokenFile
from tinygpt.data.tokenizer import ByteTokenizer, CharTokenizer

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Tokenizes texts in memory, or as if they did not fit in memory."""
    if request.param == "large":
        monkeypatch.setattr(module, "LARGE", 10)
        monkeypatch.setattr(module.shards, "cpu_count", lambda: 1)
    return request.param


# ---- a cache matches the content of its text

def test_other_content_of_the_same_size_and_time_is_noticed(tmp_path, size):
    path = tmp_path / "some.txt"
    for content in ("The harbour\nsleeps.\n", "The harbour\nsleept.\n"):
        path.write_text(content)
        os.utime(path, ns=(10**18, 10**18))
        assert text_of(load_data(path, "char", 0)) == content


def test_the_same_content_with_another_modification_time_is_not_tokenized_again(tmp_path, size,
                                                                                monkeypatch):
    path = tmp_path / "some.txt"
    path.write_text("The harbour\nsleeps.\n")
    first = load_data(path, "byte", 0)
    os.utime(path, ns=(10**18, 10**18))
    monkeypatch.setattr(module.shards, "build", None)
    data = load_data(path, "byte", 0)
    assert data.fingerprint == first.fingerprint and data.new_cache is None


def test_a_large_file_that_was_not_touched_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 10)
    monkeypatch.setattr(module.shards, "cpu_count", lambda: 1)
    path = tmp_path / "some.txt"
    path.write_text("The harbour\nsleeps.\n")
    load_data(path, "byte", 0)
    hashed = []
    checksum = documents.checksum
    monkeypatch.setattr(documents, "checksum", lambda file: hashed.append(1) or checksum(file))
    load_data(path, "byte", 0)
    assert not hashed
    os.utime(path)
    load_data(path, "byte", 0)
    assert hashed == [1]


def test_a_text_that_changes_while_it_is_tokenized_is_refused(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(module, "LARGE", 10)
    monkeypatch.setattr(module.shards, "cpu_count", lambda: 1)
    path = tmp_path / "some.txt"
    path.write_text("The harbour\nsleeps.\n")
    build = module.shards.build

    def changes(*args):
        path.write_text("The harbour\nsleept.\n")
        return build(*args)

    monkeypatch.setattr(module.shards, "build", changes)
    with pytest.raises(DataError, match=r"some\.txt was changed while it was read"):
        load_data(path, "byte", 0)
    assert not list(cache.glob("some*"))


def test_caches_without_checksums_are_read(tmp_path, cache):
    path = tmp_path / "some.txt"
    path.write_text("The harbour\nsleeps.\n")
    new = load_data(path, "char", 0)
    folder = next(cache.iterdir())
    meta = json.loads((folder / "meta.json").read_text())
    stat = path.stat()
    old = {k: v for k, v in meta.items() if k in token_files.OLD_KEYS}
    old["files"] = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns]]
    (folder / "meta.json").write_text(json.dumps(old))
    for source in (path, folder):
        data = load_data(source, "char", 0)
        assert data.fingerprint == new.fingerprint and data.new_cache is None


# ---- damage

def test_a_flipped_bit_is_noticed(tmp_path, cache, rng):
    path = tmp_path / "some.txt"
    path.write_text("The harbour sleeps, and I that know her dreams. " * 3)
    whole = load_data(path, "bpe", 270)
    folder = next(cache.iterdir())
    for name in ("train.bin", "val.bin", "meta.json"):
        good = (folder / name).read_bytes()
        for _ in range(40):
            raw = bytearray(good)
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(raw)
            for source in (path, folder):
                with pytest.raises(DataError) as caught:
                    load_data(source, "bpe", 270)
                message = str(caught.value)
                assert str(folder / name) in message and f"delete {folder}" in message
                assert "\n" not in message
        (folder / name).write_bytes(good)
    assert load_data(path, "bpe", 270).fingerprint == whole.fingerprint


# ---- files too large for memory

def test_windows_of_a_large_file_are_those_of_an_array(tmp_path, monkeypatch):
    ids = np.arange(1000, dtype=np.uint16)
    for name in ("train", "val"):
        ids.tofile(tmp_path / f"{name}.bin")
    in_memory = load_data(tmp_path, CharTokenizer("".join(map(chr, range(1000)))), 0)
    monkeypatch.setattr(token_files, "IN_MEMORY", 100)
    data = load_data(tmp_path, in_memory.tokenizer, 0)
    assert isinstance(data.train, TokenFile) and len(data.train) == 1000
    assert data.train[7] == 7 and data.train[-1] == 999 and data.train[990:2000].tolist() == [
        *range(990, 1000)] and len(data.train[5:2]) == 0
    with pytest.raises(IndexError):
        data.train[1000]
    assert data.fingerprint == in_memory.fingerprint
    assert data.bytes_per_token() == in_memory.bytes_per_token()
    for number in range(20):
        one, two = (Batches(d.train, 8, 3, 1).batch(number) for d in (data, in_memory))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("limit", [100, 10_000], ids=["windows", "in memory"])
def test_a_file_that_is_truncated_during_a_run_is_an_error(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(token_files, "IN_MEMORY", limit)
    path = tmp_path / "val.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    batches = Batches(read_tokens(path, None), 8, 3, 1)
    before = batches.batch(0)
    os.truncate(path, 0)
    if limit == 100:
        with pytest.raises(DataError, match=r"val\.bin became shorter"):
            batches.batch(0)
    else:
        assert np.array_equal(batches.batch(0), before)


# ---- files without a meta.json

@pytest.mark.parametrize("largest", [300, 50_000, 128_000])
def test_uint32_without_a_meta_json_is_read_as_such(tmp_path, rng, capsys, largest):
    ids = rng.integers(0, largest, 500, dtype=np.uint32)
    for name in ("train", "val"):
        ids.tofile(tmp_path / f"{name}.bin")
    assert read_tokens(tmp_path, None).tolist() == ids.tolist()
    assert capsys.readouterr().err.count("look like uint32") == 1
    data = load_data(tmp_path, CharTokenizer("".join(map(chr, range(300)))), 0)
    assert data.fingerprint == TokenData(ids, ids, None, "the same").fingerprint
    if largest > 300:
        with pytest.raises(DataError, match="has token id"):
            data.bytes_per_token()


def test_uint16_is_never_read_as_uint32(tmp_path, rng, capsys):
    some = [rng.integers(0, n, 500) for n in (65, 256, 1024, 50257)]
    some += [np.zeros(7), np.arange(1, 500), np.resize([3, 0, 9, 7], 400)]
    for ids in some:
        ids.astype("<u2").tofile(tmp_path / "val.bin")
        assert read_tokens(tmp_path, None).tolist() == ids.tolist()
    assert capsys.readouterr().err == ""


# ---- a fingerprint depends on the ids only

def test_the_fingerprint_of_a_text_is_that_of_its_ids(tmp_path, cache):
    text = "The harbour\nsleeps.\n"
    path = tmp_path / "some.txt"
    path.write_text(text)
    found = [load_data(source, "byte", 0) for source in (path, path, text)]
    found.append(load_data(next(cache.iterdir()), "byte", 0))
    for dtype in (np.int64, np.uint32, np.uint8):
        found.append(load_data(np.array(ByteTokenizer().encode(text), dtype), "byte", 0))
    assert len({data.fingerprint for data in found}) == 1
    others = ["The harbour\nsleept.\n", text + "\n", text + "\0", "\0" + text]
    assert len({load_data(other, "byte", 0).fingerprint for other in others}
               | {found[0].fingerprint}) == 5


# ---- folders that cannot be written, and paths that are not files

@pytest.mark.parametrize("how", ["no folder", "full"])
def test_tokens_that_cannot_be_cached_are_used(tmp_path, monkeypatch, capsys, how):
    path = tmp_path / "some.txt"
    path.write_text("The harbour\nsleeps.\n")
    if how == "no folder":  # a file is in its place: even root cannot write there
        monkeypatch.setattr(module, "DATA_DIR", path)
        monkeypatch.setattr(device, "cache_dir", lambda: path / "cache")
    else:
        def full(self, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.rename", full)
    assert text_of(load_data(path, "byte", 0)) == "The harbour\nsleeps.\n"
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "cannot be cached in" in message and "[Errno" not in message
    assert {p.name for p in tmp_path.rglob("*")} == {"some.txt", "cache"}


@pytest.mark.parametrize("limit", [1, 1000, 1400])
def test_a_full_disk_leaves_no_partial_file(tmp_path, cache, capsys, limit):
    """Files cannot grow past the limit, which shows only when the buffer is written."""
    path = tmp_path / "some.txt"
    path.write_text("The harbour\nsleeps.\n" * 40)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        made = load_data(path, "byte", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be cached in" in capsys.readouterr().err and not list(cache.glob("some*"))
    assert text_of(made) == text_of(load_data(path, "byte", 0)) == path.read_text()


def test_a_path_that_is_not_a_file_is_named_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.bin")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for name, says in ((tmp_path / "pipe", "is a pipe"), (tmp_path / "socket", "is a socket"),
                       ("/dev/zero", "is a device")):
        with pytest.raises(DataError, match=f"{name} {says}, not a file"):
            load_data(name, "byte", 0)
    with pytest.raises(DataError, match=r"pipe\.bin is a pipe"):
        read_tokens(tmp_path / "pipe.bin", None)
    folder = tmp_path / "bins"
    folder.mkdir()
    for name in ("train", "val"):
        np.arange(50, dtype=np.uint16).tofile(folder / f"{name}.bin")
    os.mkfifo(folder / "meta.json")
    with pytest.raises(DataError, match=r"meta\.json is a pipe"):
        load_data(folder, "byte", 0)


# ---- several processes at once

LOAD = """
import sys, time
from pathlib import Path
from tests.tokens import text_of
from tinygpt.data import load as data
root, number, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data.DATA_DIR = root
if sys.argv[4] == "large":
    data.LARGE = 10
    data.shards.cpu_count = lambda: 1
for n in range(rounds):
    (root / f"ready_{n}_{number}").touch()
    while len(list(root.glob(f"ready_{n}_*"))) < 4:
        time.sleep(0.001)
    for again in range(3):
        if number == 0 and sys.argv[4] == "small":  # one text takes the place of another
            new = root / "new"
            new.write_text(("one\\n", "two\\n")[again % 2] * 50 + str(n))
            new.replace(root / "some.txt")
        found = data.load_data(root / "some.txt", "char", 0)
        text = text_of(found)
        assert text.rstrip("0123456789") in ("one\\n" * 50, "two\\n" * 50), text
        same = data.load_data(root / f"{n}.txt", "bpe", 270)
        assert text_of(same) == (root / f"{n}.txt").read_text()
"""


@pytest.mark.parametrize(("size", "rounds"), [("small", 12), ("large", 3)])
def test_processes_that_tokenize_the_same_text_do_not_disturb_each_other(tmp_path, size,
                                                                               rounds):
    (tmp_path / "some.txt").write_text("one\n" * 50)
    for n in range(rounds):
        (tmp_path / f"{n}.txt").write_text(f"The harbour {n} sleeps.\n" * 40)
    running = [subprocess.Popen([sys.executable, "-c", LOAD, tmp_path, str(n), str(rounds), size],
                                cwd=ROOT, stderr=subprocess.PIPE, text=True) for n in range(4)]
    for process in running:
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 0, said
    assert len(list((tmp_path / "cache").iterdir())) == rounds + 1  # no lock, no part is left
