"""How C kernels are compiled and read the views of each other's outputs, and the thread that runs
them."""

import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tinygrad import Device, Tensor

from tinygpt import device, kernels
from tinygpt.kernels.cpu.launch import IS_014, Compilations, memory, plain

VIEWS = {
    "reshaped": lambda x: x.reshape(6, 20),
    "swapped": lambda x: x.transpose(1, 2),
    "swapped twice": lambda x: x.transpose(1, 2).transpose(1, 2).reshape(2, 60),
    "a slice": lambda x: x[:, :, 2:4],
    "heads of a slice": lambda x: x.reshape(2, 3, 20)[:, :, 4:12].reshape(2, 3, 4, 2)
    .transpose(1, 2),
    "merged after a swap": lambda x: x.transpose(1, 2).reshape(2, 12, 5),
    "part of a merged swap": lambda x: x.transpose(1, 2).reshape(2, 12, 5)[1:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_kernels_output_is_read_as_what_it_shows(name, rng):
    array = rng.standard_normal((2, 3, 4, 5), dtype=np.float32)
    ones = Tensor.ones(5).contiguous().realize()
    made = kernels.rms_norm(Tensor(array), ones, implementation="cpu")
    shown = VIEWS[name](Tensor(made.numpy())).numpy()
    view = VIEWS[name](kernels.rms_norm(Tensor(array), ones, implementation="cpu"))
    assert np.array_equal(kernels.gelu(view, implementation="cpu").numpy().ravel(),
                          kernels.gelu(Tensor(shown), implementation="cpu").numpy().ravel())
    source, start, strides = memory(view)
    flat = source.numpy().ravel()
    at = start + sum(i * s for i, s in zip(np.indices(view.shape), strides, strict=True))
    assert np.array_equal(flat[at], shown)


def test_only_what_lies_there_whole_and_in_order_is_read_without_a_copy():
    x = kernels.gelu(Tensor.ones(2, 3, 4, 5).contiguous().realize(), implementation="cpu")
    whole = {name for name, view in VIEWS.items() if plain(view(x)).uop is plain(x).uop}
    assert whole == {"reshaped", "swapped twice"}


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


# Garbage that the collector finds on the device's thread while more work waits for that thread: a
# compiled step in flight, or memory that is not kept for later.
GARBAGE = """
import gc, sys, threading
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.device import Buffer, BufferSpec
import tinygpt.kernels
gc.disable()
step = TinyJit(lambda x: ((x + 1).contiguous() * 2).realize())
x = Tensor.ones(4).contiguous().realize()
for _ in range(4):
    step(x)
Device["CPU"].synchronize()
submitted = threading.Event()
Device["CPU"].tasks.put([lambda thread: (submitted.wait(), gc.collect()), 1, 0])
if sys.argv[1] == "a step":
    step(x)
    cycle = [step]
    del step
else:
    memory = Buffer("CPU", 4, dtypes.float32, options=BufferSpec(nolru=True)).allocate()
    Device["CPU"].allocator.map(memory._buf)
    cycle = [memory]
    del memory
cycle.append(cycle)
del cycle
y = (x + 3).realize()
submitted.set()
reader = threading.Thread(target=lambda: print(y.tolist()), daemon=True)
reader.start()
reader.join(10)
"""


@pytest.mark.skipif(IS_014, reason="that thread runs no Python there")
@pytest.mark.parametrize("garbage", ["a step", "memory"])
def test_garbage_that_the_devices_own_thread_collects_does_not_stop_it(garbage):
    device.export_compiler()
    done = subprocess.run([sys.executable, "-c", GARBAGE, garbage], cwd=ROOT, capture_output=True,
                          text=True, timeout=40)
    assert done.stdout == "[4.0, 4.0, 4.0, 4.0]\n", done.stderr


ENDS = {
    "with a kernel in flight": """
Tensor.realize(*(multiply() for _ in range(6)))
""",
    "after a fork that ended": """
import os
if os.fork() == 0:
    sys.exit(0)
os.wait()
assert not pool().words[pool().STOP]
for _ in range(20):
    if os.fork() == 0:
        sys.exit(0)
    multiply().realize()
    Device["CPU"].synchronize()
"""}


@pytest.mark.parametrize("threads", [7, 1000])
@pytest.mark.parametrize("name", ENDS)
def test_a_program_ends_by_itself(name, threads):
    device.export_compiler()
    code = f"""
import sys
from tinygrad import Device, Tensor
from tinygpt import kernels
from tinygpt.kernels.cpu.launch import pool
kernels.set_threads({threads})
x, w = (Tensor.ones(1500, 1024).contiguous().realize() for _ in range(2))

def multiply():
    # in one kernel: tinygrad 0.14 compiles two in processes that a fork would end as it exits
    return kernels.stored(kernels.linear(x, w, implementation="cpu"))

multiply().realize()
Device["CPU"].synchronize()
{ENDS[name]}
print("ends")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


def test_ctrl_c_does_not_reach_the_compiler(ahead, monkeypatch):
    masks = []
    monkeypatch.setattr(ahead, "tinygrads", lambda code: masks.append(
        signal.pthread_sigmask(signal.SIG_BLOCK, ())) or b"")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    ahead.compiler.compile("int x;")
    assert signal.SIGINT in masks[0] and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_no_fewer_than_one_thread():
    with pytest.raises(ValueError, match="threads=0"):
        kernels.set_threads(0)
