"""Conversations: what the model sees of them, what of it is computed, and what is forgotten."""

import numpy as np
import pytest

from gpt import GPT, GPTConfig, SampleConfig
from tinygpt.data.chat import ChatTemplate
from tinygpt.data.tokenizer import BPETokenizer, CharTokenizer
from tinygpt.inference import decoder
from tinygpt.inference.chat import Conversation

ASCII = "\n" + "".join(map(chr, range(32, 127)))


def make(block_size: int = 256) -> GPT:
    model = GPT(GPTConfig(block_size=block_size, vocab_size=len(ASCII), n_layer=1, n_head=2,
                          n_embd=16), seed=None)
    rng = np.random.default_rng(3)
    model.load_state_dict({name: rng.normal(0, 0.3, w.shape).astype(np.float32)
                           for name, w in model.state_dict().items()})
    model.tokenizer = CharTokenizer(ASCII)
    return model


class Scripted:
    """A model that gives these answers, one after the other, and records what it is asked."""

    def __init__(self, *answers: str, block_size: int = 64, tokenizer=None):
        self.tokenizer = tokenizer or CharTokenizer(ASCII)
        self.config = GPTConfig(block_size=block_size, vocab_size=self.tokenizer.vocab_size)
        self.answers, self.asked, self.configs = list(answers), [], []

    def stream(self, rows, config, reuse_cache):
        self.asked.append(self.tokenizer.decode(rows[0]))
        self.configs.append(config)
        yield from self.tokenizer.encode(self.answers.pop(0))


def talk_to(model, system: str | None = None, stop=(), **sampling) -> Conversation:
    return Conversation(model, ChatTemplate(model.tokenizer), SampleConfig(**sampling), system,
                        stop)


def test_answers_are_sampled_after_all_messages_of_which_only_the_new_are_computed(monkeypatch):
    computed, call = [], decoder.Decoder._call

    def counted(self, tokens, start_pos, row):
        computed.append(tokens.shape[1])
        return call(self, tokens, start_pos, row)

    monkeypatch.setattr(decoder.Decoder, "_call", counted)
    monkeypatch.setattr(decoder, "CHUNKS", (64, 256))
    model = make()
    conversation = talk_to(model, "Be kind. " * 8, max_new_tokens=10, temperature=1.2, seed=5)
    for turn, text in enumerate(["How are you?", "And how is the weather?", "Good bye."]):
        before = [*conversation.messages, {"role": "user", "content": text}]
        computed.clear()
        answer = "".join(conversation.say(text))
        assert computed[0] == (256 if turn == 0 else 64) and set(computed[1:]) == {1}
        assert conversation.messages == [*before, {"role": "assistant", "content": answer}]
        prompt = conversation.template.encode(before, reply=True)
        ids = list(model.stream(prompt, 10, temperature=1.2, seed=5 + turn))
        assert answer == model.tokenizer.decode(ids).partition("\n")[0] and len(answer) > 2


def test_an_answer_ends_at_a_stop_id_a_stop_string_or_its_length():
    bpe = BPETokenizer.train("some text", 257)
    model = Scripted("one\ntwo", "abcdef", tokenizer=bpe, block_size=256)
    conversation = talk_to(model, stop=["de"])
    model.stream = lambda rows, **_: iter([*b"x\ny", bpe.end_of_text, *b"z"])
    assert "".join(conversation.say("?")) == "x\ny"
    model.stream = lambda rows, **_: iter(b"abcdef")
    assert "".join(conversation.say("?")) == "abc"
    assert "".join(talk_to(Scripted("one\ntwo")).say("?")) == "one"  # without end-of-text
    model = Scripted("a", "b")
    conversation = talk_to(model, max_new_tokens=7, seed=3)
    for _ in range(2):
        list(conversation.say("?"))
    assert [(c.max_new_tokens, c.seed) for c in model.configs] == [(7, 3), (7, 4)]


def test_the_oldest_turns_are_forgotten_and_the_system_message_stays():
    model = Scripted(*["yes"] * 5, block_size=128)
    conversation = talk_to(model, "Short.", max_new_tokens=30)
    forgotten = []
    for text in ("one", "two", "three", "four " * 8, "five"):
        list(conversation.say(text))
        forgotten.append(conversation.forgotten)
    assert forgotten == [0, 0, 0, 3, 4]
    begin = "System:\nShort.\nUser:\n"
    assert model.asked[2] == (f"{begin}one\nAssistant:\nyes\nUser:\ntwo\nAssistant:\nyes\n"
                              "User:\nthree\nAssistant:\n")
    assert model.asked[3] == begin + "four " * 8 + "\nAssistant:\n"
    assert model.asked[4] == begin + "five\nAssistant:\n"
    assert all(len(text) <= 128 - 30 for text in model.asked)
    assert [m["content"] for m in conversation.messages[:3]] == ["Short.", "one", "yes"]
    conversation.reset()
    assert conversation.forgotten == 0 and len(conversation.messages) == 1


def test_an_answer_has_at_least_half_of_the_context_and_at_most_what_is_left():
    model = Scripted("a", "b", block_size=64)
    conversation = talk_to(model, max_new_tokens=500)
    list(conversation.say("x"))
    list(conversation.say("y" * 14))  # with what is around it 32 characters
    assert conversation.forgotten == 1
    assert [c.max_new_tokens + len(text) for c, text in zip(model.configs, model.asked,
                                                            strict=True)] == [64, 64]


@pytest.mark.parametrize(("text", "says"), [
    ("y" * 15, "it has 33 tokens, and only 32 of the context of 64"), ("\u00e9", "lacks")])
def test_a_message_that_cannot_be_answered_changes_nothing(text, says):
    model = Scripted("yes", "no", block_size=64)
    conversation = talk_to(model)
    list(conversation.say("x"))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=says):
        conversation.say(text)
    assert conversation.messages == before and conversation.forgotten == 0
    assert "".join(conversation.say("z")) == "no"


def test_an_answer_that_is_not_read_to_its_end_stays_as_far_as_it_was_read():
    model = Scripted("yes indeed", "no", block_size=256)
    conversation = talk_to(model)
    pieces = conversation.say("x")
    assert next(pieces) + next(pieces) == "ye"
    pieces.close()
    list(conversation.say("z"))
    assert "Assistant:\nye\nUser:\nz\n" in model.asked[1]
