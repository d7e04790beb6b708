"""The command that writes text."""

import json

import numpy as np
import pytest

from generate import StopFilter, read_prompt, statistics
from gpt import GPT, GPTConfig
from tinygpt.optim import EMA
from tinygpt.tokenizer import ByteTokenizer, CharTokenizer


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in the folder where the command looks."""
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = ByteTokenizer()
    return model.save_checkpoint(1, None, tmp_path / "checkpoints")


def test_text_on_stdout_statistics_on_stderr_same_seed_same_text(command, saved):
    runs = [command("generate.py", "--prompt", "ROMEO:", "--max-new-tokens", 12, "--seed", s)
            for s in (1, 1, 2)]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr
    assert runs[0].stdout.startswith("ROMEO:") and len(runs[0].stdout) > 7
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout
    assert "decode" in runs[0].stderr and "prefill 6 tokens" in runs[0].stderr


def test_the_moving_average_writes_where_there_is_one(command, saved):
    refused = command("generate.py", "--ema")
    assert refused.returncode == 2 and "has no moving average" in refused.stderr
    model, other = (GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16),
                        seed) for seed in (1, 2))
    model.tokenizer = other.tokenizer = ByteTokenizer()
    both = model.save_checkpoint(2, None, saved.parent, ema=EMA(other.state_dict()))
    alone = other.save_checkpoint(3, None, saved.parent)
    runs = [command("generate.py", "--checkpoint", path, "--max_new_tokens", 12, *flags)
            for path, flags in ((both, ["--ema"]), (alone, []), (both, []))]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout


def test_several_samples_are_one_batch_and_each_stops(command, saved, tmp_path):
    (tmp_path / "prompt.txt").write_text("abc")
    done = command("generate.py", "--prompt", "FILE:prompt.txt", "--num_samples", 3,
                   "--max_new_tokens", 5, "--checkpoint", saved)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- sample") == done.stdout.count("abc") == 3


@pytest.mark.parametrize("flags", [("--quantize", "int8"), ("--quantize", "fp16", "--num_samples",
                                                            "2"), ("--threads", "1")])
def test_quantized_and_on_one_thread_it_writes_and_leaves_the_checkpoint(command, saved, flags):
    before = saved.read_bytes()
    done = command("generate.py", "--prompt", "ab", "--max_new_tokens", 5, *flags)
    assert done.returncode == 0, done.stderr
    assert "ab" in done.stdout and saved.read_bytes() == before


def test_the_prompt_can_come_from_standard_input(command, saved):
    done = command("generate.py", "--prompt", "-", "--max_new_tokens", 0, input="from a pipe")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "from a pipe\n"


@pytest.mark.parametrize(("flags", "says"), [
    (("--prompt", ""), "the prompt is empty"),
    (("--prompt", "FILE:missing.txt"), "missing.txt"),
    (("--checkpoint", "missing.safetensors"), "there is no checkpoint missing.safetensors"),
    (("--top_p", "1.5"), "top_p=1.5"), (("--temperature", "-1"), "temperature=-1"),
    (("--quantize", "int4"), "quantize='int4'"), (("--threads", "0"), "threads=0"),
    (("--num_samples", "0"), "num_samples=0"), (("--stop", ""), "stop is empty"),
    (("--top_q", "1"), "unrecognized arguments")])
def test_a_mistake_gets_one_line_and_status_2(command, saved, flags, says):
    done = command("generate.py", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_characters_that_the_tokenizer_lacks_are_named(command, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = CharTokenizer("abc")
    model.save_checkpoint(1, None, tmp_path / "checkpoints")
    done = command("generate.py", "--prompt", "abcd\u00e9")
    assert done.returncode == 2
    assert "'d'" in done.stderr and "'\\xe9'" in done.stderr


def test_without_a_checkpoint_it_says_what_to_do(command):
    done = command("generate.py")
    assert done.returncode == 2 and "run train.py first" in done.stderr


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_is_found_wherever_pieces_break(seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab"), 40))
    stop = "".join(rng.choice(list("ab"), rng.integers(1, 6)))
    until, out, rest = StopFilter(stop), "", text
    while rest:
        n = int(rng.integers(1, 4))
        out, rest = out + until.push(rest[:n]), rest[n:]
    out += until.finish()
    assert out == text.split(stop)[0]
    assert until.stopped == (stop in text)


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompt(f"FILE:{tmp_path / 'p'}")


def test_statistics_name_prefill_and_median_decode():
    line = statistics(6, [2.0, 0.01, 0.01, 5.0])
    assert "prefill 6 tokens in 2.00 s" in line and "decode 100.0 tokens/s" in line
    assert json.dumps(line)
