"""Ctrl-C and SIGTERM, handled between two steps."""

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
    """Yields a list to which a signal adds its number, with the message on stderr. A second signal
    has its usual effect at once."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(signum, frame):
        pending.append(signum)
        signal.signal(signum, before[signum])
        with suppress(OSError):  # print is not reentrant
            os.write(STDERR, message.encode())

    before = {s: signal.signal(s, note) for s in signums}
    try:
        yield pending
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@functools.cache
def insist_on_ctrl_c() -> None:
    """Raises KeyboardInterrupt again where a Ctrl-C came inside a `__del__` or a callback: Python
    would print it and continue."""
    others = sys.unraisablehook

    def hook(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main)  # here it would be ignored
            again.daemon = True
            again.start()
        else:
            others(unraisable)

    sys.unraisablehook = hook
