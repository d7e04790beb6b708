"""Low-rank adapters and frozen weights: what changes, what is saved, and what it equals."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from tinygrad import Tensor

import generate
import train as command_line
from gpt import GPT, GPTConfig
from tinygpt import checkpoint
from tinygpt.data.tokenizer import ByteTokenizer, CharTokenizer
from tinygpt.model import lora
from tinygpt.training.config import TrainConfig
from train import train

pytestmark = pytest.mark.usefixtures("without_samples")

TINY = GPTConfig(block_size=8, vocab_size=256, n_layer=2, n_head=2, n_embd=16)
IDS = np.arange(16, dtype=np.int32).reshape(2, 8)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "out"), batch_size=4, max_iters=4,
                       eval_interval=2, eval_iters=1, log_interval=1, warmup_iters=0,
                       lr_decay_iters=4, learning_rate=3e-2)


def weights(model) -> dict[str, np.ndarray]:
    return {k: w.numpy() for k, w in model.state_dict().items()}


def logits(model) -> np.ndarray:
    return model(Tensor(IDS)).numpy()


def with_adapters(targets="h.*.attn.c_attn,h.1.mlp.*", seed=5) -> GPT:
    model = GPT(TINY)
    lora.attach(model, 3, 6.0, targets, seed)
    rng = np.random.default_rng(seed)
    for adapter in lora.adapters(model):
        adapter.b.assign(Tensor(rng.normal(0, 0.3, adapter.b.shape).astype(np.float32))).realize()
    return model


def test_a_new_adapter_changes_nothing_and_a_merged_one_stays_the_same_model():
    plain = GPT(TINY)
    fresh = GPT(TINY)
    lora.attach(fresh, 3, 6.0, "h.*", 5)
    assert len(lora.adapters(fresh)) == 8  # four linear layers a block
    assert np.array_equal(logits(fresh), logits(plain))
    model = with_adapters()
    assert len(lora.adapters(model)) == 4
    before = logits(model)
    assert np.abs(before - logits(plain)).max() > 0.01
    w, adapter = plain.h[0].attn.c_attn.weight.numpy(), model.h[0].attn.c_attn.lora
    text = model.generate(IDS[:, :3], 4, temperature=0).numpy()
    expected = w + 6.0 / 3 * adapter.b.numpy() @ adapter.a.numpy()
    lora.merge(model)
    assert set(weights(model)) == set(weights(plain)) and lora.adapters(model) == ()
    np.testing.assert_allclose(model.h[0].attn.c_attn.weight.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(logits(model), before, atol=1e-5)
    assert np.array_equal(model.generate(IDS[:, :3], 4, temperature=0).numpy(), text)


def test_a_run_with_lora_trains_adapters_only_and_resumes_bit_for_bit(config, text, tmp_path):
    config = replace(config, lora_rank=2, ema=True)
    start = weights(GPT(TINY))
    model = GPT(TINY)
    result = train(model, config, text)
    after = weights(model)
    changed = {k for k in after if k not in start or not np.array_equal(after[k], start[k])}
    assert changed == {f"h.{i}.attn.c_attn.lora.{x}" for i in range(2) for x in "ab"}

    parts = replace(config, out_dir=str(tmp_path / "parts"))
    train(GPT(TINY), replace(parts, max_iters=2), text)
    rest = GPT(TINY, seed=99)
    train(rest, replace(parts, resume=True), text)
    for name, w in weights(rest).items():
        assert np.array_equal(w, after[name]), name

    tensors, _ = checkpoint.load(result.last)
    assert {k for k in tensors if k.startswith("optimizer.m.")} == {f"optimizer.m.{k}"
                                                                    for k in changed}
    merged = GPT.from_checkpoint(result.last, ema=False)
    assert set(weights(merged)) == set(start)
    np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5)
    averaged = GPT.from_checkpoint(result.last)
    assert not np.array_equal(logits(averaged), logits(merged))

    best = GPT.from_checkpoint(result.best)
    alone = tmp_path / "out" / "lora.safetensors"
    assert alone.stat().st_size < result.best.stat().st_size / 3
    base = GPT(TINY)
    lora.load(base, alone)
    np.testing.assert_allclose(logits(base), logits(best), atol=1e-5)


def test_frozen_weights_stay(config, text):
    start = weights(GPT(TINY))
    model = GPT(TINY)
    train(model, replace(config, freeze="wte*, wpe*,h.0.*"), text)
    after = weights(model)
    changed = {k for k in after if not np.array_equal(after[k], start[k])}
    assert changed == {k for k in start if k.startswith(("h.1.", "ln_f"))}


@pytest.mark.parametrize(("settings", "says"), [
    (dict(freeze="wte*,nothing*"), r"freeze=.*nothing\*.*wte.weight"),
    (dict(freeze="*"), "leaves nothing to train"),
    (dict(lora_rank=2, lora_targets="wte"), r"lora_targets='wte'.*h.0.attn.c_attn"),
    (dict(lora_rank=2, freeze="*.lora.*"), "leaves nothing to train")], ids=str)
def test_patterns_that_cannot_be_meant_are_refused(config, text, settings, says, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        train(GPT(TINY), replace(config, **settings), text)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--freeze", "h.9.*"], ["--freeze", "*"],
                                   ["--lora_rank", "2", "--lora_targets", "wte*"]])
def test_patterns_are_refused_before_text_is_tokenized(text_file, flags, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "load_data", lambda *_: pytest.fail("text was tokenized"))
    assert command_line.main(["--data", str(text_file), "--n_layer", "1", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flags[-1] in line


def test_adapters_of_another_model_and_files_without_any_are_refused(tmp_path):
    model = with_adapters()
    path = lora.save(model, model.state_dict(), {"model_config": {}}, tmp_path)
    other = GPT(replace(TINY, n_embd=32))
    before = logits(other)
    with pytest.raises(ValueError, match="does not fit the model"):
        lora.load(other, path)
    assert np.array_equal(logits(other), before)
    plain = GPT(TINY).save_checkpoint(1, None, tmp_path)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        lora.load(GPT(TINY), plain)


def test_adapters_are_tied_to_the_tokenizer_and_the_configuration(tmp_path):
    """Of models of the same shapes; dropout and a cropped context make no other model."""
    def with_tokenizer(tokenizer, **changes) -> GPT:
        model = GPT(replace(TINY, **changes))
        model.tokenizer = tokenizer
        return model

    trained = with_adapters()
    trained.tokenizer = ByteTokenizer()
    path = lora.save(trained, trained.state_dict(), {"model_config": asdict(TINY)}, tmp_path)
    other = CharTokenizer("".join(map(chr, range(32, 288))))
    refusals = ((with_tokenizer(other), "'byte' of 256 ids .*, but the model has 'char' of 256"),
                (with_tokenizer(ByteTokenizer(), activation="gelu_tanh"),
                 "activation='gelu', but this one has activation=gelu_tanh"))
    for model, says in refusals:
        before = logits(model)
        with pytest.raises(ValueError, match=says) as caught:
            lora.load(model, path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert np.array_equal(logits(model), before)
    good = with_tokenizer(ByteTokenizer(), dropout=0.1)
    lora.load(good, path)
    np.testing.assert_allclose(logits(good), logits(trained), atol=1e-5)
    lora.load(GPT(TINY), path)  # whose tokenizer is not known


def test_a_resumed_run_keeps_its_adapters_settings(config, text):
    config = replace(config, lora_rank=2, lora_alpha=8.0)
    train(GPT(TINY), replace(config, max_iters=2), text)
    for changes, says in ((dict(lora_alpha=3.0), "lora_alpha=8.0, but lora_alpha=3.0"),
                          (dict(lora_rank=3), "lora_rank=2, but lora_rank=3"),
                          (dict(lora_rank=0), "lora_rank=2, but lora_rank=0"),
                          (dict(lora_targets="h.*.mlp.c_fc"), "but lora_targets=h.*.mlp.c_fc"),
                          (dict(freeze="h.0.*"), "freeze=None, but freeze=h.0.* was asked for")):
        with pytest.raises(ValueError) as caught:
            train(GPT(TINY), replace(config, resume=True, **changes), text)
        message = str(caught.value)
        assert says in message and "ckpt_2.safetensors" in message and "\n" not in message
        assert "use the same" in message


def test_a_script_that_loads_adapters_of_another_alpha_or_rank_is_told(tmp_path):
    path = with_adapters().save_checkpoint(1, None, tmp_path)
    for rank, alpha, says in ((3, 5.0, "lora_alpha=6.0, but lora_alpha=5.0"),
                              (2, 6.0, "lora_rank=3, but lora_rank=2")):
        model = GPT(TINY)
        lora.attach(model, rank, alpha, "h.*.attn.c_attn,h.1.mlp.*", 0)
        with pytest.raises(ValueError, match=says):
            model.load_checkpoint(path)
    with pytest.raises(ValueError, match="lora_rank=3, but lora_rank=0"):
        GPT(TINY).load_checkpoint(path)


def test_export_and_quantize_merge_first(tmp_path):
    model = with_adapters()
    before = logits(model)
    twin = GPT.from_pretrained(model.save_pretrained(tmp_path / "x"))
    np.testing.assert_allclose(logits(twin), before, atol=1e-5)
    np.testing.assert_allclose(logits(with_adapters().quantize("fp16")), before, atol=1e-2)


def test_generate_takes_adapters_on_top(in_process, tmp_path):
    model = with_adapters()
    lora.save(model, model.state_dict(), {"model_config": {}}, tmp_path)
    base = GPT(TINY).save_checkpoint(1, None, tmp_path)
    done = in_process(generate, "--checkpoint", base, "--lora", "lora.safetensors", "--export",
                      "x")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(logits(GPT.from_pretrained(tmp_path / "x")), logits(model),
                               atol=1e-5)
