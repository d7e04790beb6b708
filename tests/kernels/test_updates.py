"""The operations that optimizers use, which have no gradient."""

import numpy as np
import pytest
from operations import (
    check,
    draw,
    implementations,
    np_orthogonalize,
    skip_where_it_is_not_for,
    tensors,
)
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.kernels.cases import ADAMW, LION, MUON
from tinygpt.kernels.cpu.threads import pool


def orthogonalized(implementation: str, *xs: np.ndarray) -> list[np.ndarray]:
    """The directions in which Muon moves for gradients xs, without momentum and decay."""
    options = MUON._replace(learning_rate=-1, momentum=0, weight_decay=0, grad_scale=1)
    moved, momenta = ([Tensor.zeros(*x.shape).contiguous().realize() for x in xs] for _ in "pm")
    Tensor.realize(*kernels.muon(moved, momenta, [Tensor(x).realize() for x in xs],
                                 Tensor(np.array(options, np.float32)).realize(),
                                 implementation=implementation))
    return [p.numpy() / (0.2 * np.sqrt(max(p.shape))) for p in moved]


@pytest.mark.parametrize("implementation", implementations("muon"))
@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (64, 16), (1, 7), (7, 1), (67, 530),
                                   (301, 270)])
@pytest.mark.parametrize("size", [1e-3, 1e6])
def test_muon_brings_singular_values_near_one(implementation, shape, size):
    skip_where_it_is_not_for(implementation)
    x = draw(dict(x=shape))["x"]
    u, s, v = np.linalg.svd(x, full_matrices=False)
    x = ((u * np.geomspace(1, 0.02, len(s))) @ v * size).astype(np.float32)
    y = orthogonalized(implementation, x)[0]
    inside = u.T @ y @ v.T  # y has the singular vectors of x
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=2e-4)
    assert np.diag(inside).min() > 0.6 and np.diag(inside).max() < 1.25
    np.testing.assert_allclose(y, np_orthogonalize(x.astype(np.float64)), atol=2e-4)


@pytest.mark.parametrize("implementation", implementations("muon"))
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_muon_leaves_what_a_matrix_lacks_at_zero(implementation, rank):
    skip_where_it_is_not_for(implementation)
    arrays = draw(dict(a=(20, rank), b=(rank, 30)))
    x = arrays["a"] @ arrays["b"]
    y = orthogonalized(implementation, x)[0]
    np.testing.assert_allclose(y, np_orthogonalize(x.astype(np.float64)), atol=2e-4)


@pytest.mark.parametrize("implementation", implementations("muon"))
def test_muon_of_many_is_that_of_each(implementation):
    skip_where_it_is_not_for(implementation)
    shapes = [(5, 9), (40, 40), (33, 7), (1, 3)] * 5
    arrays = draw({str(i): shape for i, shape in enumerate(shapes)})
    made = orthogonalized(implementation, *arrays.values())
    for y, x in zip(made, arrays.values(), strict=True):
        np.testing.assert_allclose(y, np_orthogonalize(x.astype(np.float64)), atol=2e-4)


def test_muon_has_room_for_every_thread_that_there_is(monkeypatch):
    """Also where fewer were asked for when the threads had begun."""
    skip_where_it_is_not_for("cpu")
    made, empty, threads = [], Tensor.empty, pool().threads
    kernels.set_threads(1)
    monkeypatch.setattr(Tensor, "empty", lambda *shape, **options: made.append(shape)
                        or empty(*shape, **options))
    orthogonalized("cpu", *[np.ones((5, 7), np.float32)] * 16)
    kernels.set_threads(threads)
    assert (min(threads, 16), 2 * 5 * 7 + 4 * 5 * 5) in made


@pytest.mark.parametrize("implementation", implementations("square_sum"))
def test_square_sum(implementation):
    skip_where_it_is_not_for(implementation)
    shapes = [(17, 31), (1,), (3, 5, 7), (5000,), *[(n,) for n in range(1, 40)]]
    arrays = draw({str(i): shape for i, shape in enumerate(shapes)})
    total = kernels.square_sum(*map(Tensor, arrays.values()), implementation=implementation)
    assert total.shape == ()
    right = sum((a.astype(np.float64) ** 2).sum() for a in arrays.values())
    np.testing.assert_allclose(total.numpy(), right, rtol=1e-5)


