"""Replay: a captured step in one call computes what its calls one by one compute."""

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.helpers import Context

from tinygpt.kernels.cpu.replay import Replay
from tinygpt.kernels.jit import compiled

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

    def capture(self) -> Replay | None:
        self.jit(self.tokens, UOp.variable("start_pos", 0, LAST).bind(0))
        return Replay.of(self.jit, self.tokens, self.key)


def test_several_steps_in_one_call_are_fed_with_what_they_draw():
    replay = Counter(2).capture()
    for start_pos, count in ((0, 1), (5, 7), (20, 3)):
        keys = np.arange(count, dtype=np.uint32)[:, None] * 10
        last, expected = np.array([4, 900]), []
        for i in range(count):
            last = (3 * last + start_pos + i + 10 * i) % 1009
            expected.append(last)
        drawn, logits = replay(np.array([[4], [900]]), start_pos, 0, keys)
        np.testing.assert_array_equal(drawn, expected)
        np.testing.assert_array_equal(logits.numpy(), last + 0.5)


def test_there_is_none_on_another_device_where_kernels_are_shown_and_without_jit():
    assert Counter(1, "CPU:1").capture() is None
    with Context(JIT=0):
        assert Counter(1).capture() is None
    counter = Counter(1)
    assert counter.capture() is not None
    with Context(DEBUG=2):
        assert Replay.of(counter.jit, counter.tokens, counter.key) is None
