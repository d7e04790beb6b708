"""TensorBoard and Weights & Biases, by fake modules with their interface."""

import json
import sys
from types import SimpleNamespace

import pytest

from tinygpt.training.config import TrainConfig
from tinygpt.training.loggers import check_loggers, make_loggers
from tinygpt.training.report import Report, Work


@pytest.fixture
def calls(monkeypatch):
    """The calls of the two libraries."""
    made = []

    class SummaryWriter:
        def __init__(self, logdir):
            made.append(("folder", logdir))

        def add_text(self, tag, text):
            made.append((tag, text.split()))

        def add_scalar(self, tag, value, step):
            made.append((tag, value, step))

        def close(self):
            made.append("closed")

    def init(**options):
        made.append(options)
        return SimpleNamespace(log=lambda figures, step: made.append((figures, step)),
                               finish=lambda: made.append("finished"))

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return made


def run(tmp_path, **which) -> dict:
    """Logs a step and an evaluation; the records in metrics.jsonl."""
    loggers = make_loggers(**{"tensorboard": False, "wandb": False} | which, out_dir=tmp_path,
                           settings={"n_layer": 2})
    report = Report(tmp_path, 0, TrainConfig(max_iters=10, log_interval=1),
                    Work(100, 1e9, lambda: 1e11), loggers)
    report.step(1, 3.5, 0.75, 2e-5, 0.25, compiled=False)
    report.evaluation(1, 4.0, 4.5, 1e-5, None)
    report.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if v is not None} for line in lines]


def test_tensorboard_gets_every_figure_of_every_record(tmp_path, calls, capsys):
    records = run(tmp_path, tensorboard=True)
    scalars = [(k, v, r["iter"]) for r in records for k, v in r.items() if k != "iter"]
    assert len(scalars) == 10 and ("val_loss", 4.5, 1) in scalars
    assert calls == [("folder", str(tmp_path / "tensorboard")), ("settings", ["n_layer:", "2"]),
                     *scalars, "closed"]


def test_wandb_gets_every_figure_of_every_record(tmp_path, calls, capsys):
    records = run(tmp_path, wandb=True)
    assert calls == [{"dir": str(tmp_path), "config": {"n_layer": 2}},
                     *(({k: v for k, v in r.items() if k != "iter"}, r["iter"]) for r in records),
                     "finished"]


@pytest.mark.parametrize("flag, library", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_library_that_is_not_there_is_told_before_anything_is_done(monkeypatch, flag, library,
                                                                     tmp_path, capsys, text_file):
    from train import main

    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ValueError, match=f"pip install {library}"):
        check_loggers(**{"tensorboard": False, "wandb": False} | {flag: True})
    monkeypatch.chdir(tmp_path)
    assert main([f"--{flag}", "--data", str(text_file), "--tokenizer", "byte", "--n_layer", "1",
                 "--block_size", "8"]) == 2
    assert f"train.py: --{flag} needs {library}" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
