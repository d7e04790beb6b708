"""Optimizers. Each is a rule on tensors that the compiled train step contains."""

import math

import numpy as np
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.checkpoint import check_shapes


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements together, a scalar float32."""
    return sum((t.square().sum().contiguous() for t in tensors), start=Tensor(0.0)).sqrt()


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """What to multiply gradients of that norm with so that it is at most limit; 0: no limit."""
    return (limit / (norm + 1e-6)).minimum(1.0) if limit else norm.ones_like()


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101) on weights of two or more dimensions.

    params are float32 tensors by name. The moments m and v are float32 of the same shapes; step
    (1,) float32 counts the updates made.
    """

    def __init__(self, params: dict[str, Tensor], beta1: float = 0.9, beta2: float = 0.99,
                 weight_decay: float = 0.1, eps: float = 1e-8):
        self.params, self.beta1, self.beta2 = params, beta1, beta2
        self.weight_decay, self.eps = weight_decay, eps
        self.step = Tensor.zeros(1).contiguous().realize()
        self.m = {name: _zeros_like(p) for name, p in params.items()}
        self.v = {name: _zeros_like(p) for name, p in params.items()}

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        """The assignments of one step, to be realized together.

        grads are in the order of params and are multiplied by scale, a scalar; learning_rate (1,)
        float32. Where apply, a scalar bool, is false, nothing changes, the count of steps included.
        """
        apply = apply.where(1.0, 0.0).reshape(1)
        self.step.assign(self.step + apply)
        shared = [scale.reshape(1), apply]
        options = {decay: self._options(learning_rate, decay, shared)
                   for decay in (self.weight_decay, 0.0)}
        updated = [self.step]
        for (name, p), g in zip(self.params.items(), grads, strict=True):
            decay = self.weight_decay if p.ndim >= 2 else 0.0
            updated += kernels.adamw(p, self.m[name], self.v[name], g, options[decay])
        return updated

    def _options(self, learning_rate: Tensor, decay: float, shared: list[Tensor]) -> Tensor:
        """What `kernels.adamw` is told, (9,) float32."""
        def debias(beta: float) -> Tensor:
            return 1 / (1 - (self.step * math.log(beta)).exp()) if beta else self.step.ones_like()
        fixed = [Tensor.full((1,), x) for x in (self.beta1, self.beta2, self.eps, decay)]
        return Tensor.cat(learning_rate, *fixed, debias(self.beta1), debias(self.beta2),
                          *shared).contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        """The state beside the parameters: step, m.<name>, v.<name>."""
        return {"step": self.step, **{f"m.{k}": t for k, t in self.m.items()},
                **{f"v.{k}": t for k, t in self.v.items()}}

    def load_state_dict(self, arrays: dict[str, np.ndarray], path="the state") -> None:
        """Takes state of the same names and shapes; raises ValueError, changing nothing, else."""
        state = self.state_dict()
        check_shapes(arrays, {k: t.shape for k, t in state.items()}, path)
        for name, tensor in state.items():
            tensor.assign(Tensor(arrays[name])).realize()


def _zeros_like(p: Tensor) -> Tensor:
    return Tensor(np.zeros(p.shape, np.float32)).realize()
