"""C files as operations on tensors, and the views of tensors that kernels read without a copy.

Private interfaces of tinygrad, 0.13's and 0.14's: functions and custom kernels as UOps (call,
maketuple, gettuple, after, param_like, placeholder_like), and the Ops that views consist of.
"""

import functools
import math
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import _to_np_dtype
from tinygrad.uop.ops import Ops

from tinygpt.kernels.cpu.compile import compilations, program, source
from tinygpt.kernels.cpu.threads import table
from tinygpt.kernels.jit import constant

# What the elements of tensors are in C; vector.h has bf16 and f16
C_TYPES = {dtypes.float32: "float", dtypes.bfloat16: "bf16", dtypes.float16: "f16",
           dtypes.int32: "int", dtypes.uint32: "unsigned", dtypes.int8: "signed char",
           dtypes.uint8: "unsigned char", dtypes.uint64: "unsigned long"}
Tensors = dict[str, Tensor | list[Tensor] | None]
Sizes = dict[str, int | float | list[int]]


@functools.cache
def constants(dtype, *values: float) -> Tensor:
    """A small tensor that never changes."""
    return constant(np.array(values, _to_np_dtype(dtype)), "CPU")


class Kernel:
    """A C file, called with tensors and sizes that have the same names in C.

    There, a tensor x is a pointer to x_t, the type of its elements; where it is None, x is 0, and
    where it is a list, an array of pointers. A size is a long, one that is a Python float a float,
    and a list of sizes an array. `defines` are macros.
    """

    def __init__(self, file: str, **defines: int | str):
        self.file, self.defines = file, defines

    def __call__(self, *, outputs: Tensors, inputs: Tensors, sizes: Sizes, gradient=None,
                 flops: int = 0) -> Tensors:
        """New tensors of the shapes and dtypes of `outputs`, by name, as the kernel computes them.

        gradient takes the gradient of the first output and all that the kernel made, by name, and
        returns the gradients of inputs by name.
        """
        name, build = self._program(outputs, inputs, sizes, flops)
        empty, given = _flat(outputs), _flat(inputs)
        arguments = [*given.values(), *self._tables(sizes)]

        def backward(dy: Tensor, made: list[Tensor]) -> list[Tensor | None]:
            grads = gradient(dy, _nested(outputs, made))
            assert grads.keys() <= inputs.keys()
            return [grads.get(key) for key in given] + [None] * (len(arguments) - len(given))

        made = call_function(name, [build], list(empty.values()), arguments, gradient and backward)
        return _nested(outputs, made)

    def in_place(self, *, changed: Tensors, inputs: Tensors, sizes: Sizes, flops: int = 0
                 ) -> Tensors:
        """Runs a kernel that writes into realized tensors, and returns them as they are then."""
        _, build = self._program(changed, inputs, sizes, flops)
        given = [plain(x) for x in _flat(inputs).values()]
        made = Tensor.custom_kernel(*_flat(changed).values(), *given, *self._tables(sizes),
                                    fxn=build)
        return _nested(changed, made)

    def _program(self, outputs: Tensors, inputs: Tensors, sizes: Sizes, flops: int
                 ) -> tuple[str, Callable]:
        """The kernel's name, and what makes its program for some buffers, the outputs first."""
        name, code = source(self.file, *self._declarations(outputs, inputs, sizes))
        compilations().begin(code)
        count = len(_flat(outputs))
        return name, lambda *buffers: program(name, code, buffers, count, flops)

    def _declarations(self, outputs: Tensors, inputs: Tensors, sizes: Sizes
                      ) -> tuple[str, tuple[tuple[str, int | str], ...]]:
        """A name that differs where the code does, and what the C file sees defined."""
        title = [Path(self.file).stem, *(f"{k}{v}" for k, v in self.defines.items()
                                         if isinstance(v, int))]
        defines, arguments, declared = dict(self.defines), [], []
        for const, tensors in (("", outputs), ("const ", inputs)):
            for name, value in tensors.items():
                parts = _flat({name: value})
                if not parts:
                    declared.append(f"{const}{self.missing}* const {name} = 0;")
                    title.append(f"no_{name}")
                    continue
                kind = defines[f"{name}_t"] = C_TYPES[next(iter(parts.values())).dtype]
                title += [] if kind in ("float", "int") else [name, kind.replace(" ", "_")]
                arguments += [f"{const}{name}_t* {part}" for part in parts]
                if isinstance(value, list):
                    declared.append(f"{const}{name}_t* {name}[] = {{{', '.join(parts)}}};")
        defines["ARGUMENTS"] = ", ".join([*arguments, *self.last_arguments])
        defines["DECLARE_NAMES"] = " ".join(declared + self._declare_sizes(sizes))
        return "_".join(title).lower(), tuple(defines.items())

    # how a kernel gets its sizes: in a table, so that one program is right for all of them

    missing = "void"  # the type of a tensor that is None
    last_arguments = ("const long* sizes", "const shared_t* shared")

    def _tables(self, sizes: Sizes) -> list[Tensor]:
        """The tensors of the last arguments: the sizes, and shared_t of pool.h."""
        words = [word for size in sizes.values() for word in _words(size)]
        return [constants(dtypes.int64, *words), table()]

    def _declare_sizes(self, sizes: Sizes) -> list[str]:
        declared, at = [], 0
        for name, value in sizes.items():
            if isinstance(value, list):
                declared.append(f"const long* {name} = sizes + {at};")
            elif isinstance(value, float):
                declared.append(f"const float {name} = __builtin_bit_cast(double, sizes[{at}]);")
            else:
                declared.append(f"const long {name} = sizes[{at}];")
            at += len(_words(value))
        return declared


