"""Out of memory, and the largest micro-batch that is not."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import GlobalCounters, Tensor

import train as command
from gpt import GPT, GPTConfig
from tinygpt import device
from tinygpt.data.load import load_data
from tinygpt.training import batch_size
from tinygpt.training.batch_size import available_memory, fit_batch_size, largest_micro_batch
from tinygpt.training.config import TrainConfig
from tinygpt.training.run import Run
from train import train

TINY = GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "out"), batch_size=6, max_iters=2,
                       gradient_accumulation_steps=2, eval_interval=2, eval_iters=1,
                       auto_batch_size=True)


@pytest.mark.parametrize("limit, expected", [(100, 12), (12, 12), (11, 6), (5, 4), (1, 1)])
@pytest.mark.parametrize("is_known", [True, False])
def test_the_largest_divisor_that_fits_is_found(limit, expected, is_known):
    """Whether the available memory is known, or allocation only fails."""
    base = 1 << 20

    def trial(n):
        if n > limit:
            raise MemoryError
        return Tensor.zeros(base // 4 * n).contiguous().realize()

    available = base * limit if is_known else None
    device.free_memory()
    before = GlobalCounters.mem_used
    assert largest_micro_batch(12, trial, available) == expected
    device.free_memory()
    assert GlobalCounters.mem_used == before


@pytest.mark.parametrize("available", [10, None])
def test_where_nothing_fits_a_memory_error_says_so(available):
    def trial(n):
        if available is None:
            raise MemoryError
        return Tensor.zeros(1000 * n).contiguous().realize()

    with pytest.raises(MemoryError, match="1 sequence"):
        largest_micro_batch(1, trial, available)


def test_the_memory_of_a_cpu_is_bounded(monkeypatch):
    assert 0 < available_memory() < 1 << 44
    monkeypatch.setattr(device, "default", lambda: "CUDA")
    assert available_memory() is None


def test_a_run_takes_the_same_tokens_in_what_fits(config, text, tmp_path, monkeypatch, capsys,
                                                  without_samples):
    data, model = load_data(text, "byte", 256), GPT(TINY)
    before = model.wte.weight.numpy()
    assert fit_batch_size(model, config, data).batch_size == 12  # there is memory enough
    taken = []
    measure = batch_size._bytes_of
    monkeypatch.setattr(batch_size, "_bytes_of", lambda trial, n: (
        taken.append(measure(trial, n)), taken[-1])[1])
    fit_batch_size(model, config, data)
    each = taken[1] - taken[0]
    assert each > 32 * 256 * 4  # the logits alone
    monkeypatch.setattr(batch_size, "available_memory", lambda: taken[0] + 2 * each + each // 2)
    found = fit_batch_size(model, config, data)
    assert (found.batch_size, found.gradient_accumulation_steps) == (3, 4)
    assert np.array_equal(model.wte.weight.numpy(), before) and not (tmp_path / "out").exists()
    train(model, config, data)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["batch_size"], saved["gradient_accumulation_steps"]) == (3, 4)
    assert saved["auto_batch_size"] is False  # which a resumed run keeps


@pytest.mark.parametrize("error", [MemoryError("Allocation of 3.00 GB failed on CUDA"),
                                   OSError(errno.ENOMEM, "Allocation of 3.00 GB failed")])
def test_out_of_memory_names_the_flags(config, text, monkeypatch, error):
    def fails(self, lr):
        raise error

    monkeypatch.setattr(Run, "step", fails)
    monkeypatch.setattr(Run, "evaluate", lambda run: (1.0, 1.0))
    says = r"out of memory \(.*Allocation of 3\.00 GB .*\): lower --batch_size.*--grad_checkpoint"
    with pytest.raises(ValueError, match=says):
        train(GPT(TINY), replace(config, auto_batch_size=False), text)


@pytest.mark.parametrize("words", [["--batch_size", "auto"], ["--batch-size=auto"]])
def test_batch_size_auto_keeps_what_the_preset_has(words):
    found = command._settings(["--preset", "gpt2", *words, "--out_dir", "x"])["train"]
    assert found.auto_batch_size and found.out_dir == "x"
    assert (found.batch_size, found.gradient_accumulation_steps) == (12, 40)
    assert not command._settings([])["train"].auto_batch_size
