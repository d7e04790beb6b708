"""The compiled steps of training a model: gradients, accumulation, update, evaluation."""

from functools import partial

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt import device, kernels
from tinygpt.kernels.cpu.replay import CompiledStep
from tinygpt.kernels.random import make_key
from tinygpt.kernels.training import training
from tinygpt.training.config import TrainConfig
from tinygpt.training.devices import Devices
from tinygpt.training.optim import EMA, Optimizer, clip_scale, global_norm
from tinygpt.training.ranks import Buckets, Ranks


class Steps:
    """Trains the weights `params` of a model with an optimizer, and updates their moving average.

    Whatever changes from step to step is written into tensors, so that each step is compiled once.
    Each rank takes its share of a step's micro-batches, which `Ranks.split` may have made smaller;
    each device takes its rows of a micro-batch.

    A micro-batch is ids and targets (B, T) int32, and where rows hold several documents also
    starts (B, T) int32, the index where that of each token begins.
    """

    def __init__(self, model, config: TrainConfig, optimizer: Optimizer, ema: EMA | None,
                 ranks: Ranks, devices: Devices):
        self.model, self.config, self.params = model, config, devices.params
        self.optimizer, self.ema, self.ranks, self.devices = optimizer, ema, ranks, devices
        rows, self.count = ranks.split(config.batch_size, config.gradient_accumulation_steps)
        shape = rows, model.config.block_size
        self.x, self.y = self._rows(*shape), self._rows(*shape)
        self.lr, self.norm_limit = self._buffer(1), self._buffer(1)
        self.loss_scale = self._buffer(1) if config.dtype == "float16" else None
        self.key = self._buffer(1, dtype=dtypes.uint32)
        self._evaluate = CompiledStep(self._eval_step)
        if self.count > 1:
            self.share = self._buffer(1)  # weight of a micro-batch in the step
            self.sums = [self._buffer(*p.shape) for p in self.params.values()]
            self.loss_sum = self._buffer(1)
            self.buckets = Buckets(ranks, [self.loss_sum, *self.sums])
            self.apply = CompiledStep(self._apply_step)
        self.starts: Tensor | None = None
        self.use_length(model.config.block_size)

    def use_starts(self) -> None:
        """Makes micro-batches have starts."""
        self.starts = self._rows(*self.x.shape)
        self.use_length(self.model.config.block_size)

    def use_length(self, length: int) -> None:
        """Sets the sequence length of training steps, which are compiled anew.

        The windows of a micro-batch are cut into pieces of that length: the same tokens in the same
        order, with positions from 0 in each piece.
        """
        self.length = length
        rows, block = self.x.shape
        self.inputs = self._whole() if length == block else tuple(
            self._rows(rows * block // length, length) for _ in range(2))
        if self.count == 1:
            self._train = CompiledStep(self._train_step)
        else:
            self.accumulate = CompiledStep(self._accumulate_step)

    def train(self, number: int, batch, lr: float, norm_limit: float,
              loss_scale: float = 1.0) -> tuple[float, float]:
        """Training step `number`: its loss, and the norm of its gradient before clipping.

        batch(n) returns micro-batch n. Each counts by its share of the step's targets. A step whose
        norm is above norm_limit changes nothing. With float16 the loss is multiplied by loss_scale
        before the backward pass; the returned loss and norm are unscaled. If a gradient overflows,
        the norm is not finite and nothing changes.
        """
        device.write(self.lr, [lr])
        device.write(self.norm_limit, [norm_limit])
        if self.loss_scale is not None:
            device.write(self.loss_scale, [loss_scale])
        numbers = range(number * self.count, (number + 1) * self.count)
        if self.count > 1:
            targets = self._targets(batch, numbers)
        for n in self.ranks.shard(numbers):
            self._load(batch(n), self.inputs)
            device.write(self.key, make_key(self.config.seed, n))
            if self.count == 1:
                stats = self._train(self.key, self.lr, *self.inputs)
            else:
                device.write(self.share, [targets[n - numbers.start] / targets.sum()])
                self.accumulate(self.key, self.share, *self.inputs)
        if self.count > 1:
            if self.ranks.size > 1:
                self.buckets.all_sum()
            stats = self.apply(self.lr)
        loss, norm = stats.tolist()
        return loss, norm

    def evaluate(self, batch, count: int) -> float:
        """The mean loss of the targets of `count` micro-batches, shared among the ranks.

        batch(n) returns micro-batch n.
        """
        losses, buffers = np.zeros(count), self._whole()
        for n in self.ranks.shard(range(count)):
            self._load(batch(n), buffers)
            losses[n] = self._evaluate(*buffers).item()
        return float(np.average(self.ranks.all_sum(losses),
                                weights=self._targets(batch, range(count))))

    def _whole(self) -> tuple[Tensor, ...]:
        """The buffers of a micro-batch of rows of block_size."""
        return (self.x, self.y) if self.starts is None else (self.x, self.y, self.starts)

    def _targets(self, batch, numbers: range) -> np.ndarray:
        """The numbers of targets of micro-batches, by which their losses count."""
        if self.starts is None:  # every token is a target
            return np.ones(len(numbers))
        return np.array([(batch(n)[1] >= 0).sum() for n in numbers])

    def _load(self, batch: tuple[np.ndarray, ...], buffers: tuple[Tensor, ...]) -> None:
        if (largest := max(ids.max() for ids in batch[:2])) >= self.model.config.vocab_size:
            raise ValueError(f"the data has token id {largest}, outside the model's vocabulary of "
                             f"{self.model.config.vocab_size}: is it another tokenizer's?")
        for buffer, array in zip(buffers, batch, strict=True):
            device.write(buffer, array)

    # ---- compiled functions

    def _gradients(self, key: Tensor, x: Tensor, y: Tensor, starts: Tensor | None = None
                   ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of the scaled loss."""
        config, model = self.config, self.model
        loss_fn = partial(kernels.cross_entropy, label_smoothing=config.label_smoothing,
                          z_loss=config.z_loss)
        key = key if model.config.dropout else None
        if config.grad_checkpoint:
            loss, chain = model.checkpointed_loss(x, y, key, loss_fn, starts)
            grads = chain.gradients(self._scaled(loss), self.params)
        else:
            _, loss = model(x, y, key, loss_fn, starts)
            grads = self._scaled(loss).gradient(*self.params.values())
        return loss, [kernels.stored(g.cast(dtypes.float32)) for g in grads]

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.reshape(())

    def _unscaled(self, x: Tensor) -> Tensor:
        return x if self.loss_scale is None else x / self.loss_scale.reshape(())

    def _update(self, loss: Tensor, grads: list[Tensor], lr: Tensor) -> Tensor:
        """Clips the gradients and updates the weights, unless something is not finite or the norm
        is a spike. Returns (2,), loss and norm."""
        norm = self._unscaled(global_norm(grads)).contiguous()
        scale = self._unscaled(clip_scale(norm, self.config.grad_clip)).contiguous()
        sound = (loss + norm).isfinite()
        if self.config.skip_spikes:
            sound = sound & (norm <= self.norm_limit.reshape(()))
        sound = sound.contiguous()
        updates = self.optimizer.update(grads, lr, scale, sound)
        updates += self.devices.all_gather()
        if self.ema:
            updates += self.ema.update(self.optimizer.step, sound)
        return Tensor.stack(loss.reshape(()), norm).realize(*updates)

    def _train_step(self, key: Tensor, lr: Tensor, *rows: Tensor) -> Tensor:
        loss, grads = self._gradients(key, *rows)
        Tensor.realize(loss, *grads)  # two graphs are scheduled in half the time of one
        return self._update(loss, grads, lr)

    def _accumulate_step(self, key: Tensor, share: Tensor, *rows: Tensor) -> None:
        loss, grads = self._gradients(key, *rows)
        assigns = [s.assign(s + g * share) for s, g in zip(self.sums, grads, strict=True)]
        Tensor.realize(self.loss_sum.assign(self.loss_sum + loss * share), *assigns)

    def _apply_step(self, lr: Tensor) -> Tensor:
        stats = self._update(self.loss_sum, self.sums, lr)
        Tensor.realize(*(s.assign(s.zeros_like()) for s in (self.loss_sum, *self.sums)))
        return stats

    def _eval_step(self, x: Tensor, y: Tensor, starts: Tensor | None = None) -> Tensor:
        with training(False):  # a user's own loop may have dropout on
            return self.model(x, y, starts=starts)[1].realize()

    # ---- input buffers

    def _buffer(self, *shape: int, dtype=dtypes.float32) -> Tensor:
        """Zeros, replicated on the devices."""
        return self.devices.replicate(Tensor.zeros(*shape, dtype=dtype).contiguous().realize())

    def _rows(self, *shape: int) -> Tensor:
        """Token ids (B, T), the rows sharded among the devices."""
        return self.devices.shard(Tensor.zeros(*shape, dtype=dtypes.int32).contiguous().realize())
