"""The numbers that the operations of optimizers take, in their order in a tensor, by name.

C files have them as the fields of a struct.
"""

from collections import namedtuple
from collections.abc import Sequence

from tinygrad import Tensor

# bias_correction1 is 1 / (1 - beta1^t) at step t; apply is 0 where nothing may change
AdamWOptions = namedtuple("AdamWOptions", [
    "learning_rate", "beta1", "beta2", "eps", "weight_decay", "bias_correction1",
    "bias_correction2", "grad_scale", "apply"])
LionOptions = namedtuple("LionOptions", [
    "learning_rate", "beta1", "beta2", "weight_decay", "grad_scale", "apply"])
MuonOptions = namedtuple("MuonOptions", [
    "learning_rate", "momentum", "weight_decay", "grad_scale", "apply"])


def thirds(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The three lists of one length that were put together: muon's weights, momenta and gradients.
    """
    n = len(tensors) // 3
    return list(tensors[:n]), list(tensors[n:2 * n]), list(tensors[2 * n:])


def unpack(kind: type, options: Tensor):
    """The options of that kind that a tensor holds, each (1,)."""
    return kind(*(options[i:i + 1] for i in range(len(kind._fields))))
