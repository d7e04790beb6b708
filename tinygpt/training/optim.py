"""Optimizers, whose updates are part of the compiled train step.

All have one interface: `update` returns the assignments of a step, `state_dict` and
`load_state_dict` save and load the state, `nbytes` is its size.
"""

import math
from contextlib import contextmanager

import numpy as np
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.checkpoint import CheckpointError, check_arrays
from tinygpt.kernels.blockwise import BLOCK
from tinygpt.kernels.options import AdamWOptions, LionOptions, MuonOptions


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements together, a scalar float32."""
    return kernels.square_sum(*tensors).sqrt()


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """The factor that clips gradients of that norm to the norm `limit`; 0: no limit."""
    return (limit / (norm + 1e-6)).minimum(1.0) if limit else norm.ones_like()


def make_optimizer(params: dict[str, Tensor], config) -> "Optimizer":
    """The optimizer that a TrainConfig names, on float32 tensors by name."""
    return OPTIMIZERS[config.optimizer](params, config.beta1, config.beta2, config.weight_decay)


class Optimizer:
    """Base class. params are float32 tensors by name; step (1,) float32 counts the updates."""

    state_size: float  # float32 numbers of state for each weight

    def __init__(self, params: dict[str, Tensor]):
        self.params = params
        self.step = Tensor.zeros(1).contiguous().realize()

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        """The assignments of one step, to be realized together.

        grads are in the order of params and are multiplied by scale, a scalar; learning_rate is
        (1,) float32. If apply, a scalar bool, is false, nothing changes, nor does step.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's state by name."""
        raise NotImplementedError

    def load_state_dict(self, arrays: dict[str, np.ndarray], path="the state") -> None:
        """Loads state of the same names and shapes. Raises ValueError, with nothing changed."""
        state = self.state_dict()
        if _maker(arrays) != _maker(state):
            raise CheckpointError(f"{path} has the state of the optimizer {_maker(arrays)}, not of "
                                  f"{_maker(state)}: use --optimizer {_maker(arrays)}, or start "
                                  "a new run")
        check_arrays(arrays, state, path)
        for name, tensor in state.items():
            tensor.assign(Tensor(arrays[name])).realize()

    def nbytes(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(t.nbytes() for t in self.state_dict().values())


def _maker(state: dict) -> str:
    """The optimizer of a state: names begin with it, but for AdamW."""
    kinds = {name.split(".")[0] for name in state}
    return next((kind for kind in OPTIMIZERS if kind in kinds), "adamw")


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101) on weights of two or more dimensions.

    The moments m and v are float32 of the parameters' shapes.
    """

    state_size = 2

    def __init__(self, params: dict[str, Tensor], beta1: float = 0.9, beta2: float = 0.99,
                 weight_decay: float = 0.1, eps: float = 1e-8):
        super().__init__(params)
        self.beta1, self.beta2, self.weight_decay, self.eps = beta1, beta2, weight_decay, eps
        self.m = {name: _zeros(p.shape) for name, p in params.items()}
        self.v = {name: _zeros(p.shape) for name, p in params.items()}

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        updated = [self.step.assign(self.step + apply.where(1.0, 0.0))]
        options = self.options(learning_rate, scale, apply)
        for (name, p), g in zip(self.params.items(), grads, strict=True):
            updated += kernels.adamw(p, self.m[name], self.v[name], g, options[p.ndim >= 2])
        return updated

    def options(self, learning_rate: Tensor, scale: Tensor, apply: Tensor) -> dict[bool, Tensor]:
        """The options of `kernels.adamw`, (9,) float32, of vectors (False) and matrices (True)."""
        def bias_correction(beta: float) -> Tensor:
            return 1 / (1 - (self.step * math.log(beta)).exp()) if beta else self.step.ones_like()
        return {is_matrix: _packed(AdamWOptions(
            learning_rate=learning_rate, beta1=self.beta1, beta2=self.beta2, eps=self.eps,
            weight_decay=self.weight_decay * is_matrix,
            bias_correction1=bias_correction(self.beta1),
            bias_correction2=bias_correction(self.beta2),
            grad_scale=scale, apply=apply.where(1.0, 0.0)))
            for is_matrix in (False, True)}

    def state_dict(self) -> dict[str, Tensor]:
        """step, m.<name>, v.<name>."""
        return {"step": self.step, **{f"m.{k}": t for k, t in self.m.items()},
                **{f"v.{k}": t for k, t in self.v.items()}}


class Lion(Optimizer):
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum.

    Its learning rate should be 3 to 10 times lower than AdamW's, its weight decay as much higher.
    The momentum is float32 of the parameters' shapes.
    """

    state_size = 1

    def __init__(self, params: dict[str, Tensor], beta1: float = 0.9, beta2: float = 0.99,
                 weight_decay: float = 0.1):
        super().__init__(params)
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.m = {name: _zeros(p.shape) for name, p in params.items()}

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        updated = [self.step.assign(self.step + apply.where(1.0, 0.0))]
        options = {is_matrix: _packed(LionOptions(
            learning_rate=learning_rate, beta1=self.beta1, beta2=self.beta2,
            weight_decay=self.weight_decay * is_matrix, grad_scale=scale,
            apply=apply.where(1.0, 0.0))) for is_matrix in (False, True)}
        for (name, p), g in zip(self.params.items(), grads, strict=True):
            updated += kernels.lion(p, self.m[name], g, options[p.ndim >= 2])
        return updated

    def state_dict(self) -> dict[str, Tensor]:
        """step, lion.<name>."""
        return {"step": self.step, **{f"lion.{k}": t for k, t in self.m.items()}}


