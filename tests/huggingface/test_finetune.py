"""The commands with a pretrained model: sampling, export, fine-tuning, evaluation."""

import json
import os
import shutil

import numpy as np
import pytest

import generate
import train
from gpt import GPT, GPTConfig
from tinygpt import evaluate
from tinygpt.data.tokenizer import BPETokenizer
from tinygpt.huggingface import pretrained


@pytest.fixture
def folder(tmp_path, text):
    """A tiny pretrained GPT-2 with a tokenizer."""
    model = GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = BPETokenizer.train(text, 300)
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_generate_writes_with_a_folder_and_exports_it(in_process, folder, tmp_path):
    done = in_process(generate, "--checkpoint", folder, "--prompt", "ROMEO:",
                      "--max_new_tokens", 4, "--temperature", 0)
    assert done.returncode == 0 and done.stdout.startswith("ROMEO:"), done.stderr
    done = in_process(generate, "--checkpoint", folder, "--export", "again")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors").read_bytes()


FINETUNE = ("--batch_size", 2, "--gradient_accumulation_steps", 2, "--eval_iters", 2,
            "--learning_rate", 1e-2, "--block_size", 8)


def test_a_fine_tune_lowers_the_loss_and_resumes_without_the_model(
        command, in_process, folder, text_file, tmp_path, without_samples):
    flags = ("--init_from", folder, "--data", text_file, *FINETUNE)
    done = in_process(train, *flags, "--max_iters", 20, "--out_dir", "whole")
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    val = [r["val_loss"] for r in map(json.loads, metrics) if "val_loss" in r]
    assert len(val) == 5 and val[-1] < val[0] - 0.3  # the preset evaluates every 5 steps
    done = in_process(train, *flags, "--max_iters", 15, "--out_dir", "part")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder)
    done = command("train.py", "--resume", "--out_dir", "part", "--max_iters", 20)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "part" / "ckpt_20.safetensors").read_bytes()[-4000:] == (
        tmp_path / "whole" / "ckpt_20.safetensors").read_bytes()[-4000:]
    evaluated = in_process(train, "--eval_only", "--out_dir", "part")
    assert evaluated.returncode == 0 and evaluated.stdout in done.stdout, evaluated.stderr
    done = in_process(generate, "--checkpoint", "part/best.safetensors", "--export", "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("flags", "says"), [
    (("--n_layer", 4), "n_layer=1, but n_layer=4 was asked for"),
    (("--block_size", 32), "block_size=16, but block_size=32 was asked for"),
    (("--preset", "shakespeare"), "block_size=16, but block_size=64 was asked for"),
    (("--init_from", "gpt5"), "there is no pretrained model gpt5"),
    (("--init_from", "gpt2", "--offline"), "--offline")], ids=str)
def test_a_fine_tune_that_cannot_be_gets_one_line_and_status_2(
        in_process, folder, flags, says, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = in_process(train, "--init_from", folder, "--data", text_file, *flags)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "checkpoints").exists()


def test_a_damaged_tokenizer_json_is_an_error_if_a_tokenizer_is_needed(folder, text_file,
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
def test_a_damaged_checkpoint_next_to_a_config_json_is_named(in_process, tmp_path, left):
    path = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=16)
               ).save_checkpoint(1, None, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    os.truncate(path, left)
    done = in_process(generate, "--checkpoint", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(path) in done.stderr and "not a complete safetensors file" in done.stderr
