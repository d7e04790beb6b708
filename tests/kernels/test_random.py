"""Counter-based random numbers."""

import numpy as np
import pytest
from operations import unmix
from tinygrad import Tensor

from tinygpt.kernels.random import make_key, next_key, random_bits, uniform

N = 1 << 16  # one shape for nearly all tests: one kernel


def draw(*words: int, of=uniform) -> np.ndarray:
    return of(Tensor(make_key(*words)), (N,)).numpy()


def lowbias32(x: int) -> int:
    """Wellons' mixer, as published."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_bits_are_the_published_mixer_of_index_and_key():
    key = int(make_key(1, 2)[0])
    expected = [lowbias32((lowbias32(i) + key) % 2**32) for i in range(2000)]
    assert draw(1, 2, of=random_bits)[:2000].tolist() == expected


def test_numbers_lie_inside_zero_and_one():
    for seed in range(5):
        u = draw(seed)
        assert u.dtype == np.float32 and 0 < u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1


@pytest.mark.parametrize("word", [0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFE00, 0xFFFFFF00,
                                  0xFFFFFFFF])
def test_the_ends_of_the_interval_are_open_for_every_word(word):
    key = Tensor(np.array([unmix(word)], np.uint32))  # the bits of index 0, whose hash is 0
    assert lowbias32(unmix(word)) == word == random_bits(key, (1,)).item()
    u = uniform(key, (1,)).item()
    assert 0 < u < 1 and abs(u - word / 2**32) < 2**-22
    assert np.isfinite(-np.log(-np.log(np.float32(u))))


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_uniform(seed):
    u = draw(seed).astype(np.float64)
    error = 5 / np.sqrt(N)  # five standard errors
    assert abs(u.mean() - 1 / 2) < error * np.sqrt(1 / 12)
    assert abs(u.var() - 1 / 12) < error * np.sqrt(1 / 180)
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    assert ((counts - N / 64) ** 2 / (N / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("seed", range(3))
def test_every_bit_is_balanced_and_no_two_agree(seed):
    words = draw(seed, of=random_bits)
    bits = (words[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    error = 5 * 0.5 / np.sqrt(N)
    assert (abs(bits.mean(0) - 0.5) < error).all()
    correlation = np.corrcoef(bits.T.astype(float)) - np.eye(32)
    assert (abs(correlation) < 5.5 / np.sqrt(N)).all()


def test_neighbours_are_uncorrelated():
    u = draw(0) - 0.5
    for lag in (1, 2, 3, 64, 97, 256, 1024):
        assert abs(np.corrcoef(u[lag:], u[:-lag])[0, 1]) < 5 / np.sqrt(N - lag)


def test_streams_of_different_keys_are_uncorrelated():
    streams = np.stack([draw(seed, step) for seed in range(3) for step in range(5)])
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert (abs(correlation) < 5 / np.sqrt(N)).all()


def test_streams_of_neighbouring_keys_are_uncorrelated():
    """Keys are made by hashing, but a stream must not depend on that."""
    keys = [0, 1, 2, 3, 2**31, 2**32 - 1]
    streams = np.stack([uniform(Tensor(np.array([k], np.uint32)), (N,)).numpy() for k in keys])
    assert (abs(np.corrcoef(streams) - np.eye(len(keys))) < 5 / np.sqrt(N)).all()


def test_a_draw_is_a_function_of_key_and_index_alone():
    key = Tensor(make_key(7))
    flat = draw(7)
    assert np.array_equal(draw(7), flat)
    assert np.array_equal(uniform(key, (256, N // 256)).numpy().ravel(), flat)
    assert np.array_equal(uniform(key, (100,)).numpy(), flat[:100])


def test_make_key_is_deterministic_and_tells_words_apart():
    words = [(s, n) for s in range(40) for n in range(40)] + [(2**40, 1), (1, 2**40)]
    keys = [make_key(*w) for w in words]
    assert all(k.shape == (1,) and k.dtype == np.uint32 for k in keys)
    assert len({int(k[0]) for k in keys}) == len(keys)
    assert all(np.array_equal(make_key(*w), k) for w, k in zip(words, keys, strict=True))
    assert make_key(1337, 0) == np.random.SeedSequence((1337, 0)).generate_state(1)[0]


def test_next_key_makes_a_chain_that_does_not_come_back():
    key, chain = Tensor(make_key(3)), []
    for _ in range(50):
        chain.append(key.item())
        key = next_key(key).realize()
        assert key.shape == (1,)
    assert len(set(chain)) == 50
    assert chain[1] == lowbias32((chain[0] + 0x9E3779B9) % 2**32)
