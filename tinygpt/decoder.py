"""Draws token after token for a batch, over a key-value cache, through two compiled steps."""

from collections.abc import Callable, Iterator

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from tinygpt import device
from tinygpt.config import SampleConfig
from tinygpt.kernels.jit import compiled
from tinygpt.kernels.random import make_key
from tinygpt.sampling import Controls, sample

CHUNK = 64  # tokens of a prompt that are read at once


class Decoder:
    """Writes texts with a model that keeps what it has seen in a cache.

    forward(tokens (B, T), position, row) gives the logits (B, V) after that row of the tokens,
    which stand at `position` of the window; it reads earlier positions from its cache and writes
    these. Prompts are read in chunks of a fixed length, new tokens one at a time; position and row
    are symbolic numbers, so that neither step is ever compiled again as the text grows. Only ids
    below vocab_size are drawn, however many logits there are.
    """

    def __init__(self, forward: Callable, block_size: int, vocab_size: int, batch_size: int,
                 enabled: tuple[str, ...]):
        self.forward, self.block_size, self.vocab_size = forward, block_size, vocab_size
        self.chunk = min(CHUNK, block_size)
        self.controls = Controls(enabled)

        def buffer(*shape: int, dtype) -> Tensor:
            return Tensor.zeros(*shape, dtype=dtype).contiguous().realize()
        self.seen = buffer(batch_size, vocab_size, dtype=dtypes.bool)
        self.tokens = {T: buffer(batch_size, T, dtype=dtypes.int32) for T in {1, self.chunk}}
        self.key = buffer(1, dtype=dtypes.uint32)
        self.steps = {T: compiled(self._step) for T in self.tokens}

    def run(self, ids: np.ndarray, config: SampleConfig) -> Iterator[np.ndarray]:
        """Yields the tokens (B,) int32 that follow ids (B, T), max_new_tokens times."""
        text = np.concatenate([ids, np.zeros((len(ids), config.max_new_tokens), np.int32)], axis=1)
        self.controls.set(config)
        if self.controls.has("repetition_penalty"):
            seen = np.zeros(self.seen.shape, dtype=bool)
            row, column = np.nonzero(ids < self.vocab_size)
            seen[row, ids[row, column]] = True
            device.write(self.seen, seen)
        start = max(0, ids.shape[1] - self.block_size)  # where the window begins in the text
        cached = 0  # how many tokens of the window the cache holds
        for n in range(ids.shape[1], text.shape[1]):
            if n - start > self.block_size:  # the window slides, and every position in it changes
                hop = min(config.window_hop, self.block_size)
                start, cached = n - self.block_size + hop - 1, 0
            device.write(self.key, make_key(config.seed, n))
            text[:, n] = self._next(text[:, start:n], cached)
            cached = n - start
            yield text[:, n]

    def _next(self, window: np.ndarray, cached: int) -> np.ndarray:
        """The tokens (B,) after window (B, n), of which the cache holds the first `cached`."""
        n = window.shape[1]
        if n - cached == 1 and n > 1:
            return self._call(window[:, -1:], n - 1, row=0)
        T = self.chunk
        for begin in range(cached, n - T, T):
            self._call(window[:, begin:begin + T], begin, row=T - 1)
        begin = max(0, n - T)  # the last chunk may overlap what is cached: it writes the same
        padded = np.zeros((len(window), T), np.int32)
        padded[:, :n - begin] = window[:, begin:]
        return self._call(padded, begin, row=n - begin - 1)

    def _call(self, tokens: np.ndarray, position: int, row: int) -> np.ndarray:
        T, last = tokens.shape[1], self.block_size - tokens.shape[1]
        device.write(self.tokens[T], tokens)
        where = UOp.variable("position", 0, last).bind(position) if last else 0
        which = UOp.variable("row", 0, T - 1).bind(row) if T > 1 else 0
        return device.read(self.steps[T](self.tokens[T], where, which))

    def _step(self, tokens: Tensor, position: UOp | int, row: UOp | int) -> Tensor:
        """Draws the tokens (B,) int32 after `row` of tokens (B, T)."""
        logits = self.forward(tokens, position, row)[:, :self.vocab_size]  # (B, V)
        return sample(logits, self.seen, self.key, self.controls).realize()
