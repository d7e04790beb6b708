"""Training steps that change nothing, to measure memory and time before a run begins."""

import tempfile
import time
from dataclasses import replace

import numpy as np

from tinygpt.data.load import TokenData, load_data
from tinygpt.model.language_model import LanguageModel
from tinygpt.training.config import TrainConfig
from tinygpt.training.recipe import Trial
from tinygpt.training.run import Run, prepare

SECONDS = 2.0  # for which steps are timed


def compiled_run(model: LanguageModel, config: TrainConfig, data: TokenData) -> Run:
    """A run whose steps are compiled, and which has written no file and changed no weight."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(model, replace(config, out_dir=folder, resume=False, curriculum=False), data)
    run.steps.evaluate(run.batches.batch, 1)
    for _ in range(2):  # compiled by the first
        run.step(0.0)  # the learning rate, which leaves the weights as they are
    return run


def time_steps(model: LanguageModel, config: TrainConfig) -> Trial:
    """Trains a model on random tokens for a few seconds, with a learning rate of 0."""
    shape = model.config
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, 20 * (shape.block_size + 1))
    run = compiled_run(model, config, load_data(ids, "byte", shape.vocab_size))
    steps, batches, end = [], [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or not steps:
        start = time.perf_counter()
        run.step(0.0)
        middle = time.perf_counter()
        run.steps.evaluate(run.batches.batch, 1)
        steps.append(middle - start)
        batches.append(time.perf_counter() - middle)
    return Trial(model.num_params(), float(np.median(steps)),
                 2 * config.eval_iters * float(np.median(batches)))