class Muon(Optimizer):
    """Muon (arXiv:2502.16982) for the blocks' matrices, AdamW for all other parameters.

    The momentum, float32 of a matrix's shape, is orthogonalized, and scaled to the root mean square
    of AdamW's steps, 0.2, so that AdamW's learning rate and weight decay suit both.
    """

    state_size = 1

    def __init__(self, params: dict[str, Tensor], beta1: float = 0.9, beta2: float = 0.99,
                 weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params)
        self.weight_decay, self.momentum = weight_decay, momentum
        self.m = {name: _zeros(p.shape) for name, p in params.items()
                  if name.startswith("h.") and p.ndim == 2}
        rest = {name: p for name, p in params.items() if name not in self.m}
        self.rest = AdamW(rest, beta1, beta2, weight_decay)
        self.step = self.rest.step

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        named = dict(zip(self.params, grads, strict=True))
        updated = self.rest.update([named[name] for name in self.rest.params], learning_rate,
                                   scale, apply)
        options = _packed(MuonOptions(
            learning_rate=learning_rate, momentum=self.momentum, weight_decay=self.weight_decay,
            grad_scale=scale, apply=apply.where(1.0, 0.0)))
        return updated + kernels.muon([self.params[name] for name in self.m], [*self.m.values()],
                                      [named[name] for name in self.m], options)

    def state_dict(self) -> dict[str, Tensor]:
        """step, muon.<name> of the matrices, and AdamW's m.<name> and v.<name> of the rest."""
        return self.rest.state_dict() | {f"muon.{k}": t for k, t in self.m.items()}


