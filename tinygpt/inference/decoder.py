"""Draws token after token for a batch, over a key-value cache, through two compiled steps."""

import operator
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from tinygpt import device, kernels
from tinygpt.config import SampleConfig
from tinygpt.inference.sampling import SamplingParameters, enabled_options, sample
from tinygpt.kernels.cpu.replay import DecodeReplay
from tinygpt.kernels.jit import compiled
from tinygpt.kernels.random import make_key

CHUNKS = 32, 64, 128, 192, 256  # tokens of a prompt that are read at once: as few as hold it
MOST_AHEAD, SECONDS_AHEAD = 16, 0.01  # tokens of a text that are drawn in one call, and their time
MOST_IDLE = 8  # decoders that are kept for a model, each with a cache


class Decoders:
    """The decoders of one model, kept between texts since compiling them takes seconds.

    A decoder that is writing is not among them, so that texts which grow in turn have a cache each.
    Idle ones do not refer to the model, so that they are freed with it.
    """

    __slots__ = ("_idle",)  # instead of a __dict__, in which get_state_dict would look for weights

    def __init__(self):
        self._idle: deque[Decoder] = deque(maxlen=MOST_IDLE)  # the one used last at the end

    def __reduce__(self):
        return Decoders, ()  # a copy of the model begins with none

    def run(self, model, prompts: list[np.ndarray], config: SampleConfig,
            reuse_cache: bool = False, with_logits: bool = False) -> Iterator["Drawn"]:
        """Yields the tokens that follow B prompts, each (T,) int32 with its own T, max_new_tokens
        times; without logits several are drawn at once. With reuse_cache the keys and values of
        tokens that an earlier text began with are not computed again."""
        needs = Needs.of(model, prompts, config)
        decoder = self._take(model, needs, prompts if reuse_cache else None)
        with suppress(GeneratorExit):  # the caller stopped reading
            yield from decoder.run(prompts, config, reuse_cache, with_logits)
        decoder.model = None
        self._idle.append(decoder)  # not after an exception, which may have stopped half a step

    def clear(self) -> None:
        """Frees the idle decoders."""
        self._idle.clear()

    def _take(self, model, needs: "Needs", prompts: list[np.ndarray] | None) -> "Decoder":
        """An idle decoder, the one whose cache has most of the prompts, or a new one."""
        fitting = [decoder for decoder in self._idle if decoder.needs == needs]
        if not fitting:
            return Decoder(model, needs)
        decoder = max(fitting, key=lambda d: d.cached_of(prompts)) if prompts else fitting[0]
        self._idle.remove(decoder)
        decoder.model = model
        return decoder


class Drawn(NamedTuple):
    """The tokens (B,) int32 that a step has drawn, and the model's logits (B, V) float32 where they
    are asked for, which the next step overwrites."""

    tokens: np.ndarray
    logits: Tensor | None


class Needs(NamedTuple):
    """What the buffers and steps of a decoder depend on, besides the model's weights."""

    config: object
    compute_dtype: str
    device: str | tuple[str, ...]
    kernels: str
    batch_size: int
    vocab_size: int  # only ids below it are drawn, even where there are more logits
    ragged: bool  # prompts of several lengths
    enabled: tuple[str, ...]

    @classmethod
    def of(cls, model, prompts: list[np.ndarray], config: SampleConfig) -> "Needs":
        tokenizer = model.tokenizer
        known = model.config.vocab_size if tokenizer is None else min(
            model.config.vocab_size, tokenizer.vocab_size)
        return cls(model.config, model.compute_dtype, model.device, kernels.in_use(),
                   len(prompts), known, len(set(map(len, prompts))) > 1, enabled_options(config))


