"""The order of work: jobs wait in a queue and share batches, which take turns."""

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
    """What a step adds to one continuation of a job; finish is "stop" or "length" in the last.

    drawn is the number of tokens so far, with those whose text is held back."""

    index: int
    text: str
    tokens: list[Token]
    drawn: int
    finish: str | None


@dataclass(eq=False, kw_only=True)
class Job:
    """A prompt, of token ids, to be continued `count` times.

    The continuations are numbered from `first` on. alone: has a batch of its own, so that the seed
    decides the text. likeliest: how many of the likeliest tokens to report in each place; with None
    the log-probability of the drawn token is not reported either. send takes each Piece, or the
    error that ended the batch, and is called by the thread that computes. stop_ids end a
    continuation, besides end-of-text.
    """

    prompt: list[int]
    count: int
    first: int
    config: SampleConfig
    stop: Sequence[str]
    alone: bool
    likeliest: int | None
    send: Callable[[Piece | Exception], None]
    stop_ids: frozenset[int] = frozenset()
    left: bool = False  # nobody waits for it any more

    def fits(self, other: "Job") -> bool:
        """Whether both can be in one batch."""
        def shared(job: Job) -> SampleConfig:
            return replace(job.config, max_new_tokens=0, seed=0)
        return not self.alone and not other.alone and shared(self) == shared(other)


class Continuation:
    """One continuation while it is written."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer):
        self.job, self.index, self.finish = job, index, None
        self._ends = job.stop_ids | {end_of_text(tokenizer)}
        self._decoder, self._until = StreamDecoder(tokenizer), StopFilter(job.stop)
        self._drawn = self._decoded = self._sent = 0  # tokens, characters, characters
        self._held: list[Token] = []
        if job.config.max_new_tokens == 0:
            self._send("", "length")

    @property
    def is_open(self) -> bool:
        return self.finish is None and not self.job.left

    def push(self, token: int, logits: np.ndarray | None) -> None:
        """Sends what the next token adds; logits (V,) if its log-probability is asked for."""
        self._drawn += 1
        if token in self._ends:
            return self._close("stop")
        text = self._decoder.push(token)
        self._held.append(Token(token, self._decoded, *(
            () if logits is None else logprobs(token, logits, self.job.likeliest))))
        self._decoded += len(text)
        text = self._until.push(text)
        if self._until.stopped:
            return self._send(text, "stop")
        if self._drawn == self.job.config.max_new_tokens:
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
        self.job.send(Piece(self.job.first + self.index, text, ready, self._drawn, finish))


class Batch:
    """Jobs that are written together; each continuation is a row. padding: rows without one.

    Where no seed decides the text, what an earlier batch has computed is used again.
    """

    def __init__(self, model, jobs: list[Job], padding: int):
        self.jobs = jobs
        self.rows = [Continuation(job, index, model.tokenizer)
                     for job in jobs for index in range(job.count)]
        prompts = [row.job.prompt for row in self.rows]
        longest = max(job.config.max_new_tokens for job in jobs)
        self._steps = model.stream_batch(prompts + padding * prompts[-1:], config=replace(
            jobs[0].config, max_new_tokens=longest), reuse_cache=not jobs[0].alone)

    @property
    def is_open(self) -> bool:
        return any(row.is_open for row in self.rows)

    def step(self) -> None:
        """Draws a token for each row."""
        drawn = next(self._steps)
        logits = None
        if any(job.likeliest is not None for job in self.jobs):
            logits = device.read(drawn.logits)  # (B, V)
        for i, row in enumerate(self.rows):
            if row.is_open:
                wanted = row.job.likeliest is not None
                row.push(int(drawn.tokens[i]), logits[i] if wanted else None)

    def close(self) -> None:
        self._steps.close()

    def fail(self, error: Exception) -> None:
        for job in self.jobs:
            job.send(error)


def logprobs(token: int, logits: np.ndarray, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token by logits (V,), and the `count` likeliest tokens."""
    shifted = logits.astype(np.float64) - logits.max()
    found = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-found, kind="stable")[:count]
    return float(found[token]), [(int(i), float(found[i])) for i in best]


class Scheduler:
    """A queue before the model. One thread calls `work` in a loop, which computes; any thread may
    call the other methods.

    Jobs that wait and fit share a batch, up to `most_rows` continuations. PLACES batches take
    turns, and the next free place goes to the job that has waited longest.
    """

    def __init__(self, model, most_rows: int):
        self.model, self.most_rows = model, most_rows
        self._waiting: deque[Job] = deque()
        self._batches: list[Batch] = []
        self._changed = threading.Condition()

    def submit(self, jobs: list[Job]) -> bool:
        """Puts jobs into the queue; False, with nothing changed, where it is too long for them."""
        with self._changed:
            if sum(job.count for job in [*self._waiting, *jobs]) > MOST_WAITING:
                return False
            self._waiting.extend(jobs)
            self._changed.notify()
            return True

    def leave(self, jobs: list[Job]) -> None:
        """Frees the places of jobs, finished or not."""
        with self._changed:
            for job in jobs:
                job.left = True
            self._waiting = deque(job for job in self._waiting if not job.left)

    def work(self, seconds: float) -> None:
        """Draws the next token of every batch; waits for a job, so long at most, if there is none.
        """
        with self._changed:
            if not self._batches and not self._waiting:
                self._changed.wait(seconds)
            together = [self._take() for _ in range(len(self._batches), PLACES) if self._waiting]
        for jobs in together:
            self._batches.append(Batch(self.model, jobs, self._padding(jobs)))
        self._batches = [batch for batch in self._batches if self._step(batch)]

    def _take(self) -> list[Job]:
        """The job that has waited longest, with those that fit into its batch."""
        jobs = [self._waiting.popleft()]
        for job in list(self._waiting):
            if jobs[0].fits(job) and sum(a.count for a in [*jobs, job]) <= self.most_rows:
                jobs.append(job)
                self._waiting.remove(job)
        return jobs

    def _padding(self, jobs: list[Job]) -> int:
        """Rows to add, so that batches have few sizes: each is compiled. None are added where the
        seed decides, since sums are rounded otherwise in a larger batch."""
        rows = sum(job.count for job in jobs)
        power = 1 << (rows - 1).bit_length()
        return 0 if jobs[0].alone else min(power, self.most_rows) - rows

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
