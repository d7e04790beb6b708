"""The command that writes text."""

import io
import json
import os
import pty
import select
import signal
import sys

import pytest
from conftest import ROOT

import generate
from generate import converse, read_prompt, statistics
from gpt import GPT, GPTConfig, SampleConfig
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from tinygpt.inference.stop import pieces_of
from tinygpt.training.optim import EMA


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


def test_the_moving_average_writes_where_there_is_one(in_process, saved):
    model, other = (GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16),
                        seed) for seed in (1, 2))
    model.tokenizer = other.tokenizer = ByteTokenizer()
    both = model.save_checkpoint(2, None, saved.parent, ema=EMA(other.state_dict()))
    alone = other.save_checkpoint(3, None, saved.parent)
    runs = [in_process(generate, "--checkpoint", path, "--max_new_tokens", 12, *flags)
            for path, flags in ((both, []), (alone, []), (both, ["--no_ema"]))]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout


def test_several_samples_are_one_batch_and_each_stops(in_process, saved, tmp_path):
    (tmp_path / "prompt.txt").write_text("abc")
    done = in_process(generate, "--prompt", "FILE:prompt.txt", "--num_samples", 3,
                   "--max_new_tokens", 5, "--checkpoint", saved)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- sample") == done.stdout.count("abc") == 3


def test_quantized_and_on_one_thread_it_writes_and_leaves_the_checkpoint(command, in_process,
                                                                         saved):
    before, words = saved.read_bytes(), ("--prompt", "ab", "--max_new_tokens", 5)
    for done in (in_process(generate, *words, "--quantize", "int8"),
                 in_process(generate, *words, "--quantize", "fp16", "--num_samples", 2),
                 command("generate.py", *words, "--threads", 1)):  # of a whole process
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
    (("--quantize", "int3"), "quantize='int3'"), (("--threads", "0"), "threads=0"),
    (("--num_samples", "0"), "num_samples=0"), (("--stop", ""), "stop='' is empty"),
    (("--interactive", "--json"), "leave out --num_samples, --json"),
    (("--top_q", "1"), "no flag --top_q; did you mean --top_p?")])
