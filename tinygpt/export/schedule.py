"""Who writes when: requests wait in a queue, are written in batches, and batches take turns."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tinygpt import device
from tinygpt.config import SampleConfig
from tinygpt.data.tokenizer import StreamDecoder, Tokenizer, end_of_text
from tinygpt.inference.stop import StopFilter

PLACES = 4  # batches that are written in turn, a token each time
MOST_WAITING = 256  # continuations


class Token(NamedTuple):
    """A drawn token: its id, the characters before it, its log-probability, and the likeliest
    [(id, log-probability), ...] in its place. The last two are None and [] unless asked for."""

    id: int
    offset: int
    logprob: float | None = None
    likeliest: Sequence[tuple[int, float]] = ()


class Piece(NamedTuple):
    """What a step adds to one continuation of a request; finish is "stop" or "length" in the last.

    drawn counts the tokens up to here, also those whose text is held back."""

    index: int
    text: str
    tokens: list[Token]
    drawn: int
    finish: str | None


@dataclass(eq=False, kw_only=True)
class Ask:
    """A prompt, of token ids, to be continued `count` times.

    Their numbers begin at `first`. alone: a batch of its own, so that the seed decides the text.
    likeliest: how many likely tokens to tell in each place; None: not even the log-probability of
    the drawn one. send takes each Piece, or the error that ended the batch; it is called by the
    thread that computes.
    """

    prompt: list[int]
    count: int
    first: int
    config: SampleConfig
    stop: Sequence[str]
    alone: bool
    likeliest: int | None
    send: Callable[[Piece | Exception], None]
    left: bool = False  # nobody waits for it any more

    def fits(self, other: "Ask") -> bool:
        """Whether both can be in one batch."""
        def shared(ask: Ask) -> SampleConfig:
            return replace(ask.config, max_new_tokens=0, seed=0)
        return not self.alone and not other.alone and shared(self) == shared(other)


class Continuation:
    """One continuation while it is written."""

    def __init__(self, ask: Ask, index: int, tokenizer: Tokenizer):
        self.ask, self.index, self.finish = ask, index, None
        self._end = end_of_text(tokenizer)
        self._decoder, self._until = StreamDecoder(tokenizer), StopFilter(ask.stop)
        self._drawn = self._decoded = self._sent = 0  # tokens, characters, characters
        self._held: list[Token] = []
        if ask.config.max_new_tokens == 0:
            self._send("", "length")

    @property
    def is_open(self) -> bool:
        return self.finish is None and not self.ask.left

    def push(self, token: int, logits: np.ndarray | None) -> None:
        """Sends what the next token adds; logits (V,) if its log-probability is asked for."""
        self._drawn += 1
        if token == self._end:
            return self._close("stop")
        text = self._decoder.push(token)
        self._held.append(Token(token, self._decoded, *(
            () if logits is None else logprobs(token, logits, self.ask.likeliest))))
        self._decoded += len(text)
        text = self._until.push(text)
        if self._until.stopped:
            return self._send(text, "stop")
        if self._drawn == self.ask.config.max_new_tokens:
            return self._close("length", text)
        return self._send(text)

    def _close(self, finish: str, text: str = "") -> None:
        """Sends the end, with what was held back."""
        rest = self._decoder.finish()
        self._decoded += len(rest)
        text += self._until.push(rest)
        if self._until.stopped:
            return self._send(text, "stop")
        return self._send(text + self._until.finish(), finish)

    def _send(self, text: str, finish: str | None = None) -> None:
        self._sent += len(text)
        whole = self._sent == self._decoded
        ready = [token for token in self._held if whole or token.offset < self._sent]
        self._held, self.finish = self._held[len(ready):], finish
        self.ask.send(Piece(self.ask.first + self.index, text, ready, self._drawn, finish))


class Batch:
    """Continuations that are written together, each as a row of one batch."""

    def __init__(self, model, asks: list[Ask], padding: int):
        self.asks = asks
        self.rows = [Continuation(ask, index, model.tokenizer)
                     for ask in asks for index in range(ask.count)]
        prompts = [row.ask.prompt for row in self.rows]
        longest = max(ask.config.max_new_tokens for ask in asks)
        self._steps = model.stream_batch(prompts + padding * prompts[-1:], config=replace(
            asks[0].config, max_new_tokens=longest))

    @property
    def is_open(self) -> bool:
        return any(row.is_open for row in self.rows)

    def step(self) -> None:
        """Draws a token for each row."""
        drawn = next(self._steps)
        logits = None
        if any(ask.likeliest is not None for ask in self.asks):
            logits = device.read(drawn.logits)  # (B, V)
        for i, row in enumerate(self.rows):
            if row.is_open:
                wanted = row.ask.likeliest is not None
                row.push(int(drawn.tokens[i]), logits[i] if wanted else None)

    def close(self) -> None:
        self._steps.close()

    def fail(self, error: Exception) -> None:
        for ask in self.asks:
            ask.send(error)


def logprobs(token: int, logits: np.ndarray, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token by logits (V,), and the `count` likeliest tokens."""
    shifted = logits.astype(np.float64) - logits.max()
    found = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-found, kind="stable")[:count]
    return float(found[token]), [(int(i), float(found[i])) for i in best]


