"""The compiled steps of training a model: gradients, accumulation, update, evaluation."""

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt import device, kernels
from tinygpt.kernels.jit import compiled
from tinygpt.kernels.random import make_key
from tinygpt.kernels.training import training
from tinygpt.training.config import TrainConfig
from tinygpt.training.devices import Devices
from tinygpt.training.optim import EMA, clip_scale, global_norm
from tinygpt.training.ranks import Buckets, Ranks


class Steps:
    """Trains the weights `params` of a model with an optimizer, and keeps the EMA where there is
    one. Whatever changes from step to step is written into tensors, so that each step is compiled
    once. Of several ranks each takes its own share of a step's micro-batches; of several devices
    each its own rows of a micro-batch. owned is what the optimizer updates of params.
    """

    def __init__(self, model, config: TrainConfig, params: dict[str, Tensor], optimizer,
                 owned: dict[str, Tensor], ema: EMA | None, ranks: Ranks, devices: Devices):
        self.model, self.config, self.params, self.owned = model, config, params, owned
        self.devices = devices
        self.optimizer, self.ema, self.ranks = optimizer, ema, ranks
        shape = config.batch_size, model.config.block_size
        self.x, self.y = self._rows(*shape), self._rows(*shape)
        self.lr, self.norm_limit = self._buffer(1), self._buffer(1)
        self.loss_scale = self._buffer(1) if config.dtype == "float16" else None
        self.key = self._buffer(1, dtype=dtypes.uint32)
        self._evaluate = compiled(self._eval_step)
        if config.gradient_accumulation_steps > 1:
            self.share = self._buffer(1)  # of a micro-batch in the step
            self.sums = [self._buffer(*p.shape) for p in params.values()]
            self.loss_sum = self._buffer(1)
            self.buckets = Buckets(ranks, [self.loss_sum, *self.sums])
            self._apply = compiled(self._apply_step)
        self.use_length(model.config.block_size)

    def use_length(self, length: int) -> None:
        """Training steps on sequences of that length from now on, which are compiled anew.

        A micro-batch is what it was, its windows cut into pieces: as many tokens, in the same
        order, each piece with positions from 0.
        """
        self.length = length
        rows, block = self.x.shape
        self.inputs = (self.x, self.y) if length == block else tuple(
            self._rows(rows * block // length, length) for _ in range(2))
        if self.config.gradient_accumulation_steps == 1:
            self._train = compiled(self._train_step)
        else:
            self._accumulate = compiled(self._accumulate_step)

    def train(self, number: int, batch, lr: float, norm_limit: float,
              loss_scale: float = 1.0) -> tuple[float, float]:
        """Training step `number`: its loss, and the norm of its gradient before clipping.

        batch(n) gives micro-batch n, ids and targets (B, T) int32. A step whose norm is above
        norm_limit changes nothing. With float16 the loss is multiplied by loss_scale before the
        backward pass; the loss and the norm that are returned are not. A gradient that overflows
        gives a norm that is not finite and changes nothing.
        """
        micro = self.config.gradient_accumulation_steps
        device.write(self.lr, [lr])
        device.write(self.norm_limit, [norm_limit])
        if self.loss_scale is not None:
            device.write(self.loss_scale, [loss_scale])
        for n in self.ranks.share(range(number * micro, (number + 1) * micro)):
            self._load(*batch(n), *self.inputs)
            device.write(self.key, make_key(self.config.seed, n))
            if micro == 1:
                stats = self._train(*self.inputs, self.key, self.lr)
            else:
                device.write(self.share, [1 / micro])
                self._accumulate(*self.inputs, self.key, self.share)
        if micro > 1:
            if self.ranks.size > 1:
                self.buckets.sum()
            stats = self._apply(self.lr)
        loss, norm = stats.tolist()
        return loss, norm

    def evaluate(self, batch, count: int) -> float:
        """The mean loss of `count` micro-batches, of which each rank computes its share.

        batch(n) gives micro-batch n, ids and targets (B, T) int32.
        """
        losses = np.zeros(count)
        for n in self.ranks.share(range(count)):
            self._load(*batch(n), self.x, self.y)
            losses[n] = self._evaluate(self.x, self.y).item()
        return float(np.mean(self.ranks.sum(losses)))

    def _load(self, x: np.ndarray, y: np.ndarray, to_x: Tensor, to_y: Tensor) -> None:
        if (largest := max(x.max(), y.max())) >= self.model.config.vocab_size:
            raise ValueError(f"the data has token id {largest}, outside the model's vocabulary of "
                             f"{self.model.config.vocab_size}: is it another tokenizer's?")
        device.write(to_x, x)
        device.write(to_y, y)

    # ---- what is compiled

    def _gradients(self, x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of the loss times its scale."""
        config, model = self.config, self.model
        options = (key if model.config.dropout else None, config.label_smoothing, config.z_loss)
        if config.grad_checkpoint:
            loss, chain = model.loss_in_little_memory(x, y, *options)
            grads = chain.gradients(self._scaled(loss), self.params)
        else:
            _, loss = model(x, y, *options)
            grads = self._scaled(loss).gradient(*self.params.values())
        return loss, [kernels.stored(g.cast(dtypes.float32)) for g in grads]

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.reshape(())

    def _unscaled(self, x: Tensor) -> Tensor:
        return x if self.loss_scale is None else x / self.loss_scale.reshape(())

    def _update(self, loss: Tensor, grads: list[Tensor], lr: Tensor) -> Tensor:
        """Clips and takes the optimizer's step where all is finite and the gradient no spike:
        (2,) loss and norm."""
        norm = self._unscaled(global_norm(grads)).contiguous()
        scale = self._unscaled(clip_scale(norm, self.config.grad_clip)).contiguous()
        sound = (loss + norm).isfinite()
        if self.config.skip_spikes:
            sound = sound & (norm <= self.norm_limit.reshape(()))
        sound = sound.contiguous()
        updates = self.optimizer.update(grads, lr, scale, sound)
        updates += self.devices.gather(self.owned, self.params)
        if self.ema:
            updates += self.ema.update(self.optimizer.step, sound)
        return Tensor.stack(loss.reshape(()), norm).realize(*updates)

    def _train_step(self, x: Tensor, y: Tensor, key: Tensor, lr: Tensor) -> Tensor:
        loss, grads = self._gradients(x, y, key)
        Tensor.realize(loss, *grads)  # two graphs are scheduled in half the time of one
        return self._update(loss, grads, lr)

    def _accumulate_step(self, x: Tensor, y: Tensor, key: Tensor, share: Tensor) -> None:
        loss, grads = self._gradients(x, y, key)
        assigns = [s.assign(s + g * share) for s, g in zip(self.sums, grads, strict=True)]
        Tensor.realize(self.loss_sum.assign(self.loss_sum + loss * share), *assigns)

    def _apply_step(self, lr: Tensor) -> Tensor:
        stats = self._update(self.loss_sum, self.sums, lr)
        Tensor.realize(*(s.assign(s.zeros_like()) for s in (self.loss_sum, *self.sums)))
        return stats

    def _eval_step(self, x: Tensor, y: Tensor) -> Tensor:
        with training(False):  # a user's loop may have switched dropout on
            return self.model(x, y)[1].realize()

    # ---- what is written into

    def _buffer(self, *shape: int, dtype=dtypes.float32) -> Tensor:
        """Zeros, on every device."""
        return self.devices.copies(Tensor.zeros(*shape, dtype=dtype).contiguous().realize())

    def _rows(self, *shape: int) -> Tensor:
        """Tokens, some rows on each device."""
        return self.devices.rows(Tensor.zeros(*shape, dtype=dtypes.int32).contiguous().realize())
