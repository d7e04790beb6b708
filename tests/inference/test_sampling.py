"""Drawing a token: each filter against numpy with a sort, the draw against the softmax.

A filter compiles for each shape in about two seconds, so that the tests share two shapes: rows of
97 logits for the filters, of 6 for the draws.
"""

import functools

import numpy as np
import pytest
from operations import unmix
from tinygrad import Tensor, TinyJit

from tinygpt.config import SampleConfig
from tinygpt.inference import sampling
from tinygpt.inference.sampling import SamplingParameters, sample
from tinygpt.kernels.random import make_key

NONE = -np.inf
ROWS = 5
FLOAT32 = 1e-6  # what a float32 sum of probabilities may be off


# ---- the definitions, on one row (V,) in float64

def top_k(logits, k):
    threshold = np.sort(logits)[::-1][min(int(k), len(logits)) - 1]
    return logits >= threshold


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def top_p(logits, p):
    """The fewest likeliest tokens that reach p, and their equals."""
    probs = softmax(logits)
    total = np.cumsum(np.sort(probs)[::-1])
    last = min(int((total < p).sum()), len(logits) - 1)
    return logits >= np.sort(logits)[::-1][last]


def min_p(logits, p):
    probs = softmax(logits)
    return probs >= p * probs.max()


FILTERS = {"top_k": (sampling.keep_top_k, top_k), "top_p": (sampling.keep_top_p, top_p),
           "min_p": (sampling.keep_min_p, min_p)}


@functools.cache
def compiled(name: str, shape: tuple[int, ...]) -> TinyJit:
    return TinyJit(lambda logits, value: FILTERS[name][0](logits, value).realize())


def filtered(name: str, logits: np.ndarray, value: float) -> np.ndarray:
    step = compiled(name, logits.shape)
    return step(Tensor(logits).realize(), Tensor([float(value)]).realize()).numpy()


def check(name: str, logits: np.ndarray, value: float) -> None:
    """What is kept is unchanged, what is not is -inf, and each row is kept as defined.

    Where float32 sums cannot tell which side of the boundary a token is on, both sides will do.
    """
    result = filtered(name, logits, value)
    kept = result != NONE
    assert np.array_equal(result[kept], logits[kept])
    for row, mask in zip(logits, kept, strict=True):
        assert mask.any()
        if name == "top_k":
            assert np.array_equal(mask, top_k(row, value))
        else:
            reference = FILTERS[name][1]
            fewest, most = sorted((value * (1 - FLOAT32), value * (1 + FLOAT32)),
                                  key=lambda v: reference(row, v).sum())
            assert (mask >= reference(row, fewest)).all(), (name, value)
            assert (mask <= reference(row, most)).all(), (name, value)


def awkward_logits(rng, V: int) -> np.ndarray:
    """Rows of normal, all negative, huge, tiny, and tied logits (ROWS, V)."""
    x = rng.standard_normal((ROWS, V)).astype(np.float32)
    x[1] = -np.abs(x[1]) * 5 - 1
    x[2] *= 1e30
    x[3] *= 1e-30
    x[4] = rng.integers(-2, 3, V)
    return x


CASES = [("top_k", v) for v in (1, 2, 3, 50, 97, 98, 10**6)] + [
    ("top_p", v) for v in (1e-6, 0.1, 0.5, 0.9, 0.999)] + [
    ("min_p", v) for v in (1e-4, 0.05, 0.5, 1.0)]


def test_filters_keep_what_they_are_defined_to_keep(rng):
    logits = awkward_logits(rng, 97)
    for name, value in CASES:
        check(name, logits, value)


@pytest.mark.parametrize("V, names", [(1, ["top_k", "min_p"]), (2, ["top_p", "min_p"])])
def test_filters_on_hardly_any_vocabulary(rng, V, names):
    logits = awkward_logits(rng, V)
    for name, value in CASES:
        if name in names:
            check(name, logits, value)


def test_filters_on_gpt2s_vocabulary(rng):
    logits = (rng.standard_normal((2, 50257)) * 4).astype(np.float32)
    for name, value in (("top_p", 0.9), ("top_p", 0.1), ("min_p", 0.02)):
        check(name, logits, value)


def padded(row) -> np.ndarray:
    """The row and then unlikely logits, ROWS times (ROWS, 97)."""
    return np.tile(np.array(row + [-200.0] * (97 - len(row)), np.float32), (ROWS, 1))


