"""Rotary positions (arXiv:2104.09864): their settings, and the tables of cosines and sines."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from tinygpt.config import setting
from tinygpt.kernels.jit import constant

ROPE = "--position rope", lambda c: c.position == "rope"
SCALED = "--rope_scaling linear or llama3", lambda c: c.rope_scaling != "none"
LLAMA3 = "--rope_scaling llama3", lambda c: c.rope_scaling == "llama3"


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The settings of RoPE, for models with position="rope".

    Scaling stretches wavelengths for a context longer than the original one: linear
    (arXiv:2306.15595) all of them; llama3 (Llama 3.1) those that turn less than rope_low_freq times
    in the original context, none that turns more than rope_high_freq times, and interpolates
    between the two.
    """

    rope_theta: float = setting(10000.0, "base wavelength of RoPE", above=0, fixed=True, needs=ROPE)
    rope_scaling: str = setting("none", "how RoPE is scaled for a longer context",
        choices=("none", "linear", "llama3"), fixed=True, needs=ROPE)
    rope_factor: float = setting(8.0, "by how much wavelengths are stretched", low=1, fixed=True,
        needs=SCALED)
    rope_low_freq: float = setting(1.0, "turns up to which llama3 stretches by the whole factor",
        above=0, fixed=True, needs=LLAMA3)
    rope_high_freq: float = setting(4.0, "turns from which llama3 does not stretch", above=0,
        fixed=True, needs=LLAMA3)
    rope_original_length: int = setting(8192, "tokens of llama3's original context", low=1,
        fixed=True, needs=LLAMA3)
    nope_interval: int | None = setting(None,
        "the last of every so many layers has no RoPE (NoPE); unset: none", low=1, fixed=True,
        needs=ROPE)

    def __post_init__(self):
        if self.rope_low_freq >= self.rope_high_freq:
            raise ValueError(f"rope_low_freq={self.rope_low_freq} is not below rope_high_freq="
                             f"{self.rope_high_freq}: choose a smaller one")

    def rotates(self, layer: int) -> bool:
        """Whether a layer has RoPE."""
        every = self.nope_interval
        return self.position == "rope" and (every is None or (layer + 1) % every != 0)

    def frequencies(self, head_size: int) -> tuple[float, ...]:
        """The radians per position of each pair of a head, (D/2,)."""
        frequency = self.rope_theta ** (-np.arange(0, head_size, 2) / head_size)
        if self.rope_scaling == "linear":
            frequency = frequency / self.rope_factor
        elif self.rope_scaling == "llama3":
            turns = self.rope_original_length * frequency / (2 * math.pi)
            kept = (turns - self.rope_low_freq) / (self.rope_high_freq - self.rope_low_freq)
            kept = kept.clip(0, 1)
            frequency = frequency * (kept + (1 - kept) / self.rope_factor)
        return tuple(frequency.tolist())


@functools.cache
def rope_tables(length: int, frequencies: tuple[float, ...],
                device: str | tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """cos and sin (length, D/2) float32 of position * frequency."""
    angle = np.outer(np.arange(length), frequencies)
    return tuple(constant(f(angle).astype(np.float32), device) for f in (np.cos, np.sin))
