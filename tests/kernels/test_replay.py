"""Replay: a captured step in one call computes what its calls one by one compute."""

import numpy as np
import pytest
from tinygrad import Tensor, UOp, dtypes
from tinygrad.helpers import Context

from tinygpt import device, kernels
from tinygpt.kernels.cpu import replay
from tinygpt.kernels.cpu.replay import CompiledStep, DecodeReplay
from tinygpt.kernels.jit import compiled
from tinygpt.kernels.options import MuonOptions

LAST, MANY = 63, 1 << 19  # start_pos at most, and enough numbers for kernels with several threads


class Counter:
    """A step for B texts whose next token depends on the last one, its position and the key."""

    def __init__(self, B: int, device: str = "CPU"):
        self.tokens = Tensor.zeros(B, 1, dtype=dtypes.int32, device=device).contiguous().realize()
        self.key = Tensor.zeros(1, dtype=dtypes.uint32, device=device).contiguous().realize()
        self.zeros = Tensor.zeros(MANY, dtype=dtypes.int32, device=device).contiguous().realize()
        self.jit = compiled(self.step)

    def step(self, tokens: Tensor, start_pos: UOp) -> tuple[Tensor, Tensor]:
        position = (self.zeros + start_pos).contiguous().sum() // MANY
        drawn = (3 * tokens[:, 0] + position + self.key.cast(dtypes.int32)) % 1009
        return drawn.contiguous().realize(), (drawn.float() + 0.5).contiguous().realize()

    def capture(self) -> DecodeReplay | None:
        self.jit(self.tokens, UOp.variable("start_pos", 0, LAST).bind(0))
        return DecodeReplay.of(self.jit, self.tokens, self.key)


def test_several_steps_in_one_call_are_fed_with_what_they_draw():
    captured = Counter(2).capture()
    for start_pos, count in ((0, 1), (5, 7), (20, 3)):
        keys = np.arange(count, dtype=np.uint32)[:, None] * 10
        last, expected = np.array([4, 900]), []
        for i in range(count):
            last = (3 * last + start_pos + i + 10 * i) % 1009
            expected.append(last)
        drawn, logits = captured(np.array([[4], [900]]), start_pos, 0, keys)
        np.testing.assert_array_equal(drawn, expected)
        np.testing.assert_array_equal(logits.numpy(), last + 0.5)


def test_there_is_none_on_another_device_where_kernels_are_shown_and_without_jit():
    assert Counter(1, "CPU:1").capture() is None
    with Context(JIT=0):
        assert Counter(1).capture() is None
    counter = Counter(1)
    assert counter.capture() is not None
    with Context(DEBUG=2):
        assert DecodeReplay.of(counter.jit, counter.tokens, counter.key) is None


class Sums:
    """A step that adds x to a tensor, by kernels of one thread and of several, and by one with more
    arguments than most have."""

    def __init__(self, device: str = "CPU"):
        def zeros(*shape: int) -> Tensor:
            return Tensor.zeros(*shape, device=device).contiguous().realize()
        self.x, self.sums, self.many = zeros(1), zeros(3, 5), zeros(MANY)
        self.p, self.m, self.grads = ([zeros(2, 2) for _ in range(5)] for _ in "pmg")
        self.options = Tensor(MuonOptions(1, 0, 0, 1, 1), dtype=dtypes.float32,
                              device=device).realize()
        self.step = CompiledStep(self.add)

    def add(self, x: Tensor) -> Tensor:
        grads = [g.assign(g + x * Tensor.eye(2)).realize() for g in self.grads]
        updated = kernels.muon(self.p, self.m, grads, self.options)
        total = (self.many.assign(self.many + x)).contiguous().sum()
        return total.realize(self.sums.assign(self.sums + x), *updated)


@pytest.mark.parametrize("jit", [2, 1, 0])  # without graphs, with them, nothing captured
def test_a_compiled_step_changes_what_its_method_does(jit):
    with Context(JIT=jit):
        s = Sums()
        given = np.array([1.0, 0.5, -2.0, 4.0, 0.25], np.float32)
        for i, x in enumerate(given):
            device.write(s.x, [x])
            assert s.step(s.x).item() == MANY * given[:i + 1].sum()
        assert (s.step.replay is None) == (jit == 0)
        np.testing.assert_array_equal(s.sums.numpy(), np.full((3, 5), given.sum()))
        assert all(abs(p.numpy()[0, 0]) > 0.5 and p.numpy()[0, 1] == 0 for p in s.p)


def test_a_long_step_is_not_one_kernel(monkeypatch):
    """For which tinygrad would not wait."""
    monkeypatch.setattr(replay, "LONGEST", 0.0)
    s = Sums()
    for count in (1, 2, 3):
        device.write(s.x, [1.0])
        assert s.step(s.x).item() == MANY * count
    assert s.step.replay is None
    monkeypatch.setattr(replay, "LONGEST", 10.0)
    for count in (4, 5):
        assert s.step(s.x).item() == MANY * count
    assert s.step.replay is not None


@pytest.mark.filterwarnings("ignore:no C kernel for muon")
def test_a_step_on_another_device_is_not_replayed():
    s = Sums("CPU:1")
    for count in (1, 2, 3):
        device.write(s.x, [1.0])
        assert s.step(s.x).item() == MANY * count
    assert s.step.replay is None
