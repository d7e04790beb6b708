"""The learning rate, against nanoGPT's formula and values computed by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from tinygpt.training.config import TrainConfig
from tinygpt.training.schedule import SCHEDULES, context_length, learning_rate


def get_lr(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """As in nanoGPT's train.py."""
    # 1) linear warmup for warmup_iters steps
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    # 2) if it > lr_decay_iters, return min learning rate
    if it > lr_decay_iters:
        return min_lr
    # 3) in between, use cosine decay down to min learning rate
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@pytest.mark.parametrize("peak, warmup, end, lowest", [
    (1e-3, 100, 5000, 1e-4), (6e-4, 0, 50, 6e-5), (1.0, 7, 8, 0.0), (3e-3, 30, 500, 3e-3)])
def test_it_is_nanogpts_formula(peak, warmup, end, lowest):
    config = TrainConfig(learning_rate=peak, warmup_iters=warmup, lr_decay_iters=end,
                         min_lr=lowest, max_iters=2 * end)
    for step in range(2 * end + 2):
        expected = get_lr(step, peak, warmup, end, lowest)
        assert learning_rate(step, config) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_it_rises_then_falls_then_stays():
    config = TrainConfig(learning_rate=1e-3, warmup_iters=40, max_iters=300, lr_decay_iters=200)
    rates = [learning_rate(step, config) for step in range(300)]
    assert rates[0] > 0 and rates[40] == max(rates) == 1e-3
    assert all(a < b for a, b in pairwise(rates[:41]))
    assert all(a > b for a, b in pairwise(rates[40:201]))
    assert set(rates[200:]) == {1e-4}


def test_unset_values_are_a_tenth_and_max_iters():
    given = TrainConfig(max_iters=100, warmup_iters=10, learning_rate=0.5, min_lr=0.05,
                        lr_decay_iters=100)
    unset = TrainConfig(max_iters=100, warmup_iters=10, learning_rate=0.5)
    assert [learning_rate(s, given) for s in range(120)] == [
        learning_rate(s, unset) for s in range(120)]


def test_a_min_lr_of_zero_is_zero():
    config = TrainConfig(max_iters=10, warmup_iters=0, min_lr=0.0)
    assert learning_rate(10, config) == learning_rate(99, config) == 0.0


HAND = dict(learning_rate=1.0, min_lr=0.2, warmup_iters=4, max_iters=20)


@pytest.mark.parametrize("settings, values", [
    (dict(schedule="linear"), {4: 1.0, 5: 0.95, 8: 0.8, 12: 0.6, 16: 0.4, 19: 0.25, 20: 0.2}),
    (dict(schedule="linear", lr_decay_iters=12), {4: 1.0, 6: 0.8, 10: 0.4, 12: 0.2, 19: 0.2}),
    (dict(schedule="wsd"), {4: 1.0, 15: 1.0, 16: 1.0, 17: 0.8, 18: 0.6, 19: 0.4, 20: 0.2}),
    (dict(schedule="wsd", decay_fraction=0.5), {4: 1.0, 10: 1.0, 11: 0.92, 15: 0.6, 20: 0.2}),
    (dict(schedule="wsd", lr_decay_iters=10), {4: 1.0, 8: 1.0, 9: 0.6, 10: 0.2, 19: 0.2}),
    # a decay as long as the run begins after the warm-up
    (dict(schedule="wsd", decay_fraction=1.0), {4: 1.0, 5: 0.95, 12: 0.6, 20: 0.2}),
    (dict(schedule="wsd", decay_fraction=1e-9), {4: 1.0, 19: 1.0, 20: 0.2}),
    (dict(schedule="constant"), {4: 1.0, 12: 1.0, 20: 1.0, 99: 1.0}),
    (dict(schedule="cosine"), {4: 1.0, 8: 0.6 + 0.4 * math.sqrt(0.5), 12: 0.6, 20: 0.2})])
def test_values_computed_by_hand(settings, values):
    config = TrainConfig(**HAND, **settings)
    warmup = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8}
    for step, value in (warmup | values | {100: values[max(values)]}).items():
        assert learning_rate(step, config) == pytest.approx(value, rel=1e-12), step


def test_without_decay_it_stays_at_the_top():
    config = TrainConfig(max_iters=50, warmup_iters=10, schedule="constant", learning_rate=0.2)
    assert learning_rate(4, config) == pytest.approx(0.2 * 5 / 11, rel=1e-12)
    assert {learning_rate(step, config) for step in range(10, 200)} == {0.2}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, end", [(10, 10), (50, 10), (100, 20), (0, 1), (9, 10)])
def test_a_warmup_that_outlasts_the_decay_divides_by_nothing(warmup, end, schedule):
    config = TrainConfig(warmup_iters=warmup, lr_decay_iters=end, max_iters=60, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(200)]
    assert all(0 < rate <= config.learning_rate for rate in rates)


# ---- context length

@pytest.mark.parametrize("start, block, steps, lengths", [
    (8, 64, 12, [8, 8, 16, 16, 32, 32, 64, 64, 64, 64, 64, 64]),
    (32, 64, 4, [32, 32, 64, 64]), (5, 20, 9, [5, 5, 5, 10, 10, 20, 20, 20, 20]),
    (1, 2, 1, [1, 2])])
def test_the_context_doubles_over_the_first_half(start, block, steps, lengths):
    config = TrainConfig(max_iters=steps, curriculum=True, curriculum_start_block_size=start)
    found = [context_length(step, config, block) for step in range(max(steps, 2))]
    assert found == lengths
    longer = replace(config, max_iters=10 * steps, lr_decay_iters=steps)
    assert [context_length(step, longer, block) for step in range(max(steps, 2))] == lengths
    off = replace(config, curriculum=False)
    assert {context_length(step, off, block) for step in range(steps)} == {block}


@pytest.mark.parametrize("start", [64, 65, 3, 24])
def test_a_length_that_does_not_double_up_to_the_block_size_is_refused(start):
    config = TrainConfig(curriculum=True, curriculum_start_block_size=start)
    with pytest.raises(ValueError, match=f"curriculum_start_block_size={start} .*choose"):
        context_length(0, config, 64)
