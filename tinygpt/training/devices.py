"""Several devices of one process: the weights on each, the rows of a micro-batch split among them.

tinygrad runs an operation on sharded tensors on every device, and sums gradients over them where
the rows come together (an all-reduce). The optimizer's state is on every device, or each keeps a
part of it, and of the weights the part that it updates (ZeRO-1, arXiv:1910.02054).
"""

from contextlib import contextmanager

from tinygrad import Tensor

from tinygpt import device
from tinygpt.training.config import TrainConfig


class Devices:
    """The devices that a run computes on, by name; a single one is used as if there were no others.

    Raises DeviceError where there are fewer than config says.
    """

    def __init__(self, config: TrainConfig):
        self.names = device.several(config.devices)
        self.partition = config.shard_optimizer and len(self.names) > 1

    def rows(self, tensor: Tensor) -> Tensor:
        """tensor, its rows from now on split among the devices."""
        return self._place(tensor, 0)

    def copies(self, tensor: Tensor) -> Tensor:
        """tensor, from now on with a copy on every device."""
        return self._place(tensor, None)

    def part(self, tensor: Tensor) -> Tensor:
        """tensor, state of the optimizer: its rows are split where they split evenly and the
        optimizer is partitioned."""
        even = tensor.shape[0] % len(self.names) == 0
        return self._place(tensor, 0 if even and self.partition else None)

    def owned(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the optimizer updates: params themselves, or for `spread` tensors beside them."""
        return {name: Tensor(p.uop) for name, p in params.items()} if self.partition else params

    def spread(self, weights: dict[str, Tensor], params: dict[str, Tensor],
               owned: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Puts weights on every device, and of params, in owned, and the optimizer's state what
        each device updates."""
        if self.partition:
            for name, p in params.items():
                self.part(owned[name].replace(p))
        for tensor in state.values():
            self.part(tensor)
        for weight in weights.values():
            self.copies(weight)

    def gather(self, owned: dict[str, Tensor], params: dict[str, Tensor]) -> list[Tensor]:
        """The assignments that bring what each device has updated to all of them."""
        if not self.partition:
            return []
        return [p.assign(device.gathered(owned[name])) for name, p in params.items()]

    def collect(self, model) -> None:
        """Puts the weights on the first device alone."""
        if len(self.names) > 1:
            for weight in model.state_dict().values():
                weight.replace(weight.to(self.names[0]).contiguous().realize())

    @contextmanager
    def on_the_first(self, model):
        """Within it the model, which is not to be changed, is on the first device alone."""
        kept = {name: Tensor(weight.uop) for name, weight in model.state_dict().items()}
        self.collect(model)
        try:
            yield
        finally:
            for name, weight in model.state_dict().items():
                weight.replace(kept[name])
            if len(self.names) > 1:
                model.free_decoders()  # which hold the weights of the first device

    def _place(self, tensor: Tensor, axis: int | None) -> Tensor:
        if len(self.names) > 1:
            tensor.shard_(self.names, axis).realize()
        return tensor
