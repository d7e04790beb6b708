"""What the commands share: how they begin and end, and how they load a model."""

import io
import signal
import sys
import threading
import warnings
from pathlib import Path

from gpt import GPT
from tinygpt import checkpoint, device, kernels
from tinygpt.config import MachineConfig
from tinygpt.huggingface.pretrained import is_pretrained
from tinygpt.model.bigram import Bigram
from tinygpt.model.language_model import LanguageModel
from tinygpt.streams import flush_or_silence, print_error
from tinygpt.training.signals import insist_on_ctrl_c

FAILURES = (KeyboardInterrupt, ValueError, MemoryError, OSError)


def prepare() -> None:
    """Prints warnings in one line, replaces characters that a stream cannot encode, and lets Ctrl-C
    raise KeyboardInterrupt, which ended the process while modules were loaded."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by nohup, or by a shell
    if threading.current_thread() is threading.main_thread() and not ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        insist_on_ctrl_c()
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None and name != "stdin":  # closed by whoever started the command
            setattr(sys, name, io.StringIO())
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def use_machine(config: MachineConfig) -> None:
    """Chooses the device, the kernels and their threads."""
    device.choose(config.device)
    kernels.use(config.kernels)
    if config.threads:
        kernels.set_threads(config.threads)


def load_model(path: str | Path, ema: bool = True, offline: bool = False, *,
               block_size: int | None = None, as_stored: bool = False) -> LanguageModel:
    """The model in a checkpoint, a GPT or a bigram, or that `GPT.from_pretrained` finds.

    With ema its weights are their moving average where the checkpoint has one; with offline nothing
    is downloaded; block_size and as_stored are for `from_pretrained`. Raises ValueError, also where
    offline or block_size has no effect.
    """
    if is_pretrained(path):
        return GPT.from_pretrained(path, offline=offline, as_stored=as_stored,
                                   block_size=block_size)
    if offline:
        raise ValueError(f"{path} is never downloaded: leave out --offline")
    if block_size is not None:
        raise ValueError(f"{path} has the block_size that it was trained with: leave out "
                         "--block_size")
    with checkpoint.Checkpoint(path) as file:
        kind = checkpoint.model_kind(file.header)
    return (Bigram if kind == Bigram.kind else GPT).from_checkpoint(path, ema)


def report(name: str, error: BaseException, remedy: str) -> int:
    """Prints the error that ended the command `name` and returns the exit status; see `failure`."""
    status, message = failure(error, remedy)
    if message:
        print_error(f"{name}: {message}")
    return status


def failure(error: BaseException, remedy: str) -> tuple[int, str]:
    """The exit status of a command that one of FAILURES has ended, and its message; remedy is the
    advice if it ran out of memory."""
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, OSError):
        flush_or_silence(sys.stdout)
    if isinstance(error, BrokenPipeError):  # stdout was closed
        return 141, ""
    if device.is_out_of_memory(error):
        return 2, str(out_of_memory(error, remedy))
    if isinstance(error, OSError) and error.strerror:  # whose text begins with a number
        named = f"{error.filename}: " if error.filename else ""
        return 2, one_line(named + error.strerror)
    return 2, one_line(str(error))


def one_line(text: str) -> str:
    """A message whose line breaks, of a path or a value in it, are escaped."""
    return "\\n".join(text.splitlines())


def out_of_memory(error: BaseException, remedy: str) -> ValueError:
    """The error of a command that ran out of memory."""
    what = (str(error).strip() or "an allocation failed").splitlines()[0]
    return ValueError(f"{device.default()} is out of memory ({what}): {remedy}")