class Decoder:
    """Writes texts with a model, over a key-value cache.

    Prompts are read in chunks of a few lengths, each compiled when it is needed, and new tokens one
    at a time; start_pos and row are symbolic, so that no step is compiled again as the text grows.
    Steps read the memory of the weights: they are compiled again after weights or layers of the
    model were replaced. Where a step can be replayed by C, one call of it draws several tokens.

    Prompts of several lengths are aligned at their ends. `start` (B,) int32 is the number of
    padding tokens before each in the window, which attention does not see.
    """

    def __init__(self, model, needs: Needs):
        self.model, self.needs = model, needs
        self.block_size = model.config.block_size
        self.parameters = SamplingParameters(needs.enabled)
        B = needs.batch_size
        self.chunks = sorted({min(length, self.block_size) for length in CHUNKS})

        def buffer(*shape: int, dtype, device=None) -> Tensor:
            return Tensor.zeros(*shape, dtype=dtype).to(device).contiguous().realize()
        self.seen = buffer(B, needs.vocab_size, dtype=dtypes.bool)
        self.key = buffer(B if needs.ragged else 1, dtype=dtypes.uint32)
        self.tokens = {T: buffer(B, T, dtype=dtypes.int32, device=needs.device)
                       for T in {1, *self.chunks}}
        self.start = buffer(B, dtype=dtypes.int32, device=needs.device) if needs.ragged else None
        self.cache = model._new_cache(B, self.start)
        self.cached_tokens = np.empty((B, 0), np.int32)  # whose keys and values the cache has
        self.parts, self.steps, self.replays, self.ahead = [], {}, {}, 1

    def run(self, prompts: list[np.ndarray], config: SampleConfig, reuse_cache: bool,
            with_logits: bool) -> Iterator[Drawn]:
        """Yields the tokens that follow the prompts, max_new_tokens times."""
        self._follow_model()
        self.parameters.set(config)
        self._mark_seen(prompts)
        lengths = [len(prompt) for prompt in prompts]
        if not self.needs.ragged:
            lengths = lengths[:1]  # one key for all rows
        window, start = aligned(prompts, self.block_size)
        hop = min(config.window_hop or (self.block_size + 1) // 2, self.block_size)
        # tokens that were drawn, and tokens of the window that are in the cache
        new, cached = 0, self.cached_of(prompts) if reuse_cache else 0
        while new < config.max_new_tokens:
            if window.shape[1] > self.block_size:  # the window moves, and with it all positions
                full = window.shape[1] - start > self.block_size
                start[full] = window.shape[1] - self.block_size + hop - 1
                window, start, cached = window[:, start.min():], start - start.min(), 0
            if self.start is not None and not cached:
                device.write(self.start, start)
            one = with_logits or not 0 < cached == window.shape[1] - 1
            count = 1 if one else min(self.ahead, config.max_new_tokens - new,
                                      self.block_size - cached)
            keys = self._keys(config.seed, [[length + new + i for length in lengths]
                                            for i in range(count)])
            drawn, logits = self._next(window, cached, keys)
            new, cached = new + count, window.shape[1] + count - 1
            window = np.concatenate([window, drawn.T], axis=1)
            self.cached_tokens = window[:, :cached]
            for tokens in drawn:
                yield Drawn(tokens, logits if with_logits else None)

    def _keys(self, seed: int, places: list[list[int]]) -> np.ndarray:
        """The keys (n, K) uint32 of n steps, which draw the tokens at those places of the texts."""
        if not self.parameters.has("temperature"):
            return np.zeros((len(places), len(places[0])), np.uint32)
        return np.array([[make_key(seed, place)[0] for place in row] for row in places])

    def cached_of(self, prompts: list[np.ndarray]) -> int:
        """The number of tokens at the beginning of all prompts that the cache has. The last one of
        a prompt does not count, since the logits after it are needed."""
        if self.start is not None:  # the place of a token depends on the other prompts
            return 0
        window, _ = aligned(prompts, self.block_size)
        n = min(window.shape[1] - 1, self.cached_tokens.shape[1])
        same = (window[:, :n] == self.cached_tokens[:, :n]).all(axis=0)
        return int(np.append(same, False).argmin())

    def _follow_model(self) -> None:
        """Drops the steps, and what is cached, where the model has other weights or layers than
        they were compiled with."""
        if not _same(parts := _parts(self.model), self.parts):
            Tensor.realize(*_weights(parts))  # what was assigned, or loaded from a file
            if not _same(parts := _parts(self.model), self.parts):
                self.parts, self.steps, self.replays, self.ahead = parts, {}, {}, 1
                self.cached_tokens = self.cached_tokens[:, :0]

    def _mark_seen(self, prompts: list[np.ndarray]) -> None:
        if self.parameters.has("repetition_penalty"):
            seen = np.zeros(self.seen.shape, dtype=bool)
            for row, ids in zip(seen, prompts, strict=True):
                row[ids[ids < self.needs.vocab_size]] = True
            device.write(self.seen, seen)

    def _next(self, window: np.ndarray, cached: int, keys: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """The tokens (n, B) that n keys draw after window (B, T), the first `cached` columns of
        which are cached, and the last logits (B, V). More than one where all but one are cached."""
        end, longest = window.shape[1], self.chunks[-1]
        while end - cached > longest:
            seen = device.read(self.seen)
            self._call(window[:, cached:cached + longest], cached, longest - 1, keys[:1])
            device.write(self.seen, seen)  # what was drawn on the way is no part of the text
            cached += longest
        if 0 < cached == end - 1:
            return self._call(window[:, cached:], cached, 0, keys)
        T = next(length for length in self.chunks if length >= end - cached)
        begin = max(0, end - T)  # the last chunk may overlap what is cached: it writes the same
        padded = np.zeros((len(window), T), np.int32)
        padded[:, :end - begin] = window[:, begin:]
        return self._call(padded, begin, end - begin - 1, keys)

    def _call(self, tokens: np.ndarray, start_pos: int, row: int, keys: np.ndarray
              ) -> tuple[np.ndarray, Tensor]:
        """Runs the step for tokens (B, T), once for each of the keys (n, K)."""
        T, last = tokens.shape[1], self.block_size - tokens.shape[1]
        if replay := self.replays.get(T):
            begin = time.perf_counter()
            made = replay(tokens, start_pos, row, keys)
            if T == 1:
                seconds = (time.perf_counter() - begin) / len(keys)
                self.ahead = max(1, min(MOST_AHEAD, int(SECONDS_AHEAD / seconds)))
            return made
        device.write(self.tokens[T], tokens)
        device.write(self.key, keys)
        where = UOp.variable("start_pos", 0, last).bind(start_pos) if last else 0
        which = UOp.variable("row", 0, T - 1).bind(row) if T > 1 else 0
        if T not in self.steps:
            self._follow_model()  # the weights may have been replaced since the text began
            self.steps[T] = compiled(self._step)
        drawn, logits = self.steps[T](self.tokens[T], where, which)
        if T not in self.replays:
            self.replays[T] = DecodeReplay.of(self.steps[T], self.tokens[T], self.key)
        return device.read(drawn)[None], logits

    def _step(self, tokens: Tensor, start_pos: UOp | int, row: UOp | int
              ) -> tuple[Tensor, Tensor]:
        """Draws the tokens (B,) int32 after `row` of tokens (B, T); returns the logits too."""
        logits = self.model._next_logits(tokens, self.cache, start_pos, row)  # (B, V)
        logits = kernels.stored(logits[:, :self.needs.vocab_size].to(self.seen.device)).realize()
        return sample(logits, self.seen, self.key, self.parameters).realize(), logits


def cache_size(config) -> int:
    """The numbers that the key-value cache of one text has, for a GPT of that configuration."""
    return 2 * config.n_layer * config.kv_heads * config.head_size * config.block_size


def aligned(prompts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `length` tokens of each prompt as rows (B, T) int32 that are aligned at their ends,
    and the column in which each begins, (B,)."""
    prompts = [prompt[-length:] for prompt in prompts]
    T = max(map(len, prompts))
    window = np.zeros((len(prompts), T), np.int32)
    start = np.array([T - len(prompt) for prompt in prompts])
    for row, begin, prompt in zip(window, start, prompts, strict=True):
        row[begin:] = prompt
    return window, start


def _parts(model) -> list:
    """All that the model computes with, in a fixed order: layers, settings, weights, and the graph
    (uop) of each weight, which changes when the weight is moved to other memory."""
    found = []
    todo = [value for name, value in vars(model).items() if name not in ("tokenizer", "_decoders")]
    while todo:
        value = todo.pop()
        found.append(value)
        kind = type(value)
        if kind is Tensor:
            found.append(value.uop)
        elif kind is list or kind is tuple:
            todo.extend(value)
        elif kind is dict:
            todo.extend(value.values())
        elif value is not model.config and hasattr(value, "__dict__"):
            todo.extend(vars(value).values())
    return found


def _same(parts: list, others: list) -> bool:
    return len(parts) == len(others) and all(map(operator.is_, parts, others))


def _weights(parts: list) -> list[Tensor]:
    return [part for part in parts if isinstance(part, Tensor)]
