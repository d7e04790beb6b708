"""OpenAI's /v1/chat/completions: a completion of a conversation by a model's chat template."""

from dataclasses import dataclass, replace

from tinygpt.config import SampleConfig, setting
from tinygpt.data.chat import ChatTemplate
from tinygpt.export.completions import (
    MOST_LIKELIEST,
    MOST_NEW,
    WITHOUT_EFFECT,
    Answer,
    Completion,
    RequestError,
    checked,
    completion_of,
    given_fields,
)
from tinygpt.export.schedule import Piece

CHAT_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "echo": (False,)}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The fields of a request that have another meaning here than in /v1/completions."""

    max_completion_tokens: int | None = setting(None, "tokens of an answer", low=1, high=MOST_NEW)
    max_tokens: int | None = setting(None, "the same", low=1, high=MOST_NEW)
    logprobs: bool = setting(False, "report the log-probability of each token")
    top_logprobs: int | None = setting(None, "likeliest tokens to report in each place", low=0,
        high=MOST_LIKELIEST)


def parse_chat(body: object, template: ChatTemplate, block_size: int, defaults: SampleConfig,
               most: int) -> Completion:
    """The completion that a JSON value asks for, with at most `most` choices.

    An answer has as many tokens as the context of block_size leaves, unless fewer are asked for.
    Raises RequestError, also where the messages and the tokens that are asked for do not fit.
    """
    given = given_fields(body, CHAT_WITHOUT_EFFECT)
    prompt = _prompt(given.pop("messages", None), template)
    options = ChatOptions(**checked(ChatOptions, given))
    if options.top_logprobs is not None and not options.logprobs:
        raise RequestError("top_logprobs has no effect without logprobs: add it",
                           param="top_logprobs")
    given["max_tokens"] = _tokens(options, len(prompt), block_size)
    given["logprobs"] = (options.top_logprobs or 0) if options.logprobs else None
    return replace(completion_of([prompt], given, defaults, most), stop_ids=template.stop_ids)


def _tokens(options: ChatOptions, prompt: int, block_size: int) -> int:
    """The most tokens of an answer to a prompt of so many tokens."""
    if None not in (options.max_completion_tokens, options.max_tokens):
        raise RequestError("max_tokens and max_completion_tokens are two names of one option: give "
                           "one of them", param="max_tokens")
    asked = options.max_completion_tokens or options.max_tokens
    if prompt + (asked or 1) > block_size:
        answer = "an answer" if asked is None else f"an answer of {asked:,}"
        raise RequestError(f"the messages have {prompt:,} tokens, which with {answer} do not fit "
                           f"into the context of {block_size:,}: send fewer or shorter ones"
                           + ("" if asked is None else ", or ask for fewer tokens"),
                           param="messages", code="context_length_exceeded")
    return asked or min(block_size - prompt, MOST_NEW)


def _prompt(messages: object, template: ChatTemplate) -> list[int]:
    try:
        if isinstance(messages, list):
            messages = [_plain(message) for message in messages]
        return template.encode(messages, reply=True)
    except ValueError as error:
        raise RequestError(str(error), param="messages") from error


def _plain(message: object) -> object:
    """A message as a template takes it: its content may be a list of parts with text, the role
    "developer" is another name of "system"."""
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None}
    if message.get("role") == "developer":
        message["role"] = "system"
    if isinstance(parts := message.get("content"), list):
        if not all(isinstance(part, dict) and part.keys() == {"type", "text"}
                   and part["type"] == "text" and isinstance(part["text"], str) for part in parts):
            raise ValueError('a part of a content is not {"type": "text", "text": "..."}: only '
                             "text can be read")
        message["content"] = "".join(part["text"] for part in parts)
    return message


class ChatAnswer(Answer):
    """The objects that answer a chat completion."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def chunk(self, piece: Piece) -> dict:
        is_first = self._drawn[piece.index] == 0
        choice = self._choice(piece)
        choice["delta"] = {"content": choice.pop("text")}
        if is_first:
            choice["delta"]["role"] = "assistant"
        return self._chunk([choice])

    def whole(self, pieces: list[Piece]) -> dict:
        made = super().whole(pieces)
        for choice in made["choices"]:
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        return made

    def _logprobs(self, piece: Piece) -> dict:
        return {"content": [
            self._entry(token.id, token.logprob) | {
                "top_logprobs": [self._entry(i, logprob) for i, logprob in token.likeliest]}
            for token in piece.tokens]}

    def _entry(self, token: int, logprob: float) -> dict:
        return {"token": self._name(token), "logprob": logprob,
                "bytes": list(self.tokenizer.decode_bytes([token]))}
