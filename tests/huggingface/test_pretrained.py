"""Models of transformers, tiny and random, in and out: logits, texts, files, refusals."""

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from tinygrad import Tensor

import generate
import train
from gpt import GPT, GPTConfig
from tinygpt import evaluate
from tinygpt import safetensors_file as tensorfile
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.huggingface import pretrained
from tinygpt.model import lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GPT2 = dict(vocab_size=97, n_positions=80, n_embd=80, n_head=5, n_layer=2)
LLAMA = dict(vocab_size=97, max_position_embeddings=80, hidden_size=96, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=3, intermediate_size=72,
             rms_norm_eps=3e-6, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
MODELS = {
    "gpt2": ("GPT2", GPT2), "gpt2 untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False)),
    "gpt2 inner": ("GPT2", GPT2 | dict(n_inner=56, activation_function="gelu",
                                       layer_norm_epsilon=1e-3)),
    "llama": ("Llama", LLAMA), "llama tied": ("Llama", LLAMA | dict(tie_word_embeddings=True)),
    "llama biased": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True))}


def theirs(name: str, seed: int = 0):
    """A random model of transformers, with weights large enough for its tokens to differ."""
    kind, settings = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(bos_token_id=0, eos_token_id=None, **settings)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else "LlamaForCausalLM")(
        config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.08
    return model


def saved(folder, name: str, dtype="float32", **kwargs):
    model = theirs(name).to(getattr(torch, dtype))
    model.save_pretrained(folder, **kwargs)
    return model.float()


def logits_of(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def greedy(model, ids: np.ndarray, count: int) -> np.ndarray:
    return model.generate(torch.tensor(ids, dtype=torch.long), max_new_tokens=count,
                          do_sample=False, eos_token_id=None, pad_token_id=0).numpy()


def some_ids(rng, *shape) -> np.ndarray:
    return rng.integers(0, 97, shape).astype(np.int32)


def random_text(rng, length: int = 300) -> str:
    """Random Unicode with blanks and letters in it, and no surrogates."""
    points = np.where(rng.random(length) < 0.4, rng.integers(32, 127, length),
                      np.where(rng.random(length) < 0.3, rng.choice([9, 10, 13, 32, 160], length),
                               rng.integers(0, 0x110000, length)))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_text_is_that_of_transformers(name, tmp_path, rng):
    reference = saved(tmp_path, name)
    ours = GPT.from_pretrained(tmp_path)
    prompt = some_ids(rng, 2, 5)
    text = ours.generate(prompt, 64, temperature=0).numpy()
    assert (text == greedy(reference, prompt, 64)).all()
    assert len(set(text[0])) > 5 and ours.tokenizer is None


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path, rng):
    reference = saved(tmp_path / "theirs", name)
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ids = some_ids(rng, 2, 80)
    expected = logits_of(reference, ids)
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours(Tensor(ids)).numpy(), expected, rtol=0, atol=1e-4)
    folder = ours.save_pretrained(tmp_path / "ours")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(logits_of(back, ids), expected, rtol=0, atol=1e-4)
    again = GPT.from_pretrained(folder)
    assert again.config == ours.config
    for key, weight in ours.state_dict().items():
        assert np.array_equal(again.state_dict()[key].numpy(), weight.numpy()), key


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_files(name, dtype, tmp_path, rng):
    saved(tmp_path, name, dtype)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = some_ids(rng, 1, 9)
    np.testing.assert_allclose(GPT.from_pretrained(tmp_path)(Tensor(ids)).numpy(),
                               logits_of(reference, ids), atol=1e-4)


