"""Token ids -> batches. The tokens are 0, 1, 2, ..., so that an id is its own position."""

import numpy as np
import pytest

from tinygpt.data import DataError
from tinygpt.data.token_data import Batches

T, B = 8, 3


def epoch_of(batches: Batches, epoch: int) -> list[int]:
    """The starts of the windows of an epoch, in order."""
    first, last = epoch * batches.windows, (epoch + 1) * batches.windows
    rows = range(first // batches.batch_size, -(-last // batches.batch_size))
    starts = np.concatenate([batches.batch(n)[0][:, 0] for n in rows])
    skip = first - rows[0] * batches.batch_size
    return starts[skip:skip + batches.windows].tolist()


@pytest.mark.parametrize("length", [T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T - 1, 100, 1000, 1001])
def test_an_epoch_has_every_window_once_and_none_overlaps(length):
    batches = Batches(np.arange(length), T, B, seed=0)
    for epoch in (0, 1, 5):
        starts = sorted(epoch_of(batches, epoch))
        assert len(set(starts)) == len(starts) == batches.windows
        assert (np.diff(starts) >= T).all()
        assert starts[0] >= 0 and starts[-1] + T < length  # the last target is there too


def test_an_epoch_leaves_out_less_than_two_windows():
    for length in range(T + 1, 10 * T):
        assert Batches(np.arange(length), T, B, 0).windows * T > length - 2 * T


def test_targets_are_the_ids_that_follow():
    batches = Batches(np.arange(100, dtype=np.uint16), T, B, seed=0)
    for x, y in [batches.batch(n) for n in range(10)] + [batches.spread(n, 4) for n in range(4)]:
        assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == np.int32
        assert (x == x[:, :1] + np.arange(T)).all() and (y == x + 1).all()


def test_a_batch_is_a_pure_function_of_its_number(rng):
    tokens = np.arange(300)
    numbers = np.concatenate([np.arange(40), rng.integers(0, 40, 40), [10**6]])
    batches = Batches(tokens, T, B, seed=4)
    seen = {}
    for n in rng.permutation(numbers):
        x, y = batches.batch(int(n))
        expected = seen.setdefault(n, (x, y))
        fresh = Batches(tokens, T, B, seed=4).batch(int(n))
        assert all(np.array_equal(a, b) and np.array_equal(a, c)
                   for a, b, c in zip((x, y), expected, fresh, strict=True))


def test_seeds_and_epochs_differ():
    def order(seed, epoch):
        return epoch_of(Batches(np.arange(1000), T, B, seed), epoch)

    orders = [order(seed, epoch) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert len({tuple(np.array(o) % T) for o in orders}) > 1  # offsets differ too


def test_the_order_is_shuffled():
    starts = epoch_of(Batches(np.arange(10_000), T, B, 0), 0)
    assert abs(np.corrcoef(starts, np.arange(len(starts)))[0, 1]) < 0.1


@pytest.mark.parametrize("length", [T + 1, 2 * T, 2 * T + 1, 100, 997])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_spread_batches_are_in_range_and_deterministic(length, count):
    batches = Batches(np.arange(length), T, B, seed=0)
    first, again = ([batches.spread(n, count) for n in range(count)] for _ in range(2))
    assert all(x.min() >= 0 and y.max() < length and x.shape == (B, T) for x, y in first)
    assert np.array_equal(first, again)
    if count * B >= length // T:  # enough windows to see both ends
        assert min(x.min() for x, _ in first) == 0
        assert max(y.max() for _, y in first) >= length - T


def test_any_of_many_spread_batches_can_be_computed():
    batches, count = Batches(np.arange(100), T, B, seed=0), 10**12
    assert batches.spread(0, count)[0].min() == 0
    assert batches.spread(count - 1, count)[1].max() >= 100 - T


@pytest.mark.parametrize("length", [0, 1, T])
def test_tokens_shorter_than_a_window_are_refused(length):
    with pytest.raises(DataError, match=rf"{length} tokens.*{T + 1}"):
        Batches(np.arange(length), T, B, 0)


def test_ids_that_do_not_fit_in_31_bits_are_refused():
    with pytest.raises(DataError, match="4294967295"):
        Batches(np.full(20, 2**32 - 1, np.uint32), T, B, 0).batch(0)
