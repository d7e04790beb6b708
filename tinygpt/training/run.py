"""A training run: the training loop, logging, saving and resuming."""

import shlex
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np

from tinygpt import checkpoint, device
from tinygpt.data.token_data import TokenData
from tinygpt.flags import to_json
from tinygpt.model import lora
from tinygpt.model.language_model import LanguageModel
from tinygpt.training.checks import (
    check_curriculum,
    check_finite,
    check_float32,
    check_memory,
    check_ranks,
    check_resumable,
    check_vocabulary,
)
from tinygpt.training.config import TrainConfig
from tinygpt.training.devices import Devices
from tinygpt.training.loggers import check_loggers, make_loggers
from tinygpt.training.loss_scale import LossScale
from tinygpt.training.optim import EMA, make_optimizer
from tinygpt.training.ranks import Ranks, checksum
from tinygpt.training.report import Report, Work, bits_per_byte
from tinygpt.training.schedule import context_length, learning_rate
from tinygpt.training.signals import pending_signals
from tinygpt.training.spikes import SpikeGuard
from tinygpt.training.steps import Steps

OVERFITTED = 1.01  # the last validation loss, as a multiple of the lowest, that is reported
NOT_FINITE = 10  # training stops after as many steps in a row without a finite loss


@dataclass
class TrainResult:
    """How a run ended: losses in nats per token, and the paths of the last and best checkpoint."""

    iter_num: int
    train_loss: float
    val_loss: float
    best_val_loss: float
    last: Path
    best: Path


class Interrupted(Exception):
    """A signal stopped the run, which has been saved."""

    def __init__(self, signum: int, path: Path):
        super().__init__(f"stopped and saved in {path}; continue with: "
                         f"python train.py --resume --out_dir {shlex.quote(str(path.parent))}")
        self.signum = signum


