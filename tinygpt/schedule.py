"""The learning rate as a pure function of the step."""

import math

from tinygpt.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters, then min_lr.

    Step 0 is the first. Without decay_lr, learning_rate after the warm-up.
    """
    peak = config.learning_rate
    lowest = peak / 10 if config.min_lr is None else config.min_lr
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return peak
    if step >= end:
        return lowest
    done = (step - config.warmup_iters) / (end - config.warmup_iters)
    return lowest + 0.5 * (1 + math.cos(math.pi * done)) * (peak - lowest)
