"""The bigram baseline, against counts of what follows what."""

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

import generate
import train as command_line
from gpt import GPT, GPTConfig
from tinygpt import checkpoint
from tinygpt.model import lora
from tinygpt.model.bigram import Bigram, BigramConfig
from tinygpt.training.config import TrainConfig
from train import main, train

FLAGS = ("--tokenizer", "char", "--block_size", 8, "--batch_size", 4, "--eval_iters", 1,
         "--eval_interval", 2)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tokenizer="byte", out_dir=str(tmp_path / "out"), batch_size=16,
                       max_iters=300, eval_interval=300, eval_iters=4, warmup_iters=0,
                       learning_rate=0.2, weight_decay=0.0, model="bigram")


def test_trained_it_is_the_table_of_counts(config, rng, without_samples):
    """Of a chain over four tokens: its rows become the shares of what follows."""
    chain = rng.dirichlet([1, 1, 1, 1], 4)
    ids = [0]
    for _ in range(20_000):
        ids.append(int(rng.choice(4, p=chain[ids[-1]])))
    model = Bigram(BigramConfig(block_size=16, vocab_size=4))
    logits, loss = model(Tensor([[0, 1]], dtype="int32"), Tensor([[1, 2]], dtype="int32"))
    assert logits.shape == (1, 2, 4) and loss.item() == pytest.approx(np.log(4))
    train(model, config, np.array(ids))
    counts = np.zeros((4, 4))
    np.add.at(counts, (ids[:18_000], ids[1:18_001]), 1)
    shares = counts / counts.sum(1, keepdims=True)
    assert np.allclose(model.table.softmax(-1).numpy(), shares, atol=0.05)
    drawn = model.generate(np.zeros((1, 1), int), 400, temperature=1.0, seed=1).numpy()[0]
    follow = np.zeros((4, 4))
    np.add.at(follow, (drawn[:-1], drawn[1:]), 1)
    assert np.abs(follow / 400 - shares * follow.sum(1, keepdims=True) / 400).max() < 0.1


def test_a_resumed_run_is_the_uninterrupted_one(config, text, tmp_path, without_samples):
    config = replace(config, max_iters=4, eval_interval=2, lr_decay_iters=4, ema=True)
    shape = BigramConfig(block_size=8, vocab_size=256)
    whole = train(Bigram(shape), config, text)
    parts = replace(config, out_dir=str(tmp_path / "parts"))
    train(Bigram(shape), replace(parts, max_iters=2), text)
    rest = train(Bigram(shape), replace(parts, resume=True), text)
    ends = [checkpoint.load(result.last)[0] for result in (whole, rest)]
    assert all(np.array_equal(array, ends[1][name]) for name, array in ends[0].items())
    again = Bigram.from_checkpoint(rest.last, ema=False)
    assert np.array_equal(again.table.numpy(), ends[0]["model.table"])
    assert np.array_equal(Bigram.from_checkpoint(rest.last).table.numpy(),
                          ends[0]["ema.table"])


def test_the_commands_train_resume_and_write(in_process, text_file, tmp_path):
    done = in_process(command_line, "--data", text_file, "--model", "bigram", "--max_iters", 2,
                      *FLAGS)
    assert done.returncode == 0 and "sample 2:" in done.stdout, done.stderr
    more = in_process(command_line, "--resume", "--max_iters", 4)
    assert more.returncode == 0 and "step 4: train loss" in more.stdout, more.stderr
    written = in_process(generate, "--prompt", "RO", "--max_new_tokens", 5)
    assert written.returncode == 0 and len(written.stdout) == 8, written.stderr
    refused = in_process(command_line, "--resume", "--model", "gpt")
    assert refused.returncode == 2
    assert "has model=bigram, but model=gpt was asked for" in refused.stderr
    small = in_process(generate, "--quantize", "int8")
    assert small.returncode == 2 and "bigram model is not quantized" in small.stderr


def test_checkpoints_are_told_apart(tmp_path):
    table = Bigram(BigramConfig(block_size=8, vocab_size=5)).save_checkpoint(1, None, tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="a bigram model, not a gpt"):
        GPT.from_checkpoint(table)
    shape = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
    with pytest.raises(checkpoint.CheckpointError, match="a bigram model, not a gpt"):
        GPT(shape).load_checkpoint(table)
    model = GPT(shape).save_checkpoint(2, None, tmp_path)
    for load in (Bigram.from_checkpoint, Bigram(BigramConfig(vocab_size=5)).load_checkpoint):
        with pytest.raises(checkpoint.CheckpointError, match="a gpt model, not a bigram"):
            load(model)


@pytest.mark.parametrize("flag, value", [("grad_checkpoint", True), ("lora_rank", 2),
                                         ("init_from", "gpt2")])
def test_flags_of_blocks_and_of_pretrained_models_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"leave out --{flag}"):
        TrainConfig(model="bigram", **{flag: value})


def test_what_only_a_gpt_can_do_is_refused_in_one_line(tmp_path, capsys):
    table = Bigram(BigramConfig(block_size=8, vocab_size=5)).save_checkpoint(1, None, tmp_path)
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    lora.attach(model, 1, 1.0, "h.*", 0)
    adapters = lora.save(model, model.state_dict(), {"model_config": {}}, tmp_path)
    new = str(tmp_path / "new")
    for command, flags, says in (
            (generate.main, ["--checkpoint", str(table), "--export", new], "leave out --export"),
            (generate.main, ["--checkpoint", str(table), "--lora", str(adapters)], "does not fit"),
            (main, ["--init_from", str(table), "--out_dir", new], "a bigram model, not a gpt")):
        assert command(flags) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and says in err
    assert not (tmp_path / "new").exists()
