"""The learning rate and the context length as pure functions of the step."""

import math

# the factor, 1 to 0, of peak - min_lr when a share of the decay is done; None: there is no decay
SCHEDULES = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)), "linear": lambda done: 1 - done,
    "wsd": lambda done: 1 - done, "constant": None}


def learning_rate(step: int, config) -> float:
    """Linear warm-up, then config.schedule down to min_lr at lr_decay_iters, then min_lr.

    Step 0 is the first. `cosine` is nanoGPT's, `linear` a straight line; `wsd` (warm-up, stable,
    decay: arXiv:2404.06395) stays up but for the last decay_fraction of the steps, in which it is
    a line; `constant` stays up for ever.
    """
    peak = config.learning_rate
    lowest = peak / 10 if config.min_lr is None else config.min_lr
    start, end = config.warmup_iters, config.lr_decay_iters or config.max_iters
    if step < start:
        return peak * (step + 1) / (start + 1)
    if (factor := SCHEDULES[config.schedule]) is None:
        return peak
    if step >= end:
        return lowest
    length = end - start
    if config.schedule == "wsd":
        length = min(length, config.decay_fraction * end)
    done = max(0.0, 1 - (end - step) / length)
    return lowest + factor(done) * (peak - lowest)


def context_length(step: int, config, block_size: int) -> int:
    """The tokens of a sequence at a step, 0 the first: block_size unless config.curriculum.

    With it, lengths double from curriculum_start_block_size, after equal numbers of steps, and
    reach block_size half-way to lr_decay_iters (arXiv:2108.06084, whose lengths grow linearly).
    Raises ValueError where no doubling leads to block_size.
    """
    if not config.curriculum:
        return block_size
    start = config.curriculum_start_block_size
    doublings = (block_size // start).bit_length() - 1
    if doublings < 1 or start << doublings != block_size:
        raise ValueError(f"curriculum_start_block_size={start} does not double up to block_size="
                         f"{block_size}: choose a half, a quarter, an eighth, ... of it")
    half = (config.lr_decay_iters or config.max_iters) / 2
    return start << min(doublings, int(step * doublings / half))
