"""How the commands begin and end: before their modules are loaded, without a device, a standard
input, memory, or a cache."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from tiny import TINY

import generate
from gpt import GPT
from tinygpt import command as commands
from tinygpt.data.tokenizer import ByteTokenizer

SCRIPTS = {"train": [str(ROOT / "train.py")], "generate": [str(ROOT / "generate.py")],
           "evaluate": ["-m", "tinygpt.evaluate"]}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint in the folder where the commands run."""
    monkeypatch.chdir(tmp_path)
    model = GPT(TINY)
    model.tokenizer = ByteTokenizer()
    return str(model.save_checkpoint(1, None, tmp_path / "checkpoints"))


def python(*words, cwd, env=(), **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=cwd, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env), timeout=120,
                          **options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_modules_are_loaded_ends_the_command_quietly(tmp_path, script):
    for delay in (0.1, 0.25, 0.4):
        process = subprocess.Popen([sys.executable, *SCRIPTS[script]], cwd=tmp_path, text=True,
                                   env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert out == "" and "Traceback" not in err and "ignored" not in err, err
        if not err:  # else it had said already that it finds no checkpoint
            assert process.returncode in (130, -signal.SIGINT), delay  # a shell says 130 of both


def test_ctrl_c_inside_a_destructor_ends_the_command_too(tmp_path):
    """Where Python itself prints a traceback and continues."""
    program = """
import signal, sys, time
from tinygpt import command

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.001)

command.prepare()
try:
    Dying()
    time.sleep(10)
except command.FAILURES as error:
    sys.exit(command.report("it", error, ""))
"""
    done = python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path, saved):
    """As nohup and shells in the background have it."""
    program = ("import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
               "import generate; status = generate.main(['--max_new_tokens', '1']);"
               "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN; sys.exit(status)")
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dev, script, says", [
    ("NONSENSE", "generate", "there is no device DEV=NONSENSE: choose"),
    ("CUDA:99", "evaluate", "device DEV=CUDA:99 cannot be used here"),
    ("CPU:1", "train", "device DEV=CPU:1 cannot be used here"),
    ("NULL", "generate", "device DEV=NULL cannot compute: choose"),
    ("DISK", "train", "device DEV=DISK cannot compute: choose")])
def test_a_device_in_the_environment_that_there_is_not_gets_one_line(saved, tmp_path, dev, script,
                                                                     says):
    (tmp_path / "t.txt").write_text("To sleep: perchance to dream.\n" * 9)
    words = {"generate": [], "evaluate": [saved, "t.txt"], "train": ["--data", "t.txt"]}[script]
    before = sorted(os.listdir(tmp_path))
    done = python(*SCRIPTS[script], *words, cwd=tmp_path, env={"DEV": dev})
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and sorted(os.listdir(tmp_path)) == before
    script = f"import sys; from gpt import GPT, GPTConfig\ntry: GPT(GPTConfig({'n_layer=1'}))\n" \
             "except ValueError as error: sys.exit(str(error))"
    done = python("-c", script, cwd=tmp_path, env={"DEV": dev})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_a_tensor_that_is_made_before_the_model_is_on_its_device(tmp_path):
    """Also where tinygrad would take another device first, as on a machine with OpenCL."""
    program = ("import tinygrad.device as d; d._Device.get_available_devices = lambda self: ("
               "self[name].device for name in ('PYTHON', 'CPU'))\n"
               "from gpt import GPT, GPTConfig\nfrom tinygrad import Tensor\n"
               "x = Tensor([[1, 2]])\n"
               "model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=4))\n"
               "assert x.device == model.wte.weight.device, (x.device, model.wte.weight.device)")
    done = python("-c", program, cwd=tmp_path, env={"DEV": ""})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [["--prompt", "-"], ["-"], ["--interactive"]])
def test_a_standard_input_that_is_closed_gets_one_line(saved, monkeypatch, capsys, flags):
    monkeypatch.setattr("sys.stdin", None)
    assert generate.main(flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "standard input is closed" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("script, words", [
    ("generate", ["--nonsense", "1"]), ("generate", ["--device", "nonsense"]),
    ("generate", ["--max_new_tokens", "1"]), ("evaluate", ["gone.safetensors", "gone.txt"]),
    ("train", ["--device", "nonsense"])])
def test_a_stderr_that_is_full_does_not_change_the_exit_status(saved, tmp_path, script, words):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *SCRIPTS[script], *words], cwd=tmp_path, stderr=full,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_stdout_that_is_full_is_reported_in_the_last_line(saved, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *SCRIPTS["generate"]], cwd=tmp_path, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=120,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    *status, last = done.stderr.splitlines()
    assert done.returncode == 2 and last == "generate.py: No space left on device"
    assert len(status) == 1 and saved.endswith(os.path.basename(status[0].split(",")[0]))


@pytest.mark.parametrize("damage", ["full", "garbage"])
def test_a_cache_of_tinygrad_that_fails_is_disabled(tmp_path, damage):
    cache = tmp_path / "cache.db"
    if damage == "garbage":
        cache.write_text("no database\n" * 100)
    fill = "helpers._db_connection.execute('PRAGMA max_page_count=1')" * (damage == "full")
    program = ("from tinygpt import device; from tinygrad import Tensor, helpers\n"
               "device.prepare()\n" + fill +
               "\nprint([(Tensor([1.0]).contiguous() + n).item() for n in (1, 2)])")
    done = python("-c", program, cwd=ROOT, env={"CACHEDB": str(cache)})
    assert (done.returncode, done.stdout) == (0, "[2.0, 3.0]\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert str(cache) in line and "compiled anew" in line


def test_what_no_machine_has_the_memory_for_is_refused_before_it_is_made(saved, capsys):
    start = time.perf_counter()
    for main, flags, says in ((generate.main, ["--num_samples", "1000000000"], "num_samples="),
                              (generate.main, ["--num_samples", "9", "--max_new_tokens",
                                               str(10 ** 15)], "num_samples=")):
        assert main(flags) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and says in err and " GB" in err
    assert time.perf_counter() - start < 10


def test_errors_of_the_system_are_printed_without_their_numbers():
    error = FileNotFoundError(2, "No such file or directory", "a.txt")
    assert commands.failure(error, "") == (2, "a.txt: No such file or directory")
    assert commands.failure(OSError(5, "Input/output error"), "") == (2, "Input/output error")
    assert commands.failure(KeyboardInterrupt(), "") == (130, "")


@pytest.mark.parametrize("flags", [["--checkpoint", "two\nlines"], ["--threads", "two\nlines"]])
def test_a_line_break_in_a_value_does_not_break_the_line(capsys, flags):
    try:
        status = generate.main(flags)
    except SystemExit as end:
        status = end.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and "two\\nlines" in line
