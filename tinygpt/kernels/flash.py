"""Flash attention (arXiv:2205.14135, arXiv:2307.08691) for GPUs, as kernels made of UOps,
tinygrad's private interface.

A workgroup holds the tile of some queries (or, for the gradients of keys and values, of some keys)
in shared memory and walks over the tiles of what they see. The softmax is computed on the way, so
no matrix of T x S numbers is ever in memory; the backward pass computes its weights again from
`lse`, the logarithm of each query's sum, in base 2. tiles.py has the matrices, workgroup.py the
instructions. Heads may have as many numbers as find room there: at least 160 in float32, 240 in
bfloat16.
"""

import functools
import math

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.renderer import Renderer

from tinygpt.kernels.cpu.kernel import call_function, projected, strided
from tinygpt.kernels.jit import constant
from tinygpt.kernels.tiles import MATRICES, Heads, Problem, Tiles, choose_tiles
from tinygpt.kernels.workgroup import arguments, find_core, render, renderer_of

DTYPES = (dtypes.float32, dtypes.bfloat16, dtypes.float16)
HIDDEN = -1e30  # a score that weighs nothing; finite, for compilers that assume so


def fits(operation: str, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> bool:
    """Whether q, k and v are of one float type, on one device with workgroups, and heads of their
    size fit in a workgroup's memory. Rows of several documents, with starts, do not."""
    if starts is not None or not all((x.device, x.dtype) == (q.device, q.dtype) for x in (k, v)):
        return False
    if q.dtype not in DTYPES or not isinstance(q.device, str):
        return False
    renderer = renderer_of(q.device)
    if not renderer.has_local or q.dtype not in renderer.supported_dtypes():
        return False
    problem = _problem(q.shape, k.shape, q.dtype, renderer)
    return all(choose_tiles(problem, rows, cols, *counts) is not None for rows, cols, counts in (
        (problem.T, problem.S, MATRICES["forward"]),
        (problem.T, problem.S, MATRICES["gradient_of_queries"]),
        (problem.S, problem.T, MATRICES["gradient_of_keys"])))


def _rows_in_order(shape: tuple[int, ...]) -> Heads:
    _, H, T, D = shape
    return Heads(H * T * D, T * D, D)


def _problem(q: tuple[int, ...], k: tuple[int, ...], dtype: DType, renderer: Renderer,
             layouts: list[Heads] | None = None, window: int | None = None,
             drop: float = 0.0) -> Problem:
    """Of shapes q (B, H, T, D) and k (B, G, S, D)."""
    (B, H, T, D), (G, S) = q, k[1:3]
    return Problem(B, H, G, T, S, D, window, int(drop * 2**32), 1 - drop, dtype,
                   *(layouts or [_rows_in_order(shape) for shape in (q, k, k)]),
                   core=find_core(renderer, dtype), memory=renderer.shared_max)


def _add(x: UOp, y: UOp) -> UOp:
    return x + y


def forward(f: Problem, out: UOp, lse: UOp, q: UOp, k: UOp, v: UOp, offset: UOp,
            key: UOp | None = None) -> UOp:
    """The kernel that writes out (B, T, H, D) and lse (B, T, H) float32; all buffers are flat."""
    t = Tiles(f, "forward", f.T, f.S, f.B * f.H)
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
    t = Tiles(f, "gradient_of_queries", f.T, f.S, f.B * f.H)
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
    t = Tiles(f, "gradient_of_keys", f.S, f.T, f.B * f.G)
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


def attention(q, k, v, starts=None, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    assert starts is None
    B, H, T, D = q.shape
    inputs, layouts = _sources(q, k, v)
    drops = dropout_p > 0 and dropout_key is not None
    problem = _problem(q.shape, k.shape, q.dtype, renderer_of(q.device), layouts, window,
                       dropout_p if drops else 0.0)
    if isinstance(offset, UOp):
        start = (Tensor.zeros(1, dtype=dtypes.int32, device=q.device) + offset).contiguous()
    else:
        start = _position(offset, q.device)
    rest = [start, *([dropout_key] if drops else [])]

    def backward(dy: Tensor, made: list[Tensor]) -> list[Tensor | None]:
        y, lse = made
        dy = dy.cast(q.dtype)
        delta = (dy.cast(dtypes.float32) * y.cast(dtypes.float32)).sum(-1).contiguous()
        more = [dy, lse, delta, *inputs, *rest]
        dq, dk, dv = [_like(x) for x in inputs]
        if inputs[0] is inputs[1]:  # one matrix, of which each kernel writes some columns
            kernels = [(gradient_of_queries, (0,)), (gradient_of_keys, (0, 0))]
            grads = [*_run(problem, kernels, [dq], more), None, None]
        else:
            grads = [*_run(problem, [(gradient_of_queries, (0,))], [dq], more),
                     *_run(problem, [(gradient_of_keys, (0, 1))], [dk, dv], more)]
        return [*grads, *[None] * len(rest)]

    out = Tensor.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = Tensor.empty(B, T, H, dtype=dtypes.float32, device=q.device)
    made = _run(problem, [(forward, (0, 1))], [out, lse], [*inputs, *rest], backward)
    return made[0].transpose(1, 2)


def _sources(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Heads]]:
    """The memory of q, k and v, and where the elements of each are; three times the same where a
    kernel made them together."""
    if (found := projected(q, k, v)) is not None:
        source, places = found
        return [source] * 3, [Heads(*strides, start) for start, *strides in places]
    inputs, strides = zip(*[strided(x) for x in (q, k, v)], strict=True)
    return list(inputs), [Heads(*s) for s in strides]


def _run(problem: Problem, kernels: list[tuple], outputs: list[Tensor], inputs: list[Tensor],
         gradient=None) -> list[Tensor]:
    """Runs kernels, each given with the numbers of the outputs that it writes."""
    def build(kernel, numbers: tuple[int, ...]):
        def program(*buffers: UOp) -> UOp:
            flat = [b.base for b in buffers]
            return kernel(problem, *[flat[n] for n in numbers], *flat[len(outputs):])
        return program

    name = problem.name(kernels[0][0].__name__)
    return call_function(name, [build(*k) for k in kernels], outputs, inputs, gradient)


def sources(q: tuple[int, ...], k: tuple[int, ...], dtype: DType, renderer: Renderer,
            window: int | None = None, drop: float = 0.0) -> dict[str, str]:
    """The text of the three kernels for shapes q (B, H, T, D) and k (B, G, S, D)."""
    f = _problem(q, k, dtype, renderer, window=window, drop=drop)
    wide, narrow = (math.prod(q), dtype), (math.prod(k), dtype)
    row = (f.B * f.T * f.H, dtypes.float32)
    given = [wide, narrow, narrow, (1, dtypes.int32), *([(1, dtypes.uint32)] if drop else [])]
    kinds = {forward: [wide, row, *given], gradient_of_queries: [wide, wide, row, row, *given],
             gradient_of_keys: [narrow, narrow, wide, row, row, *given]}
    return {kernel.__name__: render(kernel(f, *arguments(kind)), renderer)
            for kernel, kind in kinds.items()}


def _like(x: Tensor) -> Tensor:
    return Tensor.empty(*x.shape, dtype=x.dtype, device=x.device)


@functools.cache
def _position(offset: int, device: str) -> Tensor:
    return constant(np.array([offset], np.int32), device)
