"""A captured decode step as one call of C, which also runs it several times.

A TinyJit hands the kernels of a step to a queue one by one, in Python, which takes longer than a
small model computes.

Private interfaces of tinygrad, 0.13's and 0.14's: the calls of a captured step and their programs,
buffers and variables, get_runtime, and the addresses of code and buffers.
"""

import ctypes
import functools
import sys

import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.device import Buffer
from tinygrad.engine.realize import get_call_arg_uops, get_runtime, resolve_params
from tinygrad.helpers import DEBUG
from tinygrad.uop.ops import Ops, UOp

from tinygpt.kernels.cpu.compile import function, source

WORDS = 16  # of call_t in replay.c: a function and its arguments
VARIABLES = "start_pos", "row"


class Step(ctypes.Structure):
    """step_t of replay.c."""

    _fields_ = [("calls", ctypes.c_void_p), ("count", ctypes.c_uint64),
                ("positions", ctypes.c_void_p), ("position_count", ctypes.c_uint64),
                ("tokens", ctypes.c_void_p), ("drawn", ctypes.c_void_p), ("rows", ctypes.c_uint64),
                ("key", ctypes.c_void_p), ("key_size", ctypes.c_uint64)]


class Replay:
    """The kernels of a captured step, with the arguments that they were captured with."""

    def __init__(self, calls: list[UOp], tokens: Tensor, key: Tensor, drawn: Tensor,
                 logits: Tensor):
        self.logits = logits
        self._held, words = [tokens, key, drawn], []  # what C has the addresses of
        places = {name: [] for name in VARIABLES}  # of the variables in words
        for call in calls:
            program, runtime = call.src[0].arg, get_runtime("CPU", call.src[0])
            given = resolve_params(call, (tokens.uop.base,))
            buffers = [given[i].buffer.ensure_allocated() for i in program.globals]
            self._held += [runtime, *buffers]
            code = ctypes.cast(runtime.fxn, ctypes.c_void_p).value
            for core in range(program.global_size[0] if program.runtimevars else 1):
                call_words = [code, *map(_address, buffers)]
                for name in (v.expr for v in program.vars):
                    if name in places:
                        places[name].append(len(words) + len(call_words))
                    call_words.append(core)
                words += call_words + [0] * (WORDS - len(call_words))
        self.words = np.array(words, np.uint64)
        self.places = {name: np.array(found, np.uint64) for name, found in places.items()}
        self.positions = self.words.ctypes.data + 8 * self.places["start_pos"]
        memory = {name: x.uop.base.realized for name, x in
                  dict(tokens=tokens, key=key, drawn=drawn).items()}
        self.tokens = np.frombuffer(memory["tokens"].as_memoryview(force_zero_copy=True), np.int32)
        self.step = Step(calls=self.words.ctypes.data, count=len(words) // WORDS,
                         positions=self.positions.ctypes.data, position_count=len(self.positions),
                         rows=drawn.shape[0], key_size=key.shape[0],
                         **{name: _address(buffer) for name, buffer in memory.items()})

    @classmethod
    def of(cls, step: TinyJit, tokens: Tensor, key: Tensor) -> "Replay | None":
        """That of a captured step, which returned the tokens drawn (B,) int32 and the logits, and
        read tokens (B, T) int32 and key (K,) uint32.

        None where the step has other calls than of programs for the CPU with few arguments, where
        JIT=0 prevents capturing, and where DEBUG=2 asks tinygrad to show each call.
        """
        if step.captured is None or DEBUG >= 2 or not all(map(_is_plain, kernels_of(step))):
            return None
        return cls(kernels_of(step), tokens, key, *step.captured.ret)

    def __call__(self, tokens: np.ndarray, start_pos: int, row: int, keys: np.ndarray
                 ) -> tuple[np.ndarray, Tensor]:
        """The tokens drawn (n, B) int32 and the last logits after n steps, one for each of keys
        (n, K) uint32. The first step reads tokens (B, T), the others what was drawn before them, so
        that n is 1 where T is not."""
        self.words[self.places["start_pos"]], self.words[self.places["row"]] = start_pos, row
        drawn = np.empty((len(keys), self.step.rows), np.int32)
        Device["CPU"].synchronize()
        self.tokens[:] = tokens.ravel()
        _run()(ctypes.byref(self.step), ctypes.c_uint64(len(keys)),
               ctypes.c_void_p(keys.ctypes.data), ctypes.c_void_p(drawn.ctypes.data))
        return drawn, self.logits


@functools.cache
def _run():
    return function(*source("replay.c", "replay"))


def kernels_of(step: TinyJit) -> list[UOp]:
    """The calls of a captured step, with those that 0.13 put together into graphs one by one."""
    calls = []
    for call in step.captured.linear.src:
        is_graph = call.src[0].op is Ops.CUSTOM_FUNCTION and call.src[0].arg == "graph"
        calls += call.src[0].src[0].src if is_graph else [call]
    return calls


def _is_plain(call: UOp) -> bool:
    if call.src[0].op is not Ops.PROGRAM or any(x.device != "CPU" for x in get_call_arg_uops(call)):
        return False
    program = call.src[0].arg
    on_stack = min(len(program.vars), len(program.globals) + len(program.vars) - 8)
    if sys.platform == "darwin" and on_stack > 1:  # which packs two of 32 bits into a word there
        return False
    return (all(isinstance(n, int) for n in program.global_size)
            and {v.expr for v in program.vars} <= {*VARIABLES, "core_id"}
            and len(program.globals) + len(program.vars) < WORDS)


def _address(buffer: Buffer) -> int:
    return buffer.get_buf("CPU").va_addr