class Scheduler:
    """A queue before the model. One thread calls `work` in a loop, which computes; the others may
    be called by any thread.

    An ask that nobody else can share a batch with is a batch; other asks share one with all that
    wait and fit, up to `most_rows` continuations. PLACES batches take turns, and the asks that wait
    get the next free place in the order in which they came.
    """

    def __init__(self, model, most_rows: int):
        self.model, self.most_rows = model, most_rows
        self._waiting: deque[Ask] = deque()
        self._batches: list[Batch] = []
        self._changed = threading.Condition()

    def submit(self, asks: list[Ask]) -> bool:
        """Puts asks into the queue; False, with nothing changed, where it is too long for them."""
        with self._changed:
            if sum(ask.count for ask in [*self._waiting, *asks]) > MOST_WAITING:
                return False
            self._waiting.extend(asks)
            self._changed.notify()
            return True

    def leave(self, asks: list[Ask]) -> None:
        """Frees the places of asks, finished or not."""
        with self._changed:
            for ask in asks:
                ask.left = True
            self._waiting = deque(ask for ask in self._waiting if not ask.left)

    def work(self, seconds: float) -> None:
        """Draws the next token of every batch; waits for an ask, so long at most, if there is none.
        """
        with self._changed:
            if not self._batches and not self._waiting:
                self._changed.wait(seconds)
            together = [self._take() for _ in range(len(self._batches), PLACES) if self._waiting]
        for asks in together:
            self._batches.append(Batch(self.model, asks, self._padding(asks)))
        self._batches = [batch for batch in self._batches if self._step(batch)]

    def _take(self) -> list[Ask]:
        """The ask that has waited longest, with those that fit into its batch."""
        asks = [self._waiting.popleft()]
        for ask in list(self._waiting):
            if asks[0].fits(ask) and sum(a.count for a in [*asks, ask]) <= self.most_rows:
                asks.append(ask)
                self._waiting.remove(ask)
        return asks

    def _padding(self, asks: list[Ask]) -> int:
        """Rows to add, so that batches have few sizes: each is compiled. None are added where the
        seed decides, since sums are rounded otherwise in a larger batch."""
        rows = sum(ask.count for ask in asks)
        power = 1 << (rows - 1).bit_length()
        return 0 if asks[0].alone else min(power, self.most_rows) - rows

    def _step(self, batch: Batch) -> bool:
        """Continues a batch; returns whether anything is left to write in it."""
        try:
            if batch.is_open:
                batch.step()
            if batch.is_open:
                return True
            batch.close()
        except Exception as error:  # noqa: BLE001 - the others are answered nevertheless
            batch.fail(error)
        return False