def test_p_of_one_keeps_everything():
    assert (filtered("top_p", padded([5.0, 4, 3, 2, -60]), 1.0) != NONE)[:, :4].all()
    assert not SamplingParameters.of(SampleConfig(top_p=1.0)).has("top_p")  # it is not computed
    assert (filtered("min_p", padded([5.0, 4, 3, 2]), 1.0) != NONE).sum(1).tolist() == [1] * ROWS


def test_ties_stay_or_go_together():
    logits = padded([1.0, 3, 3, 2, 3])
    for k, kept in ((1, 3), (2, 3), (3, 3), (4, 4), (5, 5), (6, 97)):
        assert (filtered("top_k", logits, k) != NONE).sum(1).tolist() == [kept] * ROWS
    assert (filtered("top_p", logits, 0.1) != NONE).sum(1).tolist() == [3] * ROWS


@pytest.mark.parametrize("start", [1.0, -1.0, 1e-38, -3e38])
def test_logits_that_differ_in_the_last_bit_are_told_apart(rng, start):
    logits = np.full((ROWS, 97), start, np.float32)
    bits = logits.view(np.uint32) + rng.permutation(97).astype(np.uint32)
    for k in (1, 2, 50, 96):
        check("top_k", bits.view(np.float32), k)


def test_what_one_filter_took_away_the_next_does_not_bring_back():
    logits = padded([2.0, 1, NONE, NONE, 0])
    for name, value in (("top_k", 97), ("top_p", 0.9999999), ("min_p", 1e-6)):
        kept = filtered(name, logits, value) != NONE
        assert kept[:, [0, 1, 4]].all() and not kept[:, 2:4].any()


def test_the_penalty_divides_the_positive_and_multiplies_the_negative(rng):
    logits = awkward_logits(rng, 97)[[0, 1, 3, 4, 0]]
    seen = rng.random(logits.shape) < 0.5
    for penalty in (1.3, 0.5):
        found = sampling.penalize(Tensor(logits), Tensor(seen), Tensor([penalty])).numpy()
        strong = np.float32(penalty)
        expected = np.where(seen, np.where(logits > 0, logits / strong, logits * strong), logits)
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32


# ---- draws. MANY rows alike are MANY draws: the noise of every row is its own.

MANY = 10_000
LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01]))


def draws(logits, seed: int = 0, seen=None, **options) -> np.ndarray:
    """MANY draws from logits (6,), or one from each row of logits (B, V)."""
    logits = np.asarray(logits, np.float32)
    logits = np.tile(logits, (MANY, 1)) if logits.ndim == 1 else logits
    seen = np.broadcast_to(False if seen is None else seen, logits.shape)
    return sample(Tensor(logits), Tensor(seen.copy()).realize(), Tensor(make_key(seed)),
                  SamplingParameters.of(SampleConfig(**options))).numpy()


def shares(keys: int, **options) -> np.ndarray:
    """How often each token comes, by several keys."""
    tokens = np.concatenate([draws(LOGITS, seed, **options) for seed in range(keys)])
    return np.bincount(tokens, minlength=len(LOGITS)) / len(tokens)


def chi_square(found: np.ndarray, expected: np.ndarray, count: int) -> float:
    inside = expected > 0
    assert (found[~inside] == 0).all()
    return float((count * (found - expected)[inside] ** 2 / expected[inside]).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature):
    expected = softmax(LOGITS / temperature)
    # 5 degrees of freedom: above 25 once in 7000 times, and the seeds are fixed
    assert chi_square(shares(5, temperature=temperature), expected, 5 * MANY) < 25


def test_draws_follow_the_softmax_of_what_a_filter_kept():
    expected = softmax(np.where(np.arange(6) < 3, LOGITS, NONE))
    for options in ({"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}):
        assert chi_square(shares(1, temperature=1.0, **options), expected, MANY) < 25


def test_draws_by_different_keys_are_independent():
    """Of two draws of one row by successive keys, as of successive tokens."""
    first, second = draws(LOGITS, 1, temperature=1.0), draws(LOGITS, 2, temperature=1.0)
    p = softmax(LOGITS)
    assert abs((first == second).mean() - (p ** 2).sum()) < 5 * np.sqrt(0.25 / MANY)


def test_the_same_key_draws_the_same_token():
    first, again, other = (draws(LOGITS, seed, temperature=1.0) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_without_a_temperature_the_likeliest_is_taken(rng):
    logits = awkward_logits(rng, 97)
    logits[4] = rng.permutation(97)
    for seed, options in ((0, {}), (1, {"top_k": 5, "top_p": 0.5, "min_p": 0.9})):  # unused
        found = draws(logits, seed, temperature=0, **options)
        assert found.tolist() == logits.argmax(1).tolist() and found.dtype == np.int32


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_tiny_temperature_is_as_good_as_none(rng, temperature):
    logits = np.stack([rng.permutation(97) - 48.0 for _ in range(ROWS)])
    assert draws(logits, temperature=temperature).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF, 0xFFFFFF00, 0x80000000])
def test_no_random_word_draws_a_token_that_was_taken_away(word):
    """The noise of a token is finite whatever the random bits, or it wins against all."""
    key = Tensor(np.array([unmix(word)], np.uint32))  # the first token of the first row
    logits = np.zeros((MANY, 6), np.float32)
    logits[0, :2] = -200, 50  # of probability e^-250
    seen = Tensor(np.zeros(logits.shape, bool)).realize()
    for options in ({}, {"top_k": 3}):
        parameters = SamplingParameters.of(SampleConfig(temperature=1.0, **options))
        assert sample(Tensor(logits), seen, key, parameters).numpy()[0] == 1


# ---- the order of operations

def can_be_drawn(probs, seen=None, **options) -> set[int]:
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(probs + [0.0] * (6 - len(probs))))
    return set(draws(logits, seen=seen, **options).tolist())


