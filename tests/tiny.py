"""A model, and flags of runs, that take seconds."""

import json

from gpt import GPTConfig

TINY = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16)
FLAGS = ("--tokenizer", "byte", "--block_size", 8, "--n_layer", 1, "--n_head", 2, "--n_embd", 16,
         "--batch_size", 4, "--eval_iters", 1, "--log_interval", 1)


def losses(out_dir) -> dict[int, float]:
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return {r["iter"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