class EMA:
    """An exponential moving average of weights, float32 tensors by name; starts at the weights."""

    def __init__(self, params: dict[str, Tensor], decay: float = 0.999):
        self.params, self.decay = params, decay
        self.weights = {name: Tensor(p.numpy()).realize() for name, p in params.items()}

    def update(self, step: Tensor, apply: Tensor) -> list[Tensor]:
        """The assignments of one step, to be realized together with the optimizer's.

        step (1,) float32 counts the updates, this one included. The decay is at most
        (1 + step) / (10 + step), so that the initial weights are soon forgotten. If apply, a scalar
        bool, is false, nothing changes.
        """
        share = 1 - ((1 + step) / (10 + step)).minimum(self.decay)
        return [average.assign(apply.where(average + share * (self.params[name] - average),
                                           average))
                for name, average in self.weights.items()]

    @contextmanager
    def in_place(self):
        """Swaps the weights and their average within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        # the contents, because compiled steps refer to the memory of the tensors
        weights, averages = list(self.params.values()), list(self.weights.values())
        kept = [p.clone() for p in weights]
        Tensor.realize(*kept)
        Tensor.realize(*[p.assign(average) for p, average in zip(weights, averages, strict=True)])
        Tensor.realize(*[average.assign(k) for average, k in zip(averages, kept, strict=True)])

    def state_dict(self) -> dict[str, Tensor]:
        """The average of each weight, by its name."""
        return self.weights

    def load_state_dict(self, arrays: dict[str, np.ndarray], path="the state") -> None:
        """Loads averages of the same names and shapes. Raises ValueError, with nothing changed."""
        check_arrays(arrays, self.weights, path)
        for name, average in self.weights.items():
            average.assign(Tensor(arrays[name])).realize()


class AdamW8bit(Optimizer):
    """AdamW whose moments take one byte each per weight (arXiv:2110.02861).

    They are quantized in blocks of 256, each with its absmax (the paper has 2048; smaller blocks
    are more exact and cost 1.6% more). Parameters of fewer than 4096 elements keep float32 moments,
    as in bitsandbytes.
    """

    state_size = 0.5

    def __init__(self, params: dict[str, Tensor], beta1: float = 0.9, beta2: float = 0.99,
                 weight_decay: float = 0.1, eps: float = 1e-8):
        super().__init__(params)
        large = [name for name, p in params.items() if p.numel() >= 4096]
        self.exact = AdamW({name: p for name, p in params.items() if name not in large}, beta1,
                           beta2, weight_decay, eps)
        self.step = self.exact.step
        blocks = {name: -(-params[name].numel() // BLOCK) for name in large}
        self.quantized = {name: [_zeros((n, BLOCK), np.uint8) for _ in "mv"]
                      for name, n in blocks.items()}
        self.absmax = {name: [_zeros((n, 1)) for _ in "mv"] for name, n in blocks.items()}

    def update(self, grads: list[Tensor], learning_rate: Tensor, scale: Tensor,
               apply: Tensor) -> list[Tensor]:
        named = dict(zip(self.params, grads, strict=True))
        updated = self.exact.update([named[name] for name in self.exact.params], learning_rate,
                                    scale, apply)
        options = self.exact.options(learning_rate, scale, apply)
        for name in self.quantized:
            p, (m, v) = self.params[name], self.quantized[name]
            m_absmax, v_absmax = self.absmax[name]
            updated += kernels.adamw8bit(p, m, m_absmax, v, v_absmax, named[name],
                                         options[p.ndim >= 2])
        return updated

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's state of small parameters; adamw8bit.m.<name>, .v., .m_max., .v_max. of large."""
        state = self.exact.state_dict()
        for name in self.quantized:
            for kind, moment, absmax in zip("mv", self.quantized[name], self.absmax[name],
                                            strict=True):
                state |= {f"adamw8bit.{kind}.{name}": moment,
                          f"adamw8bit.{kind}_max.{name}": absmax}
        return state


OPTIMIZERS = {"adamw": AdamW, "lion": Lion, "muon": Muon, "adamw8bit": AdamW8bit}


def _zeros(shape: tuple[int, ...], dtype=np.float32) -> Tensor:
    return Tensor(np.zeros(shape, dtype)).realize()


def _packed(options: AdamWOptions | LionOptions | MuonOptions) -> Tensor:
    """The options, numbers or tensors of one, in one float32 tensor."""
    learning_rate, *values = options
    ones = [v.reshape(1) if isinstance(v, Tensor) else learning_rate.const_like(v) for v in values]
    return Tensor.cat(learning_rate, *ones).contiguous()
