"""Gradients of a chain of blocks that keep nothing of a block but its input.

What a block computes on the way is computed again when its gradient is due (gradient
checkpointing, arXiv:1604.06174): one more forward pass, and memory for one block instead of all.
"""

from collections.abc import Callable

from tinygrad import Tensor


class Chain:
    """Blocks one after another, each called here for its output and later for its gradient."""

    def __init__(self, x: Tensor):
        self.start = x
        self.inputs: list[Tensor] = []
        self.blocks: list[Callable[[Tensor], Tensor]] = []
        self.end = x.detach().contiguous()  # where the loss is to be computed from

    def append(self, block: Callable[[Tensor], Tensor], again: Callable[[Tensor], Tensor]) -> None:
        """Puts a block at the end. again computes the same, whenever it is called."""
        self.inputs.append(self.end)
        self.blocks.append(again)
        self.end = block(self.end).detach().contiguous()

    def gradients(self, loss: Tensor, params: dict[str, Tensor]) -> list[Tensor]:
        """Gradients of a scalar loss, which `end` goes into, by params.

        Those of block i have names that begin with "h.i."; all others may be anywhere outside the
        blocks.
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
    """A copy of x that cannot be made before grad is there.

    Without it the graph of the second computation would be that of the first, and be the first.
    """
    first = grad.detach()[(slice(None), *(slice(1) for _ in range(x.ndim - 1)))].cast(x.dtype)
    return (first != first).where(first, x).contiguous()  # where it is no number, nor is the result
