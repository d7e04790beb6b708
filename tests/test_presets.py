"""Presets, word for word as nanoGPT has them, and which of two settings wins."""

import itertools
import json
from dataclasses import asdict

import pytest
from commands import settings

from gpt import GPTConfig
from tinygpt.training.config import PRESETS, TrainConfig

CHAR = dict(  # config/train_shakespeare_char.py, and the defaults of train.py
    eval_interval=250, eval_iters=200, log_interval=10, gradient_accumulation_steps=1,
    batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
    learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta1=0.9, beta2=0.99,
    warmup_iters=100, weight_decay=1e-1, grad_clip=1.0, schedule="cosine", bias=False)
CHAR_CPU = CHAR | dict(  # the flags that nanoGPT's README adds for a CPU
    eval_iters=20, log_interval=1, block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128,
    max_iters=2000, lr_decay_iters=2000, dropout=0.0)
GPT2 = dict(  # config/train_gpt2.py, and the defaults of train.py
    batch_size=12, block_size=1024, gradient_accumulation_steps=5 * 8, max_iters=600000,
    lr_decay_iters=600000, eval_interval=1000, eval_iters=200, log_interval=10, weight_decay=1e-1,
    n_layer=12, n_head=12, n_embd=768, dropout=0.0, learning_rate=6e-4, beta1=0.9, beta2=0.95,
    grad_clip=1.0, schedule="cosine", warmup_iters=2000, min_lr=6e-5)
FINETUNE = dict(  # config/finetune_shakespeare.py, and train.py's defaults; a constant rate
    eval_interval=5, eval_iters=40, log_interval=1, batch_size=1, gradient_accumulation_steps=32,
    max_iters=20, learning_rate=3e-5, schedule="constant", warmup_iters=0, weight_decay=1e-1,
    beta1=0.9, beta2=0.95, grad_clip=1.0, dropout=0.0)
# what nanoGPT's model.py has no choice in
MODEL = dict(norm="layernorm", norm_eps=1e-5, position="learned", qk_norm=False,
             sliding_window=None, parallel=False, tie_weights=True, n_kv_head=None, n_inner=None)


@pytest.mark.parametrize("preset, published", [
    ("shakespeare_char", CHAR | MODEL | dict(tokenizer="char", activation="gelu")),
    ("shakespeare_char_cpu", CHAR_CPU | MODEL | dict(tokenizer="char", activation="gelu")),
    ("gpt2", GPT2 | MODEL | dict(tokenizer="gpt2", vocab_size=50257)),
    ("finetune_shakespeare", FINETUNE | dict(init_from="gpt2", tokenizer="gpt2")),
])
def test_a_preset_has_nanogpts_numbers(preset, published):
    found = settings("--preset", preset)
    assert {k: found[k] for k in published} == published


def test_the_default_run_is_the_first_preset():
    assert next(iter(PRESETS)) == "shakespeare"
    assert settings() == settings("--preset=shakespeare")
    assert settings()["data"] == "shakespeare" and settings()["tokenizer"] == "bpe"


def test_another_preset_has_nothing_of_the_default_one():
    for name, flags in PRESETS.items():
        defaults = {**asdict(GPTConfig()), **asdict(TrainConfig())}
        assert settings("--preset", name) == defaults | flags


# ---- which of two settings wins

@pytest.mark.parametrize("order", [*itertools.permutations(("preset", "config", "flag"))])
def test_the_later_one_wins_in_every_order(tmp_path, order):
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"n_layer": 3, "batch_size": 5}))
    words = {"preset": ["--preset", "shakespeare_char"], "config": ["--config", str(file)],
             "flag": ["--n-layer", "9"]}
    value = {"preset": 6, "config": 3, "flag": 9}
    found = settings(*(word for what in order for word in words[what]))
    assert found["n_layer"] == value[order[-1]]
    assert found["batch_size"] == (5 if order.index("config") > order.index("preset") else 64)
    assert found["n_embd"] == 384  # which only the preset says


def test_of_two_of_a_kind_the_later_one_wins(tmp_path):
    for n in (1, 2):
        (tmp_path / f"{n}.json").write_text(json.dumps({"keep": n}))
    assert settings("--keep=3", "--keep=4")["keep"] == 4
    assert settings(f"--config={tmp_path}/1.json", f"--config={tmp_path}/2.json")["keep"] == 2
    found = settings("--preset=gpt2", "--preset=shakespeare_char_cpu")
    assert found["n_layer"] == 4 and found["batch_size"] == 12
