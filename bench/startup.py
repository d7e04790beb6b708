"""Time from `python train.py` to its third step with warm caches, against empty caches:

    python bench/startup.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record

ROOT = Path(__file__).parent.parent


def to_third_step(caches: str) -> float:
    """Seconds until the default run has logged its third step."""
    env = os.environ | {"XDG_CACHE_HOME": caches, "PYTHONUNBUFFERED": "1"}
    data = str(ROOT / "data" / "lantern_and_tide.txt")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--data", data, "--log_interval", "1"],
            cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        seconds = next(time.perf_counter() - start for line in process.stdout
                       if line.startswith("iter 3:"))
        process.kill()
        process.wait()
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as caches:
        cold = to_third_step(caches)
        warm = sorted(to_third_step(caches) for _ in range(3))[1]
    record("startup.py", "default run, third step, warm", warm * 1e3, "cold", cold * 1e3)


if __name__ == "__main__":
    main()
