"""Conversations as token ids, by a model's chat template in Jinja or in a plain format.

A conversation is a list of messages {"role": "system", "user" or "assistant", "content": text}.
See docs/chat.md.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tinygpt.data.tokenizer import HFTokenizer, Tokenizer, begin_of_text, end_of_text

ROLES = ("system", "user", "assistant")
# characters for private use, which mark places in the output of a template
LEFT, RIGHT, BEGIN, END = "\ue000", "\ue001", "\ue002", "\ue003"
Spans = list[tuple[int, int]]  # ranges of characters


class ChatTemplate:
    """How a conversation becomes token ids.

    source: a template in Jinja, which needs an HFTokenizer; None: the plain format. stop_ids: the
    ids that end an answer. The methods raise ValueError where messages cannot be encoded.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None):
        self._format = PlainFormat(tokenizer) if source is None else JinjaFormat(tokenizer, source)
        self.stop_ids: frozenset[int] = self._format.stop_ids

    def encode(self, messages: list[dict], reply: bool = False) -> list[int]:
        """The ids of messages; with reply followed by what an answer begins with."""
        check_messages(messages)
        return self._format.encode(messages, reply)

    def encode_with_mask(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """The ids of messages, and which of them are the assistant's: its answers, each with what
        ends it."""
        check_messages(messages)
        return self._format.encode_with_mask(messages)


def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's own template, else the plain format."""
    return ChatTemplate(tokenizer, getattr(tokenizer, "chat_template", None))


def check_messages(messages) -> None:
    """Raises ValueError unless messages is a conversation as a template takes it."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of messages: give at least one, "
                         '{"role": "user", "content": "..."}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object: give it a role and a content")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number} has the role {message.get('role')!a}: choose one "
                             f"of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} has no text as its content: give a string")
        if others := message.keys() - {"role", "content"}:
            raise ValueError(f"message {number} has the field {min(others)!a}, which would be "
                             "ignored: remove it")


class PlainFormat:
    """The format of models without a template.

    Every turn is a line with "System:", "User:" or "Assistant:", and its text. End-of-text ends an
    answer, a line break every other turn, and an answer too where the tokenizer has no end-of-text.
    Headers, texts and ends are encoded separately, so that the ids of a conversation begin with
    those of its prompt.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.end = end_of_text(tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.encode("\n")[-1:] if self.end is None else [self.end])

    def encode(self, messages: list[dict], reply: bool) -> list[int]:
        ids, _ = self.encode_with_mask(messages)
        return ids + self.tokenizer.encode(_header("assistant")) if reply else ids

    def encode_with_mask(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        ids = list(begin_of_text(self.tokenizer))
        mask = [False] * len(ids)
        for message in messages:
            is_answer = message["role"] == "assistant"
            if is_answer and self.end is None and "\n" in message["content"]:
                raise ValueError("an answer has a line break, which ends an answer where the "
                                 "tokenizer has no end-of-text: remove it, or use "
                                 "--tokenizer bpe")
            header = self.tokenizer.encode(_header(message["role"]))
            text = self.tokenizer.encode(message["content"])
            text += [self.end] if is_answer and self.end is not None else (
                self.tokenizer.encode("\n"))
            ids += header + text
            mask += [False] * len(header) + [is_answer] * len(text)
        return ids, mask


def plain_text(messages: list[dict]) -> str:
    """A conversation as text, for a tokenizer to learn from."""
    return "".join(f"{_header(m['role'])}{m['content']}\n" for m in messages)


def _header(role: str) -> str:
    return f"{role.title()}:\n"


class JinjaFormat:
    """A template as `transformers` renders it, with the ids that its tokenizer gives the text.

    Special tokens that stand in the text of a message are plain text.
    """

    def __init__(self, tokenizer: HFTokenizer, source: str):
        if not isinstance(tokenizer, HFTokenizer):
            raise ValueError(f"a chat template needs a tokenizer.json, not the tokenizer "
                             f"{tokenizer.kind!r}: leave out the template")
        self.special = SpecialTokens(tokenizer)
        self._names = tokenizer.special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is damaged: {error}") from error
        self._marks_answers = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self.stop_ids = self._find_stop_ids(end_of_text(tokenizer))

    def encode(self, messages: list[dict], reply: bool) -> list[int]:
        text, _ = self._render(messages, reply)
        return self._ids(messages, text, reply)[0]

    def encode_with_mask(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        text, answers = self._render(messages)
        if not self._marks_answers:
            answers = self._answers(messages, text)
        ids, ends = self._ids(messages, text)
        mask = [any(min(begin, end - 1) < stop and start < end for start, stop in answers)
                for begin, end in pairwise([0, *ends])]
        return ids, mask

    def _render(self, messages: list[dict], reply: bool = False) -> tuple[str, Spans]:
        """The text of messages, and what of it stands in the template's {% generation %} blocks."""
        try:
            text = self._template.render(messages=messages, add_generation_prompt=reply, tools=None,
                                         documents=None, **self._names)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError,
                ValueError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        parts = re.split(f"[{BEGIN}{END}]", text)
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part))
        return "".join(parts), list(zip(ends[1::2], ends[2::2], strict=False))

    def _ids(self, messages: list[dict], text: str, reply: bool = False
             ) -> tuple[list[int], list[int]]:
        if not any(self.special.search(m["content"]) for m in messages):
            return self.special.encode(text)
        contents = [span for _, *span in self._contents(messages, text, reply)]
        return self.special.encode_outside(text, contents)

    def _contents(self, messages: list[dict], text: str, reply: bool = False
                  ) -> list[tuple[int, int, int]]:
        """Where messages stand in the text that the template made of them: (index, start, stop).

        Found by rendering marks in their place. Raises ValueError where the template changes what a
        message says.
        """
        marked = [m | {"content": f"{LEFT}{i}{RIGHT}"} if m["content"].strip() else m
                  for i, m in enumerate(messages)]
        before, *rest = re.split(f"{LEFT}(\\d+){RIGHT}", self._render(marked, reply)[0])
        found, at, same = [], len(before), text.startswith(before)
        for index, after in zip(map(int, rest[::2]), rest[1::2], strict=True):
            content = messages[index]["content"]
            shown = next((c for c in (content, content.strip(), content.rstrip(), content.lstrip())
                          if text.startswith(c + after, at)), None)
            if not (same := same and shown is not None):
                break
            found.append((index, at, at + len(shown)))
            at += len(shown + after)
        if not same or at != len(text):
            raise ValueError("the chat template changes the text of these messages, so that what "
                             "each says cannot be found in its output: use a template that marks "
                             "answers with {% generation %}, and no special tokens in texts")
        return found

    def _answers(self, messages: list[dict], text: str) -> Spans:
        """The spans of the assistant's answers, from the end of the prompt of each to the special
        token that follows it."""
        found = [place for place in self._contents(messages, text)
                 if messages[place[0]]["role"] == "assistant"]
        wanted = sum(m["role"] == "assistant" and bool(m["content"].strip()) for m in messages)
        if len(found) != wanted:
            raise ValueError(f"the chat template shows {len(found)} of {wanted} answers: use one "
                             "that shows all")
        spans = []
        for index, start, stop in found:
            prompt, _ = self._render(messages[:index], reply=True) if index else ("", [])
            if text.startswith(prompt) and 0 < len(prompt) < start:
                start = len(prompt)  # a blank that the answer begins with in the template
            end = self.special.match_after_blanks(text, stop)
            spans.append((start, end.end() if end else stop))
        return spans

    def _find_stop_ids(self, end: int | None) -> frozenset[int]:
        """End-of-text, and the special token that follows an answer."""
        text, _ = self._render([{"role": "user", "content": "?"},
                                {"role": "assistant", "content": LEFT + RIGHT}])
        match = self.special.match_after_blanks(text.partition(LEFT + RIGHT)[2], 0)
        return frozenset({end, match and self.special.ids[match[1]]} - {None})


class SpecialTokens:
    """A tokenizer that recognizes special tokens in a text.

    Texts are encoded as (ids, ends), where each token ends in the text.
    """

    def __init__(self, tokenizer: HFTokenizer):
        self._library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.data))
        self._library.no_padding()
        self._library.no_truncation()
        self._plain = tokenizer
        added = self._library.get_added_tokens_decoder()
        self.ids = {token.content: i for i, token in added.items() if token.special}
        longest_first = sorted(self.ids, key=len, reverse=True)
        any_of = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(any_of)
        self._after_blanks = re.compile(rf"\s*({any_of})")
        self.search = self._pattern.search

    def match_after_blanks(self, text: str, at: int) -> re.Match | None:
        """The special token, group 1, that follows position `at`, perhaps after blanks."""
        return self._after_blanks.match(text, at)

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        found = self._library.encode(text, add_special_tokens=False)
        return found.ids, [end for _, end in found.offsets]

    def encode_outside(self, text: str, plain: Iterable[tuple[int, int]]
                       ) -> tuple[list[int], list[int]]:
        """As `encode`, with special tokens that lie within the spans of `plain` as plain text."""
        ids, ends, at = [], [], 0
        gaps = pairwise([0, *(i for span in plain for i in span), len(text)])
        for match in [m for start, stop in list(gaps)[::2]
                      for m in self._pattern.finditer(text, start, stop)] + [None]:
            start, stop = match.span() if match else (len(text), len(text))
            piece = self._plain.encode_with_ends(text[at:start])
            ids += piece[0] + ([self.ids[match[0]]] if match else [])
            ends += [at + end for end in piece[1]] + ([stop] if match else [])
            at = stop
        return ids, ends


class _Generation(Extension):
    """The tag {% generation %} ... {% endgeneration %} around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{BEGIN}{caller()}{END}"


def _environment() -> ImmutableSandboxedEnvironment:
    """What the templates of `transformers` expect."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[_Generation, "jinja2.ext.loopcontrols"])
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse,
                     "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is, where Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _refuse(message: str):
    raise jinja2.TemplateError(message)
