"""Counter-based random numbers: a pure function of a key and an element's index.

Nothing is kept between calls, so a draw can be repeated exactly: by the backward pass, by a
resumed run, by another device. The mixer is Wellons' `lowbias32`, a bijection of 32-bit words.
"""

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt.kernels.jit import IS_014


def make_key(*words: int) -> np.ndarray:
    """A key (1,) uint32 from any non-negative integers, e.g. seed and step."""
    return np.random.SeedSequence(words).generate_state(1, np.uint32)


def new_key(device: str | tuple[str, ...]) -> Tensor:
    """A key (1,) uint32 drawn by tinygrad's own generator, another one at every call and at every
    replay of a TinyJit; `Tensor.manual_seed` makes it repeatable."""
    first = device if isinstance(device, str) else device[0]
    return Tensor.randint(1, high=2**31 - 1, device=first).cast(dtypes.uint32).to(device).realize()


def next_key(key: Tensor) -> Tensor:
    """The key (1,) uint32 that follows `key`; a chain of them serves one forward pass."""
    return mix(key + 0x9E3779B9).contiguous()


def counter(count: int, device: str | tuple[str, ...]) -> Tensor:
    """0, 1, ..., count - 1 (count,) int32 on a device, or on each of several."""
    return Tensor.arange(count, **({} if IS_014 else {"device": device}))  # 0.14's are anywhere


def random_bits(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent uniform uint32 words of the given shape."""
    index = counter(int(np.prod(shape)), key.device).cast(dtypes.uint32)
    return mix(mix(index) + key).reshape(shape)


def uniform(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent float32 numbers, uniform over the open interval (0, 1)."""
    return ((random_bits(key, shape).contiguous() >> 9).cast(dtypes.float32) + 0.5) * 2.0**-23


def mix(x: Tensor) -> Tensor:
    """Another uint32 word for each; no two words share one."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
