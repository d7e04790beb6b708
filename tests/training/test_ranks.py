"""Several processes: they equal one, stop together, die together, and resume as one."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tinygrad import Tensor

from gpt import GPT, GPTConfig
from tinygpt import checkpoint
from tinygpt.data.load import load_data
from tinygpt.machine import cpu_count
from tinygpt.training import ranks
from tinygpt.training.config import TrainConfig
from tinygpt.training.ranks import Buckets, Ranks, RanksError
from tinygpt.training.run import prepare
from train import main, train

SHAPE = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=32, dropout=0.1,
                  bias=False)
CONFIG = TrainConfig(tokenizer="byte", batch_size=2, gradient_accumulation_steps=4, max_iters=6,
                     eval_interval=3, eval_iters=3, log_interval=1, warmup_iters=2,
                     lr_decay_iters=100, learning_rate=1e-2, out_dir="together")


class Comm:
    """A communicator of two processes, the other of which has the same values plus `added`."""

    rank, size = 0, 2

    def __init__(self, added: float = 0.0):
        self.added, self.calls = added, 0

    def Allreduce(self, _, array):  # noqa: N802 - MPI's name
        self.calls += 1
        array += array + self.added

    def allgather(self, value):
        return [value, value]


@pytest.fixture
def launcher():
    """The mpirun of this Python, or a skip."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed", exc_type=ImportError)
    path = Path(sys.executable).with_name("mpirun")
    if not path.exists():
        pytest.skip("this Python has no mpirun: pip install mpich")
    return str(path)


