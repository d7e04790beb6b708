"""tinygrad's own optimizers in checkpoints."""

import numpy as np
import pytest
from tiny import TINY
from tinygrad import Tensor
from tinygrad.helpers import Context
from tinygrad.nn import optim
from tinygrad.nn.state import get_parameters

from gpt import GPT
from tinygpt import checkpoint
from tinygpt.model.bigram import Bigram, BigramConfig
from tinygpt.training.optim import AdamW


def table() -> Bigram:
    return Bigram(BigramConfig(block_size=4, vocab_size=5))


def steps(model, optimizer, numbers) -> None:
    """One step for each number, with gradients drawn from it."""
    for n in numbers:
        for i, p in enumerate(optimizer.params):
            rng = np.random.default_rng([n, i])
            p.grad = Tensor(rng.standard_normal(p.shape, np.float32))
        with Tensor.train() if hasattr(Tensor, "train") else Context(TRAINING=1):
            optimizer.step()


def same(model, other) -> bool:
    return all(np.array_equal(weight.numpy(), other.state_dict()[name].numpy())
               for name, weight in model.state_dict().items())


def group(params):
    """Muon for one matrix and AdamW for one vector, without the other parameters."""
    matrix, vector = (next(p for p in params if p.ndim == n) for n in (2, 1))
    return optim.OptimizerGroup(optim.Muon([matrix], lr=0.02), optim.AdamW([vector], lr=0.01))


KINDS = {
    "AdamW": (table, lambda params: optim.AdamW(params, lr=0.01, weight_decay=0.1)),
    "Adam": (table, lambda params: optim.Adam(params, lr=0.01)),
    "LAMB": (table, lambda params: optim.LAMB(params, lr=0.01)),
    "LARS": (table, lambda params: optim.LARS(params, lr=0.01)),
    "Muon": (table, lambda params: optim.Muon(params, lr=0.01)),
    "SGD": (table, lambda params: optim.SGD(params, lr=0.01, momentum=0.9)),
    "fused": (table, lambda params: optim.Adam(params, lr=0.01, fused=True)),
    "group": (lambda: GPT(TINY), group)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_loop_equals_the_uninterrupted_one(kind, tmp_path):
    make, optimizer_of = KINDS[kind]
    whole, first, rest = make(), make(), make()
    optimizers = [optimizer_of(get_parameters(model)) for model in (whole, first, rest)]
    steps(whole, optimizers[0], range(6))
    steps(first, optimizers[1], range(3))
    path = first.save_checkpoint(3, optimizers[1], tmp_path)
    assert rest.load_checkpoint(path, optimizers[2])["iter_num"] == 3
    steps(rest, optimizers[2], range(3, 6))
    assert same(rest, whole)
    fresh = make()
    fresh.load_checkpoint(path)
    steps(fresh, optimizer_of(get_parameters(fresh)), range(3, 6))
    assert not same(fresh, whole)  # so that the state matters
    tensors, _ = checkpoint.load(path)
    state = {k: a for k, a in tensors.items() if k.startswith("optimizer.")}
    for array in checkpoint.part(tensors, "model.").values():  # the parameters are saved once
        assert not any(a.shape == array.shape and np.array_equal(a, array)
                       for a in state.values())


def test_names_are_those_of_the_weights_and_the_learning_rate_is_saved(tmp_path):
    model = GPT(TINY)
    optimizer = optim.AdamW(get_parameters(model)[::-1], lr=0.01)
    optimizer.lr.assign(Tensor([0.005])).realize()
    path = model.save_checkpoint(1, optimizer, tmp_path)
    names = [k for k in checkpoint.load(path)[0] if k.startswith("optimizer.")]
    assert sorted(names) == sorted([f"optimizer.tinygrad.AdamW.{k}" for k in (
        "lr", "b1_t", "b2_t", *(f"{m}.{name}" for m in "mv" for name in model.state_dict()))])
    again = optim.AdamW(get_parameters(model), lr=0.01)  # in another order
    model.load_checkpoint(path, again)
    assert again.lr.item() == np.float32(0.005)


@pytest.mark.parametrize(("saved", "given", "says"), [
    ("Adam", "SGD", "tinygrad's Adam, not of tinygrad's SGD"),
    ("SGD", "Muon", "tinygrad's SGD, not of tinygrad's Muon"),
    ("Adam", "ours", "tinygrad's Adam, not of an optimizer of tinygpt.training.optim"),
    ("ours", "Adam", "an optimizer of tinygpt.training.optim, not of tinygrad's Adam"),
    (None, "Adam", "no optimizer, not of tinygrad's Adam"),
    (None, "ours", "no optimizer, not of an optimizer of tinygpt.training.optim")])
def test_another_optimizer_is_named_and_changes_nothing(saved, given, says, tmp_path):
    def make(kind, model):
        if kind is None:
            return None
        return AdamW(model.state_dict()) if kind == "ours" else KINDS[kind][1](
            get_parameters(model))

    model = table()
    model.table.assign(Tensor.ones(5, 5)).realize()
    path = model.save_checkpoint(1, make(saved, model), tmp_path)
    other = table()
    with pytest.raises(ValueError, match=says) as caught:
        other.load_checkpoint(path, make(given, other))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not other.table.numpy().any()


def test_an_optimizer_of_something_else_is_refused(tmp_path):
    model, other = table(), table()
    with pytest.raises(ValueError, match="a parameter that is not the model's"):
        model.save_checkpoint(1, optim.SGD(get_parameters(other)), tmp_path)
    with pytest.raises(ValueError, match="has no state_dict"):
        model.save_checkpoint(1, object(), tmp_path)
    assert list(tmp_path.iterdir()) == []
