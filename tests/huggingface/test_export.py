"""Models and tokenizers written for transformers and read again."""

import json

import numpy as np
import pytest
from peers import OWN, logits_of, random_text, some_ids, transformers
from tinygrad import Tensor
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt import GPT, GPTConfig
from tinygpt import safetensors_file
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, HFTokenizer
from tinygpt.huggingface import pretrained

LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False)


def test_a_model_without_biases_is_a_gpt2_with_zeros(tmp_path, rng):
    model = GPT(GPTConfig(**OWN, bias=False))
    back = transformers.AutoModelForCausalLM.from_pretrained(
        model.save_pretrained(tmp_path / "x")).eval()
    ids = some_ids(rng, 1, 16)
    np.testing.assert_allclose(logits_of(back, ids), model(Tensor(ids)).numpy(), atol=1e-4)


@pytest.mark.parametrize(("options", "says"), [
    (dict(qk_norm=True), "qk_norm=True"), (dict(parallel=True), "parallel=True"),
    (dict(sliding_window=4), "sliding_window=4"), (dict(n_kv_head=1), "n_kv_head=1"),
    (dict(position="rope"), "position=rope"),
    (dict(position="rope", norm="rmsnorm"), "activation=gelu"),
    (LLAMA | dict(qk_norm=True, nope_interval=2), "Qwen3ForCausalLM, lacks nope_interval=2"),
    (LLAMA | dict(qkv_bias=True, head_dim=4, nope_interval=2), "nope_interval=2")], ids=str)
def test_unsupported_options_are_named_and_nothing_is_written(tmp_path, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        GPT(GPTConfig(**OWN, **options)).save_pretrained(tmp_path / "x")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="x already exists"):
        GPT(GPTConfig(**OWN)).save_pretrained(tmp_path / "x")
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "mine"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        assert not (tmp_path / "x").exists()  # before it is complete
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        GPT(GPTConfig(**OWN)).save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_the_exported_tokenizer_gives_the_same_ids(kind, tmp_path, text, rng):
    ours = BPETokenizer.train(text + random_text(rng, 2000), 400) if kind == "bpe" else (
        ByteTokenizer())
    model = GPT(GPTConfig(**OWN | dict(vocab_size=400)))
    model.tokenizer = ours
    model.save_pretrained(tmp_path / "x")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert len(theirs) == ours.vocab_size
    back = GPT.from_pretrained(tmp_path / "x").tokenizer
    assert back.to_json() == ours.to_json()
    for sample in [text[:999], *(random_text(rng) for _ in range(50))]:
        ids = ours.encode(sample)
        assert theirs.encode(sample) == ids
        assert theirs.decode(ids) == sample == back.decode(ids)
    if kind == "bpe":
        assert theirs.eos_token_id == ours.end_of_text


def test_gpt2s_tokenizer_is_unchanged_by_tokenizer_json(tmp_path, gpt2_files, rng):
    ours = BPETokenizer()
    model = GPT(GPTConfig(**OWN | dict(vocab_size=50257)), seed=None)
    model.tokenizer = ours
    model.save_pretrained(tmp_path / "x")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    for sample in [random_text(rng) for _ in range(20)]:
        assert theirs.encode(sample) == ours.encode(sample)
    assert GPT.from_pretrained(tmp_path / "x").tokenizer.to_json() == ours.to_json()
    (tmp_path / "x" / "tokenizer.json").unlink()  # then it is tiktoken's, because of vocab_size
    assert GPT.from_pretrained(tmp_path / "x").tokenizer.to_json() == ours.to_json()


@pytest.mark.parametrize("change", [
    lambda d: d.update(normalizer={"type": "NFC"}),
    lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    lambda d: d["pre_tokenizer"].update(use_regex=False),
    lambda d: d["model"].update(ignore_merges=True), lambda d: d["model"]["merges"].reverse(),
    lambda d: d["model"]["merges"].pop(),
    lambda d: d["added_tokens"].append(d["added_tokens"][0] | {"id": 280, "content": "<x>"})])
