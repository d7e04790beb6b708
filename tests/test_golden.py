"""Losses of two recipes, recorded, which every change has to reproduce.

`python tests/test_golden.py --record` records them anew in tests/golden.json, where a change is
meant to change them: say so in its commit message. The recipes are the presets, with two blocks
instead of four, on the first part of the play that comes with the project.
"""

import functools
import json
import sys
import tempfile
from dataclasses import fields

import numpy as np
import pytest
from conftest import ROOT

from gpt import GPT, GPTConfig, TrainConfig
from tinygpt import kernels
from tinygpt.config import PRESETS
from tinygpt.data import SHIPPED, TokenData, load_data
from tinygpt.schedule import learning_rate
from train import Run

FILE = ROOT / "tests" / "golden.json"
CHARACTERS = 30_000  # of the play
EVERY = 10  # steps from one recorded loss to the next
# kernels, preset, dtype: steps, and how far a loss may be from the recorded one, in nats. Vector
# widths and numbers of threads change the order of sums, and training amplifies the rounding: after
# 100 steps one thread and two differ by 3e-6 in float32 and 1e-3 in bfloat16, the C kernels and the
# portable ones by 8e-6. The tolerances are ten times that.
CASES = {
    ("cpu", "shakespeare", "float32"): (100, 1e-4),
    ("cpu", "shakespeare", "bfloat16"): (100, 1e-2),
    ("cpu", "shakespeare_char_cpu", "float32"): (100, 1e-4),
    ("cpu", "shakespeare_char_cpu", "bfloat16"): (100, 1e-2),
    ("portable", "shakespeare_char_cpu", "float32"): (10, 1e-4),
}


@functools.cache
def data(tokenizer: str, vocab_size: int) -> TokenData:
    return load_data(SHIPPED.read_text(encoding="utf-8")[:CHARACTERS], tokenizer, vocab_size)


def losses(kind: str, preset: str, dtype: str, steps: int) -> list[float]:
    """The losses of the first step and of every tenth one after it."""
    settings = PRESETS[preset] | {"n_layer": 2, "dtype": dtype}
    shape, config = (cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})
                     for cls in (GPTConfig, TrainConfig))
    tokens = data(config.tokenizer, shape.vocab_size)
    kernels.use(kind)
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = {f.name: getattr(config, f.name) for f in fields(config)}
            config = TrainConfig(**settings | {"out_dir": folder})
            shape = GPTConfig(**vars(shape) | {"vocab_size": tokens.tokenizer.vocab_size})
            run = Run(GPT(shape, config.seed), config, tokens)
            found = [run.steps.train(n, run.batches.batch, learning_rate(n, config), np.inf)[0]
                     for n in range(steps + 1)]
        return found[::EVERY]
    finally:
        kernels.use("auto")


def key(case: tuple[str, str, str]) -> str:
    return ", ".join(case)


@pytest.mark.parametrize("case", CASES, ids=key)
def test_losses_are_those_that_were_recorded(case):
    steps, tolerance = CASES[case]
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[key(case)]
    assert len(recorded) == steps // EVERY + 1 and recorded[-1] < recorded[0] - 0.1
    np.testing.assert_allclose(losses(*case, steps), recorded, atol=tolerance, rtol=0)


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("python tests/test_golden.py --record")
    found = {key(case): [round(loss, 6) for loss in losses(*case, steps)]
             for case, (steps, _) in CASES.items()}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
