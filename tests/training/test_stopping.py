"""Early stopping, skipped spikes, and evaluation alone."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import FLAGS, TINY

import train as command_line
from gpt import GPT
from tinygpt import checkpoint
from tinygpt.data.load import load_data
from tinygpt.training.run import Run, prepare
from tinygpt.training.spikes import ENOUGH, HISTORY, SpikeGuard
from train import train


@pytest.fixture
def config(config):
    return replace(config, eval_interval=1)


def records(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def weights(model) -> dict[str, np.ndarray]:
    return {k: w.numpy() for k, w in model.state_dict().items()}


def worsening(monkeypatch, losses):
    """Evaluations that find these validation losses, the first before the first step."""
    rest = iter(losses)
    monkeypatch.setattr(Run, "evaluate", lambda self: (1.0, next(rest)))


def test_patience_counts_evaluations_in_a_row_without_a_new_best(config, text, monkeypatch, capsys,
                                                                 without_samples):
    worsening(monkeypatch, [9, 5, 6, 4, 4.5, 4.0, 3])
    result = train(GPT(TINY), replace(config, patience=2), text)
    assert result.iter_num == 5 and result.best_val_loss == 4
    assert "no new best in 2 evaluations (--patience)" in capsys.readouterr().err


def test_patience_keeps_its_count_in_a_resumed_run(config, text, monkeypatch, without_samples):
    worsening(monkeypatch, [9, 5, 6, 7, 8, 9])
    config = replace(config, patience=3)
    assert train(GPT(TINY), replace(config, max_iters=2), text).iter_num == 2
    resumed = replace(config, resume=True)
    assert train(GPT(TINY), resumed, text).iter_num == 4
    worsening(monkeypatch, [8, 1, 1])
    assert train(GPT(TINY), resumed, text).iter_num == 4  # it is over
    assert train(GPT(TINY), replace(resumed, patience=0), text).iter_num == 6


def test_an_overfitted_run_ends_with_a_sample_of_its_best_weights(config, text, monkeypatch,
                                                                     capsys):
    worsening(monkeypatch, [9, 5, 4, 4.03, 4.3, 4.05, 4.05])
    result = train(GPT(TINY), replace(config, patience=0), text)
    out, err = capsys.readouterr()
    best = GPT.from_checkpoint(result.best)
    ids = list(best.stream([best.tokenizer.encode("\n")], 200, seed=config.seed))
    assert f"sample 2:\n{best.tokenizer.decode(ids)}\n" in out and out.count("sample ") == 1
    assert "lowest, 4.0000, at step 2, and is 4.0500 now: the model overfits" in err
    worsening(monkeypatch, [9, 5, 4, 4.03, 4.3, 4.05, 4.03])
    train(GPT(TINY), replace(config, patience=0), text)
    assert "overfits" not in capsys.readouterr().err


def test_the_minutes_end_a_run_as_its_last_step_would(config, text, tmp_path, capsys):
    result = train(GPT(TINY), replace(config, eval_interval=100, max_minutes=1e-9), text)
    out, err = capsys.readouterr()
    assert result.iter_num == 1 and "(--max_minutes)" in err and "sample 1:" in out
    last = records(tmp_path / "out")[-1]
    assert (last["iter"], last["val_loss"]) == (1, result.val_loss)
    assert checkpoint.load_metadata(result.last)["iter_num"] == 1
    on = replace(config, eval_interval=100, resume=True)
    assert train(GPT(TINY), on, text).iter_num == 6


# ---- spikes

def test_a_spike_is_above_a_multiple_of_the_median_of_the_last_norms(rng):
    norms = rng.lognormal(size=300)
    guard = SpikeGuard(3.0)
    for n, norm in enumerate(norms):
        expected = 3 * np.median(norms[max(0, n - HISTORY):n]) if n >= ENOUGH else math.inf
        assert guard.limit() == pytest.approx(expected, rel=1e-6)
        guard.add(float(norm))
        guard.add(math.nan)  # which does not count
    again = SpikeGuard(3.0, json.loads(json.dumps(guard.norms)))
    assert again.limit() == guard.limit()
    off = SpikeGuard(0.0)
    for norm in norms:
        off.add(float(norm))
    assert off.limit() == math.inf and off.norms == []


def test_a_spike_changes_nothing_and_is_told(config, text, tmp_path, capsys):
    config = replace(config, skip_spikes=2.0, eval_interval=100, ema=True)
    run = prepare(GPT(TINY), config, load_data(text, "byte", 256))
    batch = run.batches.batch(0)
    run.batches.batch = lambda number: batch
    usual = [run.step(0.0)[1] for _ in range(2)]  # the second one compiles
    run.spikes = SpikeGuard(2.0, [max(usual) / 1.9] * ENOUGH)
    run.step(1e-2)
    before = weights(run.model)
    state = {k: t.numpy() for k, t in run.optimizer.state_dict().items()}
    average = {k: t.numpy() for k, t in run.ema.weights.items()}
    run.spikes = SpikeGuard(2.0, [min(usual) / 100] * ENOUGH)
    loss, norm = run.step(1e-2)
    assert norm > run.spikes.limit() and np.isfinite(loss)
    assert all(np.array_equal(w, before[k]) for k, w in weights(run.model).items())
    assert all(np.array_equal(t.numpy(), state[k]) for k, t in run.optimizer.state_dict().items())
    assert all(np.array_equal(t.numpy(), average[k]) for k, t in run.ema.weights.items())
    run.spikes = SpikeGuard(2.0)
    run.step(1e-2)
    assert not np.array_equal(weights(run.model)["wte.weight"], before["wte.weight"])


def test_skipping_is_exact_in_a_resumed_run(config, text, tmp_path, capsys, without_samples):
    """A factor of 1 skips about every other step, once there are enough norms."""
    config = replace(config, skip_spikes=1.0, eval_interval=100, lr_decay_iters=40)
    whole = train(GPT(TINY), replace(config, max_iters=40), text)
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.endswith("skipped")]
    assert 5 <= len(skipped) <= 20
    parts = replace(config, out_dir=str(tmp_path / "parts"))
    train(GPT(TINY), replace(parts, max_iters=28), text)
    rest = train(GPT(TINY), replace(parts, max_iters=40, resume=True), text)
    again = [line for line in capsys.readouterr().out.splitlines() if line.endswith("skipped")]
    assert again == skipped
    ends = [checkpoint.load(result.last)[0] for result in (whole, rest)]
    assert all(np.array_equal(array, ends[1][name]) for name, array in ends[0].items())
    assert ends[0]["optimizer.step"].item() == 40 - len(skipped)


# ---- evaluation alone

def test_eval_only_tells_of_the_best_and_touches_nothing(config, text, tmp_path, capsys):
    result = train(GPT(TINY), replace(config, max_iters=3, ema=True), text)
    lines = capsys.readouterr().out.splitlines()
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    best = checkpoint.load_metadata(result.best)["iter_num"]
    again = train(GPT(TINY, seed=5), replace(config, max_iters=3, ema=True, eval_only=True), text)
    (line,) = capsys.readouterr().out.splitlines()
    assert line in lines and line.startswith(f"step {best}: ")
    assert again.val_loss == again.best_val_loss == result.best_val_loss
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns)
            for p in (tmp_path / "out").iterdir()} == before
    result.best.unlink()
    newest = train(GPT(TINY), replace(config, ema=True, eval_only=True), text)
    assert newest.iter_num == 3


def test_eval_only_as_a_command_needs_a_run_and_no_other_flag(in_process, text_file, tmp_path):
    refused = in_process(command_line, "--eval_only")
    assert refused.returncode == 2 and "no run in checkpoints to evaluate" in refused.stderr
    assert list(tmp_path.iterdir()) == [text_file]
    done = in_process(command_line, "--data", text_file, *FLAGS, "--max_iters", 1)
    looked = in_process(command_line, "--eval_only")
    assert looked.returncode == 0, looked.stderr
    assert looked.stdout.strip() in done.stdout
