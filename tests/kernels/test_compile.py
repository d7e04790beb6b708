"""How C kernels are compiled."""

import ctypes
import functools
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from tinygrad import Device

from tinygpt.kernels.cpu import compile as compiling
from tinygpt.kernels.cpu.compile import Compilations, compilations, function


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


def test_rounding_to_bfloat16_needs_no_instruction_of_the_processor(rng):
    """Denormal and infinite numbers, ties and NaN among them, as numpy rounds them by integers."""
    bits = np.concatenate([rng.integers(0, 2**32, 10_000), np.arange(0x7F7F0000, 0x7F820000, 4096),
                           np.arange(0, 0x40000, 0x4000)]).astype(np.uint32)
    buffer = bits.copy()
    compilations()  # as whatever chooses the CPU does
    function("rounds", f"""
        __bf16 __truncsfbf2(float);
        void rounds(unsigned *x) {{
          for (int i = 0; i < {len(bits)}; i++)
            x[i] = __builtin_bit_cast(unsigned short,
                                      __truncsfbf2(__builtin_bit_cast(float, x[i])));
        }}""")(buffer.ctypes.data_as(ctypes.c_void_p))
    x = bits.view(np.float32)
    tie = (bits & 0xFFFF == 0x8000) & (bits >> 16 & 1 == 0)
    expected = (bits >> 16) + ((bits & 0xFFFF >= 0x8000) & ~tie)
    nan = np.isnan(x)
    assert np.array_equal(buffer[~nan], expected[~nan])
    assert np.isnan((buffer[nan] << 16).view(np.float32)).all() and nan.any()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo is Linux's")
@pytest.mark.parametrize(("info", "defines"), [
    ("flags\t\t: fpu avx512f avx512_bf16 avx512_vnni", {"DOT": 1}),
    ("flags\t\t: fpu avx2 avx_vnni f16c", {}),
    ("Features\t: fp asimd bf16 i8mm", {"DOT": 1}), ("Features\t: fp asimd ebf16", {}), ("", {})])
def test_bfloat16_is_multiplied_as_the_processor_can_and_what_it_lacks_is_said_once(
        info, defines, monkeypatch):
    monkeypatch.setattr(compiling, "cpu_info", lambda: info)
    for cached in (compiling.bfloat16_products, compiling.bfloat16_defines):
        monkeypatch.setattr(compiling, cached.__name__, functools.cache(cached.__wrapped__))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert compiling.bfloat16_defines() == defines
    assert bool(compiling.integer_defines.__wrapped__()) == info.endswith("avx512_vnni")
    assert [str(w.message)[:38] for w in said] == ["this processor has no AMX, AVX512_BF16"] * (
        not defines)
