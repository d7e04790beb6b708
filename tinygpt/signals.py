"""Ctrl-C and SIGTERM, answered where it suits the run."""

import os
import signal
import threading
from contextlib import contextmanager, suppress

STDERR = 2


@contextmanager
def pending_signals():
    """A list that Ctrl-C and SIGTERM put their number on; the second one acts at once."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(signum, frame):
        pending.append(signum)
        signal.signal(signum, before[signum])
        with suppress(OSError):  # print is not to be called where it may be at work already
            os.write(STDERR, b"\nstopping after this step; again to stop at once\n")

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pending
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
