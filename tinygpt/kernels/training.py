"""tinygrad's switch between training and inference: Tensor.training, from 0.14 on TRAINING."""

from tinygrad import Tensor, helpers


def is_training() -> bool:
    """Whether dropout acts."""
    return bool(helpers.TRAINING if hasattr(helpers, "TRAINING") else Tensor.training)


def training(mode: bool = True):
    """A context in which the switch has that position."""
    if hasattr(helpers, "TRAINING"):
        return helpers.Context(TRAINING=int(mode))
    return Tensor.train(mode)
