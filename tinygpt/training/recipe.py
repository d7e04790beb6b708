"""The default run for a text of any size, and the best run that fits into a number of minutes.

A smaller text gets fewer steps and more regularization. More time gets more steps and, where the
model sees enough tokens for it, a larger model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# bytes of text; steps of the default run; steps beyond which the model overfits, or was not tried;
# weight decay; dropout: the best that was measured, with SHAPES[0] (bench/search.csv)
MEASURED = ((20_000, 200, 200, 4.0, 0.3), (60_000, 600, 600, 2.0, 0.2),
            (200_000, 1200, 1200, 0.7, 0.1), (1_100_000, 3000, 18_000, 0.1, 0.0))
# passes over the text, and the dropout that they need at least
EPOCHS = ((4, 0.0), (14, 0.1), (24, 0.25))
# the shape of the default run, and larger ones for more time
SHAPES = (dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
          dict(n_layer=4, n_head=6, n_embd=192, block_size=128),
          dict(n_layer=6, n_head=6, n_embd=384, block_size=256))
BATCH_SIZE = 8
USUAL = dict(warmup_iters=100, patience=0)
BYTES_PER_TOKEN = 2.7  # of English with the default vocabulary
TOKENS_PER_WEIGHT = 4  # that a run has to see for a larger shape to be the better one
WEIGHTS_PER_TOKEN = 6  # of the text: a larger shape does not help
SMALL = 1_000_000  # bytes; a run on less is stopped once it overfits
LITTLE = 10_000  # bytes; a model learns little more than words from less
TINY = 2_000  # bytes; the validation split of less has too few tokens for a longer block


class Trial(NamedTuple):
    """A shape on this machine: its weights, and the seconds of a step and of an evaluation."""

    weights: int
    step: float
    evaluation: float


def recipe(size: int, shape: dict[str, int] = SHAPES[0],
           most: float | None = None) -> dict[str, int | float]:
    """Settings of a TrainConfig and a GPTConfig for a text of `size` bytes and a model of that
    shape. With `most`, at most so many steps, else as many as the default run has.

    The values are interpolated over the logarithm of the size between those of MEASURED; beyond
    them the nearest apply, and the largest sensible number of steps grows with the text.
    """
    sizes, steps, limits, decays, dropouts = zip(*MEASURED, strict=True)
    x, xs = np.log(max(size, 1)), np.log(sizes)

    def geometric(values: Sequence[float]) -> float:
        return float(np.exp(np.interp(x, xs, np.log(values))))

    if size < TINY:
        shape = shape | dict(block_size=16)
    measured, per_step = (BATCH_SIZE * s["block_size"] for s in (SHAPES[0], shape))  # tokens
    if most is None:
        tokens = measured * geometric(steps)
    else:
        tokens = min(per_step * most, measured * geometric(limits) * max(1, size / sizes[-1]))
    max_iters = max(20, int(round(tokens / per_step, -1)))
    epochs = max_iters * per_step * BYTES_PER_TOKEN / (0.9 * max(size, 1))
    dropout = max(np.interp(x, xs, dropouts), np.interp(epochs, *zip(*EPOCHS, strict=True)))
    return shape | dict(
        max_iters=max_iters, warmup_iters=min(100, max_iters // 2),
        eval_interval=max_iters // 10, patience=3 if size < SMALL else 0,
        weight_decay=round(geometric(decays), 2), dropout=round(float(dropout), 2))


def recipe_for(size: int, seconds: float, measure: Callable[[dict[str, int]], Trial],
               shapes: Sequence[dict[str, int]] = SHAPES) -> dict[str, int | float]:
    """The settings of the run that makes the best of `seconds` seconds.

    measure(shape) takes a few steps with a shape. The shapes are tried from the smallest to the
    first that is too large for the time or for the text.
    """
    chosen = {}
    for shape in shapes:
        trial = measure(shape)
        steps = 0.95 * (seconds - 11 * trial.evaluation) / trial.step
        tokens = steps * BATCH_SIZE * shape["block_size"]
        if chosen and tokens < TOKENS_PER_WEIGHT * trial.weights:
            break
        chosen = recipe(size, shape, steps)
        if WEIGHTS_PER_TOKEN * size / BYTES_PER_TOKEN < 2 * trial.weights:
            break
    return chosen


def describe(size: int, settings: dict[str, int | float], minutes: float | None = None) -> str:
    """The line that reports the settings that were chosen for a text, and for so many minutes."""
    values = ", ".join(f"--{name} {value}" for name, value in settings.items()
                       if (SHAPES[0] | USUAL).get(name) != value)
    given = f"{size / 1000:,.0f} KB of text" + (f", --minutes {minutes:g}" if minutes else "")
    line = f"{given}: {values} (flags and --preset override)"
    if size < LITTLE:
        line += "; that is little to learn from: give more text if you have it"
    return line
