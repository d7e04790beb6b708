"""Attention over the key-value cache: every implementation against numpy."""

import numpy as np
import pytest
from operations import np_attention
from tinygrad import Tensor, TinyJit, UOp

from tinygpt import kernels

for_each = pytest.mark.parametrize("implementation", ["reference", "portable", "cpu"])
# B, H, G, T, S, D, offset, window
SHAPES = [(1, 4, 4, 1, 9, 8, 8, None), (2, 6, 2, 1, 300, 7, 299, None),
          (1, 1, 1, 1, 1, 1, 0, None), (1, 2, 1, 1, 200, 80, 150, 130),
          (3, 3, 3, 1, 70, 33, 64, 1), (1, 8, 1, 1, 500, 64, 421, 64),
          (2, 4, 2, 5, 13, 6, 7, 4), (1, 2, 2, 1, 130, 48, 127, 500)]


def draw(B, H, G, T, S, D, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = dict(q=(B, H, T, D), k=(B, G, T, D), v=(B, G, T, D), keys=(B, G, S, D),
                  values=(B, G, S, D))
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def after(arrays: dict, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """The cache with the new keys and values in it."""
    result = []
    for new, old in (("k", "keys"), ("v", "values")):
        result.append(arrays[old].copy())
        result[-1][:, :, offset:offset + arrays[new].shape[2]] = arrays[new]
    return tuple(result)


def check(y: np.ndarray, caches, arrays: dict, offset: int, window: int | None) -> None:
    keys, values = after(arrays, offset)
    right = np_attention(*(a.astype(np.float64) for a in (arrays["q"], keys, values)), offset,
                         window)
    assert np.abs(y - right).max() <= 5e-6 * np.abs(right).max()
    for ours, wanted in zip(caches, (keys, values), strict=True):
        np.testing.assert_array_equal(ours.numpy(), wanted)


@for_each
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_equals_numpy_and_writes_the_cache(shape, implementation):
    *sizes, offset, window = shape
    arrays = draw(*sizes)
    inputs = {name: Tensor(a).realize() for name, a in arrays.items()}
    y = kernels.cached_attention(**inputs, offset=offset, window=window,
                                 implementation=implementation).numpy()
    check(y, (inputs["keys"], inputs["values"]), arrays, offset, window)


@for_each
def test_keys_behind_the_query_or_outside_the_window_change_nothing(implementation):
    def attend(seed):
        arrays, other = draw(1, 4, 2, 1, 100, 16), draw(1, 4, 2, 1, 100, 16, seed)
        for name in ("keys", "values"):
            arrays[name][:, :, :11] = 1e4 * other[name][:, :, :11]
            arrays[name][:, :, 80:] = 1e4 * other[name][:, :, 80:]
        inputs = {name: Tensor(a).realize() for name, a in arrays.items()}
        return kernels.cached_attention(**inputs, offset=80, window=70,
                                        implementation=implementation).numpy()
    np.testing.assert_array_equal(attend(1), attend(2))


@for_each
def test_large_scores_stay_finite(implementation):
    arrays = draw(1, 2, 1, 1, 150, 12)
    arrays["q"] *= 1e3
    arrays["keys"] *= 1e3
    inputs = {name: Tensor(a).realize() for name, a in arrays.items()}
    y = kernels.cached_attention(**inputs, offset=140, implementation=implementation).numpy()
    check(y, (inputs["keys"], inputs["values"]), arrays, 140, None)


@for_each
def test_symbolic_offset_and_slices_of_one_matrix_under_the_jit(implementation):
    """As the model hands them over, position after position, in two layers."""
    B, H, G, S, D = 2, 4, 2, 9, 8
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((S, B, 1, (H + 2 * G) * D), dtype=np.float32)
    unit = Tensor(np.eye((H + 2 * G) * D, dtype=np.float32)).realize()
    cache = [[Tensor.zeros(B, G, S, D).contiguous().realize() for _ in "kv"] for _ in range(2)]

    @TinyJit
    def step(x: Tensor, offset: UOp) -> Tensor:
        x = kernels.linear(x, unit, implementation=implementation)  # what a kernel made
        q, k, v = (part.reshape(B, 1, -1, D).transpose(1, 2)
                   for part in x.split([H * D, G * D, G * D], dim=-1))
        first = kernels.cached_attention(q, k, v, *cache[0], offset, None,
                                         implementation=implementation)
        return kernels.cached_attention(first, k * 2, v * 2, *cache[1], offset, 4,
                                        implementation=implementation).realize()

    position = UOp.variable("position", 0, S - 1)
    for p in range(S):
        y = step(Tensor(rows[p]).realize(), position.bind(p)).numpy()
        past = rows[:p + 1, :, 0].transpose(1, 0, 2).astype(np.float64)  # (B, S, heads D)
        q, k, v = (a.reshape(B, p + 1, -1, D).transpose(0, 2, 1, 3)
                   for a in np.split(past, [H * D, (H + G) * D], axis=-1))
        first = np_attention(q[:, :, -1:], k, v, p)
        right = np_attention(first, 2 * k, 2 * v, p, 4)
        assert np.abs(y - right).max() <= 5e-6 * np.abs(right).max(), p


@pytest.mark.parametrize(("implementation", "dtype"), [
    ("reference", "float32"), ("portable", "float32"), ("cpu", "float32"), ("cpu", "bfloat16")])
@pytest.mark.parametrize("shape", [(4, 4, 2, 1, 300, 7, 299, None), (5, 6, 2, 1, 90, 33, 70, 20),
                                   (2, 2, 1, 1, 200, 16, 199, None), (4, 2, 2, 5, 13, 6, 7, 4),
                                   (3, 2, 1, 64, 300, 20, 200, None)],
                         ids=lambda s: "-".join(map(str, s)))
def test_rows_that_begin_later_do_not_see_the_padding(shape, implementation, dtype):
    """Each is as if its keys before start were not there. Padding sees itself, and is finite."""
    B, H, G, T, S, D, offset, window = shape
    arrays = draw(B, H, G, T, S, D)
    start = np.array([0, offset, offset // 2, offset + T - 1, 1])[:B]
    for b in range(B):
        for name in ("keys", "values"):
            arrays[name][b, :, :start[b]] *= 1e4
    inputs = {name: Tensor(a).cast(dtype).contiguous().realize() for name, a in arrays.items()}
    arrays = {name: x.float().numpy() for name, x in inputs.items()}
    y = kernels.cached_attention(**inputs, offset=offset, window=window,
                                 start=Tensor(start.astype(np.int32)).realize(),
                                 implementation=implementation).float().numpy()
    keys, values = (a.astype(np.float64) for a in after(arrays, offset))
    assert np.isfinite(y).all()
    for b, first in enumerate(start):
        pad = max(0, first - offset)  # queries that are padding themselves
        right = np_attention(arrays["q"][b:b + 1, :, pad:], keys[b:b + 1, :, first:],
                             values[b:b + 1, :, first:], max(offset - first, 0), window)
        error = np.abs(y[b:b + 1, :, pad:] - right).max() / np.abs(right).max()
        assert error <= (5e-6 if dtype == "float32" else 2e-2), b
        own = values[b, :, offset:offset + pad].repeat(H // G, axis=0)
        np.testing.assert_allclose(y[b, :, :pad], own, rtol=1e-6)
