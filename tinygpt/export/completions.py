"""OpenAI's /v1/completions: what a request asks for, and the objects that answer it."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from tinygpt.config import SampleConfig, check_value, setting
from tinygpt.data.tokenizer import END_OF_TEXT, Tokenizer, end_of_text
from tinygpt.export.schedule import Job, Piece

MOST_NEW = 1 << 15
MOST_PROMPTS = 64
MOST_PROMPT_TOKENS = 1 << 16
MOST_STOPS = 16
MOST_LIKELIEST = 20
# parameters of OpenAI's that have no effect here, and the values that ask for none
WITHOUT_EFFECT = {"presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
                  "suffix": ("",), "best_of": (1,)}


class RequestError(ValueError):
    """A request that cannot be answered: the HTTP status, and the fields of OpenAI's error object.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None,
                 code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The fields of a request besides its prompt and those of SampleConfig."""

    model: str | None = setting(None, "the served one", empty=True)
    max_tokens: int = setting(16, "tokens to write for each choice", low=0, high=MOST_NEW)
    n: int = setting(1, "choices for each prompt", low=1)
    stop: tuple[str, ...] = setting((), "end before one of these strings")
    logprobs: int | None = setting(None, "likeliest tokens to report in each place", low=0,
        high=MOST_LIKELIEST)
    echo: bool = setting(False, "begin the text with the prompt")
    stream: bool = setting(False, "answer with events while the text is written")
    user: str | None = setting(None, "no effect", empty=True)
    return_tokens_as_token_ids: bool = setting(False, "tokens in logprobs are token_id:<id>")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A request that can be answered."""

    prompts: list[list[int]]
    options: Options
    sample: SampleConfig
    has_seed: bool
    include_usage: bool
    stop_ids: frozenset[int] = frozenset()  # besides end-of-text

    def jobs(self, send: Callable[[Piece | Exception], None]) -> list[Job]:
        """A job for each prompt, with its choices."""
        o = self.options
        return [Job(prompt=prompt, count=o.n, first=i * o.n, config=self.sample, stop=o.stop,
                    stop_ids=self.stop_ids, alone=self.has_seed, likeliest=o.logprobs, send=send)
                for i, prompt in enumerate(self.prompts)]


def parse(body: object, tokenizer: Tokenizer, vocab_size: int, defaults: SampleConfig, most: int
          ) -> Completion:
    """The completion that a JSON value asks for, with at most `most` choices for a prompt.

    defaults has the sampling parameters that are not given, except for the seed, which is random.
    Raises RequestError.
    """
    given = given_fields(body, WITHOUT_EFFECT)
    prompts = _prompts(given.pop("prompt", None), tokenizer, vocab_size)
    return completion_of(prompts, given, defaults, most)


def given_fields(body: object, without_effect: dict[str, tuple]) -> dict:
    """The fields of a request that are not null, without those of a neutral value. Raises
    RequestError."""
    if not isinstance(body, dict):
        raise RequestError("the request is not a JSON object: send one")
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in without_effect.items():
        if name in given and given.pop(name) not in neutral:
            raise RequestError(f"{name} is not supported: leave it out", param=name)
    return given


def completion_of(prompts: list[list[int]], given: dict, defaults: SampleConfig, most: int
                  ) -> Completion:
    """The completion of prompts that the other fields of a request ask for. Raises RequestError."""
    include_usage = _include_usage(given.pop("stream_options", {}))
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    options = Options(**checked(Options, given))
    sampling = checked(SampleConfig, given)
    if given:
        name = sorted(given)[0][:80]
        raise RequestError(f"there is no parameter {name!r}: leave it out", param=name)
    _check_options(options, most)
    seed = sampling.get("seed", secrets.randbits(32))
    sample = replace(defaults, **sampling | {"seed": seed, "max_new_tokens": options.max_tokens})
    return Completion(prompts=prompts, options=options, sample=sample, has_seed="seed" in sampling,
                      include_usage=include_usage)


def checked(cls: type, given: dict) -> dict:
    """Takes the fields of a configuration out of what is given. Raises RequestError."""
    found = {}
    for f in fields(cls):
        if f.name in given and f.name != "max_new_tokens":
            try:
                found[f.name] = check_value(f, given.pop(f.name))
            except ValueError as error:
                raise RequestError(str(error), param=f.name) from error
    return found