class Run:
    """One training run: model, data, compiled steps and progress; see `prepare`, which makes one.

    Batches, dropout and learning rate are pure functions of the step, so that resuming needs only
    weights, optimizer and step. All ranks hold the same state at every step; the main rank alone
    logs and saves.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig, data: TokenData,
                 ranks: Ranks | None = None):
        self.model, self.config, self.data = model, config, data
        self.ranks = ranks or Ranks()
        self.out_dir = Path(config.out_dir)
        self.bytes_per_token: float | None = None  # of the validation tokens
        self.iter_num, self.best_val_loss = 0, float("inf")
        self.was_best = False  # whether the resumed checkpoint was saved as the best
        self.stale = 0  # evaluations in a row without a new best
        self.not_finite = 0  # steps in a row
        self.since_compiled = 0  # steps
        self.spikes = SpikeGuard(config.skip_spikes)
        self.loss_scale = LossScale() if config.dtype == "float16" else None
        block = model.config.block_size
        rows, _ = self.ranks.split(config.batch_size, config.gradient_accumulation_steps)
        self.batches, self.val_batches = data.batches(block, rows, config.seed)
        self.params = lora.trainable(model.state_dict(), config.freeze)
        self.devices = Devices(config, self.params)
        self.optimizer = make_optimizer(self.devices.owned, config)
        self.ema = EMA(model.state_dict(), config.ema_decay) if config.ema else None
        self.steps = Steps(model, config, self.optimizer, self.ema, self.ranks, self.devices)
        if self.batches.has_starts:
            check_curriculum(config)
            self.steps.use_starts()

    def distribute(self) -> None:
        """Places the weights, their moving average and the optimizer's state on the devices."""
        averages = self.ema.state_dict() if self.ema else {}
        self.devices.distribute([*self.model.state_dict().values(), *averages.values()],
                                self.optimizer.state_dict().values())

    # ---- the run

    def train(self) -> TrainResult:
        """Trains to the end, with logs and checkpoints in out_dir. Raises Interrupted."""
        with self._locked(), pending_signals() as pending:
            self.report = self._make_report(None)
            self._log_start()
            self._try_out()
            out_dir, loggers = None, ()
            if self.ranks.is_main:
                self._prepare_out_dir()
            if self.ranks.is_main and not self._ended():
                config, out_dir = self.config, self.out_dir
                loggers = make_loggers(config.tensorboard, config.wandb, out_dir,
                                       asdict(self.model.config) | asdict(config))
            self.report = self._make_report(out_dir, loggers)
            try:
                return self._loop(pending)
            finally:
                self.report.close()

    def _locked(self):
        """Keeps other runs from writing into out_dir."""
        return checkpoint.locked(self.out_dir) if self.ranks.is_main else nullcontext()

    def _try_out(self) -> None:
        """Raises errors of the first evaluation before any file is written."""
        if not np.isfinite(self.steps.evaluate(partial(self.val_batches.spread, count=1), 1)):
            check_finite(self.model)

    def evaluate_only(self) -> TrainResult:
        """Logs the losses of the resumed checkpoint; writes nothing."""
        self.report = self._make_report(None)
        self._log_start()
        losses = self._log_evaluation()
        return TrainResult(self.iter_num, *losses, self.best_val_loss,
                           checkpoint.newest(self.out_dir), self._best_path())

    def _make_report(self, out_dir: Path | None, loggers=()) -> Report:
        return Report(out_dir, self.iter_num, self.config, self._work(), loggers,
                      silent=not self.ranks.is_main)

    def _work(self) -> Work:
        """The work of a step on sequences of the current length, of all ranks together."""
        config = self.config
        tokens = (config.gradient_accumulation_steps * config.batch_size
                  * self.model.config.block_size)
        flops = self.model.estimate_flops(self.steps.length) * tokens
        on_cpu = device.default().startswith("CPU")  # whose devices are one processor
        share = self.ranks.size * (1 if on_cpu else config.devices)
        return Work(tokens, flops / share, device.peak_flops(config.dtype))

    def _loop(self, pending: list[int]) -> TrainResult:
        config = self.config
        losses, saved = None, None
        began, first = time.perf_counter(), self.iter_num
        ended = self._ended()
        if self.iter_num >= config.max_iters:
            self.report.remark(f"the run is over after {self.iter_num} steps: to continue, raise "
                               "--max_iters")
        if self.iter_num == 0 or ended:
            losses = self._log_evaluation()
        while not ended:
            start = time.perf_counter()
            self._use_length()
            lr = learning_rate(self.iter_num, config)
            loss, norm = self.step(lr)
            seconds = time.perf_counter() - start
            self.since_compiled += 1
            self._finish_step(loss, norm, lr, seconds)
            if self.iter_num - first == 1:
                self.report.remark(f"compiled in {time.perf_counter() - began:.1f} s; "
                                   "the steps from here on are fast")
            signum, seconds = self.ranks.all_max(self._signal(pending),
                                                 time.perf_counter() - began)
            ended = self._ended(seconds)
            if ended or self.iter_num % config.eval_interval == 0:
                losses = self._log_evaluation()
                saved = self.save(losses[1])
                self.report.draw()
                ended = ended or self._ended()
            if config.sample_interval and self.iter_num % config.sample_interval == 0 and not ended:
                self._log_sample()
            if signum and not ended:
                self.save(None)
                raise Interrupted(signum, self._checkpoint_path())
        saved = saved or checkpoint.newest(self.out_dir)
        if self.iter_num < config.max_iters:
            self.report.remark(f"stopped after step {self.iter_num}: {self._why_early()}")
        if self.ranks.is_main:
            self._log_best(losses[1], saved)
        return TrainResult(self.iter_num, *losses, self.best_val_loss, saved, self._best_path())

    def _signal(self, pending: list[int]) -> int:
        """The signal that stops the run, SIGPIPE where stdout or stderr was closed; 0 for none."""
        return pending[0] if pending else signal.SIGPIPE if self.report.output_closed else 0

    def _use_length(self) -> None:
        """Sets the sequence length of the next step, as the curriculum has it."""
        length = context_length(self.iter_num, self.config, self.model.config.block_size)
        if length != self.steps.length:
            self.steps.use_length(length)
            self.since_compiled = 0
            self.report.work = self._work()
            self.report.remark(f"context of {length} tokens from step {self.iter_num + 1} on")

    def _ended(self, seconds: float = 0.0) -> bool:
        """Whether the run is over: by max_iters, patience or, after `seconds`, max_minutes."""
        config = self.config
        return (self.iter_num >= config.max_iters or self._impatient()
                or seconds >= 60 * (config.max_minutes or np.inf))

    def _impatient(self) -> bool:
        return 0 < self.config.patience <= self.stale

    def _why_early(self) -> str:
        if self._impatient():
            return f"no new best in {self.stale} evaluations (--patience)"
        return f"{self.config.max_minutes:g} minutes are over (--max_minutes)"

    def step(self, lr: float) -> tuple[float, float]:
        """Takes the next training step; its loss, and the norm of its gradient before clipping."""
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        loss, norm = self.steps.train(self.iter_num, self.batches.batch, lr, self.spikes.limit(),
                                      scale)
        self.iter_num += 1
        return loss, norm

    def _finish_step(self, loss: float, norm: float, lr: float, seconds: float) -> None:
        """Logs a step, and updates the spike limit and the loss scale for the next one."""
        finite = bool(np.isfinite(loss + norm))
        if finite:
            self.not_finite = 0
            self.report.step(self.iter_num, loss, norm, lr, seconds, self.since_compiled == 1)
            if norm > (limit := self.spikes.limit()):
                self.report.line(f"iter {self.iter_num}: gradient norm {norm:.4f} over "
                                 f"{limit:.4f}: skipped")
        else:
            self._log_not_finite(loss, norm)
        self.spikes.add(norm)
        if self.loss_scale and self.loss_scale.update(finite):
            self.report.line(f"iter {self.iter_num}: loss scale {self.loss_scale.scale:.0f}")

    def evaluate(self) -> tuple[float, float]:
        """Mean training and validation loss in nats per token, on windows spread over each split;
        of the weights' moving average where there is one."""
        count = self.config.eval_iters * self.config.batch_size // self.batches.batch_size
        with self._averaged():
            train, val = (self.steps.evaluate(partial(batches.spread, count=count), count)
                          for batches in (self.batches, self.val_batches))
        return train, val

    def _log_evaluation(self) -> tuple[float, float]:
        train, val = self.evaluate()
        self.report.evaluation(self.iter_num, train, val, learning_rate(self.iter_num, self.config),
                               bits_per_byte(val, self.bytes_per_token), self.config.ema)
        return train, val

    def _averaged(self):
        """Within it the model has the moving average of its weights, where there is one."""
        return self.ema.in_place() if self.ema else nullcontext()

    def _log_not_finite(self, loss: float, norm: float) -> None:
        self.report.line(f"iter {self.iter_num}: loss {loss}, gradient norm {norm}: skipped")
        # an overflow that a lower loss scale avoids is normal
        if self.loss_scale is None or self.loss_scale.is_smallest or not np.isfinite(loss):
            self.not_finite += 1
        if self.not_finite >= NOT_FINITE:
            raise ValueError(f"the loss was not finite for {self.not_finite} steps, the last at "
                             f"{self.iter_num}: lower --learning_rate, lengthen --warmup_iters, "
                             "or use --dtype float32; the checkpoints before are good")

    def sample(self, model: LanguageModel) -> str | None:
        """A short text by a model with the data's tokenizer, or answers to the data's questions;
        None without a tokenizer."""
        texts = []
        for prompt in self.data.sample_prompts():
            ids = takewhile(lambda i, ends=prompt.stop_ids: i not in ends,
                            model.stream([prompt.ids], 200, seed=self.config.seed))
            texts.append(prompt.shown + self.data.tokenizer.decode(list(ids)))
        return "\n".join(texts) if texts else None

    def _log_sample(self) -> None:
        if self.ranks.is_main:
            with self._averaged(), self.devices.on_first(self.model):
                self._log_text(self.iter_num, self.sample(self.model))

    def _log_text(self, iter_num: int, text: str | None) -> None:
        if text is not None:
            self.report.line(f"sample {iter_num}:\n{text}\n")

    def _log_best(self, val_loss: float, saved: Path) -> None:
        """Logs a sample of the best checkpoint, and where it is; warns if the last evaluation, with
        val_loss, was worse."""
        best = self._best_path()
        header = checkpoint.load_metadata(best)
        if header["iter_num"] == self.iter_num:
            self._log_sample()
        else:
            model = type(self.model).from_checkpoint(best)
            self._log_text(header["iter_num"], self.sample(model))
        if val_loss > OVERFITTED * self.best_val_loss:
            self.report.remark(
                f"the validation loss was lowest, {self.best_val_loss:.4f}, at step "
                f"{header['iter_num']}, and is {val_loss:.4f} now: the model overfits. "
                f"{checkpoint.BEST} has the better weights; fewer --max_iters, a higher "
                "--weight_decay or --dropout, or more text help")
        self.report.remark(f"saved in {saved}; sample with: python generate.py --checkpoint "
                           f"{shlex.quote(str(best))}")

    # ---- saving and resuming

    def save(self, val_loss: float | None) -> Path:
        """Saves a checkpoint, and marks it as the best if val_loss is the lowest so far."""
        best = val_loss is not None and val_loss < self.best_val_loss
        if best:
            self.best_val_loss = val_loss
        if val_loss is not None:
            self.stale = 0 if best else self.stale + 1
        if not self.ranks.is_main:
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
        """Marks the checkpoint at path, which has the current weights, as the best of the run."""
        checkpoint.mark_best(path)
        if self.config.lora_rank:
            metadata = {"model_config": asdict(self.model.config),
                        "init_from": self.config.init_from, "iter_num": self.iter_num}
            with self._averaged():
                lora.save(self.model, self.params, metadata, self.out_dir)

    def _finish_marking(self) -> None:
        """Marks the resumed checkpoint as the best if the run was killed between saving it as the
        best and marking it."""
        files = [checkpoint.BEST, *([lora.FILE] if self.config.lora_rank else [])]
        if self.was_best and not all(checkpoint.is_of_step(self.out_dir / name, self.iter_num)
                                     for name in files):
            self._mark_best(self._checkpoint_path())

    def resume(self) -> None:
        """Loads the checkpoint in out_dir that config asks for, if it asks for one."""
        if self.config.eval_only:
            best = self._best_path()
            self._load(best if best.exists() else checkpoint.newest(self.out_dir))
        elif self.config.resume:
            self._load(self.ranks.broadcast(checkpoint.newest(self.out_dir)))

    def _prepare_out_dir(self) -> None:
        """Moves an earlier run aside, unless this one resumes it, and writes config.json."""
        checkpoint.delete_partial_files(self.out_dir)
        self._finish_marking()
        if not self.config.resume and (moved := checkpoint.set_aside(self.out_dir)):
            self.report.remark(f"the run in {self.out_dir} is now in {moved}")
        if self._ended():
            return
        settings = to_json(self.model.config, replace(self.config, resume=False))
        checkpoint.write_atomically(self.out_dir / "config.json", settings.encode())

    def _load(self, path: Path | None) -> None:
        if path is None:
            flag = "eval_only" if self.config.eval_only else "resume"
            raise ValueError(f"there is no checkpoint in {self.out_dir}: leave out --{flag}, or "
                             "name another --out_dir")
        check_resumable(path, checkpoint.load_metadata(path), self.config, self.data)
        optimizer = None if self.config.eval_only else self.optimizer
        header = self.model.load_checkpoint(path, optimizer, self.ema)
        if "iter_num" not in header:
            raise ValueError(f"{path} has no iter_num: resume from a checkpoint of a run")
        self.iter_num, self.was_best = header["iter_num"], header.get("is_best", False)
        self.best_val_loss = header.get("best_val_loss", float("inf"))  # a user's script has none
        self.stale = header.get("stale_evaluations", 0)
        if self.config.skip_spikes:
            self.spikes = SpikeGuard(self.config.skip_spikes, header.get("gradient_norms", ()))
        if self.loss_scale and "loss_scale" in header:  # missing if the run had another dtype
            try:
                self.loss_scale = LossScale(**header["loss_scale"])
            except (TypeError, ValueError) as error:
                raise checkpoint.CheckpointError(f"{path} has a loss_scale that cannot be used "
                                                 f"({error}): use another one") from error

    def _checkpoint_path(self) -> Path:
        return self.out_dir / checkpoint.name(self.iter_num)

    def _best_path(self) -> Path:
        return self.out_dir / checkpoint.BEST

    def _log_start(self) -> None:
        data, log = self.data, self.report.remark
        log(f"device {device.describe()}")
        if self.config.devices > 1:
            log(f"the rows of a micro-batch are split among {', '.join(self.devices.names)}")
        if self.ranks.size > 1:
            log(f"{self.ranks.size} processes, {self.ranks.local_size} of them on this machine")
        log(f"data {data.source}: {len(data.train):,} training and {len(data.val):,} validation "
            "tokens")
        for note in filter(None, (data.note, self.batches.note)):
            log(note)
        trained = sum(p.numel() for p in self.params.values())
        log(f"model {self.model.num_params():,} parameters, of which {trained:,} are trained; "
            f"{self.report.work.tokens:,} tokens a step")
        if self.ema:
            log("evaluations and samples use the moving average of the weights")
        if self.config.eval_only:
            log(f"evaluating the checkpoint of step {self.iter_num}")
        elif self.iter_num:
            log(f"resuming after step {self.iter_num}")
        if not self.config.eval_only:
            log("compiling: the first evaluation and the first step are slow, and slowest in the "
                "first run")


