"""The README's own commands and its script, run as they stand, only smaller."""

import re
import shlex

import pytest
from conftest import ROOT

import generate
import train
from gpt import GPTConfig
from tinygpt.config import SampleConfig
from tinygpt.flags import parse_flags
from tinygpt.kernels.training import training
from tinygpt.training.config import PRESETS, TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
LINES = [line for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
COMMANDS = [words for line in LINES for part in line.split("&&")
            if (words := shlex.split(part))[0] == "python" and words[1] != "-m"]
SMALLER = ("--max_iters", "4", "--eval_interval", "2", "--eval_iters", "1", "--n_layer", "1",
           "--n_embd", "32", "--block_size", "16", "--batch_size", "2", "--vocab_size", "300")


def test_the_set_up_commands_name_files_that_exist():
    assert sum("pip install -r" in line for line in LINES) == 2
    for name in re.findall(r"-r (\S+)", "\n".join(LINES)):
        assert (ROOT / name).is_file()
    test_command = next(line for line in LINES if "pytest" in line).split("&& ")[-1]
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_the_files_are_those_that_there_are():
    tree = next(code for kind, code in re.findall(r"```(\w*)\n(.*?)```", README, re.S)
                if code.startswith("gpt.py "))
    named = re.findall(r"^  (\w+\.py) ", tree, re.M)
    assert sorted(named) == sorted(p.name for p in (ROOT / "tinygpt").glob("[!_]*.py"))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_understood(words):
    if words[1] == "train.py":
        parse_flags({"model": GPTConfig, "train": TrainConfig}, words[2:], "", PRESETS)
        assert callable(train.main)
    else:
        parse_flags({"what": generate.GenerateConfig, "sample": SampleConfig}, words[2:], "")


def test_training_and_writing_run_as_written(command):
    script, *flags = next(words for words in COMMANDS if words[1] == "train.py")[1:]
    done = command(script, *flags, *SMALLER)
    assert done.returncode == 0, done.stderr
    script, *flags = next(words for words in COMMANDS if words[1] == "generate.py")[1:]
    done = command(script, *flags, "--max_new_tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:")


def test_the_script_runs_as_written(tmp_path, text_file, monkeypatch, gpt2_files, capsys):
    code = next(code for kind, code in BLOCKS if kind == "python")
    for old, new in (("max_iters=2000, eval_interval=100", "max_iters=2, eval_interval=2, "
                      "eval_iters=1"), ("mytext.txt", str(text_file)), ("=100)", "=5)")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "ROMEO:" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "best.safetensors").is_file()


def test_the_training_loop_runs_as_written(text_file, capsys):
    code = [code for kind, code in BLOCKS if kind == "python"][1]
    for old, new in (("range(100)", "range(3)"), ("mytext.txt", str(text_file)),
                     ("with Tensor.train()", "with training()")):
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), {"training": training})
    losses = [2 * float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6 and sum(losses[4:]) < sum(losses[:2])
