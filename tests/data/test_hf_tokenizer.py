"""Tokenizers that Hugging Face's library reads: those of other families than GPT-2's."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tinygpt.data.tokenizer import (
    HFTokenizer,
    StreamDecoder,
    begin_of_text,
    fingerprint,
    load_tokenizer,
)

CORPUS = ["the harbour sleeps and I walk with a lead", "a lead and a harbour, sleeps",
          "it's na\u00efve, 12 caf\u00e9s \u4f60\u597d"] * 4
TEXTS = ["the harbour", "a  lead\n\nand 12", " it's na\u00efve \u4f60\u597d \U0001f600!", "x", ""]


def byte_level() -> Tokenizer:
    """As Llama 3 and Qwen have it: a pattern of its own, a token before each text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(r"\p{N}{1,2}| ?\p{L}+|\s+|.", "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|begin|>", "<|end|>"]))
    made.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral have it: blanks as letters, unknown characters as bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.train_from_iterator([text.replace(" ", "\u2581") for text in CORPUS], trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=[
            "<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]))
    data = json.loads(made.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(data))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                            normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                        special_tokens=[("<s>", 1)])
    return made


MADE = {"byte level": (byte_level, "<|end|>"), "sentencepiece": (sentencepiece, "</s>")}


@pytest.fixture(scope="module", params=MADE)
def pair(request) -> tuple[HFTokenizer, Tokenizer]:
    """Ours, and the library's own."""
    make, end = MADE[request.param]
    theirs = make()
    return HFTokenizer(json.loads(theirs.to_str()), theirs.token_to_id(end)), theirs


def test_ids_and_texts_are_those_of_the_library(pair):
    ours, theirs = pair
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text and ours.decode_bytes(ids) == text.encode()
        assert [*begin_of_text(ours), *ids] == theirs.encode(text).ids
    assert len(begin_of_text(ours)) == 1


def test_special_tokens_in_a_text_are_plain_text(pair):
    ours, theirs = pair
    special = {i for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    for i in special:
        text = f"a {theirs.id_to_token(i)} lead"
        assert special.isdisjoint(ours.encode(text)) and ours.decode(ours.encode(text)) == text
    ids = [*begin_of_text(ours), *ours.encode("one"), ours.end_of_text]
    assert ours.decode(ids) == "one"
    assert all(ours.token_lengths()[i] == 0 for i in special)


def test_a_stream_gives_the_text_without_splitting_characters(pair):
    ours, _ = pair
    for text in TEXTS:
        stream = StreamDecoder(ours)
        pieces = [stream.push(i) for i in [*begin_of_text(ours), *ours.encode(text),
                                           ours.end_of_text]]
        assert all("\ufffd" not in piece for piece in pieces)
        assert stream.finish() == "" and "".join(pieces) == text
    stream = StreamDecoder(ours)
    cut = ours.encode("\U0001f600")[:-1]
    assert "".join(map(stream.push, cut)) + stream.finish() == ours.decode(cut)


def test_token_lengths_add_up_to_the_bytes_of_a_text(pair):
    ours, _ = pair
    lengths = ours.token_lengths()
    assert lengths.shape == (ours.vocab_size,)
    for text in TEXTS[:4]:
        first = ours.encode("a")
        ids = ours.encode("a" + text)  # of sentencepiece the first token has a blank that is lost
        lost = lengths[first].sum() - 1
        assert lengths[ids].sum() == len(text.encode()) + 1 + lost


def test_json_preserves_everything(pair):
    ours, _ = pair
    again = load_tokenizer(json.loads(json.dumps(ours.to_json())))
    assert again.to_json() == ours.to_json() and fingerprint(again) == fingerprint(ours)
    assert (again.end_of_text, begin_of_text(again)) == (ours.end_of_text, begin_of_text(ours))
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_truncation_and_padding_of_the_file_are_left_out(pair):
    ours, theirs = pair
    data = json.loads(theirs.to_str()) | {
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                       "stride": 0},
        "padding": {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}}
    assert HFTokenizer(data).encode("the harbour sleeps") == ours.encode("the harbour sleeps")


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_half_of_a_surrogate_pair_is_refused(pair, text):
    with pytest.raises(ValueError, match="surrogate"):
        pair[0].encode(text)


def test_ids_out_of_range_are_refused(pair):
    for bad in (-1, pair[0].vocab_size, 2**40):
        with pytest.raises(ValueError, match=f"token id {bad}"):
            pair[0].decode([bad])


@pytest.mark.parametrize("data", [
    {}, {"version": "1.0"}, {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
    {"model": {"type": "Telepathy"}}], ids=str)
def test_a_file_that_the_library_refuses_is_a_value_error_in_one_line(data):
    with pytest.raises(ValueError, match="tokenizer") as caught:
        load_tokenizer({"kind": "hf", "tokenizer": data, "end_of_text": None})
    assert "\n" not in str(caught.value)


def test_an_end_of_text_outside_the_vocabulary_is_refused(pair):
    with pytest.raises(ValueError, match="end_of_text=99999"):
        HFTokenizer(pair[0].data, 99999)