def test_shards_and_a_file_by_name(tmp_path, rng):
    reference = saved(tmp_path / "shards", "llama", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    saved(tmp_path / "whole", "llama")
    ids = some_ids(rng, 1, 9)
    for path in (tmp_path / "shards", tmp_path / "whole" / "model.safetensors"):
        np.testing.assert_allclose(GPT.from_pretrained(path)(Tensor(ids)).numpy(),
                                   logits_of(reference, ids), atol=1e-4)


def test_older_files_with_buffers_and_without_prefix(tmp_path, rng):
    """As openai-community/gpt2 is: no `transformer.`, attention masks, sometimes the tied head."""
    reference = saved(tmp_path, "gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in reference.state_dict().items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 80, 80, dtype=torch.bool)
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    from safetensors.torch import save_file
    save_file(tensors, tmp_path / "model.safetensors")
    ids = some_ids(rng, 1, 9)
    np.testing.assert_allclose(GPT.from_pretrained(tmp_path)(Tensor(ids)).numpy(),
                               logits_of(reference, ids), atol=1e-4)


def test_a_smaller_block_size_crops_and_other_conflicts_are_refused(tmp_path, rng):
    reference = saved(tmp_path, "gpt2")
    ours = GPT.from_pretrained(tmp_path, block_size=16, dropout=0.1, n_layer=2, n_kv_head=None)
    assert ours.config.block_size == 16 and ours.config.dropout == 0.1
    ids = some_ids(rng, 1, 16)
    np.testing.assert_allclose(ours(Tensor(ids)).numpy(), logits_of(reference, ids), atol=1e-4)
    for option, had in (("n_layer", 2), ("n_head", 5), ("block_size", 80), ("vocab_size", 97)):
        with pytest.raises(ValueError, match=rf"{option}={had}, but {option}=320 was asked"):
            GPT.from_pretrained(tmp_path, **{option: 320})


def test_a_checkpoint_of_ours_is_a_pretrained_model_too(tmp_path, rng):
    model = GPT(GPTConfig(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=8))
    model.tokenizer = CharTokenizer("abc")
    path = model.save_checkpoint(1, None, tmp_path)
    twin = GPT.from_pretrained(path, block_size=8)
    ids = some_ids(rng, 1, 8)
    assert np.array_equal(twin(Tensor(ids)).numpy(), model(Tensor(ids)).numpy())
    assert twin.tokenizer.chars == "abc" and twin.config.block_size == 8


@pytest.mark.parametrize(("name", "changes", "says"), [
    ("gpt2", dict(activation_function="relu"), "activation_function='relu'"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
    ("gpt2", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("gpt2", dict(model_type="bloom"), "model_type 'bloom'"),
    ("gpt2", dict(model_type=None), "no model_type"),
    ("gpt2", dict(n_layer=3), "no tensor h.2"), ("gpt2", dict(n_layer=1), "a tensor h.1"),
    ("gpt2", dict(n_embd=10**9), "wte.weight of shape"), ("gpt2", dict(n_head="x"), "'x'"),
    ("gpt2", dict(n_head=7), "n_head=7"), ("gpt2", dict(n_inner=9), "h.0.mlp.c_fc.weight"),
    ("gpt2", dict(n_positions=70), "wpe.weight"),
    ("llama", dict(head_dim=32), "head_dim=32"), ("llama", dict(mlp_bias=True), "mlp_bias=True"),
    ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("llama", dict(rope_parameters={"rope_type": "llama3"}), "rope_type='llama3'"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "linear"}), "rope_type='linear'"),
    ("llama", dict(num_key_value_heads=6), "h.0.attn.c_attn.weight"),
    ("llama", dict(tie_word_embeddings=True, vocab_size=96), "embed_tokens.weight of shape")],
    ids=str)
def test_what_our_model_lacks_is_refused_in_one_line_that_names_it(tmp_path, name, changes, says):
    saved(tmp_path, name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


WRONG = [float("inf"), float("nan"), "7", [7], {"a": 1}, True, 10**400, -1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A GPT-2 and a Llama of transformers, and what their config.json has."""
    found = {}
    for name in ("gpt2", "llama"):
        folder = tmp_path_factory.mktemp(name)
        saved(folder, name)
        found[name] = folder / "config.json", json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(("name", "setting", "values"), [
    *(("gpt2", setting, [*WRONG, 1.5, 10**9]) for setting in (
        "n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size")),
    *(("llama", setting, [*WRONG, 1.5, 10**9]) for setting in (
        "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
        "num_key_value_heads", "vocab_size", "head_dim")),
    ("llama", "max_position_embeddings", [*WRONG, 1.5]),
    ("gpt2", "layer_norm_epsilon", [*WRONG, 0]), ("llama", "rms_norm_eps", [*WRONG, 0]),
    *((name, setting, [*WRONG[:5], 1]) for name, setting in (
        ("gpt2", "tie_word_embeddings"), ("gpt2", "activation_function"), ("gpt2", "model_type"),
        ("llama", "model_type"), ("llama", "attention_bias"), ("llama", "mlp_bias"),
        ("llama", "hidden_act"), ("gpt2", "scale_attn_weights")))])
def test_settings_of_the_wrong_type_or_size_end_at_once_in_a_line(folders, name, setting, values):
    """Before memory is asked for, or names are made."""
    path, settings = folders[name]
    try:
        for value in values:
            path.write_text(json.dumps(settings | {setting: value}))
            with pytest.raises(ValueError) as caught:
                GPT.from_pretrained(path.parent)
            assert str(path.parent) in str(caught.value), value
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, value
    finally:
        path.write_text(json.dumps(settings))


@pytest.mark.parametrize("rope", [5, "linear", [1], {"rope_type": 5}, {"rope_type": ["a"]},
                                  {"rope_theta": "x"}, {"rope_theta": float("inf")},
                                  {"rope_type": "default", "partial_rotary_factor": "x"}], ids=str)
@pytest.mark.parametrize("setting", ["rope_parameters", "rope_scaling"])
def test_rope_settings_of_the_wrong_type_are_refused(folders, setting, rope):
    path, settings = folders["llama"]
    try:
        path.write_text(json.dumps(settings | {"rope_parameters": None, setting: rope}))
        with pytest.raises(ValueError, match=str(path)) as caught:
            GPT.from_pretrained(path.parent)
        assert "\n" not in str(caught.value)
    finally:
        path.write_text(json.dumps(settings))


def test_a_checkpoint_with_adapters_says_how_to_merge_them(tmp_path):
    model = GPT(GPTConfig(**OWN))
    lora.attach(model, 1, 1.0, "h.*", 0)
    with pytest.raises(ValueError, match=r"LoRA adapters.*--export"):
        GPT.from_pretrained(model.save_checkpoint(1, None, tmp_path))


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(p.read_bytes()[:100]),
    lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    lambda p: p.write_bytes((1 << 40).to_bytes(8, "little") + p.read_bytes()[8:]),
    lambda p: p.write_bytes(p.read_bytes().replace(b'"F32"', b'"F64"', 1)),
    lambda p: p.write_bytes(p.read_bytes().replace(b'[97,80]', b'[97,81]', 1)),
    lambda p: p.unlink(), lambda p: (p.parent / "config.json").unlink(),
    lambda p: (p.parent / "config.json").write_text("{"),
    lambda p: (p.parent / "config.json").write_text("[" * 100_000),
    lambda p: ((p.parent / "config.json").unlink(), os.mkfifo(p.parent / "config.json")),
    lambda p: (p.parent / "config.json").write_text("[]")])
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage):
    saved(tmp_path, "gpt2")
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_that_names_files_with_names_that_cannot_be_is_refused(tmp_path):
    saved(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"wte.weight": "a" * 1000}}))
    with pytest.raises(ValueError, match=f"there is no {tmp_path}/aaa"):
        GPT.from_pretrained(tmp_path)


def test_a_file_of_another_kind_without_a_config_json_is_named(tmp_path):
    saved(tmp_path, "gpt2")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is no checkpoint .* no config\.json"):
        GPT.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["nothing", "gpt3", "no/such.safetensors"])
def test_names_of_nothing(name):
    with pytest.raises(ValueError, match="there is no pretrained model"):
        GPT.from_pretrained(name)


def test_a_model_is_never_in_memory_twice(tmp_path):
    """Of numpy's memory, which is where tensors pass: what is read, and what is written."""
    config = GPTConfig(block_size=16, vocab_size=1500, n_layer=12, n_head=2, n_embd=192,
                       activation="gelu_tanh")
    model = GPT(config, seed=None)
    whole = sum(w.nbytes() for w in model.state_dict().values())
    largest = max(w.nbytes() for w in model.state_dict().values())
    assert whole > 15 * largest

    def peak_of(what) -> int:
        tracemalloc.start()
        what()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_of(lambda: model.save_pretrained(tmp_path / "out")) < 1.3 * largest
    with pretrained.open_pretrained(tmp_path / "out") as found:
        assert peak_of(lambda: found.fill(model.state_dict())) < 1.3 * largest


# ---- exports

OWN = dict(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=16)


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
    (dict(position="rope", norm="rmsnorm"), "activation=gelu")], ids=str)
def test_options_without_a_home_are_named_and_nothing_is_written(tmp_path, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        GPT(GPTConfig(**OWN, **options)).save_pretrained(tmp_path / "x")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_written_over(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="x is there already"):
        GPT(GPTConfig(**OWN)).save_pretrained(tmp_path / "x")
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "mine"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        assert not (tmp_path / "x").exists()  # before it is whole
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        GPT(GPTConfig(**OWN)).save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_the_exported_tokenizer_is_ours(kind, tmp_path, text, rng):
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


def test_gpt2s_own_tokenizer_survives_the_way_through_tokenizer_json(tmp_path, gpt2_files, rng):
    ours = BPETokenizer()
    model = GPT(GPTConfig(**OWN | dict(vocab_size=50257)), seed=None)
    model.tokenizer = ours
    model.save_pretrained(tmp_path / "x")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    for sample in [random_text(rng) for _ in range(20)]:
        assert theirs.encode(sample) == ours.encode(sample)
    assert GPT.from_pretrained(tmp_path / "x").tokenizer.to_json() == ours.to_json()
    (tmp_path / "x" / "tokenizer.json").unlink()  # then it is tiktoken's, by the vocabulary
    assert GPT.from_pretrained(tmp_path / "x").tokenizer.to_json() == ours.to_json()


@pytest.mark.parametrize("change", [
    lambda d: d.update(normalizer={"type": "NFC"}),
    lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    lambda d: d["pre_tokenizer"].update(type="Whitespace"),
    lambda d: d["pre_tokenizer"].update(use_regex=False),
    lambda d: d["model"].update(type="WordPiece"), lambda d: d["model"].update(dropout=0.1),
    lambda d: d["model"]["merges"].reverse(), lambda d: d["model"]["merges"].pop(),
    lambda d: d["added_tokens"].append({"id": 9, "content": "<x>"}),
    lambda d: d.update(post_processor={"type": "TemplateProcessing"}),
    lambda d: d.clear(), lambda d: d["model"]["vocab"].update(a="b"),
    lambda d: d["added_tokens"][0].pop("id"), lambda d: d.update(added_tokens=[5]),
    lambda d: d["model"].update(vocab={"abcdefghij"[i]: i for i in range(10)}, merges=[])])
def test_a_tokenizer_json_of_another_kind_is_not_taken_for_ours(tmp_path, text, change):
    model = GPT(GPTConfig(**OWN | dict(vocab_size=300)))
    model.tokenizer = BPETokenizer.train(text, 280)
    model.save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.warns(pretrained.TokenizerWarning, match=r"x/tokenizer\.json is damaged, or"):
        assert GPT.from_pretrained(tmp_path / "x").tokenizer is None
    with pretrained.tokenizer_needed(), pytest.raises(ValueError, match=r"tokenizer\.json"):
        GPT.from_pretrained(tmp_path / "x")


def test_a_gpt2_with_a_tokenizer_json_that_cannot_be_read_does_not_get_gpt2s(tmp_path, gpt2_files):
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


def test_a_tokenizer_of_more_ids_than_the_model_is_not_taken(tmp_path):
    model = GPT(GPTConfig(**OWN))
    model.tokenizer = ByteTokenizer()
    model.save_pretrained(tmp_path / "x")
    with pytest.warns(pretrained.TokenizerWarning, match="256 ids, but the model vocab_size=97"):
        assert GPT.from_pretrained(tmp_path / "x").tokenizer is None


def test_tokens_that_no_merge_makes_are_not_exported(tmp_path):
    model = GPT(GPTConfig(**OWN | dict(vocab_size=300)))
    model.tokenizer = BPETokenizer.from_tokens([bytes([b]) for b in range(256)] + [b"abc"])
    with pytest.raises(ValueError, match="abc"):
        model.save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_a_home_is_left_out_and_told(tmp_path):
    model = GPT(GPTConfig(**OWN))
    model.tokenizer = CharTokenizer("abc")
    with pytest.warns(UserWarning, match="tokenizer"):
        model.save_pretrained(tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"]
    shutil.rmtree(tmp_path / "x")


# ---- the commands

@pytest.fixture
def folder(tmp_path, text):
    """A tiny pretrained GPT-2 of transformers with a tokenizer of ours."""
    model = GPT(GPTConfig(**OWN | dict(vocab_size=300)))
    model.tokenizer = BPETokenizer.train(text, 300)
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_generate_writes_with_a_folder_and_exports_it(command, folder, tmp_path):
    done = command("generate.py", "--checkpoint", folder, "--prompt", "ROMEO:",
                   "--max_new_tokens", 4, "--temperature", 0)
    assert done.returncode == 0 and done.stdout.startswith("ROMEO:"), done.stderr
    done = command("generate.py", "--checkpoint", folder, "--export", "again")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors").read_bytes()


FINETUNE = ("--batch_size", 2, "--gradient_accumulation_steps", 2, "--eval_iters", 2,
            "--learning_rate", 1e-2, "--block_size", 8)


def test_a_fine_tune_lowers_the_loss_and_resumes_without_the_model(command, folder, text_file,
                                                                   tmp_path):
    flags = ("--init_from", folder, "--data", text_file, *FINETUNE)
    done = command("train.py", *flags, "--max_iters", 20, "--out_dir", "whole")
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    val = [r["val_loss"] for r in map(json.loads, metrics) if "val_loss" in r]
    assert len(val) == 5 and val[-1] < val[0] - 0.3  # evaluated every 5 steps: the recipe's
    done = command("train.py", *flags, "--max_iters", 15, "--out_dir", "part")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder)
    done = command("train.py", "--resume", "--out_dir", "part", "--max_iters", 20)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "part" / "ckpt_20.safetensors").read_bytes()[-4000:] == (
        tmp_path / "whole" / "ckpt_20.safetensors").read_bytes()[-4000:]
    looked = command("train.py", "--eval_only", "--out_dir", "part")
    assert looked.returncode == 0 and looked.stdout in done.stdout, looked.stderr
    done = command("generate.py", "--checkpoint", "part/best.safetensors", "--export", "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("flags", "says"), [
    (("--n_layer", 4), "n_layer=1, but n_layer=4 was asked for"),
    (("--block_size", 32), "block_size=16, but block_size=32 was asked for"),
    (("--preset", "shakespeare"), "block_size=16, but block_size=64 was asked for"),
    (("--init_from", "gpt5"), "there is no pretrained model gpt5"),
    (("--init_from", "gpt2", "--offline"), "--offline")], ids=str)
def test_a_fine_tune_that_cannot_be_gets_one_line_and_status_2(command, folder, flags, says,
                                                               text_file, tmp_path):
    done = command("train.py", "--init_from", folder, "--data", text_file, *flags,
                   env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "checkpoints").exists()


def test_a_damaged_tokenizer_json_is_an_error_where_a_tokenizer_is_needed(folder, text_file,
                                                                          tmp_path, capsys):
    (folder / "tokenizer.json").write_text("{")
    ids = tmp_path / "ids.bin"
    np.arange(40, dtype=np.uint16).tofile(ids)
    start = ("--init_from", str(folder), "--data", str(text_file), "--out_dir", str(tmp_path / "o"))
    needing = ((generate.main, ["--checkpoint", str(folder)]), (train.main, [*start]),
               (evaluate.main, [str(folder), str(text_file)]))
    for main, flags in needing:
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and f"{folder / 'tokenizer.json'} is damaged" in err
    assert not (tmp_path / "o").exists()
    for main, flags in ((generate.main, ["--checkpoint", str(folder), "--export",
                                         str(tmp_path / "out")]),
                        (evaluate.main, [str(folder), str(ids)])):
        with pytest.warns(pretrained.TokenizerWarning, match=r"tokenizer\.json is damaged"):
            assert main(flags) == 0


@pytest.mark.parametrize("left", [0, 7, 500])
def test_a_damaged_checkpoint_beside_a_runs_config_json_is_told(command, tmp_path, left):
    path = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=16)
               ).save_checkpoint(1, None, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    os.truncate(path, left)
    done = command("generate.py", "--checkpoint", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(path) in done.stderr and "whole" in done.stderr
