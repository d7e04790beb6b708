"""Drawing an index by the Gumbel-max trick: every implementation against numpy."""

import numpy as np
import pytest
from operations import np_bits
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.kernels.random import make_key

for_each = pytest.mark.parametrize("implementation", ["reference", "portable", "cpu"])


@for_each
@pytest.mark.parametrize(("B", "V", "temperature"), [(3, 13, 0.7), (1, 1, None), (2, 20011, 3.0),
                                                     (64, 100, None)])
def test_equals_numpy(B, V, temperature, implementation, rng):
    logits = rng.standard_normal((B, V), dtype=np.float32) * 3
    logits[:, ::5] = -np.inf if V > 1 else 0
    for number in range(3):
        key = make_key(number)
        u = ((np_bits(key, B * V) >> 9).reshape(B, V) + 0.5) * 2.0**-23
        right = (logits / np.float32(temperature or 1) - np.log(-np.log(u))).argmax(-1)
        got = kernels.draw(Tensor(logits), Tensor(key), temperature and Tensor([temperature]),
                           implementation)
        assert got.shape == (B,) and got.dtype.name == "int"
        assert (got.numpy() == right).all()


@for_each
def test_rows_with_keys_of_their_own(implementation, rng):
    """Each is drawn as it is where all rows have its key."""
    logits = Tensor(rng.standard_normal((4, 33), dtype=np.float32)).realize()
    keys = np.concatenate([make_key(number) for number in (5, 0, 5, 7)])
    got = kernels.draw(logits, Tensor(keys), Tensor([0.9]), implementation).numpy()
    for row, key in enumerate(keys):
        alike = kernels.draw(logits, Tensor([key], dtype="uint32"), Tensor([0.9]), implementation)
        assert alike.numpy()[row] == got[row]
    with pytest.raises(ValueError, match="draw cannot take"):
        kernels.draw(logits, Tensor(keys[:3]), implementation=implementation)


@for_each
@pytest.mark.parametrize("V", [3, 16, 37, 20011])
def test_without_a_key_the_first_of_the_largest(V, implementation, rng):
    logits = rng.integers(-3, 3, (5, V)).astype(np.float32)
    logits[3:, :] = -7.5
    logits[4, V - 1] = -7.25
    got = kernels.draw(Tensor(logits), implementation=implementation).numpy()
    assert (got == logits.argmax(-1)).all()


@for_each
def test_frequencies_are_the_softmax(implementation, rng):
    p = np.array([0.5, 0.25, 0.15, 0.1, 0.0])
    with np.errstate(divide="ignore"):
        logits = np.broadcast_to(np.log(p).astype(np.float32), (20000, 5)).copy()
    drawn = kernels.draw(Tensor(logits), Tensor(make_key(5)), implementation=implementation)
    counts = np.bincount(drawn.numpy(), minlength=5) / 20000
    assert np.abs(counts - p).max() < 0.015 and counts[4] == 0
