"""Flash attention (arXiv:2205.14135, arXiv:2307.08691) for GPUs, as kernels made of UOps.

A workgroup holds the tile of some queries (or, for the gradients of keys and values, of some keys)
in shared memory and walks over the tiles of what they see. The softmax is computed on the way, so
no matrix of T x S numbers is ever in memory; the backward pass computes its weights again from
`lse`, the logarithm of each query's sum, in base 2. workgroup.py has the instructions.
"""

import functools
import math
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType

from tinygpt.kernels.cpu.launch import plain, untransposed
from tinygpt.kernels.random import mix
from tinygpt.kernels.workgroup import PLAIN, WARP, Core, Program, find_core, renderer_of

DTYPES = (dtypes.float32, dtypes.bfloat16, dtypes.float16)
HIDDEN = -1e30  # a score that weighs nothing; finite, for compilers that assume so
# (warps of the workgroup, rows of the other side's tiles), the best that fits being the first
TILES = ((4, 64), (4, 32), (2, 32), (2, 16), (1, 32), (1, 16), (1, 8))


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Are these of one float type on one device with workgroups?"""
    if not all((x.device, x.dtype) == (q.device, q.dtype) for x in (k, v)):
        return False
    return q.dtype in DTYPES and isinstance(q.device, str) and renderer_of(q.device).has_local


@dataclass(frozen=True)
class Heads:
    """A matrix of rows of D numbers for every batch and head: where in memory its elements are."""

    batch: int
    head: int
    row: int

    def at(self, b: UOp, h: UOp, i: UOp, d: UOp | int = 0) -> UOp:
        return b * self.batch + h * self.head + i * self.row + d


def _heads(x: Tensor) -> tuple[Tensor, Heads]:
    """The memory of x (B, H, T, D), and where its elements are."""
    if (y := untransposed(x)) is not None:
        _, T, H, D = y.shape
        return y, Heads(T * H * D, D, H * D)
    _, H, T, D = x.shape
    return x, Heads(H * T * D, T * D, D)


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


class Tiles:
    """One workgroup's tile of rows, the tiles of columns that it meets, and their products."""

    def __init__(self, problem: Problem, rows: int, cols: int, heads: int, own: int, other: int,
                 scores: int):
        """There are `rows` rows and `cols` columns in each of `heads` heads; in shared memory
        `own` tiles of rows, `other` tiles of columns and `scores` of rows x columns."""
        self.problem, core = problem, problem.core
        step, size = max(8, core.K), problem.dtype.itemsize
        self.core, self.depth = core, -(-problem.D // step) * step
        padding = core.padding // size
        self.width = self.depth + padding
        for warps, self.cols in TILES:
            self.rows, self.score_width = warps * core.M, self.cols + padding
            needed = (own * self.rows + other * self.cols) * self.width * size
            needed += self.rows * (scores * self.score_width * size + core.mates * 4)
            if (needed <= problem.memory and self.cols % step == 0
                    and (warps - 1) * core.M < rows and (self.cols <= 16 or self.cols < 2 * cols)):
                break
        else:
            raise ValueError(f"flash attention has no tiles for a head of {problem.D} numbers in "
                             f"{problem.memory} bytes: use smaller heads or other kernels")
        count = -(-rows // self.rows)
        self.program = Program(warps * WARP, heads * count)
        self.lane = self.program.thread % WARP
        self.warp = self.program.thread // WARP
        self.head = self.program.block // count
        # the last queries see the most keys: they begin first
        self.first = (count - 1 - self.program.block % count) * self.rows
        self.reduced = self.program.shared(self.rows * core.mates, dtypes.float32)

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


def _add(x: UOp, y: UOp) -> UOp:
    return x + y


def forward(f: Problem, out: UOp, lse: UOp, q: UOp, k: UOp, v: UOp, offset: UOp,
            key: UOp | None = None) -> UOp:
    """The kernel that writes out (B, T, H, D) and lse (B, T, H) float32; all buffers are flat."""
    t = Tiles(f, f.T, f.S, f.B * f.H, own=1, other=2, scores=1)
    p, slots = t.program, range(f.core.slots)
    b, h, start = t.head // f.H, t.head % f.H, f.start(offset)
    g = h // (f.H // f.G)
    (queries,) = t.matrices(1, t.rows, t.width)
    keys, values = t.matrices(2, t.cols, t.width)
    (weights,) = t.matrices(1, t.rows, t.score_width)
    sums, scores = t.accumulator(t.depth), t.accumulator(t.cols)
    top, peak, fade, total = (p.registers(len(slots)) for _ in range(4))
    p.set(top, {s: HIDDEN for s in slots})
    t.clear(total)
    t.fill(queries, t.rows, q, f.q, b, h, t.first, f.T)
    p.barrier()

    first, count = f.keys_of(t.first, t.rows, start, t.cols)
    with p.loop(count) as step:
        j = (first + step) * t.cols
        t.fill(keys, t.cols, k, f.k, b, g, j, f.S)
        t.fill(values, t.cols, v, f.v, b, g, j, f.S)
        p.barrier()
        t.scores(scores, queries, keys)
        places = t.places(t.cols)
        seen = {n: f.sees(t.first + row, j + col, start) for n, _, row, col in places}
        in_slot = [[n for n, slot, _, _ in places if slot == s] for s in slots]
        p.set(scores, {n: seen[n].where(p.get(scores, n) * (f.scale * math.log2(math.e)), HIDDEN)
                       for n in seen})
        new = t.reduce_rows([functools.reduce(UOp.maximum, [p.get(scores, n) for n in ns])
                             for ns in in_slot], UOp.maximum)
        p.set(peak, {s: p.get(top, s).maximum(new[s]) for s in slots})
        p.set(fade, {s: (p.get(top, s) - p.get(peak, s)).exp2() for s in slots})
        p.set(top, {s: p.get(peak, s) for s in slots})
        p.set(scores, {n: seen[n].where((p.get(scores, n) - p.get(peak, slot)).exp2(), 0.0)
                       for n, slot, _, _ in places})
        p.set(total, {s: functools.reduce(_add, [p.get(scores, n) for n in in_slot[s]],
                                          p.get(total, s) * p.get(fade, s)) for s in slots})
        if key is not None:
            p.set(scores, {n: f.kept(b, h, t.first + row, j + col, key).where(
                p.get(scores, n), 0.0) for n, _, row, col in places})
        t.share_scores(weights, scores)
        p.set(sums, {n: p.get(sums, n) * p.get(fade, slot)
                     for n, slot, _, _ in t.places(t.depth)})
        p.barrier()
        t.accumulate(sums, weights, values)
        p.barrier()

    whole = t.reduce_rows([p.get(total, s) for s in slots], _add)
    for s, row in zip(slots, t.rows_of_slots(), strict=True):
        i = t.first + row
        p.write(lse, f.statistics.at(b, h, i).valid((i < f.T) & (f.core.mate(t.lane) < 1)),
                p.get(top, s) + whole[s].log2())
    for n, slot, row, col in t.places(t.depth):
        i = t.first + row
        p.write(out, f.out.at(b, h, i, col).valid((i < f.T) & (col < f.D)),
                p.get(sums, n) * (whole[slot] * f.keep).reciprocal())
    return p.kernel(f.name("forward"), 2 * f.product)


def gradient_of_queries(f: Problem, dq: UOp, dy: UOp, lse: UOp, delta: UOp, q: UOp, k: UOp, v: UOp,
                        offset: UOp, key: UOp | None = None) -> UOp:
    """The kernel that writes dq from dy (B, T, H, D) and from delta (B, T, H), sum(dy * y)."""
    t = Tiles(f, f.T, f.S, f.B * f.H, own=2, other=2, scores=1)
    p, b, h, start = t.program, t.head // f.H, t.head % f.H, f.start(offset)
    g = h // (f.H // f.G)
    queries, gradients = t.matrices(2, t.rows, t.width)
    keys, values = t.matrices(2, t.cols, t.width)
    (dscores,) = t.matrices(1, t.rows, t.score_width)
    sums = t.accumulator(t.depth)
    scores, dweights = t.accumulator(t.cols), t.accumulator(t.cols)
    t.fill(queries, t.rows, q, f.q, b, h, t.first, f.T)
    t.fill(gradients, t.rows, dy, f.out, b, h, t.first, f.T)
    p.barrier()

    first, count = f.keys_of(t.first, t.rows, start, t.cols)
    with p.loop(count) as step:
        j = (first + step) * t.cols
        t.fill(keys, t.cols, k, f.k, b, g, j, f.S)
        t.fill(values, t.cols, v, f.v, b, g, j, f.S)
        p.barrier()
        t.scores(scores, queries, keys)
        t.scores(dweights, gradients, values)
        pairs = {n: (t.first + row, j + col) for n, _, row, col in t.places(t.cols)}
        _differentiate(t, scores, dweights, pairs, b, h, start, lse, delta, key)
        t.share_scores(dscores, dweights)
        p.barrier()
        t.accumulate(sums, dscores, keys)
        p.barrier()

    _write_rows(t, dq, f.q, sums, b, h, f.T)
    return p.kernel(f.name("dq"), 3 * f.product)


def gradient_of_keys(f: Problem, dk: UOp, dv: UOp, dy: UOp, lse: UOp, delta: UOp, q: UOp, k: UOp,
                     v: UOp, offset: UOp, key: UOp | None = None) -> UOp:
    """The kernel that writes dk and dv; every tile of keys meets the queries that see it."""
    t = Tiles(f, f.S, f.T, f.B * f.G, own=2, other=2, scores=2)
    p, b, g, start = t.program, t.head // f.G, t.head % f.G, f.start(offset)
    keys, values = t.matrices(2, t.rows, t.width)
    queries, gradients = t.matrices(2, t.cols, t.width)
    weights, dscores = t.matrices(2, t.rows, t.score_width)
    key_sums, value_sums = t.accumulator(t.depth), t.accumulator(t.depth)
    scores, dweights = t.accumulator(t.cols), t.accumulator(t.cols)
    t.fill(keys, t.rows, k, f.k, b, g, t.first, f.S)
    t.fill(values, t.rows, v, f.v, b, g, t.first, f.S)
    p.barrier()

    first, count = f.queries_of(t.first, t.rows, start, t.cols)
    with p.loop(f.H // f.G) as member:
        h = g * (f.H // f.G) + member
        with p.loop(count) as step:
            i = (first + step) * t.cols
            t.fill(queries, t.cols, q, f.q, b, h, i, f.T)
            t.fill(gradients, t.cols, dy, f.out, b, h, i, f.T)
            p.barrier()
            t.scores(scores, keys, queries)
            t.scores(dweights, values, gradients)
            pairs = {n: (i + col, t.first + row) for n, _, row, col in t.places(t.cols)}
            _differentiate(t, scores, dweights, pairs, b, h, start, lse, delta, key)
            t.share_scores(weights, scores)
            t.share_scores(dscores, dweights)
            p.barrier()
            t.accumulate(value_sums, weights, gradients)
            t.accumulate(key_sums, dscores, queries)
            p.barrier()

    _write_rows(t, dk, f.k, key_sums, b, g, f.S)
    _write_rows(t, dv, f.v, value_sums, b, g, f.S)
    return p.kernel(f.name("dkv"), 4 * f.product)


def _differentiate(t: Tiles, scores: UOp, dweights: UOp, pairs: dict[int, tuple[UOp, UOp]],
                   b: UOp, h: UOp, start: UOp, lse: UOp, delta: UOp, key: UOp | None) -> None:
    """Turns products q k into softmax's weights after dropout, and products dy v, the gradients
    of those weights, into the gradients of the products q k. `pairs` says of which query and key
    each register is."""
    f, p = t.problem, t.program

    def statistic(buffer: UOp, i: UOp) -> UOp:
        return buffer[f.statistics.at(b, h, i).valid(i < f.T)]

    p.set(scores, {n: f.sees(i, j, start).where(
        (p.get(scores, n) * (f.scale * math.log2(math.e)) - statistic(lse, i)).exp2(), 0.0)
        for n, (i, j) in pairs.items()})
    kept = {n: None if key is None else f.kept(b, h, i, j, key) for n, (i, j) in pairs.items()}

    def dropped(registers: UOp, n: int) -> UOp:
        x = p.get(registers, n)
        return x if kept[n] is None else kept[n].where(x * (1 / f.keep), 0.0)

    p.set(dweights, {n: p.get(scores, n) * (dropped(dweights, n) - statistic(delta, i)) * f.scale
                     for n, (i, _) in pairs.items()})
    if key is not None:
        p.set(scores, {n: dropped(scores, n) for n in pairs})


def _write_rows(t: Tiles, buffer: UOp, heads: Heads, registers: UOp, b: UOp, h: UOp,
                end: int) -> None:
    for n, _, row, col in t.places(t.depth):
        i = t.first + row
        t.program.write(buffer, heads.at(b, h, i, col).valid((i < end) & (col < t.problem.D)),
                        t.program.get(registers, n))


def attention(q, k, v, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    inputs, layouts = zip(*[_heads(x) for x in (q, k, v)], strict=True)
    inputs = [plain(x) for x in inputs]
    drops = dropout_p > 0 and dropout_key is not None
    renderer = renderer_of(q.device)
    problem = Problem(B, H, G, T, S, D, window, int(dropout_p * 2**32) if drops else 0,
                      1 - dropout_p if drops else 1.0, q.dtype, *layouts,
                      core=find_core(renderer, q.dtype), memory=renderer.shared_max)
    if isinstance(offset, UOp):
        start = (Tensor.zeros(1, dtype=dtypes.int32, device=q.device) + offset).contiguous()
    else:
        start = _position(offset, q.device)
    given = [*inputs, start, *([dropout_key] if drops else [])]

    def backward(dy: UOp, call: UOp):
        y, lse = [Tensor(b.after(call)) for b in call.src[1:3]]
        dy = Tensor(dy).cast(q.dtype).contiguous()
        delta = (dy.cast(dtypes.float32) * y.cast(dtypes.float32)).sum(-1).contiguous()
        more = [dy, lse, delta, *given]
        dq = _run(gradient_of_queries, problem, [_like(inputs[0])], more)
        dkv = _run(gradient_of_keys, problem, [_like(x) for x in inputs[1:]], more)
        return (None, None, *[x.uop for x in (*dq, *dkv)], *[None] * (len(given) - 3))

    out = Tensor.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = Tensor.empty(B, T, H, dtype=dtypes.float32, device=q.device)
    return _run(forward, problem, [out, lse], given, backward)[0].transpose(1, 2)


def _run(kernel, problem: Problem, outputs: list[Tensor], inputs: list[Tensor],
         gradient=None) -> list[Tensor]:
    def build(*buffers: UOp) -> UOp:
        return kernel(problem, *[b.base for b in buffers])

    return Tensor.custom_kernel(*outputs, *inputs, fxn=build, grad_fxn=gradient)[:len(outputs)]


def _like(x: Tensor) -> Tensor:
    return Tensor.empty(*x.shape, dtype=x.dtype, device=x.device)


@functools.cache
def _position(offset: int, device: str) -> Tensor:
    return Tensor([offset], dtype=dtypes.int32, device=device).realize()
