"""The threads that run C kernels, and tinygrad's own."""

import subprocess
import sys

import pytest
from conftest import ROOT

from tinygpt import device, kernels
from tinygpt.kernels.jit import IS_014

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


@pytest.mark.parametrize("name, threads", [*((name, 7) for name in ENDS),
                                           ("with a kernel in flight", 1000)])
def test_a_program_ends_by_itself(name, threads):
    device.export_compiler()
    code = f"""
import sys
from tinygrad import Device, Tensor
from tinygpt import kernels
from tinygpt.kernels.cpu.threads import pool
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


def test_no_fewer_than_one_thread():
    with pytest.raises(ValueError, match="threads=0"):
        kernels.set_threads(0)