def prepare(model: LanguageModel, config: TrainConfig, data: TokenData,
            ranks: Ranks | None = None) -> Run:
    """A run that is ready to train or to evaluate; writes no file.

    Attaches LoRA adapters to the model, resumes if config asks for it, and distributes the weights
    over the devices. Raises ValueError where model, config, data and out_dir do not fit together.
    """
    ranks = ranks or Ranks()
    check_ranks(model, config, data, ranks)
    check_vocabulary(model, data)
    check_float32(model)
    check_loggers(config.tensorboard, config.wandb)
    context_length(0, config, model.config.block_size)  # raises on an impossible curriculum
    if not config.eval_only:
        checkpoint.check_out_dir(Path(config.out_dir))
    bytes_per_token = data.bytes_per_token()
    model.compute_dtype = config.dtype
    if config.lora_rank:
        lora.attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    check_memory(model, config)
    run = Run(model, config, data, ranks)
    run.bytes_per_token = bytes_per_token
    run.resume()
    if ranks.size > 1:
        ranks.check_same(step=run.iter_num, weights=checksum(model.state_dict()))
    model.tokenizer = data.tokenizer
    run.distribute()
    # not realized: raises where the kernels lack an operation
    model(run.steps.x, run.steps.y, starts=run.steps.starts)
    return run