# What kernels with a gradient were given besides weights and other data, by id
_intermediates: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def free_intermediate_gradients() -> None:
    """Frees the gradients that Tensor.backward gave to tensors that the gradients of kernels refer
    to: they refer to the graph, and through tinygrad's cache of graphs neither would ever be freed.
    """
    for tensor in list(_intermediates.values()):
        tensor.grad = None


def call_function(name: str, builds: list[Callable[..., UOp]], outputs: list[Tensor],
                  inputs: list[Tensor], gradient: Callable | None) -> list[Tensor]:
    """New tensors of the shapes and dtypes of `outputs`, which kernels make one after the other.

    Each of `builds` makes a kernel for the buffers of the outputs and of the inputs. gradient takes
    the gradient of the first output and all outputs, and returns a gradient or None for each input.

    It is a function of its arguments: an output is a value, and has no memory until it is realized
    that an assignment to it would write into. Flat memory is what tinygrad need not copy.
    """
    arguments = [plain(x).uop for x in inputs]
    if gradient:
        _intermediates.update({id(x): x for x in inputs if not x.uop.is_realized})

    def backward(dy: UOp, call: UOp):
        made = [Tensor(call.gettuple(i)).reshape(t.shape) for i, t in enumerate(outputs)]
        grads = gradient(settled(Tensor(dy)).reshape(outputs[0].shape), made)
        return tuple(g if g is None else g.reshape(x.shape).uop
                     for g, x in zip(grads, arguments, strict=True))

    written = [Tensor.empty(t.numel(), dtype=t.dtype, device=t.device).uop for t in outputs]
    given = [uop.param_like(i) for i, uop in enumerate(arguments)]
    for build in builds:
        body = [*written, *given]
        kernel = build(*(UOp.placeholder_like(x, slot=i) for i, x in enumerate(body))).call(*body)
        written = [buffer.after(kernel) for buffer in written]
    call = UOp.maketuple(*written).call(*arguments, grad_fxn=gradient and backward, name=name,
                                        precompile=True)
    return [Tensor(call.gettuple(i)).reshape(t.shape) * 1 for i, t in enumerate(outputs)]


