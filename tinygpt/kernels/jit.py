"""Steps that tinygrad compiles at their first call, and constants that are no part of a step."""

from collections.abc import Callable

import numpy as np
from tinygrad import Tensor, TinyJit
from tinygrad.helpers import Context


def compiled(step: Callable) -> TinyJit:
    """A TinyJit of step that captures at its first call.

    tinygrad would call step once without capturing, so that what it makes on the way is made by
    then, and that takes as long again to schedule. Here nothing is made on the way: weights,
    states and buffers are realized before, and constants are made by `constant`.
    """
    jit = TinyJit(step)
    jit.cnt = 1
    return jit


def constant(array: np.ndarray, device: str | tuple[str, ...]) -> Tensor:
    """A realized tensor of array, on several devices a copy on each, made at once even where a step
    that asks for it is captured."""
    with Context(CAPTURING=0):
        return Tensor(array).to(device).realize()
