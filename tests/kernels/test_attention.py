"""Properties of attention besides equality with the reference."""

import numpy as np
import pytest
from operations import (
    CACHED,
    GROUPED,
    KEY,
    SQUARE,
    TOLERANCE,
    call,
    check,
    cotangent,
    draw,
    implementations,
    np_attention,
    result,
    run,
    tensors,
)
from tinygrad import Tensor, TinyJit, UOp

from tinygpt import kernels
from tinygpt.kernels.cases import can_run, heads
from tinygpt.kernels.random import make_key

for_each = pytest.mark.parametrize("implementation", implementations("attention"))


@for_each
def test_a_future_key_changes_nothing(implementation):
    arrays = draw(GROUPED)
    changed = {name: a.copy() for name, a in arrays.items()}
    changed["k"][:, :, 3], changed["v"][:, :, 3] = 50, 1e4
    dy = cotangent(arrays["q"].shape)
    dy[:, :, 3:] = 0
    before = run("attention", implementation, arrays, {}, dy=dy)
    after = run("attention", implementation, changed, {}, dy=dy)
    np.testing.assert_array_equal(after["y"][:, :, :3], before["y"][:, :, :3])
    assert (after["y"][:, :, 3:] != before["y"][:, :, 3:]).any(axis=-1).all()
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(after[name], before[name])
        assert not after[name][:, :, 3:].any()


@for_each
def test_keys_outside_the_window_or_behind_the_last_query_change_nothing(implementation):
    options = dict(offset=7, window=4)  # queries at 7, 8, 9 see keys 4 to 9
    arrays = draw(CACHED)
    before = run("attention", implementation, arrays, options)
    for unseen in (slice(0, 4), slice(10, 13)):
        arrays["k"][:, :, unseen], arrays["v"][:, :, unseen] = 50, 1e4
        after = run("attention", implementation, arrays, options)
        for name in ("y", "q", "k", "v"):
            np.testing.assert_array_equal(after[name], before[name])
        assert not after["k"][:, :, unseen].any() and not after["v"][:, :, unseen].any()
    arrays["v"][:, :, 4] += 1  # the oldest key that query 7 sees, and only that one
    after = run("attention", implementation, arrays, options)
    assert (after["y"] != before["y"]).any(axis=(0, 1, 3)).tolist() == [True, False, False]


def documents(B: int, T: int, longest: int) -> np.ndarray:
    """starts (B, T) of documents of 1 to `longest` tokens, other ones in each row."""
    rng, starts = np.random.default_rng(4), np.zeros((B, T), np.int32)
    for row in starts:
        ends = np.cumsum(rng.integers(1, longest + 1, T))
        row[:] = np.concatenate([[0], ends])[np.searchsorted(ends, np.arange(T), side="right")]
    return starts


@pytest.mark.parametrize("shapes, longest, options", [
    (heads(2, 4, 2, 7, 7, 10), 3, {}),
    (heads(2, 2, 1, 203, 203, 20), 90, dict(dropout_p=0.3, dropout_key=KEY)),
    (heads(1, 2, 2, 203, 203, 7), 9, dict(window=5))])  # some tiles see nothing of others
def test_documents_in_a_row_do_not_see_each_other(shapes, longest, options):
    arrays = draw(shapes)
    B, _, T, _ = shapes["q"]
    starts = documents(B, T, longest)
    right = run("attention", "reference", arrays, options | dict(starts=starts))
    if not options:  # the reference itself: one document at a time
        for b in range(B):
            for begin in np.unique(starts[b]):
                here = np.flatnonzero(starts[b] == begin)
                alone = {name: a[b:b + 1, :, here].astype(np.float64) for name, a in arrays.items()}
                check({"y": right["y"][b:b + 1, :, here]}, {"y": np_attention(**alone)})
    for implementation in ("cpu", "portable"):
        if can_run(implementation):
            check(run("attention", implementation, arrays, options | dict(starts=starts)), right)


def test_a_start_behind_its_query_shows_the_own_key():
    arrays = draw(SQUARE)
    starts = np.full((1, 7), 9, np.int32)
    for implementation in ("cpu", "portable", "reference"):
        if can_run(implementation):
            y = kernels.attention(**tensors(arrays), starts=Tensor(starts),
                                  implementation=implementation).numpy()
            np.testing.assert_allclose(y, arrays["v"].repeat(2, axis=1), rtol=1e-6)


def test_flash_attention_leaves_documents_to_the_portable_form():
    q, k, v = (Tensor.empty(*shape) for shape in SQUARE.values())
    with pytest.raises(ValueError, match="'flash' have no attention"):
        kernels.attention(q, k, v, starts=Tensor.zeros(1, 7, dtype="int32"),
                          implementation="flash")
    with pytest.raises(ValueError, match="cannot take tensors of the shapes"):
        kernels.attention(q, k, v, starts=Tensor.zeros(1, 6, dtype="int32"))


# heads of an odd size, tiles with edges, several tiles, and shared keys
PAIRED = {
    "odd": (heads(2, 4, 2, 5, 5, 7), {}),
    "one query": (heads(1, 2, 2, 1, 9, 33), dict(offset=8)),
    "edges": (heads(1, 4, 2, 67, 99, 34), dict(offset=32, window=41)),
    "several tiles": (heads(1, 2, 1, 195, 195, 64), {}),
    "one kv head, fewer than threads": (heads(1, 1, 1, 130, 131, 96), dict(offset=1)),
    "dropout": (heads(1, 2, 2, 97, 97, 20), dict(dropout_p=0.3, dropout_key=KEY)),
}


