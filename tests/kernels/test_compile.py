"""How C kernels are compiled."""

import signal
import subprocess

import pytest
from tinygrad import Device

from tinygpt.kernels.cpu.compile import Compilations


@pytest.fixture
def ahead(monkeypatch):
    compiler = Device["CPU"].renderer.compiler
    monkeypatch.setattr(compiler, "compile", compiler.compile)  # put back at the end
    return Compilations()


def test_a_source_is_compiled_ahead_and_once(ahead, monkeypatch):
    asked = []
    monkeypatch.setattr(ahead, "compile_now", lambda code: asked.append(code) or code.encode())
    for _ in range(2):
        ahead.begin(f"/* {id(asked)} */")
    ahead.threads.shutdown()
    assert len(asked) == 1
    for times in (1, 2):  # what was begun is handed out once: tinygrad keeps it in its cache
        assert ahead.compiler.compile(asked[0]) == asked[0].encode()
        assert len(asked) == times


def test_a_source_that_does_not_compile_fails_where_it_is_asked_for(ahead):
    ahead.begin("no C")
    with pytest.raises(subprocess.CalledProcessError):
        ahead.compiler.compile("no C")


def test_ctrl_c_does_not_reach_the_compiler(ahead, monkeypatch):
    masks = []
    monkeypatch.setattr(ahead, "tinygrads", lambda code: masks.append(
        signal.pthread_sigmask(signal.SIG_BLOCK, ())) or b"")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    ahead.compiler.compile("int x;")
    assert signal.SIGINT in masks[0] and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
