"""The default run for a text of any size: a smaller text gets fewer steps and more regularization.
"""

import numpy as np

# bytes of text, steps, weight decay, dropout: the best that was measured (bench/search.csv)
MEASURED = ((20_000, 200, 4.0, 0.3), (60_000, 600, 2.0, 0.2), (200_000, 1200, 0.7, 0.1),
            (1_100_000, 3000, 0.1, 0.0))
SMALLEST = 10_000  # bytes; a model learns little more than words from a smaller text


def recipe(size: int) -> dict[str, int | float]:
    """Settings of a TrainConfig and a GPTConfig for a text of `size` bytes.

    The values are interpolated over the logarithm of the size between those of MEASURED; beyond
    them, the nearest apply.
    """
    sizes, steps, decays, dropouts = zip(*MEASURED, strict=True)
    x, xs = np.log(max(size, 1)), np.log(sizes)
    max_iters = int(round(np.exp(np.interp(x, xs, np.log(steps))), -1))
    return dict(max_iters=max_iters, eval_interval=max_iters // 10,
                weight_decay=round(float(np.exp(np.interp(x, xs, np.log(decays)))), 2),
                dropout=round(float(np.interp(x, xs, dropouts)), 2))


def describe(size: int, settings: dict[str, int | float]) -> str:
    """The line that reports which settings the size of the text has chosen."""
    values = ", ".join(f"--{name} {value}" for name, value in settings.items())
    line = f"{size / 1000:,.0f} KB of text: {values} (flags and --preset override)"
    if size < SMALLEST:
        line += "; that is little to learn from: give more text if you have it"
    return line
