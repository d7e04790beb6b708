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
    """A model that writes these texts, one after the other, and records what it is asked."""

    def __init__(self, *answers: str | bytes, block_size: int = 64, tokenizer=None):
        self.tokenizer = tokenizer or CharTokenizer(ASCII)
        self.config = GPTConfig(block_size=block_size, vocab_size=self.tokenizer.vocab_size)
        self.answers, self.asked, self.configs = list(answers), [], []

    def stream(self, rows, config, reuse_cache):
        self.asked.append(self.tokenizer.decode(rows[0]))
        self.configs.append(config)
        answer = self.answers.pop(0)
        ids = self.tokenizer.encode(answer) if isinstance(answer, str) else answer
        yield from ids[:config.max_new_tokens]


def talk_to(model, system: str | None = None, stop=(), **sampling) -> Conversation:
    return Conversation(model, ChatTemplate(model.tokenizer), SampleConfig(**sampling), system,
                        stop)


def test_answers_are_sampled_after_all_messages_of_which_only_the_new_are_computed(monkeypatch):
    computed, call = [], decoder.Decoder._call

    def counted(self, tokens, start_pos, row, keys):
        computed.append(tokens.shape[1])
        return call(self, tokens, start_pos, row, keys)

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
    model = Scripted(tokenizer=bpe, block_size=256)
    conversation = talk_to(model, stop=["de"], max_new_tokens=12, seed=3)
    for answer, shown, is_cut in (([*b"x\ny", bpe.end_of_text, *b"z"], "x\ny", False),
                                  (b"abcdef", "abc", False), (b"x" * 20, "x" * 12, True)):
        model.answers = [answer]
        assert "".join(conversation.say("?")) == shown and conversation.is_cut == is_cut
    assert [(c.max_new_tokens, c.seed) for c in model.configs] == [(12, 3), (12, 4), (12, 5)]
    assert "".join(talk_to(Scripted("one\ntwo")).say("?")) == "one"  # without end-of-text


def test_the_oldest_turns_are_forgotten_and_the_system_message_stays():
    model = Scripted(*["yes\n"] * 5, block_size=128)
    conversation = talk_to(model, "Short.")
    forgotten = []
    for text in ("one", "two", "three", "four " * 14, "five"):
        list(conversation.say(text))
        forgotten.append(conversation.forgotten)
    assert forgotten == [0, 0, 0, 3, 4]
    begin = "System:\nShort.\nUser:\n"
    assert model.asked[2] == (f"{begin}one\nAssistant:\nyes\nUser:\ntwo\nAssistant:\nyes\n"
                              "User:\nthree\nAssistant:\n")
    assert model.asked[3] == begin + "four " * 14 + "\nAssistant:\n"
    assert model.asked[4] == begin + "five\nAssistant:\n"
    assert [m["content"] for m in conversation.messages[:3]] == ["Short.", "one", "yes"]
    conversation.reset()
    assert conversation.forgotten == 0 and len(conversation.messages) == 1


def test_an_answer_that_fills_the_context_goes_on_after_turns_are_forgotten():
    long = "abcdefghijklmnopqrstuvwxyz" * 3
    model = Scripted("yes\n", "yes\n", long, long[15:], long[38:], block_size=80)
    conversation = talk_to(model, max_new_tokens=70)
    for text in ("1", "2"):
        list(conversation.say(text))
    assert "".join(conversation.say("3")) == long[:61] and conversation.forgotten == 2
    turn = "User:\n{}\nAssistant:\n"
    two = turn.format(2) + "yes\n" + turn.format(3)
    assert model.asked[2] == turn.format(1) + "yes\n" + two
    assert model.asked[3:] == [two + long[:15], turn.format(3) + long[:38]]
    assert conversation.is_cut and conversation.messages[-1]["content"] == long[:61]


@pytest.mark.parametrize(("text", "says"), [
    ("y" * 46, "it has 64 tokens, the context 64"), ("\u00e9", "lacks")])
def test_a_message_that_cannot_be_answered_changes_nothing(text, says):
    model = Scripted("yes\n", "no\n", block_size=64)
    conversation = talk_to(model)
    list(conversation.say("x"))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=says):
        conversation.say(text)
    assert conversation.messages == before and conversation.forgotten == 0
    assert "".join(conversation.say("z")) == "no"


def test_an_answer_that_is_not_read_to_its_end_stays_as_far_as_it_was_read():
    model = Scripted("yes indeed\n", "no\n", block_size=256)
    conversation = talk_to(model)
    pieces = conversation.say("x")
    assert next(pieces) + next(pieces) == "ye"
    pieces.close()
    list(conversation.say("z"))
    assert "Assistant:\nye\nUser:\nz\n" in model.asked[1]
