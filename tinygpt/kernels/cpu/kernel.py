"""C files as operations on tensors, and the views of tensors that kernels read without a copy.

Private interfaces of tinygrad, 0.13's and 0.14's: functions and custom kernels as UOps (call,
maketuple, gettuple, after, param_like, placeholder_like), and the Ops that views consist of.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import _to_np_dtype
from tinygrad.uop.ops import Ops

from tinygpt.kernels.cpu.compile import compilations, program, source
from tinygpt.kernels.cpu.threads import table
from tinygpt.kernels.jit import constant


@functools.cache
def constants(dtype, *values: float) -> Tensor:
    """A small tensor that never changes."""
    return constant(np.array(values, _to_np_dtype(dtype)), "CPU")


@dataclass(frozen=True)
class Kernel:
    """A C file and how it is called: its arguments are outputs, inputs, sizes and the pool."""

    file: str
    arguments: tuple[tuple[str, str], ...] = ()  # (C type, name), for files with ARGUMENTS
    defines: tuple[tuple[str, str | int], ...] = ()

    def __call__(self, outputs: list[Tensor], inputs: list[Tensor], sizes: tuple[int, ...],
                 gradient=None, flops: int = 0) -> list[Tensor]:
        """New tensors of the shapes and dtypes of `outputs`, as the kernel computes them.

        gradient takes the gradient of the first output and the kernel's own outputs and returns a
        gradient, or None, for each of `inputs`.
        """
        count, name, build = len(outputs), *self._program(len(outputs), sizes, flops)
        inputs = [plain(x) for x in inputs]
        arguments = [x.uop for x in (*inputs, constants(dtypes.int64, *sizes), table())]

        def backward(dy: UOp, call: UOp):
            made = [Tensor(call.gettuple(i)) for i in range(count)]
            grads = [g if g is None else g.reshape(x.shape).uop
                     for g, x in zip(gradient(Tensor(dy), made), inputs, strict=True)]
            return (*grads, None, None)

        # A function of its arguments: an output is a value, and has no memory until it is realized
        # that an assignment to it would write into. Flat memory is what tinygrad need not copy.
        written = [Tensor.empty(t.numel(), dtype=t.dtype, device="CPU").uop for t in outputs]
        body = [*written, *(uop.param_like(i) for i, uop in enumerate(arguments))]
        kernel = build(*(UOp.placeholder_like(x, slot=i) for i, x in enumerate(body))).call(*body)
        call = UOp.maketuple(*(buffer.after(kernel) for buffer in written)).call(
            *arguments, grad_fxn=gradient and backward, name=name, precompile=True)
        return [Tensor(call.gettuple(i)).reshape(t.shape) * 1 for i, t in enumerate(outputs)]

    def in_place(self, changed: list[Tensor], inputs: list[Tensor], sizes: tuple[int, ...],
                 flops: int = 0) -> list[Tensor]:
        """Runs a kernel that writes into realized tensors, and returns them as they are then."""
        _, build = self._program(len(changed), sizes, flops)
        inputs = [plain(x) for x in inputs]
        return Tensor.custom_kernel(*changed, *inputs, constants(dtypes.int64, *sizes), table(),
                                    fxn=build)[:len(changed)]

    def _program(self, outputs: int, sizes: tuple[int, ...], flops: int) -> tuple[str, Callable]:
        """The kernel's name, and what makes its program for some buffers, the outputs first."""
        defines = dict(self.defines)
        if self.arguments:
            defines["ARGUMENTS"] = " ".join(f"{kind} {name}," for kind, name in self.arguments)
        name, code = source(self.file, **defines)
        compilations().begin(code)
        return name, lambda *buffers: program(name, code, buffers, outputs, flops)


def plain(x: Tensor) -> Tensor:
    """x without what only names its dimensions anew around a kernel's output, which tinygrad would
    otherwise copy.

    Kernels get every size as an argument, so the shape that is left does not matter to them.
    """
    source, _, strides = memory(x)
    dense = [math.prod(x.shape[i + 1:]) for i in range(x.ndim)]
    same = all(a == b or n == 1 for a, b, n in zip(strides, dense, x.shape, strict=True))
    return source if same and source.numel() == x.numel() else x


def stored(x: Tensor) -> Tensor:
    """x in memory once it is realized; a kernel's output without a copy of it."""
    return plain(x).contiguous().reshape(x.shape)


def memory(x: Tensor) -> tuple[Tensor, int, tuple[int, ...]]:
    """The tensor in whose memory x lies, where x begins in it, and the strides of x.

    A kernel's output is seen through reshapes, permutations and slices; other views are their own
    memory, since tinygrad copies them for a kernel.
    """
    uop, moves = _valued(x.uop), []
    while uop.op in (Ops.RESHAPE, Ops.PERMUTE, Ops.SHRINK):
        moves.append(uop)
        uop = _valued(uop.src[0])
    own = x, 0, tuple(math.prod(x.shape[i + 1:]) for i in range(x.ndim))
    if uop.op is not Ops.GETTUPLE or not all(isinstance(n, int) for n in x.shape + uop.shape):
        return own
    whole = view = np.empty(uop.shape, np.uint8)  # numpy does the arithmetic, on bytes as elements
    for move in reversed(moves):
        if move.op is Ops.SHRINK:
            if not all(isinstance(m[0], int) for m in move.marg):
                return own
            view = view[tuple(slice(m[0], m[0] + n) for m, n in
                              zip(move.marg, move.shape, strict=True))]
        else:
            view = view.transpose(move.arg) if move.op is Ops.PERMUTE else view.reshape(move.shape)
        if not np.may_share_memory(view, whole):  # the reshape had to copy
            return own
    return Tensor(uop), view.ctypes.data - whole.ctypes.data, view.strides


def narrow(x: Tensor) -> Tensor:
    """What x was before it was cast from 16 bits to float32; x itself where it was not."""
    uop = _valued(x.uop)
    while uop.op is Ops.CONTIGUOUS:
        uop = _valued(uop.src[0])
    widened = uop.op is Ops.CAST and uop.dtype == dtypes.float32 and uop.src[0].dtype.itemsize == 2
    return Tensor(uop.src[0]) if widened else x


def _valued(uop: UOp) -> UOp:
    """uop without multiplications by one, which make values of kernels' outputs."""
    while uop.op is Ops.MUL:
        others = [x for x, y in (uop.src, uop.src[::-1])
                  if y.base.op is Ops.CONST and y.base.arg == 1]
        if not others:
            return uop
        uop = others[0]
    return uop


def untransposed(x: Tensor) -> Tensor | None:
    """What x is `transpose(1, 2)` of, where it is that; None elsewhere."""
    is_swap = x.uop.op is Ops.PERMUTE and tuple(x.uop.arg) == (0, 2, 1, 3)
    return Tensor(x.uop.src[0]) if is_swap else None
