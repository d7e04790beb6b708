"""Dynamic loss scaling, which keeps float16 gradients from underflowing (arXiv:1710.03740)."""

import math
from dataclasses import asdict, dataclass

START = 65536.0
GROWTH_INTERVAL = 2000  # steps in a row with finite gradients after which the scale doubles
SMALLEST, LARGEST = 1.0, 2.0**127  # a float32


@dataclass
class LossScale:
    """The factor of the loss before the backward pass, by which gradients are divided afterwards.

    Like PyTorch's GradScaler it halves when a gradient overflows, down to 1, and doubles after 2000
    steps in a row without an overflow. It stays a power of two, so scaling rounds nothing.
    Raises ValueError where a value is out of range.
    """

    scale: float = START
    good_steps: int = 0  # since the scale last changed

    def __post_init__(self):
        good = type(self.scale) in (int, float) and SMALLEST <= self.scale <= LARGEST
        if not good or math.frexp(self.scale)[0] != 0.5:
            raise ValueError(f"scale={self.scale!r} is not a power of two between 1 and 2**127")
        if type(self.good_steps) is not int or self.good_steps < 0:
            raise ValueError(f"good_steps={self.good_steps!r} is not a number of steps")

    @property
    def is_smallest(self) -> bool:
        return self.scale == SMALLEST

    def update(self, finite: bool) -> bool:
        """Updates the scale after a step with finite gradients or not; returns whether it changed.
        """
        before = self.scale
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, SMALLEST)
        elif self.good_steps >= GROWTH_INTERVAL:
            self.scale, self.good_steps = min(self.scale * 2, LARGEST), 0
        return self.scale != before

    def state_dict(self) -> dict:
        """The constructor's arguments, as JSON values."""
        return asdict(self)
