"""Models written as GGUF, read by gguf's own reader and by transformers."""

import gguf as format
import numpy as np
import pytest
from tinygrad import Tensor

from gpt import GPT, GPTConfig
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.export import gguf
from tinygpt.model.bigram import Bigram, BigramConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = dict(block_size=16, vocab_size=260, n_layer=2, n_head=4, n_embd=32)
LLAMA = SIZES | dict(position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2,
                     rope_theta=500.0, norm_eps=3e-6, bias=False, tie_weights=False)
GPT2 = SIZES | dict(activation="gelu_tanh", n_inner=80)
SHAPES = {"llama": LLAMA, "gpt2": GPT2,
          "llama tied": LLAMA | dict(n_kv_head=None, tie_weights=True),
          "qwen2": LLAMA | dict(qkv_bias=True),
          "qwen3": LLAMA | dict(qk_norm=True, head_dim=10, tie_weights=True)}


def model_of(rng, **config) -> GPT:
    """A model with weights large enough for its tokens to differ."""
    model = GPT(GPTConfig(**config))
    model.load_state_dict({name: w.numpy() + 0.1 * rng.standard_normal(w.shape).astype(np.float32)
                           for name, w in model.state_dict().items()})
    model.tokenizer = BPETokenizer.train("ab abc abcd", 259)
    return model


def of_transformers(path):
    """The model that transformers makes of a GGUF file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type == "gpt2":  # what it does not read of one
        config.n_positions, config.n_inner = 16, 80
    elif config.model_type == "qwen3":
        config.head_dim = 10
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    weights = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


def contents(path) -> dict:
    return {name: field.contents() for name, field in format.GGUFReader(path).fields.items()}


def tensors(path) -> dict[str, tuple[str, np.ndarray]]:
    """The type of each tensor and its values."""
    return {t.name: (t.tensor_type.name, format.dequantize(t.data, t.tensor_type))
            for t in format.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_logits_from_the_file(name, tmp_path, rng):
    model = model_of(rng, **SHAPES[name])
    theirs = of_transformers(gguf.write(model, tmp_path / "m.gguf"))
    ids = rng.integers(0, 260, (2, 16))
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, model(Tensor(ids)).numpy(), atol=1e-4)
    assert logits.std() > 0.1


def test_matrices_have_the_type_asked_for_and_the_rest_is_float32(tmp_path, rng):
    model = model_of(rng, **GPT2)
    exact = tensors(gguf.write(model, tmp_path / "none.gguf"))
    for quantize, kind, share in (("fp16", "F16", 2 ** -11), ("int8", "Q8_0", 1 / 240),
                                  ("int4", "Q4_0", 1 / 8)):
        found = tensors(gguf.write(model, tmp_path / f"{quantize}.gguf", quantize))
        assert found.keys() == exact.keys()
        for name, (stored, values) in found.items():
            whole = exact[name][1]
            vector = whole.ndim == 1 or name == "position_embd.weight"
            odd = name.endswith("ffn_down.weight")  # 80 weights in a row: no multiple of 32
            assert stored == ("F32" if vector else "F16" if odd else kind), name
            limit = 0 if vector else share * np.abs(whole).max()
            assert np.abs(values - whole).max() <= limit + 1e-7 and values.shape == whole.shape


def test_the_metadata_has_the_sizes(tmp_path, rng):
    found = contents(gguf.write(model_of(rng, **LLAMA), tmp_path / "m.gguf", "int8"))
    expected = {"context_length": 16, "embedding_length": 32, "block_count": 2, "vocab_size": 260,
                "feed_forward_length": 88, "attention.head_count": 4,
                "attention.head_count_kv": 2, "attention.key_length": 8,
                "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 500}
    assert {key: found[f"llama.{key}"] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-6)
    assert found["general.architecture"] == "llama" and found["general.file_type"] == 7


def test_a_bpe_tokenizer_is_in_the_file(tmp_path, rng):
    model = model_of(rng, **LLAMA)
    found = contents(gguf.write(model, tmp_path / "m.gguf"))
    tokens = found["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert tokens[256:] == ["ab", "\u0120ab", "<|endoftext|>", "[UNUSED259]"]
    assert found["tokenizer.ggml.token_type"] == [1] * 258 + [3, 5]
    assert found["tokenizer.ggml.merges"] == ["a b", "\u0120 ab"]
    assert found["tokenizer.ggml.eos_token_id"] == model.tokenizer.end_of_text == 258


@pytest.mark.parametrize(("tokenizer", "tokens"), [
    (ByteTokenizer(), [f"\\x{b:02x}" for b in range(256)]),
    (CharTokenizer("\n \\ab"), ["\\x0a", "\\x20", "\\x5c", "\\x61", "\\x62"])])
def test_bytes_and_characters_are_tokens_of_rwkvs_tokenizer(tokenizer, tokens, tmp_path, rng):
    model = model_of(rng, **LLAMA)
    model.tokenizer = tokenizer
    found = contents(gguf.write(model, tmp_path / "m.gguf"))
    assert found["tokenizer.ggml.model"] == "rwkv"
    assert found["tokenizer.ggml.tokens"][:len(tokens)] == tokens
    assert len(found["tokenizer.ggml.tokens"]) == 260
    assert "tokenizer.ggml.eos_token_id" not in found


@pytest.mark.parametrize("tokenizer", [None, CharTokenizer("a\u00e9")])
def test_without_a_tokenizer_that_llama_cpp_has_it_is_left_out_with_a_warning(tokenizer, tmp_path,
                                                                              rng):
    model = model_of(rng, **LLAMA)
    model.tokenizer = tokenizer
    with pytest.warns(UserWarning, match="no tokenizer"):
        found = contents(gguf.write(model, tmp_path / "m.gguf"))
    assert found["tokenizer.ggml.model"] == "none" and "tokenizer.ggml.tokens" not in found


def test_what_llama_cpp_lacks_is_named_and_nothing_is_written(tmp_path, rng):
    for config, says in ((GPT2 | dict(qk_norm=True), "qk_norm=True"),
                         (LLAMA | dict(activation="gelu"), "activation=gelu"),
                         (LLAMA | dict(rope_scaling="linear"), "rope_scaling=linear"),
                         (LLAMA | dict(qk_norm=True, sliding_window=3), "sliding_window=3")):
        with pytest.raises(ValueError, match=says):
            gguf.write(GPT(GPTConfig(**config)), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="'int3' are not written: choose one of none, fp16, int8"):
        gguf.write(GPT(GPTConfig(**LLAMA)), tmp_path / "m.gguf", "int3")
    with pytest.raises(ValueError, match="bigram"):
        gguf.write(Bigram(BigramConfig(vocab_size=3)), tmp_path / "m.gguf")
    with pytest.warns(UserWarning, match="tanh"):
        gguf.write(model_of(rng, **GPT2 | dict(activation="gelu")), tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, rng, monkeypatch):
    (tmp_path / "m.gguf").write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(format.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ValueError, match=r"m\.gguf cannot be written \(No space left"):
        gguf.write(model_of(rng, **LLAMA), tmp_path / "m.gguf")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.gguf", "old")]
