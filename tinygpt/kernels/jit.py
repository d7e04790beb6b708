"""Steps that tinygrad compiles at their first call, constants that are no part of a step, and which
release of tinygrad this is.

Private interfaces of tinygrad: the count of a TinyJit's calls, `capturing`, and the context
variable CAPTURING.
"""

import functools
import weakref
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor, TinyJit
from tinygrad.engine.realize import capturing
from tinygrad.helpers import Context
from tinygrad.uop.ops import ProgramInfo

IS_014 = "target" in ProgramInfo.__dataclass_fields__  # 0.14 or later, not 0.13


def compiled(method: Callable) -> TinyJit:
    """A TinyJit of a method that captures at its first call, and is freed with its object.

    tinygrad's own does not capture the first call, during which tensors may be created, and so
    schedules the step twice. Here none are: weights, states and buffers are realized before, and
    constants are made by `constant`. The reference to the object is weak, because its memory would
    otherwise wait for the garbage collector.
    """
    jit = TinyJit(functools.partial(method.__func__, weakref.proxy(method.__self__)))
    jit.cnt = 1
    return jit


def is_capturing() -> bool:
    """Whether a TinyJit captures what is computed now, so that no value can be read."""
    return bool(capturing)


def constant(array: np.ndarray, device: str | tuple[str, ...]) -> Tensor:
    """A realized tensor of array, on several devices a copy on each; made at once, even while a
    step is captured."""
    with Context(CAPTURING=0):
        return Tensor(array).to(device).realize()
