"""The default run for a text of any size, and the best run that fits into a number of minutes.

What regularizes a run on a small text is weight decay, not dropout (bench/search.csv), and two
numbers say how much: how often the text is read, and over how much of it the weights average.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

# the shape of the default run, and larger ones for more time
SHAPES = (dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
          dict(n_layer=4, n_head=6, n_embd=192, block_size=128),
          dict(n_layer=6, n_head=4, n_embd=256, block_size=256),
          dict(n_layer=6, n_head=6, n_embd=384, block_size=256))
BATCH_SIZE = 8
# of a run of 1300 steps. A shorter one wants a higher rate, by the square root of the steps, and a
# longer one a lower rate, if it reads its text twice or more often.
LEARNING_RATE = 8e-3
LEARNING_RATES = 2e-3, 1.5e-2  # the lowest and the highest
USUAL = dict(warmup_iters=100, patience=0)
SHAKESPEARE = 1_115_394  # bytes
MAX_ITERS = 3000  # of the default run: three minutes on two cores with AVX2
EPOCHS = 10  # times that a text is read at most; more overfit
# Weights are an average of their updates over the last 1 / (learning_rate * weight_decay) steps
# (arXiv:2405.13698); with fewer epochs than these a run overfits less, with more it learns faster
EPOCHS_AVERAGED = 0.7
WEIGHT_DECAY = 0.1, 6.0  # the least and the most; a long text is not read so often
BYTES_PER_TOKEN = dict(bpe=2.7, gpt2=3.3, char=1.0, byte=1.0)  # of English
TOKENS_PER_WEIGHT = 0.7  # that a run has to see for a larger shape to be the better one
SMALL = 1_000_000  # bytes; a run on less is stopped once it overfits
LITTLE = 10_000  # bytes; a model learns little more than words from less
TINY = 2_000  # bytes; the validation split of less has too few tokens for a longer block


class Trial(NamedTuple):
    """A shape on this machine: its weights, and the seconds of a step and of an evaluation."""

    weights: int
    step: float
    evaluation: float


class Given(NamedTuple):
    """What the recipe follows besides the text: flags that a user may give."""

    rows: int = BATCH_SIZE  # sequences in a step
    learning_rate: float | None = None
    tokenizer: str = "bpe"


DEFAULTS = Given()


def recipe(size: int, shape: dict[str, int] = SHAPES[0], most: float = MAX_ITERS,
           given: Given = DEFAULTS) -> dict[str, int | float]:
    """Settings of a TrainConfig and a GPTConfig for a text of `size` bytes, a model of that shape
    and at most so many steps."""
    if size < TINY:
        shape = shape | dict(block_size=16)
    text = 0.9 * max(size, 1) / BYTES_PER_TOKEN[given.tokenizer]  # tokens of the training split
    step = given.rows * shape["block_size"]  # tokens of a step
    max_iters = max(20, int(round(min(most, EPOCHS * text / step), -1)))
    rate = within(LEARNING_RATES, LEARNING_RATE * (1300 / max_iters)**0.5)
    if max_iters * step < 2 * text:
        rate = max(rate, LEARNING_RATE)
    rate = given.learning_rate or rate
    weight_decay = within(WEIGHT_DECAY, step / (rate * EPOCHS_AVERAGED * text))
    return shape | dict(
        max_iters=max_iters, warmup_iters=min(100, max_iters // 2), eval_interval=max_iters // 10,
        patience=3 if size < SMALL else 0, learning_rate=round(rate, 4),
        weight_decay=round(weight_decay, 2))


def within(limits: tuple[float, float], value: float) -> float:
    return min(max(value, limits[0]), limits[1])


def recipe_for(size: int, seconds: float, measure: Callable[[dict[str, int]], Trial],
               shapes: Sequence[dict[str, int]] = SHAPES, given: Given = DEFAULTS
               ) -> dict[str, int | float]:
    """The settings of the run that makes the best of `seconds` seconds.

    measure(shape) takes a few steps with a shape. The shapes are tried from the smallest to the
    first that is too large for the time or for the text.
    """
    chosen = {}
    for shape in shapes:
        trial = measure(shape)
        most = 0.95 * (seconds - 11 * trial.evaluation) / trial.step
        made = recipe(size, shape, most, given)
        tokens = made["max_iters"] * given.rows * made["block_size"]
        if chosen and tokens < TOKENS_PER_WEIGHT * trial.weights:
            break
        chosen = made
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
