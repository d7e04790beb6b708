"""Gradient checkpointing (arXiv:1604.06174): of each block only the input is kept.

All else is computed again for the gradient of the block: one more forward pass, and memory for one
block instead of all.
"""

import copy
from functools import partial

from tinygrad import Tensor


class Chain:
    """The blocks of a model on x (B, T, C): `end` is their output, to compute the loss from."""

    def __init__(self, x: Tensor, blocks: list, ctx):
        self.start, self.end = x, x.detach().contiguous()
        self.inputs, self.blocks = [], []
        for layer, block in enumerate(blocks):
            self.inputs.append(self.end)
            again = copy.copy(ctx)  # from which the same dropout keys follow
            self.blocks.append(partial(block, ctx=again, layer=layer))
            self.end = block(self.end, ctx, layer).detach().contiguous()

    def gradients(self, loss: Tensor, params: dict[str, Tensor]) -> list[Tensor]:
        """Gradients by params of a scalar loss that was computed from `end`.

        The weights of block i have names that begin with "h.i.", those outside the blocks others.
        """
        total: dict[str, Tensor] = {}

        def back(y: Tensor, x: Tensor, names: list[str], grad: Tensor | None) -> Tensor:
            dx, *grads = y.gradient(x, *(params[name] for name in names), gradient=grad)
            for name, g in zip(names, grads, strict=True):
                total[name] = total[name] + g if name in total else g
            return dx.contiguous()

        outside = [name for name in params if not name.startswith("h.")]
        grad = back(loss, self.end, outside, None)
        for i in reversed(range(len(self.blocks))):
            x = _wait_for(grad, self.inputs[i])
            grad = back(self.blocks[i](x), x, [n for n in params if n.startswith(f"h.{i}.")], grad)
        back(self.start, self.start, outside, grad)
        return [total[name] for name in params]


def _wait_for(grad: Tensor, x: Tensor) -> Tensor:
    """A copy of x that depends on grad.

    Without it the second computation would have the graph of the first, so that tinygrad would keep
    the results of the first instead.
    """
    first = grad.detach()[(slice(None), *(slice(1) for _ in range(x.ndim - 1)))].cast(x.dtype)
    return (first != first).where(first, x).contiguous()  # NaN makes the result NaN
