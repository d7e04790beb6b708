"""The state of tinygrad's own optimizers, `tinygrad.nn.optim`, for checkpoints."""

import numpy as np
from tinygrad import Tensor, nn

from tinygpt.checkpoint import CheckpointError, check_arrays, part

PREFIX = "tinygrad."


def adapted(optimizer, weights: dict[str, Tensor]):
    """The optimizer itself where it is one of ours; one of tinygrad's, for parameters
    that are among weights, with the same `state_dict` and `load_state_dict`.

    Raises ValueError where it is neither, or where it has a parameter that is not in weights.
    """
    if not isinstance(optimizer, nn.optim.Optimizer):
        if hasattr(optimizer, "state_dict") and hasattr(optimizer, "load_state_dict"):
            return optimizer
        raise ValueError(f"optimizer={optimizer!r} has no state_dict: give one of tinygpt's or "
                         "of tinygrad.nn.optim")
    return StockOptimizer(optimizer, weights)


def check_owner(state: dict[str, np.ndarray], optimizer, path) -> None:
    """Raises CheckpointError where a saved state is not that of the kind of an adapted optimizer;
    among themselves those of `tinygpt.training.optim` know."""
    theirs, ours = _owner(state), _owner(optimizer.state_dict())
    if theirs != ours:
        raise CheckpointError(f"{path} has the state of {theirs}, not of {ours}: use the same "
                              "optimizer, or load without one")


class StockOptimizer:
    """An optimizer of `tinygrad.nn.optim` whose state has stable names.

    They are `tinygrad.<kind>.<state>.<weight>`, such as `tinygrad.AdamW.m.wte.weight`, and
    `tinygrad.<kind>.lr`; those of an OptimizerGroup's members begin with `tinygrad.<number>.`. The
    parameters, which are the model's, are not part of it.
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
        """The state besides the parameters, by name."""
        return self.state

    def load_state_dict(self, arrays: dict[str, np.ndarray], path="the state") -> None:
        """Takes state of the same names and shapes; raises ValueError, changing nothing, else."""
        check_arrays(arrays, self.state, path)
        for name, tensor in self.state.items():
            tensor.assign(Tensor(arrays[name], device=tensor.device, dtype=tensor.dtype)).realize()


def kind_of(optimizer: nn.optim.Optimizer) -> str:
    """The name under which tinygrad's users know an optimizer: several share a class."""
    kind = type(optimizer).__name__
    if kind == "LAMB" and optimizer.adam:
        return "AdamW" if optimizer.wd else "Adam"
    if kind == "LARS":
        return "Muon" if optimizer.ns_coefficients else "LARS" if optimizer.tcoef else "SGD"
    return kind


def _members(optimizer: nn.optim.Optimizer, prefix: str):
    """Every optimizer of a group, or the one that is none, with a prefix of its own."""
    if not isinstance(optimizer, nn.optim.OptimizerGroup):
        yield prefix, optimizer
        return
    for i, member in enumerate(optimizer.optimizers):
        yield from _members(member, f"{prefix}{i}.")


def _state(optimizer: nn.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """An optimizer's tensors but for the parameters, each list of them by the weights' names."""
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


def _owner(state: dict) -> str:
    """The optimizer that a state's names belong to, in words."""
    if not state:
        return "no optimizer"
    if not (names := part(state, PREFIX)):
        return "an optimizer of tinygpt.training.optim"
    kinds = {name.lstrip("0123456789.").partition(".")[0] for name in names}
    return " and ".join(f"tinygrad's {kind}" for kind in sorted(kinds))
