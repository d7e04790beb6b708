"""Blocks computed again in the backward pass: the same gradients in less memory."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import ROOT
from tinygrad import Tensor

from gpt import GPT, GPTConfig
from tinygpt.kernels import cross_entropy, use
from tinygpt.kernels.random import make_key

SHAPE = GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
KINDS = [
    (dict(dropout=0.3, parallel=True, qk_norm=True, n_kv_head=1), "auto"),
    (dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False, tie_weights=False),
     "auto"), ({}, "portable")]


@pytest.mark.parametrize("kind, kernels", KINDS, ids=str)
def test_the_gradients_are_those_without(rng, kind, kernels):
    model = GPT(replace(SHAPE, **kind))
    x, y = (Tensor(rng.integers(0, 50, (2, 8)), dtype="int32") for _ in range(2))
    key = Tensor(make_key(1, 2)) if "dropout" in kind else None
    params = model.state_dict()
    try:
        use(kernels)
        loss_fn = partial(cross_entropy, label_smoothing=0.1, z_loss=1e-3)
        loss = model(x, y, key, loss_fn)[1]
        expected = [loss, *loss.gradient(*params.values())]
        again, chain = model.checkpointed_loss(x, y, key, loss_fn)
        grads = chain.gradients(again, params)
        Tensor.realize(*expected, again, *grads)
        for name, a, b in zip(["loss", *params], expected, [again, *grads], strict=True):
            a, b = a.numpy(), b.numpy()
            assert np.abs(a).max() > 0 or name.endswith("bias"), name
            assert np.allclose(a, b, rtol=1e-5, atol=1e-7), name
    finally:
        use("auto")


def test_frozen_weights_need_no_gradient(rng):
    model = GPT(SHAPE)
    x, y = (Tensor(rng.integers(0, 50, (2, 8)), dtype="int32") for _ in range(2))
    some = {k: p for k, p in model.state_dict().items() if k.startswith(("h.0.", "ln_f"))}
    expected = model(x, y)[1].gradient(*some.values())
    loss, chain = model.checkpointed_loss(x, y)
    found = chain.gradients(loss, some)
    Tensor.realize(*expected, *found)
    for a, b in zip(expected, found, strict=True):
        assert np.allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-7)


def test_a_step_takes_less_memory():
    """What bench/grad_checkpoint.py finds of four blocks, in processes of their own."""
    script = ROOT / "bench" / "grad_checkpoint.py"
    sizes = ["4", "16", "64", "8"]
    done = subprocess.run([sys.executable, str(script), *sizes], capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0, done.stderr
    without, with_it = (float(line.split()[-2]) for line in done.stdout.splitlines()[-2:])
    assert with_it < 0.6 * without
