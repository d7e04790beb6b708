"""Captured steps that C runs.

A TinyJit hands the kernels of a step to a queue one by one, in Python, which takes longer than a
small model computes.

Private interfaces of tinygrad, 0.13's and 0.14's: the calls of a captured step and their programs,
buffers and variables, get_runtime, and the addresses of code and buffers.
"""

import ctypes
import functools
import sys
import time
from collections.abc import Callable

import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.device import Buffer
from tinygrad.engine.realize import get_call_arg_uops, get_runtime, resolve_params
from tinygrad.helpers import DEBUG
from tinygrad.uop.ops import Ops, UOp

from tinygpt.kernels.cpu.compile import function, source
from tinygpt.kernels.cpu.kernel import Kernel
from tinygpt.kernels.cpu.threads import pool
from tinygpt.kernels.jit import compiled, constant

FEW, MANY = 10, 60  # arguments that call_t of calls.h has room for
VARIABLES = "start_pos", "row"
LONGEST = 10.0  # seconds of a step; 0.14 waits for a kernel for 30


class Calls:
    """The kernels of a captured step, with the arguments that they were captured with, as an array
    of call_t (see calls.h): words (W,) uint64. `places` has the indices of VARIABLES in words.
    """

    def __init__(self, calls: list[UOp], inputs: tuple[UOp, ...]):
        words, self.places = [], {name: [] for name in VARIABLES}
        self.held = []  # what words has the addresses of
        for call in calls:
            program, runtime = call.src[0].arg, get_runtime("CPU", call.src[0])
            given = resolve_params(call, inputs)
            buffers = [given[i].buffer.ensure_allocated() for i in program.globals]
            self.held += [runtime, *buffers]
            code = ctypes.cast(runtime.fxn, ctypes.c_void_p).value
            count = len(buffers) + len(program.vars)
            room = FEW if count <= FEW else MANY
            parts = program.global_size[0] if program.runtimevars else 1
            for core in range(parts):
                words += [code, parts, room, *map(_address, buffers)]
                for name in (v.expr for v in program.vars):
                    if name in self.places:
                        self.places[name].append(len(words))
                    words.append(core)
                words += [0] * (room - count)
        self.words = np.array(words, np.uint64)

    @classmethod
    def of(cls, step: TinyJit, *inputs: Tensor) -> "Calls | None":
        """The kernels of a step that was captured with those inputs.

        None where it has other calls than of programs for the CPU, where JIT=0 prevents capturing,
        and where DEBUG=2 asks tinygrad to show each call.
        """
        if step.captured is None or DEBUG >= 2 or not all(map(_is_plain, kernels_of(step))):
            return None
        return cls(kernels_of(step), tuple(x.uop.base for x in inputs))


class CompiledStep:
    """A method of tensors that is captured at its first call. Where all its kernels are the CPU's
    and it takes no longer than LONGEST, C runs them later on, as one kernel of tinygrad's queue.

    Every call gets the same tensors, and overwrites what the one before it returned.
    """

    def __init__(self, method: Callable[..., Tensor | None]):
        self.step, self.replay, self.calls = compiled(method), None, None

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        if self.replay and DEBUG < 2:
            self.replay()
            return self.step.captured.ret
        is_first, start = self.step.captured is None, time.perf_counter()
        made = self.step(*inputs)
        if is_first:
            self.calls = Calls.of(self.step, *inputs)
        if self.calls and not self.replay:
            Device["CPU"].synchronize()
            if time.perf_counter() - start < LONGEST:
                self._begin_to_replay()
        return made

    def _begin_to_replay(self) -> None:
        self.words = constant(self.calls.words, "CPU")
        self.replay = compiled(self._run)

    def _run(self) -> None:
        Tensor.realize(*Kernel("replay.c").in_place(
            changed=dict(calls=self.words), inputs={},
            sizes=dict(words=len(self.calls.words))).values())


class Step(ctypes.Structure):
    """step_t of replay_decoding.c."""

    _fields_ = [("pool", ctypes.c_void_p), ("calls", ctypes.c_void_p), ("end", ctypes.c_void_p),
                ("positions", ctypes.c_void_p), ("position_count", ctypes.c_uint64),
                ("tokens", ctypes.c_void_p), ("drawn", ctypes.c_void_p), ("rows", ctypes.c_uint64),
                ("key", ctypes.c_void_p), ("key_size", ctypes.c_uint64)]


class DecodeReplay:
    """A captured decode step, which C runs several times in one call."""

    def __init__(self, calls: Calls, tokens: Tensor, key: Tensor, drawn: Tensor, logits: Tensor):
        self.logits, self.calls = logits, calls
        self.words, self.held = calls.words, (tokens, key, drawn)
        self.places = {name: np.array(at, np.uint64) for name, at in calls.places.items()}
        begin, end = self.words.ctypes.data, self.words.ctypes.data + self.words.nbytes
        self.positions = begin + 8 * self.places["start_pos"]
        memory = {name: x.uop.base.realized for name, x in
                  dict(tokens=tokens, key=key, drawn=drawn).items()}
        self.tokens = np.frombuffer(memory["tokens"].as_memoryview(force_zero_copy=True), np.int32)
        self.step = Step(pool=pool().address, calls=begin, end=end,
                         positions=self.positions.ctypes.data, position_count=len(self.positions),
                         rows=drawn.shape[0], key_size=key.shape[0],
                         **{name: _address(buffer) for name, buffer in memory.items()})

    @classmethod
    def of(cls, step: TinyJit, tokens: Tensor, key: Tensor) -> "DecodeReplay | None":
        """That of a captured step, which returned the tokens drawn (B,) int32 and the logits, and
        read tokens (B, T) int32 and key (K,) uint32. None where `Calls.of` is."""
        calls = Calls.of(step, tokens)
        return calls and cls(calls, tokens, key, *step.captured.ret)

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
    return function(*source("replay_decoding.c", "replay_decoding"))


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
            and len(program.globals) + len(program.vars) <= MANY)


def _address(buffer: Buffer) -> int:
    return buffer.get_buf("CPU").va_addr
