"""Saves and loads the state of the optimizers in `tinygrad.nn.optim`."""

import numpy as np
from tinygrad import Tensor, nn

from tinygpt.checkpoint import CheckpointError, check_arrays, part

PREFIX = "tinygrad."


def with_state_dict(optimizer, weights: dict[str, Tensor]):
    """The optimizer if it has a `state_dict`, as those of tinygpt; one of tinygrad wrapped in
    StockOptimizer.

    Raises ValueError if it is neither, or has a parameter that is not among weights.
    """
    if not isinstance(optimizer, nn.optim.Optimizer):
        if hasattr(optimizer, "state_dict") and hasattr(optimizer, "load_state_dict"):
            return optimizer
        raise ValueError(f"optimizer={optimizer!r} has no state_dict: give one of tinygpt's or "
                         "of tinygrad.nn.optim")
    return StockOptimizer(optimizer, weights)


def check_optimizer(state: dict[str, np.ndarray], optimizer, path) -> None:
    """Raises CheckpointError if a saved state is of another kind than `optimizer`. The optimizers
    of `tinygpt.training.optim` count as one kind; they check their own states."""
    saved, ours = _kind_of_state(state), _kind_of_state(optimizer.state_dict())
    if saved != ours:
        raise CheckpointError(f"{path} has the state of {saved}, not of {ours}: use the same "
                              "optimizer, or load without one")


class StockOptimizer:
    """The state of an optimizer of `tinygrad.nn.optim` under stable names.

    They are `tinygrad.<kind>.<state>.<weight>`, such as `tinygrad.AdamW.m.wte.weight`, and
    `tinygrad.<kind>.lr`; for the members of an OptimizerGroup, `tinygrad.<number>.<kind>...`. The
    parameters are part of the model's state, not of this one.
    """

    def __init__(self, optimizer: nn.optim.Optimizer, weights: dict[str, Tensor]):
        self.state: dict[str, Tensor] = {}
        names = {weight: name for name, weight in weights.items()}
        for prefix, member in _members(optimizer, PREFIX):
            if any(param not in names for param in member.params):
                raise ValueError(f"the optimizer {kind_of(member)} has a parameter that is not the "
                                 "model's: make it from nn.state.get_parameters(model)")
            self.state |= {f"{prefix}{kind_of(member)}.{name}": tensor
                           for name, tensor in _state(member, names).items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The state by name, without the parameters."""
        return self.state

    def load_state_dict(self, arrays: dict[str, np.ndarray], path="the state") -> None:
        """Loads a state. Raises ValueError, without a change, if names or shapes differ."""
        check_arrays(arrays, self.state, path)
        for name, tensor in self.state.items():
            tensor.assign(Tensor(arrays[name], device=tensor.device, dtype=tensor.dtype)).realize()


def kind_of(optimizer: nn.optim.Optimizer) -> str:
    """The name of the function that made an optimizer; several share a class."""
    kind = type(optimizer).__name__
    if kind == "LAMB" and optimizer.adam:
        return "AdamW" if optimizer.wd else "Adam"
    if kind == "LARS":
        return "Muon" if optimizer.ns_coefficients else "LARS" if optimizer.tcoef else "SGD"
    return kind


def _members(optimizer: nn.optim.Optimizer, prefix: str):
    """Yields an optimizer, or the members of a group, each with its prefix."""
    if not isinstance(optimizer, nn.optim.OptimizerGroup):
        yield prefix, optimizer
        return
    for i, member in enumerate(optimizer.optimizers):
        yield from _members(member, f"{prefix}{i}.")


def _state(optimizer: nn.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The tensors of an optimizer without its parameters; lists are named by weight."""
    state = {}
    for key, value in vars(optimizer).items():
        if isinstance(value, Tensor):
            state[key] = value
        elif key in ("params", "buffers") or not isinstance(value, list):
            continue
        elif value and isinstance(value[0], Tensor):
            fused = len(value) != len(optimizer.params)  # one tensor for all parameters
            labels = ["all"] if fused else [names[param] for param in optimizer.params]
            state |= {f"{key}.{label}": t for label, t in zip(labels, value, strict=True)}
    return state


def _kind_of_state(state: dict) -> str:
    """The kind of optimizer that a state belongs to, in words."""
    if not state:
        return "no optimizer"
    if not (names := part(state, PREFIX)):
        return "an optimizer of tinygpt.training.optim"
    kinds = {name.lstrip("0123456789.").partition(".")[0] for name in names}
    return " and ".join(f"tinygrad's {kind}" for kind in sorted(kinds))
