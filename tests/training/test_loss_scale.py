"""Training in float16: the loss is scaled, overflows are skipped, and resuming is exact."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tiny import TINY, losses

from gpt import GPT
from tinygpt import checkpoint
from tinygpt.data.load import load_data
from tinygpt.training import loss_scale
from tinygpt.training.loss_scale import LossScale
from tinygpt.training.ranks import Ranks
from tinygpt.training.run import Run, prepare
from tinygpt.training.steps import Steps
from train import train


@pytest.fixture
def config(config):
    return replace(config, dtype="float16", max_iters=20, eval_interval=100)


@pytest.fixture
def data(text):
    return load_data(text, "byte", 256)


def state(run: Run) -> dict[str, np.ndarray]:
    """Copies of the weights, the optimizer's state and the moving average."""
    parts = (run.model, run.optimizer, run.ema)
    return {f"{n}.{k}": t.numpy().copy() for n, part in enumerate(parts) if part
            for k, t in part.state_dict().items()}


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.array_equal(array, theirs[name]) for name, array in ours.items())


# ---- the scale

def test_it_is_pytorchs_grad_scaler(rng, monkeypatch):
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler("cpu")
    assert theirs.get_scale() == LossScale().scale
    assert theirs.get_growth_interval() == loss_scale.GROWTH_INTERVAL
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 4)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=4), LossScale()
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    theirs.scale(weight)  # which makes its tensors
    for _ in range(300):
        before, finite = ours.scale, rng.random() < 0.9
        weight.grad = torch.tensor([1.0 if finite else np.inf])
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(finite) == (ours.scale != before)
        assert ours.state_dict() == {"scale": theirs.get_scale(),
                                     "good_steps": theirs.state_dict()["_growth_tracker"]}
        ours = LossScale(**ours.state_dict())


