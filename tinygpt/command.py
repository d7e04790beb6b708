"""How the project's commands begin and end."""

import io
import os
import sys
import warnings
from contextlib import suppress

from tinygpt import device

FAILURES = (KeyboardInterrupt, ValueError, MemoryError, OSError)


def prepare() -> None:
    """Warnings become one line each; what is told, and cannot be, is no reason to fail."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the command
            setattr(sys, name, io.StringIO())
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def tell(name: str, error: BaseException, remedy: str) -> int:
    """Says on stderr what has ended the command of that name; see `failure`. The exit status."""
    status, message = failure(error, remedy)
    if message:
        print(f"{name}: {message}", file=sys.stderr)
    return status


def failure(error: BaseException, remedy: str) -> tuple[int, str]:
    """The exit status of a command that one of FAILURES has ended, and what to say of it; remedy is
    what helps where memory did not suffice."""
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, BrokenPipeError):  # the reader of our output has left
        silence(sys.stdout)
        return 141, ""
    if device.is_out_of_memory(error):
        return 2, str(out_of_memory(error, remedy))
    return 2, str(error)


def out_of_memory(error: BaseException, remedy: str) -> ValueError:
    """What to say where memory did not suffice."""
    what = (str(error).strip() or "what was asked for does not fit").splitlines()[0]
    return ValueError(f"{device.default()} is out of memory ({what}): {remedy}")


def silence(stream) -> None:
    """Lets what is written to a stream from now on, and what it still holds, go nowhere."""
    with suppress(OSError):  # of a stream that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
