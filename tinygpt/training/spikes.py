"""Steps whose gradient is far larger than usual."""

import math
from collections.abc import Iterable
from statistics import median

import numpy as np

HISTORY = 100  # norms that the median is of
ENOUGH = 20  # norms without which nothing is a spike


class SpikeGuard:
    """Knows above which gradient norm a step is a spike: `factor` times the running median.

    The norms of skipped steps count too, so that a level that stays high becomes the usual one.
    factor 0: nothing is a spike.
    """

    def __init__(self, factor: float, norms: Iterable[float] = ()):
        self.factor, self.norms = factor, list(norms)

    def limit(self) -> float:
        """The largest norm that is none; infinity while fewer than 20 are known."""
        if not self.factor or len(self.norms) < ENOUGH:
            return math.inf
        return float(np.float32(self.factor * median(self.norms)))  # as the device compares it

    def add(self, norm: float) -> None:
        """Takes note of a step's norm, where that is finite."""
        if self.factor and math.isfinite(norm):
            self.norms = [*self.norms, norm][-HISTORY:]
