"""Memory and time of a train step with --grad_checkpoint against the step without it, each in its
own process:

    python bench/grad_checkpoint.py [layers width block batch]

Memory is the largest amount that tinygrad has allocated after a step, including weights, optimizer
state and the buffers of the compiled step.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from tinygrad import GlobalCounters

from gpt import GPT, GPTConfig
from tinygpt.data.load import TokenData
from tinygpt.training.config import TrainConfig
from tinygpt.training.run import prepare

STEPS = 6


def measure(L: int, C: int, T: int, B: int, grad_checkpoint: bool) -> str:
    ids = np.random.default_rng(0).integers(0, 512, 100_000).astype(np.uint16)
    model = GPT(GPTConfig(n_layer=L, n_head=max(1, C // 64), n_embd=C, block_size=T,
                          vocab_size=512))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(batch_size=B, grad_checkpoint=grad_checkpoint, out_dir=folder)
        run = prepare(model, config, TokenData(ids, ids, None, "random"))
        seconds, peak = [], 0
        for _ in range(STEPS):
            start = time.perf_counter()
            loss, _ = run.step(1e-4)
            seconds.append(time.perf_counter() - start)
            peak = max(peak, GlobalCounters.mem_used)
    return (f"grad_checkpoint {grad_checkpoint!s:5}  loss {loss:.6f}  step "
            f"{np.median(seconds[2:]) * 1e3:.0f} ms  peak {peak / 1e6:.1f} MB")


def main() -> None:
    case = [int(word) for word in sys.argv[1:]]
    if len(case) == 5:
        print(measure(*case[:4], bool(case[4])))
        return
    case = case or [6, 384, 256, 12]
    print("layers {} width {} block {} batch {}".format(*case), flush=True)
    for on in "01":
        subprocess.run([sys.executable, __file__, *map(str, case), on], check=True)


if __name__ == "__main__":
    main()
