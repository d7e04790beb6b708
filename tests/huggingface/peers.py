"""Tiny random models of transformers, and what they compute."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OWN = dict(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=16)
GPT2 = dict(vocab_size=97, n_positions=110, n_embd=80, n_head=5, n_layer=2)
LLAMA = dict(vocab_size=97, max_position_embeddings=110, hidden_size=96, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=3, intermediate_size=72,
             rms_norm_eps=3e-6, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.5,
              high_freq_factor=5.0, original_max_position_embeddings=24)
MODELS = {
    "gpt2": ("GPT2", GPT2), "gpt2 untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False)),
    "gpt2 inner": ("GPT2", GPT2 | dict(n_inner=56, activation_function="gelu",
                                       layer_norm_epsilon=1e-3)),
    "llama": ("Llama", LLAMA), "llama tied": ("Llama", LLAMA | dict(tie_word_embeddings=True)),
    "llama biased": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "llama linear": ("Llama", LLAMA | dict(head_dim=10, rope_parameters=dict(
        rope_type="linear", rope_theta=500.0, factor=2.5))),
    "llama3": ("Llama", LLAMA | dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=7, head_dim=10)),
    "mistral whole": ("Mistral", LLAMA | dict(sliding_window=None)),
    "qwen2": ("Qwen2", LLAMA | dict(num_attention_heads=3, num_key_value_heads=1)),
    "qwen2 window": ("Qwen2", LLAMA | dict(tie_word_embeddings=True, use_sliding_window=True,
                                           sliding_window=9, max_window_layers=0)),
    "qwen3": ("Qwen3", LLAMA | dict(hidden_size=44, num_attention_heads=5, num_key_value_heads=1,
                                    head_dim=14, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", LLAMA | dict(num_hidden_layers=3, no_rope_layer_interval=2,
                                        tie_word_embeddings=True, pad_token_id=0))}


def theirs(name: str, seed: int = 0):
    """A random model of transformers, with weights large enough for its tokens to differ."""
    kind, settings = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(bos_token_id=0, eos_token_id=None, **settings)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)(config).eval()
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
