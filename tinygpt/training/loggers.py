"""Loggers besides metrics.jsonl: TensorBoard and Weights & Biases."""

import importlib
from pathlib import Path


class TensorBoard:
    """Writes TensorBoard's event files to out_dir/tensorboard, with tensorboardX."""

    def __init__(self, out_dir: Path, settings: dict):
        self._writer = _library("tensorboardX", "tensorboard").SummaryWriter(
            str(out_dir / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def log(self, iter_num: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, iter_num)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Logs to Weights & Biases, which its own environment variables configure."""

    def __init__(self, out_dir: Path, settings: dict):
        self._run = _library("wandb", "wandb").init(dir=str(out_dir), config=settings)

    def log(self, iter_num: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=iter_num)

    def close(self) -> None:
        self._run.finish()


def make_loggers(tensorboard: bool, wandb: bool, out_dir: Path, settings: dict) -> list:
    """The loggers that are asked for. Raises ValueError where one cannot be started."""
    asked = [(TensorBoard, tensorboard), (WandB, wandb)]
    try:
        return [cls(out_dir, settings) for cls, wanted in asked if wanted]
    except ValueError:
        raise
    except Exception as error:  # any error of the library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"a logger cannot be started ({reason}): fix that, or leave out "
                         f"{' or '.join(f'--{cls.__name__.lower()}' for cls, w in asked if w)}"
                         ) from error


def check_loggers(tensorboard: bool, wandb: bool) -> None:
    """Raises ValueError where a library that is asked for is not installed."""
    for name, flag, wanted in (("tensorboardX", "tensorboard", tensorboard),
                               ("wandb", "wandb", wandb)):
        if wanted:
            _library(name, flag)


def _library(name: str, flag: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--{flag} needs {name}, which is not installed: pip install {name}, or "
                         f"leave out --{flag}") from error