def test_temperature_comes_before_top_p():
    """At temperature 1/2 the first has 0.53 of the probability, at 1 it has 0.4."""
    assert can_be_drawn([0.4, 0.3, 0.2, 0.1], temperature=0.5, top_p=0.5) == {0}
    assert can_be_drawn([0.4, 0.3, 0.2, 0.1], temperature=1.0, top_p=0.5) == {0, 1}


def test_temperature_comes_before_min_p():
    """At temperature 2 the second is 0.71 times as likely as the first, at 1 half as likely."""
    assert can_be_drawn([0.5, 0.25, 0.25], temperature=2.0, min_p=0.6) == {0, 1, 2}
    assert can_be_drawn([0.5, 0.25, 0.25], temperature=1.0, min_p=0.6) == {0}


def test_top_k_comes_before_top_p():
    """Of the two that top-k leaves, the first alone has 0.57 of the probability."""
    assert can_be_drawn([0.4, 0.3, 0.2, 0.1], temperature=1.0, top_k=2, top_p=0.55) == {0}


def test_top_p_comes_before_min_p():
    """Were the last two gone first, 0.57 would be enough to reach 0.55."""
    assert can_be_drawn([0.4, 0.3, 0.16, 0.14], temperature=1.0, top_p=0.55, min_p=0.5) == {0, 1}


def test_the_penalty_comes_before_top_k():
    """log 0.6 times 4 is below log 0.3: the seen first falls out of the best one."""
    options = {"temperature": 1.0, "top_k": 1, "seen": np.arange(6) == 0}
    assert can_be_drawn([0.6, 0.3, 0.1], repetition_penalty=4.0, **options) == {1}
    assert can_be_drawn([0.6, 0.3, 0.1], repetition_penalty=1.0, **options) == {0}


def test_the_penalty_acts_on_greedy_too_and_remembers_what_was_drawn():
    logits = Tensor(np.tile(np.array([3.0, 2, 1, -1, -2, -3], np.float32), (MANY, 1)))
    start = np.zeros((MANY, 6), bool)
    start[0, 0] = True
    seen = Tensor(start).realize()
    parameters = SamplingParameters.of(SampleConfig(temperature=0, repetition_penalty=4.0))
    key = Tensor(make_key(0))
    found = [sample(logits, seen, key, parameters).numpy()[:2].tolist() for _ in range(3)]
    assert found == [[1, 0], [2, 1], [0, 2]]  # 3/4, 2/4 and 1/4 once all were drawn
    assert seen.numpy()[:2].tolist() == [[True] * 3 + [False] * 3] * 2


# ---- parameters

def test_new_values_need_no_new_parameters():
    parameters = SamplingParameters.of(SampleConfig(temperature=1.0, top_k=4))
    logits = Tensor(np.tile(LOGITS.astype(np.float32), (MANY, 1)))
    seen, key = Tensor(np.zeros((MANY, 6), bool)).realize(), Tensor(make_key(0))
    for k in (1, 2, 3):
        parameters.set(SampleConfig(temperature=1.0, top_k=k))
        assert set(sample(logits, seen, key, parameters).tolist()) == set(range(k))


def test_greedy_needs_no_filters():
    everything = SampleConfig(temperature=0, top_k=3, top_p=0.5, min_p=0.5, repetition_penalty=2.0)
    assert SamplingParameters.of(everything).enabled == ("repetition_penalty",)
    assert SamplingParameters.of(SampleConfig()).enabled == ("temperature",)
    assert not SamplingParameters.of(SampleConfig(min_p=0.0)).has("min_p")
