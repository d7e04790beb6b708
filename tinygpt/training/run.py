"""A training run: the loop of its steps, what it tells, and how it is saved and gone on with."""

import shlex
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tinygpt import checkpoint, device
from tinygpt.config import SampleConfig, TrainConfig
from tinygpt.data.load import Batches, TokenData
from tinygpt.data.tokenizer import up_to_end
from tinygpt.flags import to_json
from tinygpt.machine import cpu_count
from tinygpt.model import lora
from tinygpt.model.language_model import LanguageModel
from tinygpt.safetensors_file import BAD_VALUES
from tinygpt.training.devices import Devices
from tinygpt.training.loggers import check_loggers, make_loggers
from tinygpt.training.loss_scale import LossScale
from tinygpt.training.optim import EMA, make_optimizer
from tinygpt.training.ranks import Ranks, checksum
from tinygpt.training.report import Report, bits_per_byte
from tinygpt.training.schedule import context_length, learning_rate
from tinygpt.training.signals import pending_signals
from tinygpt.training.spikes import SpikeGuard
from tinygpt.training.steps import Steps

MOMENTS = {"adamw": 2, "muon": 1, "lion": 1, "adamw8bit": 0.5}  # numbers of state for a weight
NOT_FINITE = 10  # steps in a row without a finite loss after which training stops


@dataclass
class TrainResult:
    """How a run ended: losses in nats per token, the path of the last and the best checkpoint."""

    iter_num: int
    train_loss: float
    val_loss: float
    best_val_loss: float
    last: Path
    best: Path


class Interrupted(Exception):
    """A signal asked the run to stop, and it has been saved."""

    def __init__(self, signum: int, path: Path):
        super().__init__(f"stopped and saved in {path}; continue with: "
                         f"python train.py --resume --out_dir {shlex.quote(str(path.parent))}")
        self.signum = signum


