"""Writing to stdout and stderr when they were closed or are full."""

import os
import sys
from contextlib import suppress


def print_error(line: str) -> None:
    """Prints a line to stderr; where that fails, only the exit status reports the error."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def flush_or_silence(stream) -> None:
    """Writes what a stream still holds; discards it where that fails, as Python's exit would fail
    once more, with a status of its own."""
    try:
        stream.flush()
    except OSError:
        silence(stream)


def silence(stream) -> None:
    """Discards the buffer of a stream, and everything written to it from now on."""
    with suppress(OSError):  # the stream has no file descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
