"""Chat completions, asked for by OpenAI's own client."""

import numpy as np
import openai
import pytest
from test_server import Served, random_checkpoint
from tinygrad import Tensor

from gpt import GPT, SampleConfig
from tinygpt.data.chat import ChatTemplate
from tinygpt.data.tokenizer import BPETokenizer, CharTokenizer
from tinygpt.export.chat_completions import parse_chat
from tinygpt.export.completions import RequestError

ASCII = "\n" + "".join(map(chr, range(32, 127)))
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(CharTokenizer(ASCII), 128, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return GPT.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def ask(checkpoint):
    served = Served(checkpoint)
    create = served.client().chat.completions.create
    yield lambda messages=MESSAGES, **options: create(model="ckpt_1", messages=messages, **options)
    assert len(served.said().splitlines()) == 2, served.said()
    served.close()


def expected(model, count: int, n: int = 1, **options) -> list[str]:
    """What the model answers MESSAGES, up to the line break that ends an answer."""
    prompt = ChatTemplate(model.tokenizer).encode(MESSAGES, reply=True)
    rows = model.generate([prompt] * n, count, **{"temperature": 0.9} | options).tolist()
    return [model.tokenizer.decode(row[len(prompt):]).partition("\n")[0] for row in rows]


def test_an_answer_is_what_follows_the_template_streamed_or_not(ask, model):
    right, = expected(model, 12, seed=5)
    whole = ask(max_completion_tokens=12, seed=5)
    choice, = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", right)
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert choice.finish_reason == ("length" if len(right) == 12 else "stop")
    assert whole.usage.prompt_tokens == len("System:\nBe kind.\nUser:\nHow are you?\nAssistant:\n")
    chunks = list(ask(max_tokens=12, seed=5, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == right
    assert [chunk.choices[0].delta.role for chunk in pieces] == [
        "assistant", *[None] * (len(pieces) - 1)]
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [
        *[None] * (len(pieces) - 1), choice.finish_reason]
    assert last.usage == whole.usage and not last.choices


def test_an_answer_ends_at_the_end_of_a_turn_at_a_stop_string_or_with_the_context(ask, model):
    seeds, hot = range(10), dict(temperature=5)
    texts = {seed: expected(model, 81, seed=seed, **hot)[0] for seed in seeds}
    ended = next(seed for seed in seeds if 5 < len(texts[seed]) < 70)
    choice, = ask(seed=ended, **hot).choices
    assert choice.message.content == texts[ended] and choice.finish_reason == "stop"
    stop = texts[ended][3:5]
    choice, = ask(seed=ended, stop=[stop], **hot).choices
    assert choice.message.content == texts[ended].partition(stop)[0]
    assert choice.finish_reason == "stop"
    made = ask(seed=next(seed for seed in seeds if len(texts[seed]) == 81), **hot)
    assert made.usage.total_tokens == 128 and made.choices[0].finish_reason == "length"


def test_several_choices_with_log_probabilities(ask, model):
    made = ask(n=2, max_tokens=6, seed=5, logprobs=True, top_logprobs=3)
    assert [c.message.content for c in made.choices] == expected(model, 6, n=2, seed=5)
    prompt = ChatTemplate(model.tokenizer).encode(MESSAGES, reply=True)
    for choice in made.choices:
        ids = model.tokenizer.encode(choice.message.content)
        logits = model(Tensor([[*prompt, *ids]])).numpy()[0, len(prompt) - 1:-1].astype(np.float64)
        right = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = choice.logprobs.content[:len(ids)]
        assert [entry.token for entry in found] == list(choice.message.content)
        assert [bytes(entry.bytes).decode() for entry in found] == list(choice.message.content)
        np.testing.assert_allclose([e.logprob for e in found], right[range(len(ids)), ids],
                                   atol=1e-4)
        np.testing.assert_allclose([[top.logprob for top in e.top_logprobs] for e in found],
                                   np.sort(right)[:, ::-1][:, :3], atol=1e-4)


def test_content_in_parts_the_role_developer_and_an_answer_sent_back(ask, model):
    parts = [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?"}]
    made = ask([{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}],
               max_tokens=12, seed=5)
    assert [made.choices[0].message.content] == expected(model, 12, seed=5)
    again = ask([MESSAGES[1], made.choices[0].message, {"role": "user", "content": "And?"}],
                max_tokens=2)
    assert again.usage.prompt_tokens > 40


@pytest.mark.parametrize(("messages", "options", "says", "param"), [
    ([], {}, "messages is not a list", "messages"),
    ([{"role": "tool", "content": "x"}], {}, "message 1 has the role 'tool'", "messages"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "only text", "messages"),
    ([{"role": "user", "content": "\u00e9"}], {}, "lacks", "messages"),
    ([{"role": "user", "content": "x" * 111}], {}, "do not fit into the context of 128",
     "messages")])
def test_what_cannot_be_answered_gets_openais_error(ask, messages, options, says, param):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        ask(messages, **options)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


TEMPLATE = ChatTemplate(BPETokenizer.train("some text", 257))


@pytest.mark.parametrize(("fields", "says", "param"), [
    (dict(messages=None), "messages is not a list", "messages"),
    (dict(messages=["hello"]), "message 1 is not an object", "messages"),
    (dict(messages=[{"role": "user", "content": 5}]), "no text", "messages"),
    (dict(messages=[{"role": "user", "content": "a", "name": "b"}]), "'name'", "messages"),
    (dict(max_tokens=5, max_completion_tokens=5), "two names", "max_tokens"),
    (dict(max_tokens=0), "max_tokens=0", "max_tokens"),
    (dict(max_tokens=60), "an answer of 60 do not fit", "messages"),
    (dict(logprobs=3), "logprobs=3 is neither", "logprobs"),
    (dict(top_logprobs=3), "without logprobs", "top_logprobs"),
    (dict(logprobs=True, top_logprobs=21), "top_logprobs=21", "top_logprobs"),
    (dict(tools=[{"type": "function"}]), "tools is not supported", "tools"),
    (dict(response_format={"type": "json_object"}), "not supported", "response_format"),
    (dict(echo=True), "echo is not supported", "echo"), (dict(prompt="a"), "'prompt'", "prompt"),
    (dict(n=9), "at most 8", "n")])
def test_fields_of_a_wrong_kind_are_named(fields, says, param):
    body = {"messages": [{"role": "user", "content": "hello"}]} | fields
    with pytest.raises(RequestError, match=says) as caught:
        parse_chat(body, TEMPLATE, 64, SampleConfig(), 8)
    assert caught.value.body["error"]["param"] == param and caught.value.status == 400
    code = "context_length_exceeded" if "fit" in says else None
    assert caught.value.body["error"]["code"] == code


def test_fields_without_effect_may_have_their_neutral_value():
    made = parse_chat({"messages": [{"role": "user", "content": "hello"}], "tools": [], "n": 2,
                       "tool_choice": "none", "response_format": {"type": "text"}, "top_k": 3,
                       "presence_penalty": 0, "user": "me"}, TEMPLATE, 64, SampleConfig(), 8)
    assert made.options.max_tokens == 64 - len(made.prompts[0]) and made.sample.top_k == 3
    assert made.stop_ids == {256}