@pytest.mark.parametrize("instructions", [{}, {"DOT": 1}], ids=["float32", "pairs"])
@pytest.mark.parametrize("name", PAIRED)
def test_bfloat16_in_c_is_close_to_float32(name, instructions, monkeypatch):
    """With an instruction for pairs of bfloat16, which is emulated where there is none."""
    monkeypatch.setattr(kernels.cpu, "bfloat16_defines", lambda: instructions)
    shapes, options = PAIRED[name]
    arrays = draw(shapes)
    dy = draw(dict(dy=shapes["q"]), seed=1)["dy"]  # in bfloat16 too
    got = run("attention", "cpu", arrays, options, "bfloat16", dy=dy)
    check(got, run("attention", "reference", arrays, options, dy=dy), "bfloat16")


@for_each
def test_dropout_in_attention_is_the_same_forward_and_backward(implementation):
    arrays = draw(SQUARE)
    arrays["v"][:] = np.eye(7)  # y is then the weights, and v's gradient their transpose
    dy = np.broadcast_to(np.eye(7, dtype=np.float32), arrays["q"].shape)
    options = dict(dropout_p=0.3, dropout_key=KEY)
    got = run("attention", implementation, arrays, options, dy=dy)
    sum_of_heads = got["y"].reshape(2, 2, 7, 7).sum(axis=1)
    np.testing.assert_allclose(got["v"][0], sum_of_heads.transpose(0, 2, 1), rtol=1e-6)
    again = run("attention", implementation, arrays, options, dy=dy)
    np.testing.assert_array_equal(again["y"], got["y"])
    other = run("attention", implementation, arrays, options | dict(dropout_key=make_key(3)), dy=dy)
    assert ((other["y"] == 0) != (got["y"] == 0)).any()
    below = np.tril(np.ones((7, 7), bool))
    assert 0.1 < (got["y"][..., below] == 0).mean() < 0.5


@for_each
def test_symbolic_offset(implementation):
    arrays = draw(CACHED)
    inputs = tensors(arrays)
    variable = UOp.variable("offset", 0, 10)
    attend = TinyJit(lambda q, k, v, offset: call(
        "attention", implementation, q, k, v, offset=offset, window=4).realize())
    for offset in (1, 10, 0, 7):
        y = attend(*inputs.values(), variable.bind(offset)).numpy()
        check({"y": y}, {"y": np_attention(**arrays, offset=offset, window=4)})


@for_each
def test_attention_takes_views(implementation):
    """As the model hands them over: slices of one matrix, heads and positions swapped."""
    arrays = draw(GROUPED)
    whole = np.concatenate([a.transpose(0, 2, 1, 3).reshape(2, 5, -1) for a in arrays.values()], -1)
    x = Tensor(whole).realize()
    q, k, v = (part.reshape(2, 5, -1, 8).transpose(1, 2) for part in x.split([32, 16, 16], -1))
    y = call("attention", implementation, q, k, v)
    dx = (y * Tensor(cotangent(y.shape))).sum().gradient(x)[0]
    Tensor.realize(y, dx)
    right = result("attention", 0, "reference")
    right_dx = [right[name].transpose(0, 2, 1, 3).reshape(2, 5, -1) for name in ("q", "k", "v")]
    check({"y": y.numpy(), "x": dx.numpy()}, {"y": right["y"], "x": np.concatenate(right_dx, -1)})


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_projection_of_queries_keys_and_values_is_not_copied(dtype):
    arrays, results = draw(dict(x=(2, 70, 24), weight=(40, 24))), {}
    arrays["weight"] /= 8  # scores of about one
    for implementation in ("cpu", "reference"):
        kind = dtype if implementation == "cpu" else "float32"
        inputs = tensors(arrays, kind)
        both = call("linear", implementation, **inputs)
        q, k, v = (part.reshape(2, 70, -1, 5).transpose(1, 2)
                   for part in both.split([20, 10, 10], -1))
        if implementation == "cpu":
            assert kernels.cpu._projections(q, k, v)[0]["k"] is None
        y = call("attention", implementation, q, k, v)
        dx = (y.float() * Tensor(cotangent(y.shape))).sum().gradient(inputs["x"])[0]
        results[implementation] = {"y": y.float().numpy(), "x": dx.float().numpy()}
    check(results["cpu"], results["reference"], dtype)


@for_each
def test_attention_is_stable(implementation):
    arrays = draw(GROUPED)
    arrays["q"] *= 1e3
    arrays["k"] *= 1e3
    got = run("attention", implementation, arrays, {})
    check(got, {"y": np_attention(**{n: a.astype(np.float64) for n, a in arrays.items()})})
    assert all(np.isfinite(a).all() for a in got.values())


def test_attention_equals_pytorch():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.tensor(a, requires_grad=True) for a in draw(GROUPED).values())
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    (y * torch.tensor(cotangent(tuple(y.shape)))).sum().backward()
    right = {"y": y.detach(), "q": q.grad, "k": k.grad, "v": v.grad}
    check(result("attention", 0, "reference"), {name: t.numpy() for name, t in right.items()})
