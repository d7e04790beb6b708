"""A conversation with a model."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tinygpt.config import SampleConfig
from tinygpt.data.chat import ChatTemplate
from tinygpt.inference.stop import pieces_of


class Conversation:
    """What was said, and the model's answers, each of at most config.max_new_tokens tokens.

    `messages` are all messages, {"role": ..., "content": ...}. Where they outgrow the model's
    context, it sees only the system message and the last turns; `forgotten` is the number of turns
    before these. A turn is a message of the user and its answer.
    """

    def __init__(self, model, template: ChatTemplate, config: SampleConfig,
                 system: str | None = None, stop: Sequence[str] = ()):
        self.model, self.template, self.config, self.stop = model, template, config, stop
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Begins again, with the system message alone."""
        self.messages, self.forgotten = list(self._system), 0

    def say(self, text: str) -> Iterator[str]:
        """Adds a message of the user; returns the pieces of the answer as they are sampled.

        An answer that is not read to its end stays in the conversation as far as it was read.
        Raises ValueError, with nothing changed, where the message cannot be encoded or leaves no
        room for an answer.
        """
        turns = [*self.messages[len(self._system):], {"role": "user", "content": text}]
        ids, self.forgotten = self._newest_that_fit(turns)
        answer = {"role": "assistant", "content": ""}
        self.messages = [*self._system, *turns, answer]
        config = replace(self.config, seed=self.config.seed + len(turns) // 2, max_new_tokens=min(
            self.config.max_new_tokens, self.model.config.block_size - len(ids)))
        return self._answer(answer, ids, config)

    def _answer(self, answer: dict, ids: list[int], config: SampleConfig) -> Iterator[str]:
        tokens = itertools.takewhile(
            lambda token: token not in self.template.stop_ids,
            self.model.stream([ids], config=config, reuse_cache=True))
        for piece in pieces_of(self.model.tokenizer, tokens, self.stop):
            answer["content"] += piece
            yield piece

    def _newest_that_fit(self, turns: list[dict]) -> tuple[list[int], int]:
        """The ids of the system message and the newest turns, and how many turns are left out.

        An answer has room for max_new_tokens, or half of the context if that is less.
        """
        block_size = self.model.config.block_size
        most = block_size - min(self.config.max_new_tokens, block_size // 2)
        for forgotten in range(self.forgotten, len(turns) // 2 + 1):
            ids = self.template.encode([*self._system, *turns[2 * forgotten:]], reply=True)
            if len(ids) <= most:
                return ids, forgotten
        raise ValueError(f"the message is too long: with the system message it has {len(ids):,} "
                         f"tokens, and only {most:,} of the context of {block_size:,} are left "
                         "beside the answer; shorten it")