@pytest.fixture
def together(launcher, tmp_path, text_file):
    """Starts train.py as two processes, which write to log.txt; ends them where the test fails."""
    started = []

    def start(*flags) -> subprocess.Popen:
        settings = tmp_path / "settings.json"
        wanted = {k: v for c in (SHAPE, CONFIG) for k, v in vars(c).items()}
        settings.write_text(json.dumps(wanted | {"data": str(text_file)}))
        command = [launcher, "-n", "2", sys.executable, str(ROOT / "train.py"), "--config",
                   str(settings), *map(str, flags)]
        with open(tmp_path / "log.txt", "w") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log,
                                            stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def wait_for(tmp_path, text: str, process: subprocess.Popen) -> str:
    """log.txt as soon as the text is in it."""
    end = time.monotonic() + 120
    while text not in (log := (tmp_path / "log.txt").read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < end, log
        time.sleep(0.05)
    return log


def process_of(rank: int, launcher: subprocess.Popen) -> int:
    """The process id of that rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        if (b"train.py" in command and f"PMI_RANK={rank}".encode() in words
                and launcher.pid in (parent, above)):
            return int(folder.name)
    raise AssertionError(f"there is no process of rank {rank}")


def losses(folder) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["iter"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


# ---- real processes

def test_two_processes_equal_one_die_together_and_resume_as_one(
        together, tmp_path, text_file, without_samples, capsys):
    alone = replace(CONFIG, out_dir=str(tmp_path / "alone"))
    result = train(GPT(SHAPE), alone, str(text_file))
    process = together()
    assert process.wait(120) == 0
    log = (tmp_path / "log.txt").read_text(errors="replace")
    assert log.count("iter 5: ") == log.count("step 6: ") == log.count("2 processes") == 1
    ours, theirs = losses(tmp_path / "alone"), losses(tmp_path / "together")
    assert list(ours) == list(theirs) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(theirs.values()), list(ours.values()), rtol=1e-6)
    tensors, metadata = checkpoint.load(tmp_path / "together" / "ckpt_6.safetensors")
    expected, wanted = checkpoint.load(result.last)
    assert metadata["best_val_loss"] == pytest.approx(wanted["best_val_loss"], rel=1e-6)
    for name, array in expected.items():
        np.testing.assert_allclose(tensors[name], array, rtol=1e-4, atol=2e-6, err_msg=name)

    process = together("--resume", "--max_iters", 100000)
    wait_for(tmp_path, "step 12: ", process)  # of step 9 there is a checkpoint
    os.kill(process_of(1, process), signal.SIGKILL)
    assert process.wait(10) != 0  # though process 0 waits for gradients
    assert "signal 9" in (tmp_path / "log.txt").read_text(errors="replace")  # mpirun's words
    there = checkpoint.newest(tmp_path / "together")
    step = checkpoint.load_metadata(there)["iter_num"]
    assert step >= 9 and step % 3 == 0
    resumed = replace(CONFIG, out_dir=str(tmp_path / "together"), resume=True, max_iters=step + 3)
    assert train(GPT(SHAPE, seed=3), resumed, str(text_file)).iter_num == step + 3
    train(GPT(SHAPE), replace(alone, resume=True, max_iters=9), str(text_file))
    assert losses(tmp_path / "together")[9] == pytest.approx(losses(tmp_path / "alone")[9],
                                                              rel=1e-5)


def test_two_processes_share_the_rows_of_one_micro_batch(
        together, tmp_path, text_file, without_samples):
    settings = dict(gradient_accumulation_steps=1, batch_size=6, max_iters=3)
    alone = replace(CONFIG, **settings, out_dir=str(tmp_path / "alone"))
    expected = train(GPT(replace(SHAPE, dropout=0.0)), alone, str(text_file))
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert together(*flags, "--dropout=0").wait(120) == 0
    ours, theirs = losses(tmp_path / "alone"), losses(tmp_path / "together")
    np.testing.assert_allclose(list(theirs.values()), list(ours.values()), rtol=1e-6)
    saved = checkpoint.load_metadata(tmp_path / "together" / "ckpt_3.safetensors")
    assert saved["best_val_loss"] == pytest.approx(expected.best_val_loss, rel=1e-6)
    assert saved["train_config"]["batch_size"] == 6


def test_a_signal_to_one_process_stops_all_at_the_same_step(together, tmp_path):
    process = together("--max_iters", 100000)
    wait_for(tmp_path, "iter 4: ", process)
    os.kill(process_of(1, process), signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    last = [line for line in (tmp_path / "log.txt").read_text(errors="replace").splitlines()
            if line.startswith("iter ")][-1]
    step = checkpoint.load_metadata(checkpoint.newest(tmp_path / "together"))["iter_num"]
    assert last.startswith(f"iter {step}:")


# ---- one process, with fake communicators

def test_one_process_communicates_with_none(monkeypatch):
    alone = Ranks()
    assert alone.is_main and list(alone.shard(range(3, 9))) == [3, 4, 5, 6, 7, 8]
    array = np.arange(3.0)
    assert alone.all_sum(array) is array and array.tolist() == [0, 1, 2]
    assert alone.all_max(3, 1.5) == [3, 1.5] and alone.broadcast("x") == "x"
    assert alone.threads() == cpu_count()
    with alone.local_main_first():
        alone.check_same(a=1)
    alone.abort(2)
    for name in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD"):
        monkeypatch.delenv(f"{name}_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # it is not imported
    assert ranks.world.__wrapped__().size == 1


def test_the_shares_of_all_are_everything_once():
    class Third(Comm):
        size = 3
    parts = []
    for rank in range(3):
        Third.rank = rank
        parts.append(list(Ranks(Third()).shard(range(12, 24))))
    assert [n for batches in zip(*parts, strict=True) for n in batches] == list(range(12, 24))


@pytest.mark.parametrize("bucket, calls", [(1 << 20, 1), (40, 3), (1, 4)])
def test_tensors_are_summed_in_few_buckets(monkeypatch, rng, bucket, calls):
    monkeypatch.setattr(ranks, "BUCKET", bucket)
    shapes = [(3, 4), (30,), (1,), (60,)]
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    tensors = [Tensor(a.copy()).contiguous().realize() for a in arrays]
    comm = Comm(added=1.0)
    Buckets(Ranks(comm), tensors).all_sum()
    assert comm.calls == calls
    for tensor, array in zip(tensors, arrays, strict=True):
        assert np.array_equal(tensor.numpy(), array + (array + 1))


def test_a_difference_between_processes_is_named():
    class Other(Comm):
        def allgather(self, values):
            return [values, values | {"seed": 8}]
    with pytest.raises(RanksError, match="process 1 has seed 8, process 0 7"):
        Ranks(Other()).check_same(n_layer=2, seed=7)
    Ranks(Comm()).check_same(n_layer=2, loss=math.inf)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_micro_batches_are_split_into_as_many_for_each_process(size):
    class Some(Comm):
        pass
    Some.size = size
    for count in (1, 2, 3, 4, 8):
        rows, number = Ranks(Some()).split(12, count)
        assert number % size == 0 and rows * number == 12 * count
        assert rows == 12 or number == math.lcm(size, count)  # no smaller than they have to be


def test_micro_batches_that_cannot_be_shared_are_refused(text, tmp_path):
    config = replace(CONFIG, out_dir=str(tmp_path / "out"), batch_size=3,
                     gradient_accumulation_steps=3)
    data = load_data(text, "byte", 256)
    with pytest.raises(ValueError, match=r"9 sequences of a step .* 2 processes: .* multiple of 2"):
        prepare(GPT(SHAPE), config, data, Ranks(Comm()))
    config = replace(config, batch_size=2, devices=2)
    with pytest.raises(ValueError, match=r"1 sequences .* devices=2: choose a larger batch_size"):
        prepare(GPT(SHAPE), config, data, Ranks(Comm()))
    assert not (tmp_path / "out").exists()


def test_without_mpi4py_many_processes_get_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "0")
    ranks.world.cache_clear()
    assert main(["--out_dir", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "4 processes" in error and "pip install mpi4py" in error
    monkeypatch.setenv("PMI_RANK", "3")
    with pytest.raises(SystemExit) as end:
        main(["--out_dir", "nowhere"])
    assert end.value.code == 2 and capsys.readouterr().err == ""
    ranks.world.cache_clear()
