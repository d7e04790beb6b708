"""The largest micro-batch that fits into the memory of a device."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tinygrad import GlobalCounters

from tinygpt import device
from tinygpt.data.token_data import TokenData
from tinygpt.model.language_model import LanguageModel
from tinygpt.training.config import TrainConfig
from tinygpt.training.trial import compiled_run

SHARE = 0.8  # of the memory that is free on a CPU, which others use too
ADVICE = ("lower --batch_size and raise --gradient_accumulation_steps as much, or take "
          "--batch_size auto; --grad_checkpoint, a smaller --block_size and --optimizer adamw8bit "
          "take less too")


def fit_batch_size(model: LanguageModel, config: TrainConfig, data: TokenData) -> TrainConfig:
    """config with the largest micro-batch that fits, and as many tokens a step."""
    sequences = config.batch_size * config.gradient_accumulation_steps

    def split(n: int) -> TrainConfig:
        return replace(config, batch_size=n, gradient_accumulation_steps=sequences // n,
                       auto_batch_size=False)

    def trial(n: int):
        return compiled_run(model, split(n), data)

    print("finding the largest micro-batch that fits", file=sys.stderr)
    n = largest_micro_batch(sequences, trial, available_memory())
    print(f"batch_size {n}, gradient_accumulation_steps {sequences // n}", file=sys.stderr)
    return split(n)


def largest_micro_batch(sequences: int, trial: Callable[[int], object],
                        available: int | None) -> int:
    """The largest divisor of sequences that fits.

    trial(n) takes steps on n sequences, returns an object that keeps their memory in use, and
    raises MemoryError where they do not fit. If the available bytes are known, two small trials
    measure the memory of a sequence; if not, sizes are tried from the largest down. Raises
    MemoryError where none fits.
    """
    sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
    if available is not None:
        return _predicted(sizes, trial, available)
    for n in reversed(sizes):
        try:
            _bytes_of(trial, n)
            return n
        except MemoryError:
            device.free_memory()
    raise MemoryError(f"not even {sizes[0]} sequence fits")


def _predicted(sizes: list[int], trial: Callable[[int], object], available: int) -> int:
    one = _bytes_of(trial, sizes[0])
    if one > available:
        raise MemoryError(f"not even {sizes[0]} sequence fits: it takes {one >> 20} of "
                          f"{available >> 20} MB")
    if len(sizes) == 1:
        return sizes[0]
    try:
        each = max(0, _bytes_of(trial, sizes[1]) - one) / (sizes[1] - sizes[0])
    except MemoryError:
        return sizes[0]
    return max(n for n in sizes if one + (n - sizes[0]) * each <= available)


def _bytes_of(trial: Callable[[int], object], n: int) -> int:
    """The bytes that trial(n) takes on the device."""
    device.free_memory()
    before = GlobalCounters.mem_used
    try:
        kept = trial(n)
    except OSError as error:
        if device.is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise
    taken = GlobalCounters.mem_used - before
    del kept
    device.free_memory()
    return taken


def available_memory() -> int | None:
    """Bytes that training may take on a CPU; None on another device, where allocation fails."""
    if not device.default().startswith("CPU"):
        return None
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [int(meminfo["MemAvailable"].split()[0]) << 10]
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text())
                    - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        pass  # another system, or no limit
    return int(SHARE * min(free))
