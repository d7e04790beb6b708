"""Numbers in a byte each, in blocks that share a magnitude: arXiv:2110.02861's dynamic map.

Its 256 values are 0, 1 and seven decades below 1, each with twice as many values as the one below
it; with a sign half as many. A code is that of the nearest value.
"""

from tinygrad import Tensor

BLOCK = 256  # numbers that share a magnitude


def _decades(signed: bool) -> list[tuple[int, float, float]]:
    """(n, unit, least) of the seven decades, the lowest first.

    A decade has n values, unit * (0.1 + 0.9 (j + 0.5) / n), with the codes n + j; numbers from
    `least` on are nearer to one of them than to those below.
    """
    found, below = [], 0.0
    for i in range(7):
        n, unit = 2**i * (1 if signed else 2), 10.0**(i - 6)
        found.append((n, unit, (below + unit * (0.1 + 0.45 / n)) / 2))
        below = unit * (1 - 0.45 / n)
    return found


def dequantize(codes: Tensor, tops: Tensor, signed: bool) -> Tensor:
    """What `quantize` made codes (N, 256) uint8 and tops (N, 1) float32 of, roughly."""
    k = (codes & 127 if signed else codes).cast("int32")
    n, unit = k.const_like(0), tops.const_like(0.0)
    for size, value, _ in _decades(signed):
        n, unit = (k >= size).where(size, n), (k >= size).where(value, unit)
    x = (n > 0).where(unit * (0.1 + 0.9 * (k - n + 0.5) / n.maximum(1)), 0.0)
    x = (codes == (128 if signed else 1)).where(1.0, x)
    return ((codes > 128) & signed).where(-x, x) * tops


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """x (N, 256) float32, not negative unless signed -> codes uint8, largest magnitudes (N, 1).

    Without a sign only zero becomes zero: the root of a second moment divides.
    """
    tops = x.abs().max(-1, keepdim=True).contiguous()
    y = x.abs() / (tops > 0).where(tops, 1.0)
    n, unit = y.const_like(0.0), y.const_like(1.0)
    for number, (size, value, least) in enumerate(_decades(signed)):
        reached = y > 0 if number == 0 and not signed else y >= least
        n, unit = reached.where(size, n), reached.where(value, unit)
    j = ((y / unit - 0.1) / 0.9 * n).floor().maximum(0.0).minimum(n - 1)
    codes = (n > 0).where(n + j, 0.0)
    last = _decades(signed)[-1][0]
    whole = (1 + (1 - 0.45 / last)) / 2  # larger numbers are nearest to 1
    if not signed:
        return (y > whole).where(1.0, codes).cast("uint8"), tops
    codes = ((x < 0) & (codes > 0)).where(codes + 128, codes)
    return ((x > 0) & (y > whole)).where(128.0, codes).cast("uint8"), tops


def in_blocks(x: Tensor) -> Tensor:
    """The elements of x and zeros up to a whole block, (N, 256)."""
    return x.reshape(-1).pad((0, -x.numel() % BLOCK)).reshape(-1, BLOCK)
