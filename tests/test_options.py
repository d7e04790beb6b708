"""Every two options of training do together what they do: covering combinations of them."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from covering import MODEL, covering
from test_flags import TINY, records, weights

from gpt import GPT
from tinygpt import checkpoint
from tinygpt.data.token_data import TokenData
from tinygpt.model.bigram import Bigram, BigramConfig
from tinygpt.training.config import TrainConfig
from tinygpt.training.optim import OPTIMIZERS
from tinygpt.training.run import Run
from tinygpt.training.schedule import SCHEDULES, learning_rate
from train import train


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "out"), batch_size=4, eval_iters=1,
                       log_interval=1, warmup_iters=1, learning_rate=1e-2)


TRAINING = dict(
    optimizer=list(OPTIMIZERS), ema=[False, True], curriculum=[False, True],
    gradient_accumulation_steps=[1, 2], dtype=["float32", "bfloat16", "float16"],
    label_smoothing=[0.0, 0.1], z_loss=[0.0, 1e-3], skip_spikes=[0.0, 2.0], grad_clip=[1.0, 0.0],
    weight_decay=[0.1, 0.0])
OF_BLOCKS = dict(grad_checkpoint=[False, True], lora_rank=[0, 2], freeze=[None, "wte*,ln_f*"])
SHAPES = MODEL | dict(dropout=[0.0, 0.2], activation=["gelu", "swiglu"], n_kv_head=[None, 2])


def go_on_exactly(model: Callable, config: TrainConfig) -> None:
    """Three steps: finite losses at the scheduled rates, and what is to change does, nothing else.
    The third one again from the checkpoint of the second is the same, bit for bit."""
    ids = np.random.default_rng(4).integers(0, 32, 600)
    data = TokenData(ids[:500], ids[500:], None, "numbers")
    config = replace(config, max_iters=3, eval_interval=2, curriculum_start_block_size=4)
    whole = model(5)
    before = weights(whole)
    result = train(whole, config, data)
    steps = [r for r in records(result.last.parent) if "loss" in r]
    assert len(steps) == 3 and all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in steps)
    assert [r["lr"] for r in steps] == [learning_rate(n, config) for n in range(3)]
    frozen = tuple((config.freeze or "nothing").replace("*", "").split(","))
    for name, weight in weights(whole).items():
        changed = name not in before or not np.array_equal(weight, before[name])
        assert changed == (".lora." in name if config.lora_rank else not name.startswith(frozen))

    expected, _ = checkpoint.load(result.last)
    assert any(name.startswith("ema.") for name in expected) == config.ema
    result.last.unlink()
    rest = train(model(6), replace(config, resume=True), data)
    again, metadata = checkpoint.load(rest.last)
    assert metadata["iter_num"] == 3 and rest.last == result.last
    assert {r["iter"]: r["loss"] for r in records(rest.last.parent) if "loss" in r} == {
        r["iter"]: r["loss"] for r in steps}
    assert again.keys() == expected.keys()
    assert all(np.array_equal(array, expected[name]) for name, array in again.items())


@pytest.fixture
def no_evaluations(monkeypatch, without_samples):
    monkeypatch.setattr(Run, "evaluate", lambda run: (1.0, 1.0))


def named(row: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in row.items() if v not in (None, False, 0))


def of_blocks() -> list[dict]:
    """What concerns blocks meets in every way; optimizers and shapes of the model in turn."""
    rows = covering(OF_BLOCKS | {name: TRAINING[name] for name in (
        "dtype", "ema", "curriculum", "gradient_accumulation_steps")})
    return [row | dict(optimizer=optimizer) | shape for row, optimizer, shape in zip(
        rows, itertools.cycle(OPTIMIZERS), itertools.cycle(covering(SHAPES)))]


def of_training() -> list[dict]:
    """What concerns training alone meets in every way; schedules in turn."""
    return [row | dict(schedule=schedule) for row, schedule in zip(
        covering(TRAINING), itertools.cycle(SCHEDULES))]


@pytest.mark.parametrize("row", of_blocks(), ids=named)
def test_options_combine(config, row, no_evaluations):
    shape = {k: v for k, v in row.items() if k in SHAPES}
    if row.get("lora_rank") and row.get("freeze"):  # of what else is trained then
        row = row | {"freeze": "h.*.lora.a"}
    go_on_exactly(lambda seed: GPT(replace(TINY, vocab_size=32, **shape), seed),
                  replace(config, **{k: v for k, v in row.items() if k not in shape}))


@pytest.mark.parametrize("row", of_training(), ids=named)
def test_options_combine_for_a_bigram(config, row, no_evaluations):
    go_on_exactly(lambda seed: Bigram(BigramConfig(block_size=8, vocab_size=32)),
                  replace(config, model="bigram", **row))
