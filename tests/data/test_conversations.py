"""Files of conversations: what is read, split and refused."""

import json

import numpy as np
import pytest

from tinygpt.data import DataError
from tinygpt.data.chat import chat_template_of, plain_text
from tinygpt.data.conversations import ChatData
from tinygpt.data.load import load_data
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer


def conversation(i: int) -> list[dict]:
    return [{"role": "user", "content": f"what is {i}"},
            {"role": "assistant", "content": f"one more than {i - 1}"}]


def write(path, conversations, **more):
    path.write_text("\n".join(json.dumps({"messages": c} | more) for c in conversations) + "\n")
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "chats.jsonl", map(conversation, range(20)))


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_conversations_become_ids_and_masks_of_two_splits(path, kind):
    data = load_data(str(path), kind, 300)
    assert isinstance(data, ChatData) and [len(split) for split in data.splits] == [18, 2]
    template = chat_template_of(data.tokenizer)
    pairs = [template.encode_with_mask(conversation(i)) for i in range(20)]
    for split, expected in zip(data.splits, (pairs[:18], pairs[18:]), strict=True):
        assert split.ids.tolist() == [i for ids, _ in expected for i in ids]
        assert split.mask.tolist() == [m for _, mask in expected for m in mask]
    assert data.describe()["validation_tokens"] == len(data.val) == len(data.splits[1].ids)
    answers = [conversation(i)[1]["content"] for i in (18, 19)]
    ends = 0 if kind == "bpe" else 1  # bytes of what ends an answer
    assert data.bytes_per_token() == pytest.approx(
        sum(len(a) + ends for a in answers) / data.splits[1].mask.sum())
    prompt = data.sample_prompts()[0]
    assert prompt.shown.startswith("what is 18\n") and prompt.stop_ids == template.stop_ids
    assert prompt.ids == template.encode(conversation(18)[:1], reply=True)


def test_a_trained_tokenizer_learns_from_the_plain_text_of_the_training_split(path):
    text = "".join(plain_text(conversation(i)) for i in range(18))
    data = load_data(str(path), "bpe", 300)
    assert data.tokenizer.to_json() == BPETokenizer.train(text, 300).to_json()


def test_the_fingerprint_covers_ids_masks_and_ends(path, tmp_path):
    def fingerprint(*conversations):
        found = write(tmp_path / "other.jsonl", conversations)
        return load_data(str(found), ByteTokenizer(), 0).fingerprint

    seen = [fingerprint(conversation(1), conversation(2)),
            fingerprint(conversation(1), conversation(3)),
            fingerprint(conversation(1), conversation(1), conversation(2)),
            fingerprint(conversation(1) * 2, conversation(2))]
    assert len(set(seen)) == 4 and seen[0] == fingerprint(conversation(1), conversation(2))
    ids = load_data(str(path), ByteTokenizer(), 0)
    moved = type(ids.splits[0])(ids.splits[0].ids, np.roll(ids.splits[0].mask, 1),
                                ids.splits[0].ends)
    other = ChatData((moved, ids.splits[1]), [], ids.tokenizer, ids.source)
    assert other.fingerprint != ids.fingerprint


def test_lines_with_the_text_field_are_documents(tmp_path, cache):
    path = write(tmp_path / "both.jsonl", map(conversation, range(9)), text="a text")
    assert not isinstance(load_data(str(path), "byte", 256), ChatData)
    assert isinstance(load_data(str(path), "byte", 256, text_field="body"), ChatData)


@pytest.mark.parametrize("line, says", [
    ("{", r"chats.jsonl, line 2: invalid JSON .*: write an object"),
    ('{"text": "x"}', r"line 2: no messages: write"),
    ('{"messages": []}', r"line 2: messages is not a list .* give at least one"),
    ('{"messages": [{"role": "bot", "content": "x"}]}', "line 2: message 1 has the role 'bot'"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: half of a surrogate"),
    ('{"messages": [{"role": "assistant", "content": "a\\nb"}]}', "line 2: an answer has a line")])
def test_a_wrong_line_is_named_with_a_remedy(path, line, says):
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *rest]))
    with pytest.raises(DataError, match=says):
        load_data(str(path), "byte", 256)


def test_one_conversation_is_too_few(tmp_path):
    with pytest.raises(DataError, match="has 1 conversations: give two or more"):
        load_data(str(write(tmp_path / "one.jsonl", [conversation(1)])), "byte", 256)
