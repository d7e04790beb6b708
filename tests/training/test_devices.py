"""Two devices in one process, two of tinygrad's CPUs: they equal one, and write the same files."""

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

from gpt import GPT, GPTConfig
from tinygpt import checkpoint, device
from tinygpt.data.load import load_data
from tinygpt.device import DeviceError
from tinygpt.training.config import TrainConfig
from tinygpt.training.devices import Devices
from tinygpt.training.optim import make_optimizer
from tinygpt.training.run import prepare
from train import train

SHAPE = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16, dropout=0.1,
                  bias=False)
TWO = "CPU", "CPU:1"


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "whole"), batch_size=4, max_iters=4,
                       eval_interval=2, eval_iters=1, warmup_iters=1, lr_decay_iters=6,
                       learning_rate=1e-2)


def same(a, b) -> None:
    """Two checkpoints hold the same tensors and metadata, to rounding."""
    (ours, metadata), (theirs, wanted) = checkpoint.load(a.last), checkpoint.load(b.last)
    assert set(ours) == set(theirs) and set(metadata) == set(wanted)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert a.val_loss == pytest.approx(b.val_loss, rel=1e-6)
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-6)


def test_two_devices_resume_a_run_of_one_and_one_resumes_theirs(config, text, tmp_path,
                                                                      without_samples):
    config = replace(config, gradient_accumulation_steps=2, shard_optimizer=True, ema=True)
    whole = train(GPT(SHAPE), config, text)
    parts = replace(config, out_dir=str(tmp_path / "parts"))
    train(GPT(SHAPE), replace(parts, max_iters=2), text)
    model = GPT(SHAPE, seed=5)
    rest = train(model, replace(parts, devices=2, resume=True), text)
    same(whole, rest)
    assert rest.iter_num == 4 and model.wte.weight.device == device.default()
    again = train(GPT(SHAPE), replace(parts, resume=True), text)  # is over: evaluates
    assert again.val_loss == pytest.approx(rest.val_loss, rel=1e-6)


@pytest.mark.parametrize("shape", [SHAPE, replace(
    SHAPE, position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=1)],
    ids=["gpt2", "llama"])
def test_gradients_over_two_devices_are_those_of_one(shape, rng):
    x, y = (Tensor(rng.integers(0, 256, (4, 8)).astype(np.int32)).realize() for _ in range(2))
    key = Tensor([77], dtype="uint32").realize()
    model = GPT(shape)
    params = model.state_dict()
    loss = model(x, y, key)[1]
    expected = [loss, *loss.gradient(*params.values())]
    Tensor.realize(*expected)
    expected = [t.numpy() for t in expected]
    for tensor in (*params.values(), key):
        tensor.shard_(TWO).realize()
    x, y = x.shard(TWO, 0).realize(), y.shard(TWO, 0).realize()
    loss, chain = model.checkpointed_loss(x, y, key)
    grads = chain.gradients(loss, params)
    Tensor.realize(loss, *grads)
    for ours, array in zip((loss, *grads), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), array, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, partition", [("adamw", True), ("lion", True), ("muon", True),
                                             ("adamw8bit", False)])
def test_optimizers_on_two_devices_equal_those_on_one(rng, kind, partition):
    shapes = {"h.0.w": (8, 4), "wte": (6, 800), "odd": (5, 3), "b": (6,)}
    arrays = {k: rng.standard_normal(s, dtype=np.float32) for k, s in shapes.items()}
    ends = []
    for count in (1, 2):
        config = TrainConfig(optimizer=kind, devices=count, batch_size=2, shard_optimizer=partition)
        params = {k: Tensor(a.copy()).realize() for k, a in arrays.items()}
        devices = Devices(config, params)
        grads = [devices.replicate(Tensor(a + 1).realize()) for a in arrays.values()]
        optimizer = make_optimizer(devices.owned, config)
        devices.distribute(params.values(), optimizer.state_dict().values())
        lr, scale, sound = (devices.replicate(Tensor(v).realize()) for v in ([0.1], 0.5, True))
        for _ in range(2):
            Tensor.realize(*optimizer.update(grads, lr, scale, sound), *devices.all_gather())
        ends.append({k: t.numpy() for k, t in (params | optimizer.state_dict()).items()})
    assert abs(ends[0]["wte"] - arrays["wte"]).max() > 0.05
    for name, array in ends[0].items():
        np.testing.assert_allclose(ends[1][name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_each_device_keeps(config, text):
    """All weights, and all of the optimizer's state or, with shard_optimizer, its rows."""
    data = load_data(text, "byte", 256)
    for sharded in (False, True):
        run = prepare(GPT(SHAPE), replace(config, devices=2, shard_optimizer=sharded), data)
        for tensor in (*run.model.state_dict().values(), *run.optimizer.state_dict().values()):
            assert tensor.device == TWO
        state = run.optimizer.state_dict()
        assert state["m.wte.weight"].uop.axis == (0 if sharded else None)
        buffers = device.buffers_of(state["v.wte.weight"])
        assert [b.size for b in buffers] == [256 * 16 // (1 + sharded)] * 2
        assert run.model.wte.weight.uop.axis is None and run.steps.x.uop.axis == 0


def test_a_run_on_two_devices_samples_between_steps(config, text):
    """On the first device; the compiled steps of the sampling do not outlive its weights."""
    run = prepare(GPT(replace(SHAPE, dropout=0.0)), replace(config, devices=2),
                  load_data(text, "byte", 256))
    written = []
    for _ in range(2):
        with run.devices.on_first(run.model):
            written.append(run.model.generate([[1]], 6, temperature=0.0).tolist())
            alone = GPT(run.model.config)
            alone.load_state_dict({k: w.numpy() for k, w in run.model.state_dict().items()})
        assert written[-1] == alone.generate([[1]], 6, temperature=0.0).tolist()
        run.step(1.0)  # so far that something else is written
    assert written[0] != written[1]


def test_tensors_on_two_devices_are_written_and_read(rng):
    array = rng.standard_normal((4, 6), dtype=np.float32)
    for axis in (None, 0, 1):
        tensor = Tensor.zeros(4, 6).contiguous().realize().shard_(TWO, axis).realize()
        device.write(tensor, array)
        assert np.array_equal(tensor.numpy(), array) and np.array_equal(device.read(tensor), array)
        whole = device.gathered(tensor).realize()
        assert whole.uop.axis is None and np.array_equal((whole + 1).numpy(), array + 1)


@pytest.mark.parametrize("wrong, names", [
    (dict(batch_size=3), ["batch_size=3", "devices=2"]),
    (dict(auto_batch_size=True), ["devices=2"]),
    (dict(kernels="cpu"), ["'cpu'", "devices=2"]), (dict(kernels="flash"), ["'flash'"]),
    (dict(kernels="cuda"), ["'cuda'"]),
    (dict(optimizer="adamw8bit", shard_optimizer=True), ["adamw8bit", "--shard_optimizer"])])
def test_what_cannot_be_split_is_refused(wrong, names):
    with pytest.raises(ValueError, match="choose") as caught:
        TrainConfig(**(dict(batch_size=4, devices=2) | wrong))
    assert all(name in str(caught.value) for name in names)
    TrainConfig(**(dict(batch_size=4) | wrong))


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(device, "default", lambda: "CUDA")
    with pytest.raises(DeviceError, match=r"devices=2: CUDA cannot be used here .* choose"):
        Devices(TrainConfig(devices=2, batch_size=2), {})
