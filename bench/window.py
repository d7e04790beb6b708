"""Bits per byte past block_size, by how the window moves over the last tenth of a text: computed
again after every hop, or never, with the keys and values of the last block_size tokens kept:

    python bench/window.py CHECKPOINT TEXT
"""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tinygrad import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpt import GPT, GPTConfig
from tinygpt.data.token_data import mean_bytes
from tinygpt.training.report import bits_per_byte

LONG, SCORED = 32, 64  # times block_size: the text over which keys are kept, and what is scored


def bits(model: GPT, ids: np.ndarray, scored: int, hop: int) -> float:
    """Bits per byte of the last `scored` of ids, in windows of block_size that move by hop."""
    T, nats = model.config.block_size, []
    ends = range(len(ids) - scored + hop, len(ids) + 1, hop)
    windows = np.stack([ids[end - T - 1:end] for end in ends]).astype(np.int32)
    for batch in np.array_split(windows, max(1, windows.size // 4096)):
        logits = model(Tensor(batch[:, :-1].copy())).numpy()[:, T - hop:]
        logits -= logits.max(-1, keepdims=True)
        likely = np.take_along_axis(logits, batch[:, T - hop + 1:, None], -1)[..., 0]
        nats.append((np.log(np.exp(logits).sum(-1)) - likely).ravel())
    each = mean_bytes(ids[len(ids) - scored:], model.tokenizer, "the text")
    return bits_per_byte(float(np.concatenate(nats).mean(dtype=np.float64)), each)


def rolling(model: GPT) -> GPT:
    """The model on long texts, in which a position sees the last block_size keys of each layer."""
    config = asdict(model.config)
    T = config["block_size"]
    twin = GPT(GPTConfig(**config | dict(block_size=LONG * T, sliding_window=T)), None)
    twin.load_state_dict({name: w.numpy() for name, w in model.state_dict().items()})
    twin.tokenizer = model.tokenizer
    return twin


def main() -> None:
    model = GPT.from_checkpoint(sys.argv[1])
    text = Path(sys.argv[2]).read_text(encoding="utf-8")
    ids = np.array(model.tokenizer.encode(text[int(len(text) * 0.9):]))  # train.py's validation
    T = model.config.block_size
    ids, scored = ids[:(LONG + SCORED) * T], SCORED * T
    for hop in (1, T // 8, T // 4, T // 2, T):
        print(f"hop {hop:2}     {bits(model, ids, scored, hop):.4f}", flush=True)
    if model.config.position == "rope":
        print(f"keys kept  {bits(rolling(model), ids, scored, LONG * T // 2):.4f}")


if __name__ == "__main__":
    main()
