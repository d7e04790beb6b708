"""Everything that is not the model itself."""

import os
import signal
import sys

# Ctrl-C while `python -m tinygpt.evaluate` loads its modules, the first of which is this one
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from tinygpt.device import check_cache, export_compiler, prefer_cpu, shield_workers

export_compiler()
check_cache()
prefer_cpu()
shield_workers()