def test_a_mistake_gets_one_line_and_status_2(in_process, saved, flags, says):
    done = in_process(generate, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_characters_that_the_tokenizer_lacks_are_named(in_process, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = CharTokenizer("abc")
    model.save_checkpoint(1, None, tmp_path / "checkpoints")
    done = in_process(generate, "--prompt", "abcd\u00e9")
    assert done.returncode == 2
    assert "lacks 'd' (U+0064), '\u00e9' (U+00E9)\n" in done.stderr


def test_only_ids_that_the_tokenizer_has_are_drawn(in_process, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = CharTokenizer("abc")  # which lacks the line break that is the prompt, too
    for penalty in (1.0, 1.2):
        ids = model.generate([[0, 40]], 60, repetition_penalty=penalty).numpy()[0]
        assert ids[1] == 40 and ids[2:].max() < 3
    model.save_checkpoint(1, None, tmp_path / "checkpoints")
    done = in_process(generate, "--max_new_tokens", 20)
    assert done.returncode == 0 and set(done.stdout) <= set("abc\n"), done.stderr
    assert len(done.stdout) == 22


def test_without_a_checkpoint_the_message_names_what_to_do(in_process):
    done = in_process(generate)
    assert done.returncode == 2 and "run train.py first" in done.stderr


def test_samples_as_json_lines_and_in_files(in_process, saved, tmp_path):
    flags = ("--prompt", "a", "--num_samples", 2, "--max_new_tokens", 12, "--seed", 3)
    plain = in_process(generate, *flags)
    done = in_process(generate, *flags, "--json", "--out-dir", "some/where")
    assert done.returncode == 0, done.stderr
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    texts = [f"a{o['text']}" for o in objects]
    assert plain.stdout == "".join(f"--- sample {n} of 2 ---\n{t}\n" for n, t in
                                   enumerate(texts, 1))
    for number, sample in enumerate(objects, 1):
        seconds = sample.pop("seconds")
        assert 0 < seconds < 300 and sample.pop("text")
        assert sample == {"sample": number, "prompt": "a", "tokens": 12, "seed": 3}
        file = tmp_path / "some" / "where" / f"sample_{number}.txt"
        assert file.read_bytes().decode() == texts[number - 1] + "\n"
    assert plain.stdout.count("\ufffd") == "".join(texts).count("\ufffd")
    again = in_process(generate, *flags, "--out-dir", "some/where")
    assert again.returncode == 0 and "sample_4.txt" in again.stderr
    assert len(list((tmp_path / "some" / "where").iterdir())) == 4
    stopped = in_process(generate, *flags, "--json", "--stop", texts[0][2:4])
    first = json.loads(stopped.stdout.splitlines()[0])
    assert first["text"] == texts[0][1:2] and first["tokens"] <= 4
    (tmp_path / "taken").write_text("a file")
    refused = in_process(generate, *flags, "--out_dir", "taken")
    assert refused.returncode == 2 and "taken" in refused.stderr.splitlines()[-1]


def test_interactive_continues_what_is_typed_and_keeps_the_window(saved, monkeypatch, capsys):
    model = GPT.from_checkpoint(saved)
    asked = []

    def stream(rows, config, **_):
        asked.append((bytes(rows[0]).decode(), config.seed))
        yield from b"xyz"

    monkeypatch.setattr(model, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n\nc"))
    converse(model, [10], SampleConfig(seed=5), ())
    assert asked == [("\nab", 5), ("\nabxyz", 6), ("\nabxyzxyz"[-8:] + "\nc", 7)]
    assert capsys.readouterr().out == "xyz\n" * 3


def test_interactive_prints_what_it_cannot_read_and_continues(monkeypatch, capsys):
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = CharTokenizer("abc")  # which has no line break either
    monkeypatch.setattr(model, "stream", lambda rows, config, **_: iter(rows[0][-1:]))
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nxx\nc\n"))
    converse(model, [0], SampleConfig(), ())
    out, err = capsys.readouterr()
    assert out == "b\nc\n" and "lacks 'x'" in err


def test_interactive_ends_with_its_input_and_several_stops_are_taken(command, saved):
    done = command("generate.py", "--interactive", "--prompt", "So", "--max_new_tokens", 40,
                   "--stop", "\n\n", "--stop", "e", input="a\n")
    assert done.returncode == 0 and done.stdout.startswith("So"), done.stderr
    assert "e" not in done.stdout and "Ctrl-D" in done.stderr


def test_ctrl_c_ends_the_text_and_not_the_command(saved, monkeypatch, capsys):
    """The first one while a text is written; what is there by then stays part of it."""
    model, asked = GPT.from_checkpoint(saved), []

    def stream(rows, config, **_):
        asked.append(bytes(rows[0]).decode())
        yield ord("x")
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield from b"yz"

    monkeypatch.setattr(model, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    converse(model, [10], SampleConfig(), ())
    assert asked == ["\na", "\naxy\nb"] and capsys.readouterr().out == "xy\nxyz\n"


def test_a_terminal_gets_a_prompt_sign_line_editing_and_a_history(saved):
    """And Ctrl-D at the sign ends the command."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(saved.parent.parent)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, str(ROOT / "generate.py"), "--interactive",
                                  "--max_new_tokens", "1", "--prompt", "So"])

    def until(text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            assert select.select([terminal], [], [], 60)[0], seen
            seen += os.read(terminal, 4096)
        return seen

    until(b"> ")
    os.write(terminal, b"first words\n")
    until(b"first words\r\n")
    until(b"> ")
    os.write(terminal, b"\x1b[A")  # the arrow up
    until(b"first words")
    os.write(terminal, b"\n")
    until(b"> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompt(f"FILE:{tmp_path / 'p'}")


def test_statistics_name_prefill_and_decode():
    line = statistics(6, [2.0, 5.0, 0.04, 0.0, 0.0])
    assert "prefill 6 tokens in 2.00 s" in line and "decode 75.0 tokens/s" in line
    assert "tokens/s" not in statistics(6, [2.0, 5.0]).partition("included")[2]
    assert json.dumps(line)


def test_generation_ends_at_end_of_text_which_is_not_printed():
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=4))
    model.tokenizer = BPETokenizer.train("some text", 257)
    ids = [*model.tokenizer.encode("na\u00efve"), model.tokenizer.end_of_text, *b"more"]
    assert "".join(pieces_of(model.tokenizer, iter(ids), [])) == "na\u00efve"
    held_back = pieces_of(model.tokenizer, iter(ids), ["ve "])
    assert "".join(held_back) == "na\u00efve"
