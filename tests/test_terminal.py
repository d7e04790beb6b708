"""A conversation on a terminal, and over lines from elsewhere."""

import io
import json
import os
import pty
import re
import select
import signal
import sys

import pytest
from conftest import ROOT

import generate
from gpt import GPT, GPTConfig, SampleConfig
from tinygpt import terminal
from tinygpt.data.chat import ChatTemplate, check_messages
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.inference.chat import Conversation


class Echo:
    """A model that answers with what it was asked last; after "now" there is a Ctrl-C."""

    def __init__(self, block_size: int = 128):
        self.tokenizer = ByteTokenizer()
        self.config = GPTConfig(block_size=block_size, vocab_size=256)

    def stream(self, rows, config, reuse_cache):
        said = bytes(rows[0]).decode().split("\n")[-3]
        for i, byte in enumerate(f"{said}\n".encode()[:config.max_new_tokens]):
            if said[:i].endswith("now"):
                os.kill(os.getpid(), signal.SIGINT)
            yield byte


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """What the lines of a script make talk print on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, system: str | None = None, stdin=io.StringIO, **config
            ) -> tuple[str, str]:
        model = Echo(**config)
        monkeypatch.setattr("sys.stdin", stdin("".join(f"{line}\n" for line in lines)))
        terminal.talk(Conversation(model, ChatTemplate(model.tokenizer),
                                   SampleConfig(max_new_tokens=50), system))
        return capsys.readouterr()

    return run


def test_lines_in_answers_out_and_nothing_else_on_stdout(talk):
    out, err = talk("hello", "", "  good bye ")
    assert out == "hello\ngood bye\n" and err == ""


def test_commands(talk, tmp_path):
    out, err = talk("/save a.jsonl", "one", "/save a.jsonl", "/reset", "/help", "two",
                    "/save b.jsonl", "/save", "/savee", "/reset now", system="Short.")
    assert out == "one\ntwo\n"
    assert [line for line in err.splitlines() if line not in terminal.HELP] == [
        "nothing was said yet: there is nothing to save", "saved in a.jsonl",
        "a new conversation begins", "saved in b.jsonl",
        "/save needs the name of a new file: /save chat.jsonl",
        "there is no command /savee: /help lists them",
        "/reset takes nothing after it: leave it out"]
    assert terminal.HELP in err
    for name, said in (("a.jsonl", "one"), ("b.jsonl", "two")):
        line, = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        messages = json.loads(line)["messages"]
        check_messages(messages)
        assert [m["content"] for m in messages] == ["Short.", said, said]


def test_a_file_that_exists_or_cannot_be_written_is_refused_and_the_program_goes_on(talk, tmp_path):
    (tmp_path / "old.jsonl").write_text("precious")
    out, err = talk("one", "/save old.jsonl", "/save no/folder.jsonl", "/save /", "two")
    assert out == "one\ntwo\n" and (tmp_path / "old.jsonl").read_text() == "precious"
    assert [line.split()[0] for line in err.splitlines()] == ["old.jsonl", "no/folder.jsonl", "/"]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_notice_comes_once_for_each_forgetting(talk):
    texts = ["a" * 40, "b", "c", "d", "e" * 30, "f" * 150, "g", "h" * 49]
    out, err = talk(*texts, block_size=160)
    assert out.split() == [text for text in texts if "f" not in text]
    assert err.splitlines() == [
        "the context is full: the oldest turn is forgotten",
        "the message is too long: with the system message it has 168 tokens, the context 160; "
        "shorten it",
        "the context is full: the oldest turn is forgotten",
        "the context is full: the 3 oldest turns are forgotten"]


def test_an_answer_that_is_cut_off_has_a_notice(talk):
    out, err = talk("a" * 60)
    assert out == "a" * 50 + "\n" and err == "the answer is cut off at its maximum length\n"


def test_ctrl_c_stops_an_answer_which_stays_as_far_as_it_was_printed(talk, tmp_path):
    out, _ = talk("stop now, please", "next", "/save a.jsonl")
    assert out == "stop now,\nnext\n"
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [m["content"] for m in messages] == ["stop now, please", "stop now,", "next", "next"]


def test_ctrl_c_at_the_sign_drops_the_line_and_ends_what_reads_no_terminal(talk, monkeypatch):
    lines = iter([KeyboardInterrupt, "one\n", KeyboardInterrupt, ""])

    def read_line() -> str:
        if (line := next(lines)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(terminal, "read_line", read_line)
    assert talk(stdin=Keyboard)[0] == "\none\n\n"
    lines = iter([KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        talk()


@pytest.mark.parametrize("flag", ["--interactive", "--num_samples=2", "--json", "--out_dir=x",
                                  "--export=x.c", "--serve", "--prompt=x", "--window_hop=2",
                                  "--system"])
def test_what_makes_no_sense_in_a_conversation_is_refused(flag, capsys):
    assert generate.main([flag, "Be kind."] if flag == "--system" else [flag, "--chat"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "has no effect" in err and flag.partition("=")[0] in err and "--chat" in err


def test_on_a_terminal_ctrl_c_stops_and_ctrl_d_ends(tmp_path):
    model = GPT(GPTConfig(block_size=4096, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = ByteTokenizer()
    model.save_checkpoint(1, None, tmp_path / "checkpoints")
    pid, screen = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, str(ROOT / "generate.py"), "--chat", "--system",
                                  "Be kind.", "--max_new_tokens", "4000", "--temperature", "0"])
    shown = ""

    def until(pattern: str) -> None:
        nonlocal shown
        while not (found := re.search(pattern, shown)):
            assert select.select([screen], [], [], 60)[0], shown
            shown += os.read(screen, 4096).decode("ascii", "replace")
        shown = shown[found.end():]

    until("> ")
    os.write(screen, b"hello\n")
    until("hello\r\n.")
    os.write(screen, b"\x03")
    until("\r\n> ")
    os.write(screen, b"/save a.jsonl\n")
    until("saved in a.jsonl")
    until("> ")
    os.write(screen, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(screen)
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "hello" and 0 < len(messages[2]["content"]) < 3900
