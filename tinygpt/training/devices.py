"""Several devices in one process: the weights are replicated, the rows of a micro-batch sharded.

tinygrad runs an operation on sharded tensors on every device, and sums gradients over the devices
(an all-reduce). The optimizer's state is replicated too, or sharded together with the weights that
it updates (ZeRO-1, arXiv:1910.02054).
"""

from collections.abc import Iterable
from contextlib import contextmanager

from tinygrad import Tensor

from tinygpt import device
from tinygpt.training.config import TrainConfig


class Devices:
    """The devices of a run, by name, and the weights `params` that it trains on them.

    The optimizer updates `owned`: params themselves or, with shard_optimizer, tensors of which each
    device has its own rows. On a single device nothing is moved. Raises DeviceError where there are
    fewer devices than config asks for.
    """

    def __init__(self, config: TrainConfig, params: dict[str, Tensor]):
        self.names = device.several(config.devices)
        self.shard_optimizer = config.shard_optimizer and len(self.names) > 1
        self.params = params
        self.owned = ({name: Tensor(p.uop) for name, p in params.items()} if self.shard_optimizer
                      else params)

    def shard(self, tensor: Tensor) -> Tensor:
        """Splits the rows of a tensor among the devices, in place."""
        return self._place(tensor, 0)

    def replicate(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to every device, in place."""
        return self._place(tensor, None)

    def distribute(self, weights: Iterable[Tensor], state: Iterable[Tensor]) -> None:
        """Replicates weights, which contain params; shards or replicates `owned` and the
        optimizer's state."""
        if self.shard_optimizer:
            for name, p in self.params.items():
                self._place_state(self.owned[name].replace(p))
        for tensor in state:
            self._place_state(tensor)
        for weight in weights:
            self.replicate(weight)

    def all_gather(self) -> list[Tensor]:
        """The assignments that copy the rows that each device has updated to all devices."""
        if not self.shard_optimizer:
            return []
        return [p.assign(device.gathered(self.owned[name])) for name, p in self.params.items()]

    def to_first(self, model) -> None:
        """Moves the weights of a model to the first device."""
        if len(self.names) > 1:
            for weight in model.state_dict().values():
                weight.replace(weight.to(self.names[0]).contiguous().realize())

    @contextmanager
    def on_first(self, model):
        """Moves a model, which must not be changed meanwhile, to the first device and back."""
        kept = {name: Tensor(weight.uop) for name, weight in model.state_dict().items()}
        self.to_first(model)
        try:
            yield
        finally:
            for name, weight in model.state_dict().items():
                weight.replace(kept[name])
            if len(self.names) > 1:
                model.free_decoders()  # which hold the weights of the first device

    def _place_state(self, tensor: Tensor) -> None:
        """Shards a tensor if shard_optimizer is set and its rows split evenly; else replicates."""
        even = tensor.shape[0] % len(self.names) == 0
        self._place(tensor, 0 if even and self.shard_optimizer else None)

    def _place(self, tensor: Tensor, axis: int | None) -> Tensor:
        if len(self.names) > 1:
            tensor.shard_(self.names, axis).realize()
        return tensor
