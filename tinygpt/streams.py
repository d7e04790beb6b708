"""stdout and stderr that were closed, or that are full."""

import os
import sys
from contextlib import suppress


def print_error(line: str) -> None:
    """Prints a line to stderr; where that fails, only the exit status reports the error."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream) -> None:
    """Discards what is written to a stream from now on, and what it still holds."""
    with suppress(OSError):  # of a stream that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
