"""Nothing is lost: not by signals, closed pipes, full disks, a second run in one folder, or a run
that is refused."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import FLAGS, TINY, losses

from gpt import GPT
from tinygpt import checkpoint, device
from tinygpt.checkpoint import CheckpointError
from tinygpt.kernels import use
from tinygpt.training.optim import AdamW
from tinygpt.training.report import Report
from train import train


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- signals and pipes

def start(tmp_path, text_file, *flags, **environment) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--data", str(text_file), "--max_iters", "100000",
         "--eval_interval", "5", *map(str, FLAGS), *flags], cwd=tmp_path, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_a_checkpoint(folder, process) -> None:
    for _ in range(1200):
        if list(folder.glob("ckpt_*")) or process.poll() is not None:
            return
        time.sleep(0.1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_how_to_resume(tmp_path, text_file, command, signum):
    process = start(tmp_path, text_file)
    wait_for_a_checkpoint(tmp_path / "checkpoints", process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    assert "python train.py --resume" in err.splitlines()[-1]
    saved = checkpoint.newest(tmp_path / "checkpoints")
    last = max(losses(tmp_path / "checkpoints"))
    assert saved.name == f"ckpt_{last}.safetensors"


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(tmp_path, text_file, command):
    process = start(tmp_path, text_file)
    wait_for_a_checkpoint(tmp_path / "checkpoints", process)
    process.kill()
    process.communicate()
    last = checkpoint.load_metadata(checkpoint.newest(tmp_path / "checkpoints"))["iter_num"]
    done = command("train.py", "--resume", "--max_iters", last + 2)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {last}" in done.stderr
    assert sorted(losses(tmp_path / "checkpoints")) == list(range(1, last + 3))


def test_ctrl_c_while_a_step_compiles_is_handled_after_the_step(tmp_path, text_file):
    """The terminal sends it to the compiler too."""
    process = start(tmp_path, text_file, CACHELEVEL="0")
    while "compiling" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert (tmp_path / "checkpoints" / "ckpt_1.safetensors").exists()


@pytest.mark.parametrize("kind", ["pipe", "full"])
def test_a_run_whose_stdout_is_closed_or_full_is_saved_and_ends(tmp_path, text_file, kind):
    if kind == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    if kind == "pipe":
        process = start(tmp_path, text_file)
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=120)
    else:
        with open("/dev/full", "w") as full:
            process = subprocess.run([sys.executable, ROOT / "train.py", "--data", text_file,
                                      *map(str, FLAGS)], cwd=tmp_path, stdout=full, text=True,
                                     stderr=subprocess.PIPE, timeout=120)
        err = process.stderr
    assert process.returncode == 141 and "Traceback" not in err, err
    assert "stopped and saved" in err.splitlines()[-1]
    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert max(losses(tmp_path / "checkpoints")) == checkpoint.load_metadata(saved)["iter_num"]


# ---- folders and files

def test_a_second_run_in_the_folder_of_a_running_one_is_refused(config, text, tmp_path,
                                                               without_samples):
    (tmp_path / "out").mkdir()
    with (checkpoint.locked(tmp_path / "out"),
          pytest.raises(CheckpointError, match=r"a run is writing to .*out: name another")):
        train(GPT(TINY), config, text)
    assert not any((tmp_path / "out").iterdir())
    for _ in range(2):  # neither an end nor an error leaves it locked
        train(GPT(TINY), replace(config, max_iters=1), text)


def test_a_run_that_is_refused_does_not_remove_the_folder_of_another(tmp_path, monkeypatch):
    out = tmp_path / "a" / "out"
    exists = Path.exists
    with checkpoint.locked(out):  # made just now, which the other run does not see
        monkeypatch.setattr(Path, "exists", lambda path: path not in (out, out.parent)
                            and exists(path))
        with pytest.raises(CheckpointError, match="a run is writing"), checkpoint.locked(out):
            pass
        monkeypatch.undo()
        assert out.is_dir()
    assert not out.parent.exists()


def test_a_folder_that_another_run_removes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    out, lock = tmp_path / "out", fcntl.flock

    def late(folder, how):
        monkeypatch.undo()
        out.rmdir()
        lock(folder, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with checkpoint.locked(out):
        assert out.is_dir()
        with pytest.raises(CheckpointError, match="a run is writing"), checkpoint.locked(out):
            pass
    assert not out.exists()


def test_a_run_that_is_refused_moves_nothing(config, text, tmp_path, without_samples):
    train(GPT(TINY), replace(config, max_iters=1), text)
    before = contents(tmp_path / "out")
    try:
        with pytest.raises(ValueError, match="'flash' have no attention"):
            train(GPT(TINY), replace(config, kernels="flash"), text)
    finally:
        use("auto")
    with pytest.raises(ValueError, match="256 ids"):
        train(GPT(replace(TINY, vocab_size=100)), config, text)
    with pytest.raises(ValueError, match="device='cuda', but the model is on"):
        train(GPT(TINY), replace(config, device="cuda"), text)
    with pytest.raises(ValueError, match="model='bigram', but a gpt model"):
        train(GPT(TINY), replace(config, model="bigram"), text)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("settings", ['{"model_type": "gpt2"}', "[1]", "not JSON"])
def test_a_config_json_that_is_no_runs_is_left_alone(config, text, tmp_path, settings):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(settings)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json is not that of a run"):
        train(GPT(TINY), config, text)
    assert contents(tmp_path) == before


def test_a_run_that_is_over_logs_that_and_keeps_its_settings(config, text, tmp_path, capsys,
                                                           without_samples):
    train(GPT(TINY), config, text)
    before = contents(tmp_path / "out")
    result = train(GPT(TINY), replace(config, resume=True, max_iters=4), text)
    assert "the run is over after 6 steps" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before and result.iter_num == 6


@pytest.mark.parametrize("settings, says", [
    (dict(kernels="flash"), "'flash' have no attention"),
    (dict(freeze="nothing*"), "nothing is named like"),
    (dict(batch_size=10**9), "one layer take .*: choose a smaller --batch_size"),
    (dict(optimizer="adamw", max_iters=3), "optimizer's state take 9")])
def test_a_run_that_is_refused_leaves_no_folder_and_prints_nothing_else(
        config, text, tmp_path, capsys, monkeypatch, settings, says):
    if "optimizer" in settings:
        monkeypatch.setattr(AdamW, "state_size", 3e5)
        monkeypatch.setattr(device, "memory", lambda: 10 ** 9)
    try:
        with pytest.raises(ValueError, match=says):
            train(GPT(TINY), replace(config, out_dir=str(tmp_path / "a" / "b"), **settings), text)
    finally:
        use("auto")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_the_save_comes_before_the_picture(config, text, tmp_path, monkeypatch, without_samples):
    seen = []
    monkeypatch.setattr(Report, "draw", lambda report: seen.append(
        checkpoint.newest(tmp_path / "out").name))
    train(GPT(TINY), config, text)
    assert seen == ["ckpt_3.safetensors", "ckpt_6.safetensors"]


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_run_left_half_written_is_gone(config, text, tmp_path, without_samples,
                                                     resume):
    train(GPT(TINY), replace(config, max_iters=1), text)
    for name in (".loss.png.part", ".ckpt_9.safetensors.part", ".config.json.part", ".my.part"):
        (tmp_path / "out" / name).write_bytes(b"half")
    train(GPT(TINY), replace(config, max_iters=1, resume=resume), text)  # saves nothing more
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".my.part"]


def test_what_a_script_trained_on_is_what_resume_reads(config, text, text_file, tmp_path,
                                                       without_samples):
    for data, named in ((text_file, str(text_file)), (text, ""), (list(range(200)), "")):
        train(GPT(TINY), replace(config, max_iters=1), data)
        saved = json.loads((tmp_path / "out" / "config.json").read_text())
        assert saved["data"] == named
