"""Tiny random models of transformers, read: logits, texts, files, errors."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from peers import MODELS, OWN, greedy, logits_of, saved, some_ids, torch, transformers
from tinygrad import Tensor, dtypes

from gpt import GPT, GPTConfig, TrainConfig
from tinygpt import device
from tinygpt.data.tokenizer import CharTokenizer
from tinygpt.huggingface import pretrained
from tinygpt.model import lora
from train import train


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3", "mistral", "qwen2", "qwen3",
                                  "smollm3"])
def test_greedy_text_is_that_of_transformers(name, tmp_path, rng):
    reference = saved(tmp_path, name)
    ours = GPT.from_pretrained(tmp_path)
    prompt = some_ids(rng, 2, 5)
    text = ours.generate(prompt, 100, temperature=0).numpy()
    assert (text == greedy(reference, prompt, 100)).all()
    assert len(set(text[0])) > 5 and ours.tokenizer is None


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path, rng):
    reference = saved(tmp_path / "theirs", name)
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ids = some_ids(rng, 2, 110)
    expected = logits_of(reference, ids)
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours(Tensor(ids)).numpy(), expected, rtol=0, atol=1e-4)
    folder = ours.save_pretrained(tmp_path / "ours")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(logits_of(back, ids), expected, rtol=0, atol=1e-4)
    again = GPT.from_pretrained(folder)
    assert again.config == ours.config
    assert back.config.model_type == reference.config.model_type or name == "mistral whole"
    for key, weight in ours.state_dict().items():
        assert np.array_equal(again.state_dict()[key].numpy(), weight.numpy()), key


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_half_precision_files_are_read(name, dtype, tmp_path, rng):
    saved(tmp_path, name, dtype)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = some_ids(rng, 1, 9)
    np.testing.assert_allclose(GPT.from_pretrained(tmp_path)(Tensor(ids)).numpy(),
                               logits_of(reference, ids), atol=1e-4)


@pytest.mark.parametrize(("name", "dtype", "kept"), [
    ("qwen3", "bfloat16", dtypes.bfloat16), ("gpt2", "float16", dtypes.float16)])
def test_matrices_of_16_bits_stay_as_they_are_stored(name, dtype, kept, tmp_path, rng):
    saved(tmp_path / "x", name, dtype)
    ours = GPT.from_pretrained(tmp_path / "x", as_stored=True)
    wide = GPT.from_pretrained(tmp_path / "x")
    weights = ours.state_dict()
    assert {w.dtype for w in weights.values() if w.ndim == 2} == {kept}
    assert {w.dtype for w in weights.values() if w.ndim == 1} == {dtypes.float32}
    ids = some_ids(rng, 1, 9)
    np.testing.assert_allclose(ours(Tensor(ids)).numpy(), wide(Tensor(ids)).numpy(), atol=1e-5)
    ours.save_pretrained(tmp_path / "y")  # again in 16 bits
    back = GPT.from_pretrained(tmp_path / "y", as_stored=True).state_dict()
    for key, weight in weights.items():
        assert back[key].dtype == weight.dtype
        assert np.array_equal(device.read(back[key]), device.read(weight)), key
    with pytest.raises(ValueError, match="adapters need float32"):
        lora.attach(ours, 1, 1.0, "h.*", 0)
    written = [list(model.stream(ids, 12, temperature=0)) for model in (ours, wide)]
    assert written[0] == written[1]
    written = [list(model.quantize("int8").stream(ids, 12, temperature=0))
               for model in (ours, wide)]
    assert written[0] == written[1]


def test_a_model_of_16_bits_is_not_trained(tmp_path):
    saved(tmp_path / "x", "qwen3", "bfloat16")
    model = GPT.from_pretrained(tmp_path / "x", as_stored=True)
    with pytest.raises(ValueError, match=r"wte\.weight is .*as_stored"):
        train(model, TrainConfig(out_dir=str(tmp_path / "o")), np.arange(2000) % 97)


def test_shards_and_a_single_file_are_read(tmp_path, rng):
    reference = saved(tmp_path / "shards", "llama", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    saved(tmp_path / "whole", "llama")
    ids = some_ids(rng, 1, 9)
    for path in (tmp_path / "shards", tmp_path / "whole" / "model.safetensors"):
        np.testing.assert_allclose(GPT.from_pretrained(path)(Tensor(ids)).numpy(),
                                   logits_of(reference, ids), atol=1e-4)


def test_older_files_with_buffers_and_without_a_prefix_are_read(tmp_path, rng):
    """As openai-community/gpt2: no `transformer.`, attention masks, sometimes the tied head."""
    reference = saved(tmp_path, "gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in reference.state_dict().items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 110, 110, dtype=torch.bool)
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
    for option, had in (("n_layer", 2), ("n_head", 5), ("block_size", 110), ("vocab_size", 97)):
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
    ("llama", dict(head_dim=32), "h.0.attn.c_attn.weight"),
    ("llama", dict(mlp_bias=True), "mlp_bias=True"),
    ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type='yarn'"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
     "rope_type='dynamic'"),
    ("llama", dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "no low_freq_factor"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "linear"}), "no factor"),
    ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    ("llama", dict(sliding_window=9), "sliding_window=9"),
    ("llama", dict(model_type="gemma3_text"), "model_type 'gemma3_text'"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=9, layer_types=[
        "full_attention", "sliding_attention"]), "layer_types=['full_attention', 'sliding_"),
    ("qwen3", dict(attention_bias=True), "attention_bias=True"),
    ("smollm3", dict(no_rope_layers=[0, 1, 1]), "no_rope_layers=[0, 1, 1]"),
    ("smollm3", dict(use_sliding_window=True), "use_sliding_window=True"),
    ("llama", dict(num_key_value_heads=6), "h.0.attn.c_attn.weight"),
    ("llama", dict(tie_word_embeddings=True, vocab_size=96), "embed_tokens.weight of shape")],
    ids=str)
def test_an_unsupported_setting_is_refused_in_one_line_that_names_it(tmp_path, name, changes, says):
    saved(tmp_path, name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


WRONG = [float("inf"), float("nan"), "7", [7], {"a": 1}, True, 10**400, -1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The config.json of a GPT-2 and a Llama of transformers, and its content."""
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
def test_settings_of_the_wrong_type_or_size_are_refused_at_once(folders, name, setting, values):
    """Before memory is allocated or names are made."""
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


def test_the_error_for_adapters_says_how_to_merge_them(tmp_path):
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


def test_an_index_with_file_names_that_are_too_long_is_refused(tmp_path):
    saved(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"wte.weight": "a" * 1000}}))
    with pytest.raises(ValueError, match=f"there is no {tmp_path}/aaa"):
        GPT.from_pretrained(tmp_path)


def test_a_file_of_another_kind_without_a_config_json_is_named(tmp_path):
    saved(tmp_path, "gpt2")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is not a checkpoint .*config\.json"):
        GPT.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["nothing", "gpt3", "no/such.safetensors"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="there is no pretrained model"):
        GPT.from_pretrained(name)


def test_a_model_is_never_in_memory_twice(tmp_path):
    """Measures numpy's memory, through which tensors are read and written."""
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
