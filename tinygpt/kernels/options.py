"""The numbers that the operations of optimizers take, in their order in a tensor, by name.

C files have them as the fields of a struct.
"""

from collections import namedtuple

from tinygrad import Tensor

# bias_correction1 is 1 / (1 - beta1^t) at step t; apply is 0 where nothing may change
AdamWOptions = namedtuple("AdamWOptions", [
    "learning_rate", "beta1", "beta2", "eps", "weight_decay", "bias_correction1",
    "bias_correction2", "grad_scale", "apply"])
LionOptions = namedtuple("LionOptions", [
    "learning_rate", "beta1", "beta2", "weight_decay", "grad_scale", "apply"])


def unpack(kind: type, options: Tensor):
    """The options of that kind that a tensor holds, each (1,)."""
    return kind(*(options[i:i + 1] for i in range(len(kind._fields))))