class Run:
    """One training run: its data, its compiled steps and where it stands.

    Batches, dropout and learning rate are pure functions of the step, so that weights, optimizer
    and step are all that a resumed run needs. Of several ranks all hold the same at every step,
    and the first alone tells and saves.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig, data: TokenData,
                 ranks: Ranks | None = None):
        self.model, self.config, self.data = model, config, data
        self.ranks = ranks or Ranks()
        self._check_ranks()
        self.out_dir = Path(config.out_dir)
        self.iter_num, self.best_val_loss = 0, float("inf")
        self.was_best = False  # whether the checkpoint that was resumed was the best
        self.stale = 0  # evaluations in a row without a new best
        self.not_finite = 0  # steps in a row
        self.spikes = SpikeGuard(config.skip_spikes)
        self.loss_scale = LossScale() if config.dtype == "float16" else None
        model.compute_dtype = config.dtype
        self._check_vocabulary()
        self.bytes_per_token = data.bytes_per_token()
        check_loggers(config.tensorboard, config.wandb)
        context_length(0, config, model.config.block_size)  # refuses a curriculum that cannot be
        block, rows = model.config.block_size, config.batch_size
        self.batches = Batches(data.train, block, rows, config.seed)
        self.val_batches = Batches(data.val, block, rows, config.seed)
        if config.lora_rank:
            lora.attach(model, config.lora_rank, config.lora_alpha, config.lora_targets,
                        config.seed)
        self.params = lora.trainable(model.state_dict(), config.freeze)
        self._check_memory()
        self.devices = Devices(config)
        owned = self.devices.owned(self.params)
        self.optimizer = make_optimizer(owned, config)
        self.ema = EMA(model.state_dict(), config.ema_decay) if config.ema else None
        self._open_out_dir()
        if self.ranks.size > 1:
            self.ranks.check_same(step=self.iter_num, weights=checksum(model.state_dict()))
        model.tokenizer = data.tokenizer

        averages = self.ema.state_dict() if self.ema else {}
        self.devices.spread(model.state_dict() | {f"ema.{k}": t for k, t in averages.items()},
                            self.params, owned, self.optimizer.state_dict())
        self.steps = Steps(model, config, self.params, self.optimizer, owned, self.ema, self.ranks,
                           self.devices)
        self._check_kernels()
        self.fresh = 0  # how many steps were taken since the last was compiled anew

    # ---- the run

    def train(self) -> TrainResult:
        with self._only_run(), pending_signals() as pending:
            self.report = self._make_report(None)
            self._greet()
            self._try_out()
            out_dir, loggers = None, ()
            if self.ranks.first:
                self._make_room()
            if self.ranks.first and not self._ended():
                config, out_dir = self.config, self.out_dir
                loggers = make_loggers(config.tensorboard, config.wandb, out_dir,
                                       asdict(self.model.config) | asdict(config))
            self.report = self._make_report(out_dir, loggers)
            try:
                return self._loop(pending)
            finally:
                self.report.close()

    def _only_run(self):
        """Keeps other runs out of out_dir."""
        return checkpoint.locked(self.out_dir) if self.ranks.first else nullcontext()

    def _check_kernels(self) -> None:
        """Raises ValueError where the kernels that are asked for lack an operation of the model."""
        self.model(self.steps.x, self.steps.y)  # which is not realized

    def _try_out(self) -> None:
        """Finds out what cannot be run before any file is touched."""
        if np.isfinite(self.steps.evaluate(partial(self.val_batches.spread, count=1), 1)):
            return
        for name, weight in self.model.state_dict().items():
            if not np.isfinite(weight.numpy()).all():
                raise ValueError(f"the model's {name} {BAD_VALUES} before the first step: "
                                 "start from other weights; a run that made these needs a lower "
                                 "--learning_rate")

    def evaluate_only(self) -> TrainResult:
        """Tells how good the checkpoint is that the run stands at; writes nothing."""
        self.report = self._make_report(None)
        self._greet()
        losses = self._evaluate()
        return TrainResult(self.iter_num, *losses, self.best_val_loss,
                           checkpoint.newest(self.out_dir), self._best_path())

    def _make_report(self, out_dir: Path | None, loggers=()) -> Report:
        return Report(out_dir, self.iter_num, self.config.max_iters, self.config.log_interval,
                      self._tokens_per_step(), self._flops_per_step(),
                      self._peak_flops(), loggers, silent=not self.ranks.first)

    def _peak_flops(self) -> float | None:
        """Of all ranks together; those of a machine share its CPU. None where it is unknown."""
        on_cpu = device.default().startswith("CPU")
        each = self.ranks.threads() / cpu_count() if on_cpu else self.config.devices
        peak = device.peak_flops(self.config.dtype)
        return peak and peak * each * self.ranks.size

    def _flops_per_step(self) -> int:
        return self.model.estimate_flops(self.steps.length) * self._tokens_per_step()

    def _tokens_per_step(self) -> int:
        config = self.config
        return (config.gradient_accumulation_steps * config.batch_size
                * self.model.config.block_size)

    def _loop(self, pending: list[int]) -> TrainResult:
        config = self.config
        losses, saved = None, None
        began, first = time.perf_counter(), self.iter_num
        ended = self._ended()
        if self.iter_num >= config.max_iters:
            self.report.remark(f"the run is over after {self.iter_num} steps: to go on, ask for "
                               "more with --max_iters")
        if self.iter_num == 0 or ended:
            losses = self._evaluate()
        while not ended:
            start = time.perf_counter()
            self._use_length()
            lr = learning_rate(self.iter_num, config)
            loss, norm = self._step(lr)
            self.iter_num += 1
            seconds = time.perf_counter() - start
            self.fresh += 1
            self._after_step(loss, norm, lr, seconds)
            if self.iter_num - first == 1:
                self.report.remark(f"compiled in {time.perf_counter() - began:.1f} s; "
                                   "the steps from here on are fast")
            signum, seconds = self.ranks.largest(self._signal(pending),
                                                 time.perf_counter() - began)
            ended = self._ended(seconds)
            if ended or self.iter_num % config.eval_interval == 0:
                losses = self._evaluate()
                saved = self._save(losses[1])
                self.report.draw()
                ended = ended or self._ended()
            if config.sample_interval and self.iter_num % config.sample_interval == 0 and not ended:
                self._sample()
            if signum and not ended:
                self._save(None)
                raise Interrupted(signum, self._checkpoint_path())
        saved = saved or checkpoint.newest(self.out_dir)
        if self.iter_num < config.max_iters:
            self.report.remark(f"stopped after step {self.iter_num}: {self._why_early()}")
        self._sample()
        best = self._best_path()
        averaged = config.ema and checkpoint.load_metadata(best)["train_config"]["ema"]
        self.report.remark(f"saved in {saved}; write with: python generate.py --checkpoint "
                           f"{shlex.quote(str(best))}{' --ema' if averaged else ''}")
        return TrainResult(self.iter_num, *losses, self.best_val_loss, saved, best)

    def _signal(self, pending: list[int]) -> int:
        """What asks the run to stop: the first signal, or that nobody reads what it says; or 0."""
        return pending[0] if pending else signal.SIGPIPE if self.report.unheard else 0

    def _use_length(self) -> None:
        """Follows the curriculum to the length of the next step's sequences."""
        length = context_length(self.iter_num, self.config, self.model.config.block_size)
        if length != self.steps.length:
            self.steps.use_length(length)
            self.fresh = 0
            self.report.flops_per_iter = self._flops_per_step()
            self.report.remark(f"context of {length} tokens from step {self.iter_num + 1} on")

    def _ended(self, seconds: float = 0.0) -> bool:
        """Whether the run is over: by steps, by patience, or by the seconds that it took."""
        config = self.config
        return (self.iter_num >= config.max_iters or self._impatient()
                or seconds >= 60 * (config.max_minutes or np.inf))

    def _impatient(self) -> bool:
        return 0 < self.config.patience <= self.stale

    def _why_early(self) -> str:
        if self._impatient():
            return f"no new best in {self.stale} evaluations (--patience)"
        return f"{self.config.max_minutes:g} minutes are over (--max_minutes)"

    def _step(self, lr: float) -> tuple[float, float]:
        """One training step: its loss, and the norm of its gradient before clipping."""
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        return self.steps.train(self.iter_num, self.batches.batch, lr, self.spikes.limit(), scale)

    def _after_step(self, loss: float, norm: float, lr: float, seconds: float) -> None:
        """Logs a step, and lets its norm decide on the limit and the loss scale of the next."""
        finite = bool(np.isfinite(loss + norm))
        if finite:
            self.not_finite = 0
            self.report.step(self.iter_num, loss, norm, lr, seconds, self.fresh == 1)
            if norm > (limit := self.spikes.limit()):
                self.report.line(f"iter {self.iter_num}: gradient norm {norm:.4f} over "
                                 f"{limit:.4f}: skipped")
        else:
            self._skipped(loss, norm)
        self.spikes.add(norm)
        if self.loss_scale and self.loss_scale.update(finite):
            self.report.line(f"iter {self.iter_num}: loss scale {self.loss_scale.scale:.0f}")

    def _evaluate(self) -> tuple[float, float]:
        """Mean loss on windows spread over each split, in nats per token, of the weights' moving
        average where there is one."""
        means, count = [], self.config.eval_iters
        with self._averaged():
            for batches in (self.batches, self.val_batches):
                means.append(self.steps.evaluate(partial(batches.spread, count=count), count))
        self.report.evaluation(self.iter_num, *means, learning_rate(self.iter_num, self.config),
                               bits_per_byte(means[1], self.bytes_per_token),
                               self.config.ema)
        return means[0], means[1]

    def _averaged(self):
        """Puts the weights' moving average, where there is one, in their place for a while."""
        return self.ema.in_place() if self.ema else nullcontext()

    def _skipped(self, loss: float, norm: float) -> None:
        self.report.line(f"iter {self.iter_num}: loss {loss}, gradient norm {norm}: skipped")
        # a gradient that a lower loss scale keeps finite is part of the normal course
        if self.loss_scale is None or self.loss_scale.is_smallest or not np.isfinite(loss):
            self.not_finite += 1
        if self.not_finite >= NOT_FINITE:
            raise ValueError(f"the loss was not finite for {self.not_finite} steps, the last at "
                             f"{self.iter_num}: lower --learning_rate, lengthen --warmup_iters, "
                             "or use --dtype float32; the checkpoints before are good")

    def _sample(self) -> None:
        """A piece of text that the model writes now, on stdout."""
        if self.model.tokenizer is None or not self.ranks.first:
            return
        tokenizer = self.model.tokenizer
        try:
            prompt = tokenizer.encode("\n")
        except ValueError:  # a tokenizer of characters that knows no line break
            prompt = [int(self.data.val[0])]
        ids = self.model.stream([prompt], SampleConfig(max_new_tokens=200, seed=self.config.seed))
        with self._averaged(), self.devices.on_the_first(self.model):
            text = tokenizer.decode(list(up_to_end(tokenizer, ids)))
        self.report.line(f"sample {self.iter_num}:\n{text}\n")

    # ---- saving and resuming

    def _save(self, val_loss: float | None) -> Path:
        """Saves where the run stands, as the best too where val_loss is the lowest so far."""
        best = val_loss is not None and val_loss < self.best_val_loss
        if best:
            self.best_val_loss = val_loss
        if val_loss is not None:
            self.stale = 0 if best else self.stale + 1
        if not self.ranks.first:
            return self._checkpoint_path()
        config = self.config
        path = self.model.save_checkpoint(self.iter_num, self.optimizer, self.out_dir, {
            "train_config": asdict(config), "best_val_loss": self.best_val_loss,
            "data_position": self.iter_num * config.gradient_accumulation_steps,
            "data": self.data.describe(),
            "random_state": {"seed": config.seed}, "stale_evaluations": self.stale,
            "gradient_norms": self.spikes.norms, "is_best": best,
            **({"loss_scale": self.loss_scale.state_dict()} if self.loss_scale else {})}, self.ema)
        if best:
            self._mark_best(path)
        checkpoint.rotate(self.out_dir, config.keep)
        return path

    def _mark_best(self, path: Path) -> None:
        """Makes the checkpoint at path, of the weights as they are, the best of the run."""
        checkpoint.mark_best(path)
        if self.config.lora_rank:
            lora.save(self.model, self.params, {
                "model_config": asdict(self.model.config), "init_from": self.config.init_from,
                "iter_num": self.iter_num}, self.out_dir)

    def _finish_marking(self) -> None:
        """Marks the checkpoint that the run resumed from as the best where it was saved as such,
        but the run was killed before the mark."""
        files = [checkpoint.BEST, *([lora.FILE] if self.config.lora_rank else [])]
        if self.was_best and not all(checkpoint.is_of_step(self.out_dir / name, self.iter_num)
                                     for name in files):
            self._mark_best(self._checkpoint_path())

    def _open_out_dir(self) -> None:
        """Goes on where the run in out_dir was, if that is asked for."""
        if self.config.eval_only:
            best = self._best_path()
            return self._resume(best if best.exists() else checkpoint.newest(self.out_dir))
        checkpoint.check_out_dir(self.out_dir)
        if self.config.resume:
            self._resume(self.ranks.from_first(checkpoint.newest(self.out_dir)))

    def _make_room(self) -> None:
        """Moves a former run aside, unless this one resumes it, and writes this one's settings."""
        checkpoint.sweep(self.out_dir)
        self._finish_marking()
        if not self.config.resume and (moved := checkpoint.set_aside(self.out_dir)):
            self.report.remark(f"the run in {self.out_dir} is now in {moved}")
        if self._ended():
            return
        settings = to_json(self.model.config, replace(self.config, resume=False))
        checkpoint.write_atomically(self.out_dir / "config.json", settings.encode())

    def _resume(self, path: Path | None) -> None:
        if path is None:
            flag = "eval_only" if self.config.eval_only else "resume"
            raise ValueError(f"there is no checkpoint in {self.out_dir} to go on from: "
                             f"leave out --{flag}, or name another --out_dir")
        header = checkpoint.load_metadata(path)
        theirs = header.get("tokenizer")
        ours = self.data.tokenizer and self.data.tokenizer.to_json()
        if theirs != ours:
            raise ValueError(f"{path} was trained with another tokenizer than the data has now: "
                             "use the same --data and --tokenizer, or start a new run")
        self._check_trained(path, header)
        if not self.config.eval_only:
            self.data.check_same(path, header.get("data"))
        optimizer = None if self.config.eval_only else self.optimizer
        header = self.model.load_checkpoint(path, optimizer, self.ema)
        if "iter_num" not in header:
            raise ValueError(f"{path} has no iter_num: resume from a checkpoint of a run")
        self.iter_num, self.was_best = header["iter_num"], header.get("is_best", False)
        self.best_val_loss = header.get("best_val_loss", float("inf"))  # not of a script's own save
        self.stale = header.get("stale_evaluations", 0)
        if self.config.skip_spikes:
            self.spikes = SpikeGuard(self.config.skip_spikes, header.get("gradient_norms", ()))
        if self.loss_scale and "loss_scale" in header:  # not where the run had another dtype
            try:
                self.loss_scale = LossScale(**header["loss_scale"])
            except (TypeError, ValueError) as error:
                raise checkpoint.CheckpointError(f"{path} has a loss_scale that cannot be used "
                                                 f"({error}): use another one") from error

    def _check_trained(self, path: Path, header: dict) -> None:
        """Raises CheckpointError where a run trained other weights than this one would: its
        adapters, and the state of its optimizer, belong to those."""
        theirs, ours = header.get("train_config"), asdict(self.config)
        if theirs is None:  # of a script's own save
            return
        names = ["lora_rank"]
        if self.config.lora_rank:
            names += ["lora_alpha", "lora_targets"]
        if not self.config.eval_only:
            names += ["freeze"]
        checkpoint.check_same(path, theirs, {name: ours[name] for name in names if name in theirs})

    def _checkpoint_path(self) -> Path:
        return self.out_dir / checkpoint.name(self.iter_num)

    def _best_path(self) -> Path:
        return self.out_dir / checkpoint.BEST

    def _check_ranks(self) -> None:
        config, size = self.config, self.ranks.size
        if config.gradient_accumulation_steps % size:
            raise ValueError(f"gradient_accumulation_steps={config.gradient_accumulation_steps} "
                             f"micro-batches cannot be shared by {size} processes: choose a "
                             f"multiple of {size}, or another number of processes")
        self.ranks.check_same(**asdict(self.model.config), **{
            k: v for k, v in asdict(config).items() if k not in ("device", "threads")},
            training_data=self.data.fingerprint)

    def _check_memory(self) -> None:
        """Raises ValueError where training does not fit whatever the batch size is, or a
        micro-batch does not fit whatever the model computes with it."""
        config, shape = self.config, self.model.config
        trained = sum(p.numel() for p in self.params.values()) / config.devices
        needed = 4 * (self.model.num_params() * (2 if config.ema else 1)
                      + trained * (1 + MOMENTS[config.optimizer]))
        device.check_memory(int(needed), "the weights, their gradients and the optimizer's state",
                            "make the model smaller (--n_layer, --n_embd, --vocab_size), or take "
                            "--optimizer adamw8bit or --lora_rank")
        width = getattr(shape, "n_embd", shape.vocab_size)  # of a layer's output
        device.check_memory(4 * config.batch_size * shape.block_size * width // config.devices,
                            "the activations of one layer",
                            "choose a smaller --batch_size or --block_size")
        device.check_memory(8 * config.eval_iters, f"the losses of eval_iters={config.eval_iters} "
                            "batches", "choose a smaller --eval_iters")

    def _check_vocabulary(self) -> None:
        tokenizer, size = self.data.tokenizer, self.model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model "
                             f"vocab_size={size}: give it at least as many")

    def _greet(self) -> None:
        data, say = self.data, self.report.remark
        say(f"device {device.describe()}")
        if self.config.devices > 1:
            say(f"the rows of a micro-batch are split among {', '.join(self.devices.names)}")
        if self.ranks.size > 1:
            say(f"{self.ranks.size} processes, {self.ranks.local_size} of them on this machine")
        say(f"data {data.source}: {len(data.train):,} training and {len(data.val):,} validation "
            f"tokens")
        changed = sum(p.numel() for p in self.params.values())
        say(f"model {self.model.num_params():,} parameters, of which {changed:,} are trained; "
            f"{self._tokens_per_step():,} tokens a step")
        if self.ema:
            say("evaluations and samples are of the weights' moving average")
        if self.config.eval_only:
            say(f"evaluating what was saved after step {self.iter_num}")
        elif self.iter_num:
            say(f"resuming after step {self.iter_num}")
        if not self.config.eval_only:
            say("compiling: the first evaluation and the first step are slow, the first time "
                "most of all")
