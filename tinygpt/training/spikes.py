"""Detection of gradient spikes: steps with an unusually large gradient norm."""

import math
from collections.abc import Iterable
from statistics import median

import numpy as np

HISTORY = 100  # norms in the running median
ENOUGH = 20  # norms before which no step is a spike


class SpikeGuard:
    """A step is a spike if its gradient norm is above `factor` times the running median.

    The norms of skipped steps count too, so that a level that stays high becomes normal. factor 0:
    no step is a spike.
    """

    def __init__(self, factor: float, norms: Iterable[float] = ()):
        self.factor, self.norms = factor, list(norms)

    def limit(self) -> float:
        """The largest norm that is no spike; infinity until 20 norms are known."""
        if not self.factor or len(self.norms) < ENOUGH:
            return math.inf
        return float(np.float32(self.factor * median(self.norms)))  # as the device compares it

    def add(self, norm: float) -> None:
        """Adds a step's norm to the history if it is finite."""
        if self.factor and math.isfinite(norm):
            self.norms = [*self.norms, norm][-HISTORY:]
