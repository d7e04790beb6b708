"""Optimizers. Each is a rule on tensors that the compiled train step contains.

All have one interface: `update` gives the assignments of a step, `state_dict` and
`load_state_dict` keep the state between runs, `nbytes` says what it takes.
"""

import math

import numpy as np
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.checkpoint import CheckpointError, check_shapes
from tinygpt.config import TrainConfig


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements together, a scalar float32."""
    return sum((t.square().sum().contiguous() for t in tensors), start=Tensor(0.0)).sqrt()


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """What to multiply gradients of that norm with so that it is at most limit; 0: no limit."""
    return (limit / (norm + 1e-6)).minimum(1.0) if limit else norm.ones_like()


def make_optimizer(params: dict[str, Tensor], config: TrainConfig) -> "Optimizer":
    """The optimizer that config names, on float32 tensors by name."""
    cls = {"adamw": AdamW, "muon": Muon}[config.optimizer]
    return cls(params, config.beta1, config.beta2, config.weight_decay)


class Optimizer:
    """What all optimizers share. params are float32 tensors by name.

    step (1,) float32 counts the updates made.
    """

    def __init__(self, params: dict[str, Tensor]):
        self.params = params
        self.step = Tensor.zeros(1).contiguous().realize()

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        """The assignments of one step, to be realized together.

        grads are in the order of params and are multiplied by scale, a scalar; learning_rate (1,)
        float32. Where apply, a scalar bool, is false, nothing changes, the count of steps included.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """The state beside the parameters, by name."""
        raise NotImplementedError

    def load_state_dict(self, arrays: dict[str, np.ndarray], path="the state") -> None:
        """Takes state of the same names and shapes; raises ValueError, changing nothing, else."""
        state = self.state_dict()
        if _maker(arrays) != _maker(state):
            raise CheckpointError(f"{path} has the state of the optimizer {_maker(arrays)}, not of "
                                  f"{_maker(state)}: use --optimizer {_maker(arrays)}, or start "
                                  "a new run")
        check_shapes(arrays, {k: t.shape for k, t in state.items()}, path)
        for name, tensor in state.items():
            tensor.assign(Tensor(arrays[name])).realize()

    def nbytes(self) -> int:
        """Bytes of the state beside the parameters."""
        return sum(t.nbytes() for t in self.state_dict().values())


def _maker(state: dict) -> str:
    """The optimizer that a state belongs to: all but AdamW's have names that begin with it."""
    kinds = {name.split(".")[0] for name in state}
    return next((kind for kind in ("muon",) if kind in kinds), "adamw")


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101) on weights of two or more dimensions.

    The moments m and v are float32 of the parameters' shapes.
    """

    def __init__(self, params: dict[str, Tensor], beta1: float = 0.9, beta2: float = 0.99,
                 weight_decay: float = 0.1, eps: float = 1e-8):
        super().__init__(params)
        self.beta1, self.beta2, self.weight_decay, self.eps = beta1, beta2, weight_decay, eps
        self.m = {name: _zeros_like(p) for name, p in params.items()}
        self.v = {name: _zeros_like(p) for name, p in params.items()}

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
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


class Muon(Optimizer):
    """Muon (arXiv:2502.16982) for the blocks' matrices, AdamW for all other parameters.

    The momentum, float32 of a matrix's shape, is orthogonalized before it is taken as a step, and
    the step scaled to the root mean square that AdamW's have, 0.2, so that AdamW's learning rate
    and weight decay suit both.
    """

    def __init__(self, params: dict[str, Tensor], beta1: float = 0.9, beta2: float = 0.99,
                 weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params)
        self.weight_decay, self.momentum = weight_decay, momentum
        self.m = {name: _zeros_like(p) for name, p in params.items()
                  if name.startswith("h.") and p.ndim == 2}
        rest = {name: p for name, p in params.items() if name not in self.m}
        self.rest = AdamW(rest, beta1, beta2, weight_decay)
        self.step = self.rest.step

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        named = dict(zip(self.params, grads, strict=True))
        updated = self.rest.update([named[name] for name in self.rest.params], learning_rate,
                                   scale, apply)
        for name, m in self.m.items():
            p, grad = self.params[name], named[name] * scale
            m.assign(apply.where(self.momentum * m + grad, m))
            step = orthogonalize(grad + self.momentum * m) * (0.2 * math.sqrt(max(p.shape)))
            moved = p * (1 - learning_rate * self.weight_decay) - learning_rate * step
            updated += [m, p.assign(apply.where(moved, p))]
        return updated

    def state_dict(self) -> dict[str, Tensor]:
        """step, muon.<name> of the matrices, and AdamW's m.<name> and v.<name> of the rest."""
        return self.rest.state_dict() | {f"muon.{k}": t for k, t in self.m.items()}


def orthogonalize(x: Tensor) -> Tensor:
    """The orthogonal matrix nearest to x, roughly: u f(s) v^T for x = u s v^T, f(s) about 1.

    x (R, C) float32 -> the same. Five Newton-Schulz steps x <- (a + b A + c A^2) x, A = x x^T,
    as in arXiv:2502.16982, which bring singular values into 0.7..1.2. As A and its polynomials
    commute, the steps are taken on A, (N, N) with N = min(R, C), and their product applied to x
    once: a third to a half of the operations. Float32 bears that, half precision would not.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (x / (x.square().sum().sqrt() + 1e-7).contiguous()).contiguous()
    flipped = x.T.contiguous()
    wide = x.shape[0] <= x.shape[1]
    A = kernels.linear(x, x) if wide else kernels.linear(flipped, flipped)  # (N, N)
    eye, product = Tensor.eye(A.shape[0]) * a, None
    for i in range(5):
        step = (eye + b * A + c * kernels.linear(A, A)).contiguous()
        product = step if product is None else kernels.linear(product, step)
        if i < 4:
            A = kernels.linear(kernels.linear(step, A), step)
            A = ((A + A.T) / 2).contiguous()  # else what is not symmetric grows at every step
    return kernels.linear(product, flipped) if wide else kernels.linear(x, product)


def _zeros_like(p: Tensor) -> Tensor:
    return Tensor(np.zeros(p.shape, np.float32)).realize()
