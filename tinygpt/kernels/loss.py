"""The loss that a model returns.

Private interfaces of tinygrad: Tensor's ufix and _wrap_uop are overridden.
"""

from collections.abc import Callable

from tinygrad import Tensor

from tinygpt.kernels.cpu.kernel import free_intermediate_gradients


class Loss(Tensor):
    """A scalar loss that may be read before `backward` and after the weights have changed.

    tinygrad drops the graph of what it realizes, so that a loss that was read would have no
    gradients, and it computes what was not realized from the weights as they are by then. This one
    keeps its graph, and `backward` realizes it together with the gradients of the weights (name ->
    Tensor, what `weights()` returns).
    """

    def __init__(self, loss: Tensor, weights: Callable[[], dict[str, Tensor]]):
        free_intermediate_gradients()  # of the backward passes before
        super().__init__(loss.uop)
        self._graph, self._weights = loss.uop, weights

    # What is computed from a loss is a Tensor. tinygrad would want an operand to be a Loss too.

    def ufix(self, x) -> Tensor:
        return x if isinstance(x, Tensor) else Tensor(self.uop).ufix(x)

    @classmethod
    def _wrap_uop(cls, uop) -> Tensor:
        return Tensor(uop)

    def backward(self, gradient: Tensor | None = None) -> Tensor:
        """Adds the gradients to the `grad` of every tensor in the graph, as Tensor.backward."""
        Tensor(self._graph).backward(gradient)
        grads = (w.grad for w in self._weights().values())
        return self.realize(*(grad for grad in grads if grad is not None))

    def gradient(self, *targets: Tensor, gradient: Tensor | None = None) -> list[Tensor]:
        """The gradients by the targets, as Tensor.gradient."""
        return Tensor(self._graph).gradient(*targets, gradient=gradient)
