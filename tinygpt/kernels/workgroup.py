"""Programs for a GPU's workgroup, written in tinygrad's UOps: threads with registers, memory that
they share, barriers, and products of matrices, on tensor cores where tinygrad has them.

The UOps used here, to_program, renderers and tensor cores are private interfaces of tinygrad, of
0.13 and 0.14. A thread's own operations happen in the order of the program; those on shared memory
are ordered by barriers alone.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tinygrad import Device, UOp, dtypes
from tinygrad.codegen import to_program
from tinygrad.codegen.opt import tc
from tinygrad.device import Compiler
from tinygrad.dtype import AddrSpace, DType
from tinygrad.helpers import Target
from tinygrad.renderer import Estimates, Renderer
from tinygrad.renderer.cstyle import CUDARenderer, MetalRenderer
from tinygrad.uop.ops import AxisType, KernelInfo, Ops

from tinygpt.kernels.jit import IS_014

WARP = 32  # threads that multiply matrices together

Place = Callable[[UOp, int], tuple]  # (lane, number of an element) -> (row, column)


@dataclass(frozen=True)
class Core:
    """How a warp computes C += A B, with A (M, K), B (K, 8) and C (M, 8) float32.

    Every lane holds some elements of each; a, b and c say which. Of C it holds `slots` rows, each
    shared with `mates` - 1 other lanes, among which it is number mate(lane).
    """

    name: str  # "" for plain multiplications, else what tinygrad calls the tensor core's device
    M: int
    K: int
    counts: tuple[int, int, int]  # elements of A, B and C in each lane
    a: Place
    b: Place
    c: Place
    slots: int
    mates: int
    mate: Callable[[UOp], UOp]
    padding: int  # bytes between the rows of shared matrices, against bank conflicts

    def slot(self, e: int) -> int:
        """In which of its rows a lane's element e of C is."""
        return e * self.slots // self.counts[2]

    def row(self, lane: UOp, slot: int) -> UOp:
        return self.c(lane, slot * self.counts[2] // self.slots)[0]


def _pair(lane: UOp, e: int) -> UOp:
    return lane % 4 * 2 + e % 2


def _simdgroup(lane: UOp, e: int) -> tuple:
    return lane // 2 % 4 + lane // 16 * 4, lane % 2 * 2 + lane // 8 % 2 * 4 + e


PLAIN = Core("", 16, 1, (4, 1, 4), slots=4, mates=8, mate=lambda lane: lane % 8, padding=4,
             a=lambda lane, e: (lane // 8 + 4 * e, 0), b=lambda lane, e: (0, lane % 8),
             c=lambda lane, e: (lane // 8 + 4 * e, lane % 8))
# mma.m16n8k16 for bfloat16 and float16; the layouts stand in NVIDIA's PTX manual
CUDA = Core("CUDA", 16, 16, (8, 4, 4), slots=2, mates=4, mate=lambda lane: lane % 4, padding=16,
            a=lambda lane, e: (lane // 4 + e // 2 % 2 * 8, _pair(lane, e) + e // 4 * 8),
            b=lambda lane, e: (_pair(lane, e) + e // 2 * 8, lane // 4),
            c=lambda lane, e: (lane // 4 + e // 2 * 8, _pair(lane, e)))
# simdgroup_float8x8, and of other types
METAL = Core("METAL", 8, 8, (2, 2, 2), slots=1, mates=4,
             mate=lambda lane: lane % 2 + lane // 8 % 2 * 2, padding=16,
             a=_simdgroup, b=_simdgroup, c=_simdgroup)


def find_core(renderer: Renderer, dtype: DType) -> Core:
    """The tensor core that tinygrad has for products of that type, or plain multiplications.

    A CUDA device's cores for float32 round it to 10 bits; theirs are other dimensions, so that it
    is multiplied without them.
    """
    if core := {"CUDA": CUDA, "NV": CUDA, "METAL": METAL}.get(renderer.target.device):
        wanted = (8, core.M, core.K), dtype, dtypes.float32
        if any((c.dims, c.dtype_in, c.dtype_out) == wanted for c in renderer.tensor_cores):
            return core
    return PLAIN


def renderer_of(device: str) -> Renderer:
    return Device[device].renderer


def renderer_for(device: str, arch: str) -> Renderer:
    """What writes the source for a device, "CUDA" or "METAL", that need not be there."""
    kind = {"CUDA": CUDARenderer, "METAL": MetalRenderer}[device]
    renderer = kind.__new__(kind)  # the usual way would look for the device's compiler
    Renderer.__init__(renderer, Target(device, arch=arch))
    renderer.compiler = Compiler()
    renderer.tensor_cores = tc.metal if device == "METAL" else tc.get_cuda(arch)
    return renderer


def arguments(kinds: list[tuple[int, DType]]) -> list[UOp]:
    """Stand-ins for buffers of so many elements of such types."""
    return [UOp.placeholder((count,), dtype, i) for i, (count, dtype) in enumerate(kinds)]


def render(kernel: UOp, renderer: Renderer) -> str:
    """The source of a kernel."""
    program = to_program(kernel, renderer)
    return next(part.arg for part in program.src if part.op is Ops.SOURCE)


class Program:
    """A kernel in the making, in the order in which a thread runs it."""

    def __init__(self, threads: int, blocks: int):
        self.threads = threads
        self.thread = UOp.special(threads, "lidx0")
        self.block = UOp.special(blocks, "gidx0")
        self._numbers = itertools.count()
        self._now: tuple[UOp, ...] = ()  # what a thread has done
        self._synced: tuple[UOp, ...] = ()  # what all threads are known to have done
        self._sharing: list[UOp] = []  # writes to shared memory since the last barrier
        self._results: list[UOp] = []

    def registers(self, count: int) -> UOp:
        """float32 numbers of a thread's own."""
        return UOp.placeholder((count,), dtypes.float32, next(self._numbers), AddrSpace.REG)

    def shared(self, count: int, dtype: DType) -> UOp:
        """Memory of the workgroup."""
        return UOp.placeholder((count,), dtype, next(self._numbers), AddrSpace.LOCAL)

    def get(self, registers: UOp, i: int) -> UOp:
        return registers.after(*self._now)[i]

    def set(self, registers: UOp, values: dict[int, UOp | float]) -> None:
        """Puts values, none of which reads another's register, into registers."""
        target = registers.after(*self._now)
        self._now = (UOp.group(*[target[i].store(x) for i, x in values.items()]),)

    def multiply(self, core: Core, a: list[UOp], b: list[UOp], registers: UOp, first: int) -> None:
        """A lane's part of C += A B, of which it brings its elements of A and B and has those of C
        in `registers` from number `first` on."""
        count = core.counts[2]
        c = [self.get(registers, first + e) for e in range(count)]
        if not core.name:
            self.set(registers, {first + e: c[e] + a[e] * b[0] for e in range(count)})
            return
        dims = (8, core.M, core.K)
        if IS_014:
            made = UOp.wmma(UOp.stack(*a), UOp.stack(*b), UOp.stack(*c), dims, core.name, WARP)
            self.set(registers, {first + e: made.index(e) for e in range(count)})
            return
        kind = a[0].dtype
        arg = (f"WMMA_8_{core.M}_{core.K}_{kind.name}_float", dims, kind, dtypes.float32, core.name,
               WARP, tuple(((0, n),) for n in core.counts), ())
        made = UOp(Ops.WMMA, dtypes.float32.vec(count),
                   tuple(x[0].vectorize(*x[1:]) for x in (a, b, c)), arg)
        # the sum of what is not hidden takes an element out of the vector
        element = UOp.range(count, next(self._numbers), AxisType.UNROLL)
        made = UOp(Ops.UNROLL, dtypes.float32, (made,), ((element.arg[0], count),))
        self.set(registers, {first + e: UOp(Ops.REDUCE, dtypes.float32, (
            element.eq(e).where(made, 0.0), element), (Ops.ADD, ())) for e in range(count)})

    def get_shared(self, memory: UOp, i: UOp) -> UOp:
        """What was there at the last barrier."""
        return memory.after(*self._synced)[i]

    def set_shared(self, memory: UOp, i: UOp, value: UOp, *loops: UOp) -> None:
        """Visible after the next barrier. `loops` are ranges from `each` that i and value use."""
        place = memory.after(*self._synced)[i]
        self._sharing.append(place.store(value.cast(place.dtype)).end(*loops))

    def each(self, count: int) -> UOp:
        """A range for `set_shared`."""
        return UOp.range(count, next(self._numbers))

    def barrier(self) -> None:
        first, *others = (x for x in (*self._now, *self._sharing) if x.op is not Ops.RANGE)
        self._now = self._synced = (first.barrier(*others),)
        self._sharing = []

    @contextlib.contextmanager
    def loop(self, count: int | UOp) -> Iterator[UOp]:
        """Repeats its body; a body that uses barriers has to end with one."""
        if isinstance(count, int) and count == 1:
            yield self.block * 0
            return
        index = UOp.range(count, next(self._numbers))
        before = self._synced
        self._now, self._synced = (*self._now, index), (*before, index)
        inside = self._synced
        yield index
        assert not self._sharing, "a barrier is missing at the end of the loop"
        end = UOp.group(*self._now).end(index)
        self._now = (end,)
        self._synced = before if self._synced is inside else (end,)

    def write(self, buffer: UOp, i: UOp, value: UOp) -> None:
        """A result, into global memory."""
        self._results.append(buffer[i].store(value.cast(buffer[i].dtype)))

    def kernel(self, name: str, flops: int) -> UOp:
        info = KernelInfo(name=name, estimates=Estimates(ops=flops))
        # the tag keeps tinygrad from optimizing it and from counting its operations, which fails
        return UOp.sink(*self._results, *self._now, arg=info, tag=1)