def _words(size: int | float | list[int]) -> list[int]:
    """The 64-bit words of a size, a float's those of a double."""
    if isinstance(size, float):
        return list(struct.unpack("q", struct.pack("d", size)))
    return size if isinstance(size, list) else [size]


def _flat(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that are not None, those of a list x as x0, x1, ..."""
    flat = {}
    for name, value in tensors.items():
        if isinstance(value, list):
            flat |= {f"{name}{i}": x for i, x in enumerate(value)}
        elif value is not None:
            flat[name] = value
    return flat


def _nested(tensors: Tensors, flat: list[Tensor]) -> Tensors:
    """`flat` under the names of `tensors`, in lists where those are lists."""
    rest = iter(flat)
    return {name: [next(rest) for _ in value] if isinstance(value, list) else next(rest)
            for name, value in tensors.items() if value is not None}


def plain(x: Tensor) -> Tensor:
    """x without the views of a kernel's output that leave its elements where they are, which
    tinygrad would otherwise copy.

    The shape changes, but kernels get every size as an argument.
    """
    source, _, strides = memory(x)
    dense = [math.prod(x.shape[i + 1:]) for i in range(x.ndim)]
    same = all(a == b or n == 1 for a, b, n in zip(strides, dense, x.shape, strict=True))
    return source if same and source.numel() == x.numel() else x


def settled(x: Tensor) -> Tensor:
    """x as a value that is computed once for all that read it; a kernel's output is not copied."""
    return x if memory(x)[0].uop.op is Ops.GETTUPLE else x.contiguous() * 1


def stored(x: Tensor) -> Tensor:
    """x, contiguous in memory once it is realized; a kernel's output is not copied."""
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
    if (uop.op not in (Ops.GETTUPLE, Ops.CONTIGUOUS)
            or not all(isinstance(n, int) for n in x.shape + uop.shape)):
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
    """The tensor of 16 bits that was cast to the float32 tensor x, or x itself."""
    uop = _valued(x.uop)
    while uop.op is Ops.CONTIGUOUS:
        uop = _valued(uop.src[0])
    widened = uop.op is Ops.CAST and uop.dtype == dtypes.float32 and uop.src[0].dtype.itemsize == 2
    return Tensor(uop.src[0]) if widened else x


def _valued(uop: UOp) -> UOp:
    """uop without the multiplications by one that make kernels' outputs values."""
    while uop.op is Ops.MUL:
        others = [x for x, y in (uop.src, uop.src[::-1])
                  if y.base.op is Ops.CONST and y.base.arg == 1]
        if not others:
            return uop
        uop = others[0]
    return uop


def untransposed(x: Tensor) -> Tensor | None:
    """The tensor of which x is `transpose(1, 2)`, or None."""
    is_swap = x.uop.op is Ops.PERMUTE and tuple(x.uop.arg) == (0, 2, 1, 3)
    return Tensor(x.uop.src[0]) if is_swap else None


def strided(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The memory that x (B, H, T, D) is read from, and its batch, head and row strides."""
    if (y := untransposed(x)) is not None:
        _, T, H, D = y.shape
        return y, (T * H * D, D, H * D)
    _, H, T, D = x.shape
    return x, (H * T * D, T * D, D)


def projected(q: Tensor, k: Tensor, v: Tensor
              ) -> tuple[Tensor, list[tuple[int, int, int, int]]] | None:
    """The matrix whose columns are q (B, H, T, D), k and v (B, G, T, D), where a kernel made them
    together, and where in its memory each begins, and its batch, head and row strides."""
    (B, H, T, D), G = q.shape, k.shape[1]
    width = (H + 2 * G) * D
    views = [memory(x) for x in (q, k, v)]
    source = views[0][0]
    places = [(start, T * width, D, width) for start in (0, H * D, (H + G) * D)]
    if (k.shape == v.shape == (B, G, T, D) and source.numel() == B * T * width
            and all(other.uop is source.uop for other, _, _ in views)
            and [(start, *strides) for _, start, strides in views] == [(*p, 1) for p in places]):
        return source, places
    return None