@pytest.mark.parametrize("implementation", implementations("adamw"))
@pytest.mark.parametrize("shape", [(17, 31), (1,), (509,)])
def test_adamw_updates_in_place_or_not_at_all(implementation, shape):
    skip_where_it_is_not_for(implementation)
    arrays = draw(dict(p=shape, m=shape, v=shape, grad=shape))
    arrays["v"] = np.abs(arrays["v"])
    p, m, v, g = arrays["p"], arrays["m"], arrays["v"], ADAMW.grad_scale * arrays["grad"]
    m = ADAMW.beta1 * m + (1 - ADAMW.beta1) * g
    v = ADAMW.beta2 * v + (1 - ADAMW.beta2) * g**2
    p = p * (1 - ADAMW.learning_rate * ADAMW.weight_decay) - ADAMW.learning_rate * (
        m * ADAMW.bias_correction1) / (np.sqrt(v * ADAMW.bias_correction2) + ADAMW.eps)
    for apply, right in ((1.0, {"p": p, "m": m, "v": v}), (0.0, arrays)):
        state = tensors(arrays | ({} if apply else dict(grad=arrays["grad"] * np.float32("nan"))))
        options = Tensor(ADAMW._replace(apply=apply), dtype="float32")
        Tensor.realize(*kernels.adamw(*state.values(), options, implementation=implementation))
        check({n: state[n].numpy() for n in "pmv"}, {n: right[n] for n in "pmv"})


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(17, 31), (1,), (509,)])
def test_lion_updates_in_place_or_not_at_all(implementation, shape):
    skip_where_it_is_not_for(implementation)
    arrays = draw(dict(p=shape, m=shape, grad=shape))
    arrays["grad"].flat[0] = arrays["m"].flat[0] = 0.0  # whose sign is 0
    p, m, g = arrays["p"], arrays["m"], LION.grad_scale * arrays["grad"]
    p = (p * (1 - LION.learning_rate * LION.weight_decay)
         - LION.learning_rate * np.sign(LION.beta1 * m + (1 - LION.beta1) * g))
    m = LION.beta2 * m + (1 - LION.beta2) * g
    for apply, right in ((1.0, {"p": p, "m": m}), (0.0, arrays)):
        state = tensors(arrays | ({} if apply else dict(grad=arrays["grad"] * np.float32("nan"))))
        options = Tensor(LION._replace(apply=apply), dtype="float32")
        Tensor.realize(*kernels.lion(*state.values(), options, implementation=implementation))
        check({n: state[n].numpy() for n in "pm"}, {n: right[n] for n in "pm"})


@pytest.mark.parametrize("implementation", implementations("muon"))
def test_muon_updates_in_place_or_not_at_all(implementation):
    skip_where_it_is_not_for(implementation)
    shapes = [(17, 31), (300, 160), (1, 3)]
    ps, ms, gs = ([draw(dict(x=s), seed)["x"] for s in shapes] for seed in range(3))
    lr, scale = MUON.learning_rate, MUON.grad_scale
    momenta = [MUON.momentum * m + scale * g for m, g in zip(ms, gs, strict=True)]
    steps = [np_orthogonalize(scale * g + MUON.momentum * m) * 0.2 * np.sqrt(max(g.shape))
             for m, g in zip(momenta, gs, strict=True)]
    moved = [p * (1 - lr * MUON.weight_decay) - lr * s for p, s in zip(ps, steps, strict=True)]
    for apply, right in ((1.0, moved + momenta), (0.0, ps + ms)):
        params, old, grads = ([Tensor(x).realize() for x in xs] for xs in (ps, ms, gs))
        if not apply:
            grads = [Tensor.full(g.shape, float("nan")).contiguous().realize() for g in grads]
        options = Tensor(MUON._replace(apply=apply), dtype="float32")
        Tensor.realize(*kernels.muon(params, old, grads, options, implementation=implementation))
        for ours, theirs in zip(params + old, right, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-4)


@pytest.mark.parametrize("n", [1, 300, 20_000])
@pytest.mark.parametrize("apply", [1.0, 0.0])
def test_adamw8bit_is_the_reference(rng, n, apply):
    """But for a code here and there whose neighbour is as near."""
    skip_where_it_is_not_for("cpu")
    blocks = -(-n // 256)
    arrays = dict(p=rng.standard_normal(n), m=rng.integers(0, 256, (blocks, 256)),
                  m_tops=rng.uniform(0, 2, (blocks, 1)), v=rng.integers(0, 256, (blocks, 256)),
                  v_tops=rng.uniform(0, 2, (blocks, 1)), grad=rng.standard_normal(n))
    for name in "mv":  # the last block's end is of no weight
        arrays[name].reshape(-1)[n:] = 0
    arrays["m_tops"][-1] = 0.0
    options = Tensor(ADAMW._replace(apply=apply), dtype="float32")
    found = []
    for implementation in ("cpu", "reference"):
        state = {k: Tensor(a.astype(np.uint8 if k in "mv" else np.float32)).realize()
                 for k, a in arrays.items()}
        Tensor.realize(*kernels.adamw8bit(*state.values(), options, implementation=implementation))
        found.append({k: t.numpy() for k, t in state.items()})
    for name in ("p", "m_tops", "v_tops"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)
    for name in "mv":
        assert (found[0][name] != found[1][name]).mean() < 1e-3
        assert apply or np.array_equal(found[0][name], arrays[name])
