"""Ctrl-C and SIGTERM, answered between two steps."""

import _thread
import functools
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress

STDERR = 2


@contextmanager
def pending_signals(signums=(signal.SIGINT, signal.SIGTERM),
                    message: str = "\nstopping after this step; again to stop at once\n"):
    """A list that signals put their number on, with that message on stderr; the second one acts at
    once."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(signum, frame):
        pending.append(signum)
        signal.signal(signum, before[signum])
        with suppress(OSError):  # print is not to be called where it may be at work already
            os.write(STDERR, message.encode())

    before = {s: signal.signal(s, note) for s in signums}
    try:
        yield pending
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@functools.cache
def insist_on_ctrl_c() -> None:
    """Raises the KeyboardInterrupt of a Ctrl-C again where Python has met it inside a `__del__` or
    a callback, prints it there, and continues as if there had been none."""
    others = sys.unraisablehook

    def hook(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main)  # it would be ignored here too
            again.daemon = True
            again.start()
        else:
            others(unraisable)

    sys.unraisablehook = hook
