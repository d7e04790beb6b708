"""Training on contexts that grow: the batches, the gradients, resumed runs."""

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

from gpt import GPT, GPTConfig
from tinygpt import checkpoint
from tinygpt.data.load import load_data
from tinygpt.training.config import TrainConfig
from tinygpt.training.run import Run, prepare
from tinygpt.training.steps import Steps
from train import train

TINY = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "out"), batch_size=2, max_iters=12,
                       eval_interval=100, eval_iters=1, log_interval=1, warmup_iters=2,
                       learning_rate=1e-2, lr_decay_iters=12, curriculum=True,
                       curriculum_start_block_size=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch, without_samples):
    """No evaluations and samples."""
    monkeypatch.setattr(Run, "evaluate", lambda run: (1.0, 1.0))


def test_the_tokens_are_those_of_a_run_without_in_shorter_pieces(config, text, monkeypatch):
    seen, compiled = [], []
    call = GPT.__call__
    monkeypatch.setattr(GPT, "__call__", lambda model, x, *rest, **named: (
        compiled.append(x.shape), call(model, x, *rest, **named))[1])
    monkeypatch.setattr(Steps, "evaluate", lambda *args: 1.0)
    train_one = Steps.train
    monkeypatch.setattr(Steps, "train", lambda steps, *what: (
        train_one(steps, *what), seen.append([t.numpy() for t in steps.inputs]))[0])
    data = load_data(text, "byte", 256)
    train(GPT(TINY), config, data)
    assert compiled[-3:] == [(8, 4), (4, 8), (2, 16)] and len(compiled) == 4  # one by prepare
    run = prepare(GPT(TINY), replace(config, curriculum=False), data)
    shapes = [(8, 4)] * 3 + [(4, 8)] * 3 + [(2, 16)] * 6
    for n, (found, shape) in enumerate(zip(seen, shapes, strict=True)):
        for ids, whole in zip(found, run.batches.batch(n), strict=True):
            assert ids.shape == shape and np.array_equal(ids.ravel(), whole.ravel())


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_step_is_the_one_that_the_pieces_alone_give(config, text, settings):
    """The mean loss over the pieces, each read from position 0."""
    run = prepare(GPT(TINY), replace(config, **settings), load_data(text, "byte", 256))
    micro = run.config.gradient_accumulation_steps
    pieces = [[t.reshape(8, 4) for t in run.batches.batch(n)] for n in range(micro)]
    expected = [run.model(Tensor(x[i:i + 1]), Tensor(y[i:i + 1]))[1].item()
                for x, y in pieces for i in range(8)]
    run.steps.use_length(4)
    assert run.step(0.0)[0] == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_run_resumed_around_a_change_is_the_uninterrupted_one(config, text, tmp_path):
    """Stopped right at the change of length, after step 3, and between two steps of a length."""
    shape = replace(TINY, dropout=0.1, position="rope")
    config = replace(config, lr_decay_iters=6, max_iters=5, curriculum_start_block_size=8)
    whole = train(GPT(shape), config, text)
    parts = replace(config, out_dir=str(tmp_path / "parts"))
    for stop, resume in ((1, False), (3, True), (5, True)):
        last = train(GPT(shape), replace(parts, max_iters=stop, resume=resume), text).last
    ends = [checkpoint.load(path)[0] for path in (whole.last, last)]
    assert all(np.array_equal(array, ends[1][name]) for name, array in ends[0].items())


def test_a_change_is_logged_and_a_wrong_length_refused(config, text, capsys, tmp_path):
    train(GPT(TINY), replace(config, curriculum_start_block_size=8, max_iters=4,
                             lr_decay_iters=4), text)
    assert "context of 16 tokens from step 3 on" in capsys.readouterr().err
    out = tmp_path / "none"
    with pytest.raises(ValueError, match="curriculum_start_block_size=3"):
        train(GPT(TINY), replace(config, curriculum_start_block_size=3, out_dir=str(out)), text)
    assert not out.exists()
