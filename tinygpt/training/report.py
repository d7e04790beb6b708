"""Logging of a run: log lines, a progress bar, metrics.jsonl and loss.png."""

import io
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tinygpt.checkpoint import CheckpointError, write_atomically
from tinygpt.streams import silence
from tinygpt.training.config import TrainConfig

SPIKE = 1.5  # a loss this many times the running average is reported


@dataclass(frozen=True)
class Work:
    """The work of a training step, and what it is done with."""

    tokens: int
    flops: float  # of each device, or of each process on a CPU
    peak_flops: Callable[[], float | None]  # FLOP/s of one of them; None where that is unknown


class Report:
    """Logs a run: on stdout in nanoGPT's words, and in out_dir unless that is None.

    Records of steps after `start`, which a resumed run takes again, are dropped. The figures of
    every record go to the loggers too (see loggers.py). A silent report prints and writes nothing.
    `output_closed` is set once stdout or stderr cannot be written; nothing is printed from then on.
    """

    def __init__(self, out_dir: Path | None, start: int, config: TrainConfig, work: Work,
                 loggers=(), silent: bool = False):
        self.out_dir, self.work, self.silent = out_dir, work, silent
        self.max_iters, self.log_interval = config.max_iters, config.log_interval
        self.records, self.file, self.loggers = [], None, list(loggers)
        self.output_closed = self.undrawn = False
        if out_dir is not None:
            former = _read_records(out_dir / "metrics.jsonl") if start else []
            self.records = [r for r in former if r["iter"] <= start]
            write_atomically(out_dir / "metrics.jsonl",
                             "".join(json.dumps(r) + "\n" for r in self.records).encode())
            self.file = (out_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.bar = tqdm(total=self.max_iters, initial=start, unit="it", dynamic_ncols=True,
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}"
                                   "{postfix}]",  # our own ETA leaves out steps that compile
                        disable=out_dir is None or not sys.stderr.isatty())
        self.bar_shows_steps = not self.bar.disable and sys.stdout.isatty()
        self.seconds: float | None = None  # of a step, a running average
        self.average: float | None = None  # of the loss

    def close(self) -> None:
        self.bar.close()
        for logger in self.loggers:
            with suppress(Exception):  # the run is over: nothing is lost
                logger.close()
        if self.file:
            with suppress(OSError):  # a full disk, which has been reported
                self.file.close()

    def line(self, text: str) -> None:
        """Prints a line on stdout, above the bar if there is one."""
        self._print(text, sys.stdout)

    def remark(self, text: str) -> None:
        """Prints a line on stderr."""
        self._print(text, sys.stderr)

    def _print(self, text: str, file) -> None:
        if self.silent or self.output_closed:
            return
        try:
            tqdm.write(text, file=file)
            file.flush()
        except OSError:
            self.output_closed = True
            silence(file)

    def step(self, iter_num: int, loss: float, norm: float, lr: float, seconds: float,
             compiled: bool) -> None:
        """Logs a step with a finite loss. The time of a step that compiled is left out of averages.
        """
        if not compiled:
            old = seconds if self.seconds is None else self.seconds
            self.seconds = 0.9 * old + 0.1 * seconds
        if self.average is not None and loss > SPIKE * self.average:
            self.line(f"iter {iter_num}: loss spike, {loss:.4f} over an average of "
                      f"{self.average:.4f}")
        self.average = loss if self.average is None else 0.95 * self.average + 0.05 * loss
        mean = self.seconds or seconds
        rate = self.work.tokens / mean
        eta = (self.max_iters - iter_num) * mean
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tok/s, ETA {_clock(eta)}",
                                 refresh=False)
        self.bar.update(1)
        if iter_num % self.log_interval == 0:
            peak = self.work.peak_flops()
            mfu = self.work.flops / mean / peak if peak else None
            if not self.bar_shows_steps:
                used = "" if mfu is None else f"mfu {mfu:.2%}, "
                self.line(f"iter {iter_num}: loss {loss:.4f}, time {seconds * 1e3:.2f}ms, "
                          f"{used}{rate:,.0f} tok/s, ETA {_clock(eta)}")
            self._record(iter=iter_num, loss=loss, grad_norm=norm, lr=lr,
                         ms=seconds * 1e3, tokens_per_second=rate, mfu=mfu)

    def evaluation(self, iter_num: int, train: float, val: float, lr: float,
                   bits_per_byte: float | None, ema: bool = False) -> None:
        """Logs an evaluation in nats per token and bits per byte; with ema, one of the weights'
        moving average."""
        tail = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits per byte"
        tail += ", of the weights' moving average" if ema else ""
        self.line(f"step {iter_num}: train loss {train:.4f}, val loss {val:.4f}{tail}")
        self._record(iter=iter_num, train_loss=train, val_loss=val, lr=lr,
                     bits_per_byte=bits_per_byte, time=time.time(),
                     **({"ema": True} if ema else {}))

    def draw(self) -> None:
        """Writes loss.png to out_dir once there are steps. If it cannot be drawn, the run continues
        without it, with one remark."""
        steps = [r for r in self.records if "loss" in r]
        if not steps or self.out_dir is None or self.undrawn:
            return
        try:
            self._draw(steps)
        except Exception as error:  # noqa: BLE001 - any error of matplotlib or the disk
            self.undrawn = True
            self.remark(f"loss.png is not drawn ({_first_line(error)}); the run continues")

    def _draw(self, steps: list[dict]) -> None:
        """Training and validation loss, the learning rate below."""
        from matplotlib.figure import Figure  # slow to import: half a second

        evals = [r for r in self.records if "val_loss" in r]
        figure = Figure(figsize=(8, 6))
        top, low = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([r["iter"] for r in steps], [r["loss"] for r in steps], color="0.75",
                 linewidth=1, label="training batches")
        for key, text, style in (("train_loss", "training", "C0.-"),
                                 ("val_loss", "validation", "C1.-")):
            top.plot([r["iter"] for r in evals], [r[key] for r in evals], style, label=text)
        top.set_ylabel("loss, nats per token")
        top.legend()
        low.plot([r["iter"] for r in steps], [r["lr"] for r in steps], color="C2")
        low.set_ylabel("learning rate")
        low.set_xlabel("step")
        for axes in (top, low):
            axes.grid(alpha=0.3)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110, format="png")
        write_atomically(self.out_dir / "loss.png", picture.getvalue())

    def _record(self, **record) -> None:
        """Writes a record to metrics.jsonl and its figures to the loggers."""
        self.records.append(record)
        if self.file:
            try:
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
            except OSError as error:
                raise CheckpointError(f"{self.file.name} cannot be written ({error.strerror}): "
                                      "what was saved before is untouched") from error
        figures = {k: float(v) for k, v in record.items() if v is not None and k != "iter"}
        for logger in list(self.loggers):
            try:
                logger.log(record["iter"], figures)
            except Exception as error:  # noqa: BLE001 - any error of the library
                self.loggers.remove(logger)
                self.remark(f"{type(logger).__name__} failed and is not used any more "
                            f"({_first_line(error)}); the run continues")


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """A loss in nats per token as bits per byte of text, which does not depend on tokens."""
    return None if bytes_per_token is None else loss / math.log(2) / bytes_per_token


def _read_records(path: Path) -> list[dict]:
    """The records of an earlier run, without lines that are cut off or damaged."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("iter"), int):
                    records.append(record)
    return records


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
