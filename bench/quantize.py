"""Perplexity and size of a model with fp16, int8 and int4 matrices against float32, over the last
tenth of a text; appends to quantize.csv:

    python bench/quantize.py CHECKPOINT TEXT
"""

import csv
import datetime
import math
import sys
from pathlib import Path

import numpy as np
from tinygrad import Tensor, TinyJit
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpt import GPT

RESULTS = Path(__file__).parent / "quantize.csv"
FIELDS = ["date", "model", "matrices", "tokens", "loss", "perplexity", "megabytes"]
BATCH = 8


def loss_over(model: GPT, ids: np.ndarray) -> tuple[float, int]:
    """Mean loss in nats per token over adjacent windows, and the number of tokens."""
    T = model.config.block_size
    count = (len(ids) - 1) // T // BATCH * BATCH
    x = ids[:count * T].reshape(count, T).astype(np.int32)
    y = ids[1:count * T + 1].reshape(count, T).astype(np.int32)
    step = TinyJit(lambda x, y: model(x, y)[1].realize())
    losses = [step(Tensor(x[i:i + BATCH]).realize(), Tensor(y[i:i + BATCH]).realize()).item()
              for i in range(0, count, BATCH)]
    return float(np.mean(losses)), count * T


def main() -> None:
    path, text = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8")
    held_out = text[int(len(text) * 0.9):]  # the validation split of train.py
    for kind in ("float32", "fp16", "int8", "int4"):
        model = GPT.from_checkpoint(path)
        ids = np.array(model.tokenizer.encode(held_out))
        size = f"{model.num_params() / 1e6:.1f}M parameters"
        if kind != "float32":
            model.quantize(kind)
        loss, tokens = loss_over(model, ids)
        megabytes = sum(t.nbytes() for t in get_state_dict(model).values()) / 1e6
        print(f"{kind:8} loss {loss:.5f}   perplexity {math.exp(loss):.4f}   {megabytes:.2f} MB",
              flush=True)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(FIELDS)
            writer.writerow([datetime.date.today().isoformat(), size, kind, tokens, f"{loss:.5f}",
                             f"{math.exp(loss):.4f}", f"{megabytes:.2f}"])


if __name__ == "__main__":
    main()
