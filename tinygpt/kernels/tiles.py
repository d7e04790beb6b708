"""Tiles of attention's matrices: what one workgroup holds in shared memory, where in global memory
it comes from, and how its warps multiply it. flash.py has the algorithm."""

import functools
import math
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType

from tinygpt.kernels.random import mix
from tinygpt.kernels.workgroup import PLAIN, WARP, Core, Program

# (warps of the workgroup, rows of the other side's tiles), the best that fits being the first
TILES = ((4, 64), (4, 32), (2, 32), (2, 16), (1, 32), (1, 16), (1, 8))
# matrices in shared memory: tiles of rows, of columns, and of rows x columns
MATRICES = {"forward": (1, 2, 1), "gradient_of_queries": (2, 2, 1), "gradient_of_keys": (2, 2, 2)}


@dataclass(frozen=True)
class Heads:
    """A matrix of rows of D numbers for every batch and head: where in memory its elements are."""

    batch: int
    head: int
    row: int
    first: int = 0

    def at(self, b: UOp, h: UOp, i: UOp, d: UOp | int = 0) -> UOp:
        return b * self.batch + h * self.head + i * self.row + d + self.first


@dataclass(frozen=True)
class Problem:
    """What is known when the kernels are written."""

    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    window: int | None
    threshold: int  # random words below it drop a weight; 0 for no dropout
    keep: float  # the share of weights that stay
    dtype: DType
    q: Heads
    k: Heads
    v: Heads
    core: Core
    memory: int  # bytes that a workgroup may share

    @property
    def out(self) -> Heads:
        return Heads(self.T * self.H * self.D, self.D, self.H * self.D)

    @property
    def padding(self) -> int:
        """Elements between the rows of matrices in shared memory."""
        return self.core.padding // self.dtype.itemsize

    @property
    def depth(self) -> int:
        """D, padded to what the core multiplies at once."""
        step = max(8, self.core.K)
        return -(-self.D // step) * step

    @property
    def statistics(self) -> Heads:
        return Heads(self.T * self.H, 1, self.H)

    @property
    def product(self) -> int:
        """Floating-point operations of the products of all queries and the keys that they see."""
        return self.B * self.H * self.D * self.T * (2 * self.S - self.T)

    def name(self, what: str) -> str:
        return f"flash_{what}_{self.B}_{self.H}_{self.T}_{self.S}_{self.D}"

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.D)

    def start(self, offset: UOp) -> UOp:
        """The position of the first query."""
        return offset[0].cast(dtypes.weakint).maximum(0).minimum(self.S)

    def keys_of(self, i: UOp, rows: int, start: UOp, cols: int) -> tuple[UOp, UOp]:
        """The first tile of keys that the `rows` queries from i see, and how many there are."""
        end = (start + i + rows).minimum(self.S)
        first = 0 if self.window is None else (start + i - self.window + 1).maximum(0) // cols
        return first + end * 0, ((end + cols - 1) // cols - first).maximum(0)

    def queries_of(self, j: UOp, rows: int, start: UOp, cols: int) -> tuple[UOp, UOp]:
        """The first tile of queries that see any of the `rows` keys from j, and how many."""
        first = (j - start).maximum(0) // cols
        end = self.T + first * 0
        if self.window is not None:
            end = (j + rows - 1 + self.window - start).minimum(self.T).maximum(0)
        return first, ((end + cols - 1) // cols - first).maximum(0)

    def sees(self, i: UOp, j: UOp, start: UOp) -> UOp:
        seen = (i < self.T) & (j < self.S) & (j <= i + start)
        return seen if self.window is None else seen & (i + start < j + self.window)

    def kept(self, b: UOp, h: UOp, i: UOp, j: UOp, key: UOp) -> UOp:
        """Whether dropout leaves a weight, exactly as `random_bits` of (B, H, T, S) have it."""
        def word(x):
            return x.cast(dtypes.uint32)

        index = (word(b * self.H + h) * self.T + word(i)) * self.S + word(j)
        return (mix(mix(index) + key[0]) < self.threshold).logical_not()


def choose_tiles(f: Problem, rows: int, cols: int, own: int, other: int,
                 scores: int) -> tuple[int, int] | None:
    """The best of TILES for `rows` rows and `cols` columns that finds room for so many MATRICES."""
    size = f.dtype.itemsize
    for warps, width in TILES:
        height = warps * f.core.M
        needed = (own * height + other * width) * (f.depth + f.padding) * size
        needed += height * (scores * (width + f.padding) * size + f.core.mates * 4)
        if (needed <= f.memory and width % f.core.K == 0 and height < rows + f.core.M
                and (width <= 16 or width < 2 * cols)):
            return warps, width
    return None


class Tiles:
    """One workgroup's tile of rows, the tiles of columns that it meets, and their products."""

    def __init__(self, problem: Problem, kernel: str, rows: int, cols: int, heads: int):
        """There are `rows` rows and `cols` columns in each of `heads` heads."""
        self.problem, self.core, self.depth = problem, problem.core, problem.depth
        chosen = choose_tiles(problem, rows, cols, *MATRICES[kernel])
        assert chosen is not None, "asked for without `fits`"
        warps, self.cols = chosen
        self.rows = warps * self.core.M
        self.width, self.score_width = self.depth + problem.padding, self.cols + problem.padding
        count = -(-rows // self.rows)
        self.program = Program(warps * WARP, heads * count)
        self.lane = self.program.thread % WARP
        self.warp = self.program.thread // WARP
        self.head = self.program.block // count
        # the last queries see the most keys: they begin first
        self.first = (count - 1 - self.program.block % count) * self.rows
        self.reduced = self.program.shared(self.rows * self.core.mates, dtypes.float32)

    def matrices(self, count: int, rows: int, width: int) -> list[UOp]:
        return [self.program.shared(rows * width, self.problem.dtype) for _ in range(count)]

    def accumulator(self, width: int) -> UOp:
        """Registers for (rows, width) numbers, all 0."""
        registers = self.program.registers(width // 8 * self.core.counts[2])
        self.clear(registers)
        return registers

    def clear(self, registers: UOp) -> None:
        self.program.set(registers, {e: 0.0 for e in range(math.prod(registers.shape))})

    def places(self, width: int) -> list[tuple[int, int, UOp, UOp]]:
        """Of each register of an accumulator: its number, slot, row and column."""
        core, per = self.core, self.core.counts[2]
        found = []
        for n in range(width // 8):
            for e in range(per):
                row, col = core.c(self.lane, e)
                found.append((n * per + e, core.slot(e), self.warp * core.M + row, n * 8 + col))
        return found

    def rows_of_slots(self) -> list[UOp]:
        return [self.warp * self.core.M + self.core.row(self.lane, s)
                for s in range(self.core.slots)]

    def fill(self, matrix: UOp, rows: int, buffer: UOp, heads: Heads, b: UOp, h: UOp, first: UOp,
             end: int) -> None:
        """Rows from `first` on into shared memory, with 0 behind row `end` and column D."""
        program = self.program
        step = program.each(rows * self.depth // program.threads)
        place = step * program.threads + program.thread
        row, col = place // self.depth, place % self.depth
        i = heads.at(b, h, first + row, col)
        value = buffer[i.valid((first + row < end) & (col < self.problem.D))]
        program.set_shared(matrix, row * self.width + col, value, step)

    def share_scores(self, matrix: UOp, scores: UOp) -> None:
        for n, _, row, col in self.places(self.cols):
            self.program.set_shared(matrix, row * self.score_width + col,
                                    self.program.get(scores, n))

    def scores(self, registers: UOp, a: UOp, b: UOp) -> None:
        """registers (rows, cols) = a (rows, D) b (cols, D)^T."""
        self.clear(registers)
        self._multiply(registers, a, self.width, self.depth, self.cols,
                       lambda k, col: self.program.get_shared(b, col * self.width + k))

    def accumulate(self, registers: UOp, a: UOp, b: UOp) -> None:
        """registers (rows, D) += a (rows, cols) b (cols, D)."""
        self._multiply(registers, a, self.score_width, self.cols, self.depth,
                       lambda k, col: self.program.get_shared(b, k * self.width + col))

    def _multiply(self, registers, a, a_width, depth, width, b_at) -> None:
        core, lane, program = self.core, self.lane, self.program
        kind = dtypes.float32 if core is PLAIN else self.problem.dtype
        with program.loop(depth // core.K) as step:
            k0, left = step * core.K, []
            for e in range(core.counts[0]):
                row, k = core.a(lane, e)
                i = (self.warp * core.M + row) * a_width + k0 + k
                left.append(program.get_shared(a, i).cast(kind))
            for n in range(width // 8):
                places = [core.b(lane, e) for e in range(core.counts[1])]
                right = [b_at(k0 + k, n * 8 + col).cast(kind) for k, col in places]
                program.multiply(core, left, right, registers, n * core.counts[2])

    def reduce_rows(self, partial: list[UOp], operation) -> list[UOp]:
        """Of each slot's row: the operation over what every lane that has the row brings."""
        program, mates = self.program, self.core.mates
        rows = self.rows_of_slots()
        for row, x in zip(rows, partial, strict=True):
            program.set_shared(self.reduced, row * mates + self.core.mate(self.lane), x)
        program.barrier()
        return [functools.reduce(operation, [program.get_shared(self.reduced, row * mates + m)
                                             for m in range(mates)]) for row in rows]
