"""The numbers that the operations of optimizers take, by name and in their order in a tensor.

C files have them as the fields of a struct.
"""

from typing import NamedTuple

from tinygrad import Tensor


class AdamWOptions(NamedTuple):
    """adamw's and adamw8bit's; t is the number of the step, from 1 on."""

    learning_rate: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    weight_decay: float | Tensor
    bias_correction1: float | Tensor  # 1 / (1 - beta1^t)
    bias_correction2: float | Tensor  # 1 / (1 - beta2^t)
    grad_scale: float | Tensor  # gradients are multiplied by it
    apply: float | Tensor  # 0 where nothing may change


class LionOptions(NamedTuple):
    """lion's, as AdamW's of the same names."""

    learning_rate: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    weight_decay: float | Tensor
    grad_scale: float | Tensor
    apply: float | Tensor


def unpack(kind: type, options: Tensor):
    """The options of that kind that a tensor holds, each (1,)."""
    return kind(*(options[i:i + 1] for i in range(len(kind._fields))))