def test_a_tokenizer_json_of_another_kind_is_not_taken_for_ours(tmp_path, text, change):
    model = GPT(GPTConfig(**OWN | dict(vocab_size=300)))
    model.tokenizer = BPETokenizer.train(text, 280)
    model.save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    found = GPT.from_pretrained(tmp_path / "x").tokenizer
    assert isinstance(found, HFTokenizer) and found.data == data
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert found.encode(text[:500]) == theirs.encode(text[:500])
    assert found.end_of_text == theirs.eos_token_id == 279


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_in_another_file_is_not_replaced_by_gpt2s(tmp_path, name):
    GPT(GPTConfig(**OWN | dict(vocab_size=50257, n_embd=2)), seed=None).save_pretrained(
        tmp_path / "x")
    (tmp_path / "x" / name).write_text("{}")
    with pytest.warns(pretrained.TokenizerWarning, match=f"{name} can be read only as"):
        assert GPT.from_pretrained(tmp_path / "x").tokenizer is None


def test_a_tokenizer_json_travels_whole(tmp_path):
    """From a folder to a model, its checkpoint and an export."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    GPT(GPTConfig(**OWN)).save_pretrained(tmp_path / "x")
    made.save(str(tmp_path / "x" / "tokenizer.json"))
    (tmp_path / "x" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    model = GPT.from_pretrained(tmp_path / "x")
    assert model.tokenizer.encode("b a c") == [2, 1, 0] and model.tokenizer.end_of_text == 3
    twin = GPT.from_checkpoint(model.save_checkpoint(1, None, tmp_path))
    twin.save_pretrained(tmp_path / "y")
    again = GPT.from_pretrained(tmp_path / "y").tokenizer
    assert again.to_json() == twin.tokenizer.to_json() == model.tokenizer.to_json()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "y")
    assert theirs.encode("b a c") == [2, 1, 0] and theirs.eos_token_id == 3


def test_a_gpt2_with_a_damaged_tokenizer_json_does_not_get_gpt2s_tokenizer(tmp_path, gpt2_files):
    model = GPT(GPTConfig(**OWN | dict(vocab_size=50257, n_embd=2)), seed=None)
    model.tokenizer = BPETokenizer.from_tokens([bytes([b]) for b in range(256)])
    model.save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "tokenizer.json"
    for text in ("{", "[" * 9999, '{"version": "1.0"}'):
        path.write_text(text)
        with pytest.warns(pretrained.TokenizerWarning, match=r"tokenizer\.json"):
            assert GPT.from_pretrained(tmp_path / "x").tokenizer is None
    path.unlink()
    assert GPT.from_pretrained(tmp_path / "x").tokenizer.vocab_size == 50257


def test_a_tokenizer_with_more_ids_than_the_model_is_not_used(tmp_path):
    model = GPT(GPTConfig(**OWN))
    model.tokenizer = ByteTokenizer()
    model.save_pretrained(tmp_path / "x")
    with pytest.warns(pretrained.TokenizerWarning, match="256 ids, but .* vocab_size=97"):
        assert GPT.from_pretrained(tmp_path / "x").tokenizer is None


def test_tokens_that_are_not_merges_are_not_exported(tmp_path):
    model = GPT(GPTConfig(**OWN | dict(vocab_size=300)))
    model.tokenizer = BPETokenizer.from_tokens([bytes([b]) for b in range(256)] + [b"abc"])
    with pytest.raises(ValueError, match="abc"):
        model.save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_transformers_lacks_is_left_out_with_a_warning(tmp_path):
    model = GPT(GPTConfig(**OWN))
    model.tokenizer = CharTokenizer("abc")
    with pytest.warns(UserWarning, match="tokenizer"):
        model.save_pretrained(tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"]