def _check_options(options: Options, most: int) -> None:
    if options.n > most:
        raise RequestError(f"n={options.n} is out of range: choose at most {most}", param="n")
    if len(options.stop) > MOST_STOPS:
        raise RequestError(f"stop has {len(options.stop)} strings: give at most {MOST_STOPS}",
                           param="stop")
    if options.echo and options.logprobs is not None:
        raise RequestError("echo gives no log-probabilities of the prompt: leave out one of echo "
                           "and logprobs", param="echo")


def _include_usage(options: object) -> bool:
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError("stream_options is not an object with include_usage: leave it out",
                           param="stream_options")
    return options.get("include_usage") is True


def _prompts(prompt: object, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The token ids of a prompt: a string, a list of strings, ids, or lists of ids."""
    many = isinstance(prompt, list) and prompt and all(isinstance(p, str | list) for p in prompt)
    prompts = prompt if many else [prompt]
    if len(prompts) > MOST_PROMPTS:
        raise RequestError(f"there are {len(prompts)} prompts: send at most {MOST_PROMPTS}",
                           param="prompt")
    try:
        ids = [_ids(p, tokenizer, vocab_size) for p in prompts]
    except ValueError as error:
        raise RequestError(str(error), param="prompt") from error
    if (count := sum(map(len, ids))) > MOST_PROMPT_TOKENS:
        raise RequestError(f"the prompt has {count:,} tokens: send at most {MOST_PROMPT_TOKENS:,}",
                           param="prompt", code="context_length_exceeded")
    return ids


def _ids(prompt: object, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError("the prompt is neither text nor a list of token ids: send one of them, or "
                         "a list of them")
    if not ids:
        raise ValueError("the prompt is empty: give at least one character")
    if bad := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(f"token id {str(bad[0])[:20]} is outside the vocabulary 0.."
                         f"{vocab_size - 1}")
    return ids


class Answer:
    """The objects that answer a completion, from the pieces of its choices."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, completion: Completion, name: str, tokenizer: Tokenizer):
        self.completion, self.tokenizer = completion, tokenizer
        self.head = {"id": f"{self.id_prefix}-{secrets.token_hex(12)}", "object": self.kind,
                     "created": int(time.time()), "model": name}
        count = completion.options.n * len(completion.prompts)
        self.unfinished = count
        self._drawn = [0] * count  # tokens of each choice so far

    def chunk(self, piece: Piece) -> dict:
        """The object of an event, with what a piece adds to its choice."""
        return self._chunk([self._choice(piece)])

    def whole(self, pieces: list[Piece]) -> dict:
        """The object with all choices, from all of their pieces."""
        choices = {}
        for piece in pieces:
            choice = self._choice(piece)
            before = choices.setdefault(piece.index, choice)
            if before is not choice:
                before["text"] += choice["text"]
                before["finish_reason"] = choice["finish_reason"]
                for name, values in (choice["logprobs"] or {}).items():
                    before["logprobs"][name] += values
        return self.head | {"choices": [choices[i] for i in sorted(choices)], "usage": self.usage}

    def last_chunk(self) -> dict:
        """The object of an event without choices, with the usage."""
        return self._chunk([]) | {"usage": self.usage}

    def _chunk(self, choices: list[dict]) -> dict:
        return self.head | {"object": self.chunk_kind, "choices": choices}

    @property
    def usage(self) -> dict:
        prompt, drawn = sum(map(len, self.completion.prompts)), sum(self._drawn)
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def _choice(self, piece: Piece) -> dict:
        options, i = self.completion.options, piece.index
        text, drawn = piece.text, self._drawn[i]
        logprobs = None if options.logprobs is None else self._logprobs(piece)
        self._drawn[i] = piece.drawn
        if options.echo and drawn == 0:
            text = self.tokenizer.decode(self.completion.prompts[i // options.n]) + text
        self.unfinished -= piece.finish is not None
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, piece: Piece) -> dict:
        return {"tokens": [self._name(token.id) for token in piece.tokens],
                "token_logprobs": [token.logprob for token in piece.tokens],
                "top_logprobs": [{self._name(i): logprob for i, logprob in token.likeliest}
                                 for token in piece.tokens],
                "text_offset": [token.offset for token in piece.tokens]}

    def _name(self, token: int) -> str:
        """The text of a token; that of one which is no whole character begins with "bytes:"."""
        if self.completion.options.return_tokens_as_token_ids:
            return f"token_id:{token}"
        if token == end_of_text(self.tokenizer):
            return END_OF_TEXT
        raw = self.tokenizer.decode_bytes([token])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
