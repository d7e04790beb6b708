"""Time and peak memory of exporting a random GPT-2 124M and reading it back, each step in its own
process, against transformers reading it; the logits have to agree:

    python bench/export.py
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record
from bench.memory import peak

IDS = np.arange(64, dtype=np.int32).reshape(1, 64) * 700  # below 50257
STEPS = ("build", "export", "transformers", "read")


def measure(step: str, folder: Path) -> dict[str, float]:
    """Seconds of one step without imports, and peak MB with the forward pass after it, which reads
    memory-mapped weights. Saves the logits of IDS in folder."""
    from tinygrad import Tensor

    from gpt import GPT, GPTConfig

    if step == "transformers":
        import torch
        import transformers
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "gpt2")
        seconds = time.perf_counter() - start
        logits = model(torch.tensor(IDS, dtype=torch.long)).logits.detach().numpy()
    else:
        start = time.perf_counter()
        model = (GPT.from_pretrained(folder / "gpt2") if step == "read" else
                 GPT(GPTConfig(activation="gelu_tanh")))
        if step == "export":
            start = time.perf_counter()
            model.save_pretrained(folder / "gpt2")
        seconds = time.perf_counter() - start
        logits = model(Tensor(IDS)).numpy()
    np.save(folder / f"{step}.npy", logits)
    return {"seconds": seconds, "MB": peak()}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as name:
        found = {step: json.loads(subprocess.run(
            [sys.executable, __file__, step, name], check=True, text=True,
            stdout=subprocess.PIPE).stdout.splitlines()[-1]) for step in STEPS}
        logits = {step: np.load(Path(name) / f"{step}.npy") for step in STEPS}
    for step, array in logits.items():
        error = float(np.abs(array - logits["build"]).max())
        print(f"{step}: logits differ by {error:.1e} at most")
        assert error < 1e-4, step
    theirs = found["transformers"]
    for step in ("build", "export", "read"):
        for unit, value in found[step].items():
            record("export.py", f"GPT-2 124M, {step}", value, "transformers reading",
                   theirs[unit], unit)


if __name__ == "__main__":
    main()
