"""A conversation with a model."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tinygpt.config import SampleConfig
from tinygpt.data.chat import ChatTemplate
from tinygpt.inference.stop import pieces_of


class Conversation:
    """What was said, and the model's answers, each of at most config.max_new_tokens tokens.

    `messages` are all messages, {"role": ..., "content": ...}. Where the model's context is full,
    the oldest turn, a message of the user and its answer, is forgotten: the model sees the system
    message and the turns after the first `forgotten`. `is_cut` is set where the last answer has
    reached its maximum length.
    """

    def __init__(self, model, template: ChatTemplate, config: SampleConfig,
                 system: str | None = None, stop: Sequence[str] = ()):
        self.model, self.template, self.config, self.stop = model, template, config, stop
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Begins again, with the system message alone."""
        self.messages, self.forgotten, self.is_cut = list(self._system), 0, False

    def say(self, text: str) -> Iterator[str]:
        """Adds a message of the user; returns the pieces of the answer as they are sampled.

        An answer that is not read to its end stays in the conversation as far as it was read.
        Raises ValueError, with nothing changed, where the message cannot be encoded or is too long.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, forgotten = self._newest_that_fit(asked, [])
        if not self._room(ids):
            raise ValueError(f"the message is too long: with the system message it has {len(ids):,}"
                             f" tokens, the context {self.model.config.block_size:,}; shorten it")
        answer = {"role": "assistant", "content": ""}
        self.messages, self.forgotten, self.is_cut = [*asked, answer], forgotten, False
        return self._answer(asked, answer)

    def _answer(self, asked: list[dict], answer: dict) -> Iterator[str]:
        tokens = itertools.takewhile(lambda token: token not in self.template.stop_ids,
                                     self._tokens(asked))
        for piece in pieces_of(self.model.tokenizer, tokens, self.stop):
            answer["content"] += piece
            yield piece

    def _tokens(self, asked: list[dict]) -> Iterator[int]:
        """Draws an answer to messages; forgets where it fills the context."""
        drawn: list[int] = []
        turn = (len(asked) - len(self._system)) // 2
        config = replace(self.config, seed=self.config.seed + turn)
        while left := config.max_new_tokens - len(drawn):
            ids, self.forgotten = self._newest_that_fit(asked, drawn)
            if not (room := self._room(ids)):
                break
            for token in self.model.stream([ids], reuse_cache=True, config=replace(
                    config, max_new_tokens=min(left, room))):
                drawn.append(token)
                yield token
        self.is_cut = True

    def _newest_that_fit(self, asked: list[dict], drawn: list[int]) -> tuple[list[int], int]:
        """The ids of the system message, the newest turns that leave room, and what is drawn of the
        answer; and how many turns are left out. The last message is always there."""
        turns = asked[len(self._system):]
        for forgotten in range(self.forgotten, len(turns) // 2 + 1):
            seen = [*self._system, *turns[2 * forgotten:]]
            ids = self.template.encode(seen, reply=True) + drawn
            if self._room(ids):
                break
        return ids, forgotten

    def _room(self, ids: list[int]) -> int:
        """The number of tokens that fit into the context after ids."""
        return max(0, self.model.config.block_size - len(ids))