def test_the_scale_stays_within_its_bounds(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 1)
    scale = LossScale(2.0)
    assert scale.update(False) and scale.is_smallest and not scale.update(False)
    scale = LossScale(2.0**126)
    assert scale.update(True) and not scale.update(True) and scale.scale == 2.0**127
    for bad in (dict(scale="2"), dict(scale=np.inf), dict(scale=0.5), dict(scale=3.0),
                dict(scale=True), dict(good_steps=-1), dict(good_steps=1.5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LossScale(**bad)


# ---- steps

@pytest.mark.parametrize("options, ways", [
    (dict(), [dict(), dict(devices=2)]),
    (dict(gradient_accumulation_steps=2, grad_checkpoint=True, optimizer="muon"), [dict()])],
    ids=["plain, on one device and on two", "accumulated"])
def test_20_steps_are_those_of_float32(config, data, options, ways):
    def trained(**changes) -> np.ndarray:
        run = prepare(GPT(TINY), replace(config, **options | changes), data)
        try:
            return np.array([run.step(3e-3) for _ in range(20)]).T
        finally:
            run.devices.to_first(run.model)

    right, norm32 = trained(dtype="float32")
    for way in ways:
        loss, norm = trained(**way)
        np.testing.assert_allclose(loss, right, atol=1e-2)
        np.testing.assert_allclose(norm, norm32, rtol=2e-2)  # of gradients that are not scaled
        assert loss[-1] < loss[0] - 1 and not np.array_equal(loss, right)


def test_the_scale_saves_what_float16_would_lose(config, data):
    """The gradient of a block's matrix; with 2^14 times as many tokens it would be as much smaller.
    """
    def gradient(dtype: str, scale: float) -> np.ndarray:
        run = prepare(GPT(TINY), replace(config, dtype=dtype, freeze="w*,ln_f*", grad_clip=0.0,
                                         optimizer="lion", beta2=0.0), data)
        run.steps.train(0, run.batches.batch, 0.0, np.inf, scale)
        return run.optimizer.m["h.0.attn.c_attn.weight"].numpy()

    right = gradient("float32", 1.0)
    lost, saved = (np.linalg.norm(gradient("float16", scale) - right) / np.linalg.norm(right)
                   for scale in (2.0**-14, 65536 * 2.0**-14))
    assert saved < 3e-3 < 10 * saved < lost


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_overflow_changes_nothing_and_the_run_recovers(config, data, monkeypatch, capsys,
                                                          accumulation, without_samples):
    monkeypatch.setattr(LossScale, "__init__", lambda self: setattr(self, "__dict__", dict(
        scale=2.0**40, good_steps=0)))
    config = replace(config, ema=True, gradient_accumulation_steps=accumulation, max_iters=40)
    run = prepare(GPT(TINY), config, data)
    before = state(run)
    loss, norm = run.step(1e-2)
    assert np.isfinite(loss) and not np.isfinite(norm) and equal(state(run), before)

    result = train(GPT(TINY), config, data)
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if line.endswith("skipped")]
    changes = [line for line in lines if "loss scale" in line]
    assert changes == [f"iter {n}: loss scale {2**(40 - n)}" for n in range(1, len(skipped) + 1)]
    assert 10 < len(skipped) < 30  # more than end a run whose loss is not finite
    tensors, metadata = checkpoint.load(result.last)
    assert metadata["loss_scale"] == {"scale": 2.0**(40 - len(skipped)),
                                   "good_steps": 40 - len(skipped)}
    assert tensors["optimizer.step"].item() == 40 - len(skipped)
    assert result.train_loss < loss - 0.2


def test_an_overflow_in_one_process_is_one_in_all(config, data, monkeypatch):
    config = replace(config, gradient_accumulation_steps=2)
    ranks = Ranks()
    run = prepare(GPT(TINY), config, data, ranks)
    ranks.size, before = 2, state(run)
    for added, finite in ((np.inf, False), (0.0, True)):  # to what the other process has as well
        monkeypatch.setattr(ranks, "all_sum", lambda array, added=added: np.add(
            array, array + added, out=array))
        assert np.isfinite(run.step(1e-2)[1]) == finite != equal(state(run), before)


@pytest.mark.parametrize("loss, steps", [(2.0, 16 + 10), (np.nan, 10)])
def test_overflows_end_a_run_only_at_the_smallest_scale(config, data, monkeypatch, capsys, loss,
                                                        steps):
    """65536 halves 16 times; a loss that is not finite does not come from the scale."""
    monkeypatch.setattr(Steps, "evaluate", lambda *args: 1.0)
    monkeypatch.setattr(Steps, "train", lambda *args: (loss, np.inf))
    with pytest.raises(ValueError, match=f"not finite for 10 steps, the last at {steps}:"):
        train(GPT(TINY), replace(config, max_iters=100), data)


def test_a_run_resumes_to_the_bit_within_a_growth_interval(config, data, tmp_path, monkeypatch,
                                                           capsys, without_samples):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    config = replace(config, max_iters=11, lr_decay_iters=11, ema=True)
    whole = train(GPT(TINY), config, data)
    logged = re.findall("iter .* loss scale .*", capsys.readouterr().out)
    assert logged[:2] == ["iter 3: loss scale 131072", "iter 6: loss scale 262144"]
    parts = replace(config, out_dir=str(tmp_path / "parts"))
    half = train(GPT(TINY), replace(parts, max_iters=5), data)
    assert checkpoint.load_metadata(half.last)["loss_scale"] == {"scale": 131072.0, "good_steps": 2}
    rest = train(GPT(TINY, seed=3), replace(parts, resume=True), data)
    assert re.findall("iter .* loss scale .*", capsys.readouterr().out) == logged
    (ours, metadata), (theirs, wanted) = checkpoint.load(rest.last), checkpoint.load(whole.last)
    assert equal(ours, theirs) and metadata["loss_scale"] == wanted["loss_scale"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "out")


def test_a_run_resumes_in_another_dtype_and_damage_is_refused(config, data, monkeypatch):
    monkeypatch.setattr(Steps, "evaluate", lambda *args: 1.0)
    monkeypatch.setattr(Steps, "train", lambda *args: (2.0, 1.0))
    monkeypatch.setattr(Run, "sample", lambda run, model: None)
    config = replace(config, max_iters=2)
    train(GPT(TINY), replace(config, dtype="bfloat16"), data)
    on = train(GPT(TINY), replace(config, max_iters=4, resume=True), data)
    tensors, metadata = checkpoint.load(on.last)
    assert metadata["loss_scale"] == {"scale": 65536.0, "good_steps": 2}
    on = train(GPT(TINY), replace(config, max_iters=6, resume=True, dtype="float32"), data)
    assert "loss_scale" not in checkpoint.load_metadata(on.last)
    for damaged in ({"scale": 3.5}, {"size": 1.0}):
        checkpoint.save(on.last, tensors, metadata | {"loss_scale": damaged, "iter_num": 6})
        with pytest.raises(ValueError, match=r"has (a )?loss_scale"):
            train(GPT(TINY), replace(config, max_iters=8, resume=True), data)
    with pytest.raises(ValueError, match=r"loss_scale=65536\.0, which is not an object"):
        checkpoint.save(on.last, tensors, metadata | {"loss_scale": 65536.0})
