"""Every implementation of every operation: `reference` against numpy, the others against it."""

import functools
import itertools
import math
import os
import subprocess

import numpy as np
import operations
import pytest
from operations import (
    CASES,
    KEY,
    TOLERANCE,
    WITHOUT_GRADIENT,
    check,
    constants,
    cotangent,
    differentiate,
    draw,
    ids,
    implementations,
    np_bits,
    np_cross_entropy,
    np_dropout,
    result,
    run,
    skip_where_it_is_not_for,
    tensors,
)
from tinygrad import Tensor, TinyJit, dtypes

from tinygpt import kernels
from tinygpt.kernels.cases import can_run
from tinygpt.kernels.cpu import compile, kernel
from tinygpt.kernels.random import make_key, random_bits

NUMBERED = [(operation, n) for operation, cases in CASES.items() for n in range(len(cases))]
OTHERS = [(o, n, i) for o, n in NUMBERED for i in implementations(o, but="reference")]
IN_16_BITS = [(o, i, d) for o in CASES for i in implementations(o)
              for d in ("bfloat16", "float16")]
for_each_cross_entropy = pytest.mark.parametrize("implementation", implementations("cross_entropy"))


@pytest.fixture
def restore():
    yield
    kernels.use("auto")


# ---- what holds for every operation

@pytest.mark.parametrize("dtype", [dtypes.bfloat16, dtypes.float16])
@pytest.mark.parametrize("implementation", implementations("linear"))
def test_matrices_of_16_bits_are_read_as_they_are(implementation, dtype, rng):
    """With activations in float32, nothing is rounded."""
    skip_where_it_is_not_for(implementation, operation="linear")
    narrow = Tensor(rng.normal(size=(29, 37)).astype(np.float32)).cast(dtype).realize()
    wide = narrow.float().realize()
    for rows in (1, 9):  # a dot product for each, and a matrix product
        x = Tensor(rng.normal(size=(rows, 37)).astype(np.float32)).realize()
        y = kernels.linear(x, narrow, implementation=implementation).numpy()
        np.testing.assert_allclose(y, x.numpy() @ wide.numpy().T, atol=1e-4)
    idx = Tensor(np.array([[0, 28, 5]], np.int32))
    rows = kernels.embedding(idx, narrow, implementation=implementation)
    assert rows.dtype == dtypes.float32
    assert np.array_equal(rows.numpy(), wide.numpy()[[[0, 28, 5]]])


@pytest.mark.parametrize("operation, number", NUMBERED)
def test_reference_equals_numpy(operation, number):
    shapes, options = CASES[operation][number]
    in_numpy = functools.partial(getattr(operations, f"np_{operation}"), **options)
    arrays = {name: a.astype(np.float64) for name, a in draw(shapes).items()}
    ours, right = result(operation, number, "reference"), in_numpy(**arrays)
    check(ours, {"y": right})

    rng, dy = np.random.default_rng(3), cotangent(np.shape(right))
    for name in arrays:  # the gradient along a random direction, against a difference quotient
        direction = rng.standard_normal(arrays[name].shape)
        y1, y2 = (in_numpy(**arrays | {name: arrays[name] + h * direction}) for h in (-1e-5, 1e-5))
        slope = ((y2 - y1) * dy).sum() / 2e-5
        error = abs((ours[name] * direction).sum() - slope)
        assert error <= 1e-4 * max(np.linalg.norm(ours[name]), 1e-2), name


@pytest.mark.parametrize("operation, number, implementation", OTHERS)
def test_equals_reference(operation, number, implementation):
    check(result(operation, number, implementation), result(operation, number, "reference"))


@pytest.mark.parametrize("operation, implementation, dtype", IN_16_BITS)
def test_16_bits_are_close_to_float32(operation, implementation, dtype):
    check(result(operation, 0, implementation, dtype), result(operation, 0, "reference"), dtype)


@pytest.mark.parametrize("implementation", kernels.IMPLEMENTATIONS)
def test_same_under_the_jit(implementation):
    skip_where_it_is_not_for(implementation)
    offered = [o for o in CASES if implementation in implementations(o)
               and can_run(implementation, operation=o)]
    fixed = {o: constants(CASES[o][0][1]) for o in offered}

    @TinyJit
    def step(**inputs):
        outputs = {}
        for o in offered:
            mine = {name.split(".")[1]: t for name, t in inputs.items()
                    if name.startswith(f"{o}.")}
            y, grads = differentiate(o, implementation, mine, fixed[o])
            outputs |= {f"{o}.y": y} | {f"{o}.{name}": g for name, g in grads.items()}
        Tensor.realize(*outputs.values())
        return outputs

    for seed in (2, 1, 0):  # run, captured, replayed
        outputs = step(**{f"{o}.{name}": t for o in offered
                          for name, t in tensors(draw(CASES[o][0][0], seed)).items()})
    for o in offered:
        check({name.split(".")[1]: t.numpy() for name, t in outputs.items()
               if name.startswith(f"{o}.")}, result(o, 0, "reference"))


@pytest.mark.parametrize("operation", CASES)
def test_unknown_implementation_is_refused(operation):
    shapes, options = CASES[operation][0]
    with pytest.raises(ValueError, match="choose auto, reference"):
        run_by_name(operation, "nonsense", shapes, options)
    for name in set(kernels.IMPLEMENTATIONS) - set(implementations(operation)):
        with pytest.raises(ValueError, match=f"{name}.* no {operation}"):
            run_by_name(operation, name, shapes, options)


def run_by_name(operation, implementation, shapes, options):
    getattr(kernels, operation)(**tensors(draw(shapes)), **constants(options),
                                implementation=implementation)


def test_use_decides_what_auto_means(restore, monkeypatch):
    for name, module in kernels.IMPLEMENTATIONS.items():
        for operation in ("attention", "gelu"):
            if hasattr(module, operation):
                monkeypatch.setattr(module, operation, lambda *_, name=name: name)
    for module in (kernels.cpu, kernels.cuda, kernels.flash):
        monkeypatch.setattr(module, "fits", lambda *_: True)
    q, k, v = (Tensor.zeros(1, 2, 3, 4) for _ in range(3))
    before = kernels.gelu(q), kernels.attention(q, k, v)
    for name, module in kernels.IMPLEMENTATIONS.items():
        kernels.use(name)  # cuda has no attention
        assert kernels.attention(q, k, v) == (name if hasattr(module, "attention") else before[1])
    kernels.use("flash")
    assert kernels.gelu(q) == before[0]  # flash has attention alone
    kernels.use("reference")
    assert kernels.gelu(q) == kernels.gelu(q, implementation="auto") == "reference"
    assert kernels.gelu(q, implementation="portable") == "portable"
    with pytest.raises(ValueError, match="nonsense"):
        kernels.use("nonsense")
    assert kernels.gelu(q) == "reference"
    kernels.use("auto")
    assert (kernels.gelu(q), kernels.attention(q, k, v)) == before


def test_what_is_asked_for_by_use_runs_or_raises(restore):
    double = Tensor(np.ones((3, 4)), dtype=dtypes.double, device="CPU").realize()
    with pytest.warns(UserWarning, match="no C kernel for swiglu of dtypes.double:"):
        kernels.swiglu(double, double)
    kernels.use("cpu")
    with pytest.raises(ValueError, match=r"'cpu' have no gelu for .*double"):
        kernels.gelu(double)


def filled(*shape: int, dtype=dtypes.float32) -> Tensor:
    return Tensor.ones(*shape, dtype=dtype).contiguous().realize()


MISFITS = {
    "linear": [lambda: (filled(4, 10), filled(6, 12)),
               lambda: (filled(4, 12), filled(6, 12), filled(12)),
               lambda: (filled(4, 12), filled(6, 12), None, filled(6))],
    "quantized_linear": [lambda: (filled(4, 10), filled(6, 12, dtype=dtypes.int8), filled(6))],
    "attention": [lambda: (filled(1, 4, 5, 8), filled(1, 3, 5, 8), filled(1, 3, 5, 8)),
                  lambda: (filled(1, 4, 5, 8), filled(1, 4, 5, 6), filled(1, 4, 5, 6)),
                  lambda: (filled(1, 4, 5, 8), filled(1, 4, 5, 8), filled(1, 4, 3, 8))],
    "layer_norm": [lambda: (filled(4, 10), filled(8)),
                   lambda: (filled(4, 10), filled(10), filled(1))],
    "rms_norm": [lambda: (filled(4, 10), filled(20))],
    "swiglu": [lambda: (filled(4, 10), filled(10))],
    "rope": [lambda: (filled(1, 2, 5, 8), filled(4, 4), filled(4, 4))],
    "cross_entropy": [lambda: (filled(4, 10), filled(3, dtype=dtypes.int32))],
}


@pytest.mark.parametrize("operation", MISFITS)
def test_shapes_that_do_not_fit_one_another_are_refused(operation):
    for make in MISFITS[operation]:
        with pytest.raises(ValueError, match="cannot take tensors of the shapes"):
            getattr(kernels, operation)(*make())


@pytest.mark.parametrize("operation, make", [
    ("gelu", lambda: (filled(4, 4, dtype=dtypes.int32),)),
    ("embedding", lambda: (filled(4, dtype=dtypes.int32), filled(5, 4, dtype=dtypes.float64))),
    ("square_sum", lambda: (filled(4, 4, dtype=dtypes.bfloat16),)),
    ("attention", lambda: [filled(1, 1, 2, 4096)] * 3)])
def test_the_c_kernels_are_not_given_what_they_would_misread(operation, make):
    with pytest.raises(ValueError, match=f"'cpu' have no {operation}"):
        getattr(kernels, operation)(*make(), implementation="cpu")


@pytest.mark.parametrize("implementation", ["reference", "portable", "cpu"])
def test_nan_is_not_swallowed(implementation):
    logits = draw(dict(logits=(5, 70)))["logits"]
    logits[2, 7] = logits[3, 69] = np.nan
    for row, lost in enumerate([False, False, True, True, False]):
        got = run("cross_entropy", implementation, dict(logits=logits[row:row + 1]),
                  dict(targets=np.zeros(1, np.int32)))
        assert np.isnan(got["y"]) == lost == np.isnan(got["logits"]).any()
    arrays = draw(dict(q=(1, 2, 5, 16), k=(1, 2, 5, 16), v=(1, 2, 5, 16)))
    arrays["q"][0, 1, 3, 2] = np.nan
    out = run("attention", implementation, arrays, {})["y"]
    assert np.isnan(out[0, 1, 3]).all() and np.isfinite(np.delete(out[0, 1], 3, axis=0)).all()


# ---- matrix products deeper than a slice and wider than a strip, with edges on every side


# what multiplies bfloat16; what the processor lacks is emulated
BFLOAT16 = [{}, {"AMX": 1, "AMX_EMULATED": 1}, {"DOT": 1}]
DEEP = dict(x=(67, 1100), weight=(1553, 1100), bias=(1553,), residual=(67, 1553))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("instructions", BFLOAT16, ids=lambda d: "_".join(d) or "float32")
def test_c_products_of_several_strips_and_slices(instructions, dtype, monkeypatch):
    monkeypatch.setattr(kernels.cpu, "bfloat16_defines", lambda: instructions)
    arrays = draw(DEEP)
    right = run("linear", "reference", arrays, {})
    check(run("linear", "cpu", arrays, {}, dtype), right, dtype)
    for name in ("x", "residual"):  # the same numbers come out of numbers that need no rounding
        arrays[name] = np.sign(arrays[name])
    arrays["weight"] = np.round(arrays["weight"])
    exact = run("linear", "cpu", arrays, {}, dtype, dy=np.ones(DEEP["residual"], np.float32))
    for name in ("weight", "bias"):
        column_sums = arrays["x"].sum(0) if name == "weight" else np.float32(67)
        np.testing.assert_array_equal(exact[name], np.broadcast_to(column_sums, DEEP[name]))


PROCESSORS = {"avx512": ["x86_64", "-march=sapphirerapids"], "sse": ["x86_64", "-march=x86-64"],
              "neon": ["aarch64", "-mcpu=apple-m1"], "bfdot": ["aarch64", "-mcpu=apple-m2"]}


@pytest.fixture(scope="module")
def c_sources():
    """The source of every C kernel that the cases use, with each way to multiply bfloat16 and
    integers."""
    sources, build = {}, kernel.program

    def program(name, code, *rest):
        sources[name] = code
        return build(name, code, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "program", program)
        patch.setattr(compile.Compilations, "begin", lambda *args: None)  # not for this processor
        for defines in ({}, {"AMX": 1}, {"DOT": 1}):
            patch.setattr(kernels.cpu, "bfloat16_defines", lambda defines=defines: defines)
            for operation, dtype in itertools.product(CASES, TOLERANCE):
                if "cpu" in implementations(operation):
                    shapes, options = CASES[operation][0]
                    differentiate(operation, "cpu", tensors(draw(shapes), dtype),
                                  constants(options))
        for operation, cases in WITHOUT_GRADIENT.items():
            for shapes, options in cases:
                run(operation, "cpu", draw(shapes), options)
        for defines in ({}, {"VNNI": 1}):
            patch.setattr(kernels.cpu, "integer_defines", lambda defines=defines: defines)
            for weight, scale in ((filled(6, 32, dtype=dtypes.float16), None),
                                  (filled(6, 32, dtype=dtypes.int8), filled(6)),
                                  (filled(6, 16, dtype=dtypes.uint8),
                                   filled(6, 1, dtype=dtypes.float16))):
                kernels.quantized_linear(filled(9, 32), weight, scale,
                                         implementation="cpu").realize()
    for kind in ("FLOAT", "AMX", "DOT"):
        defines = ((kind, 1), ("ROUNDS", 1), ("BURSTS", 1))
        sources |= [kernel.source("peak.c", f"peak_{kind}1".lower(), defines)]
    return sources


@pytest.mark.parametrize("processor", PROCESSORS)
def test_c_compiles_for_other_processors(processor, c_sources):
    assert all(any(kind in name for name in c_sources) for kind in ("amx1", "vnni1", "int41"))
    target, *options = PROCESSORS[processor]
    command = [os.environ.get("CC", "clang"), f"--target={target}-none-unknown-elf", *options,
               "-x", "c", "-c", "-O0", "-ffreestanding", "-Wall", "-Werror", "-Wno-psabi",
               "-Wno-unused",
               "-o", os.devnull, "-"]
    for name, code in c_sources.items():
        if "amx1" not in name or processor == "avx512":
            done = subprocess.run(command, input=code, text=True, capture_output=True)
            assert done.returncode == 0, f"{name}: {done.stderr}"


# ---- cross entropy


@for_each_cross_entropy
def test_cross_entropy_is_stable(implementation):
    rng, targets = np.random.default_rng(4), ids((17,), 509)
    logits = rng.standard_normal((17, 509), dtype=np.float32) * 1e4
    got = run("cross_entropy", implementation, dict(logits=logits), dict(targets=targets))
    check(got, {"y": np_cross_entropy(logits.astype(np.float64), targets)})
    right = np.zeros_like(logits)  # of such logits the largest has probability 1
    right[np.arange(17), logits.argmax(-1)] += 1
    right[np.arange(17), targets] -= 1
    check(got, {"logits": right / 17 * cotangent(())})


@for_each_cross_entropy
def test_a_target_outside_of_the_vocabulary_is_no_logit(implementation):
    logits = draw(dict(logits=(6, 37)))
    options = dict(targets=np.array([1, 36, 37, 16777217, 2**31 - 1, -1], np.int32),
                   label_smoothing=0.1)
    check(run("cross_entropy", implementation, logits, options),
          run("cross_entropy", "reference", logits, options))


def test_an_id_outside_of_the_vocabulary_touches_no_foreign_memory():
    idx = dict(idx=np.array([2, 10**9, -10**9, 0], np.int32))
    weight = draw(dict(weight=(5, 12)))
    got = run("embedding", "cpu", weight, idx)
    assert np.array_equal(got["y"][[0, 3]], weight["weight"][[2, 0]]) and not got["y"][1:3].any()
    right = np.zeros((5, 12), np.float32)
    right[[2, 0]] = cotangent((4, 12))[[0, 3]]
    assert np.array_equal(got["weight"], right)


@for_each_cross_entropy
def test_ignored_targets_count_for_nothing(implementation):
    logits, targets = draw(dict(logits=(17, 509)))["logits"], ids((17,), 509)
    targets[[0, 5, 16]] = -1, -100, -2**31  # nanoGPT's, Hugging Face's, and any other
    options = dict(targets=targets, label_smoothing=0.1, z_loss=0.01)
    before = run("cross_entropy", implementation, dict(logits=logits), options)
    assert not before["logits"][[0, 5, 16]].any() and before["logits"][1].all()
    logits[[0, 5, 16]] = 77
    after = run("cross_entropy", implementation, dict(logits=logits), options)
    assert after["y"] == before["y"]


@for_each_cross_entropy
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(implementation):
    logits = dict(logits=np.zeros((17, 509), np.float32))
    targets = ids((17,), 509)
    plain = run("cross_entropy", implementation, logits, dict(targets=targets))["y"]
    options = dict(targets=targets, label_smoothing=0.1, z_loss=0.01)
    more = run("cross_entropy", implementation, logits, options)["y"]
    np.testing.assert_allclose(plain, math.log(509), rtol=1e-6)
    np.testing.assert_allclose(more, math.log(509) + 0.01 * math.log(509) ** 2, rtol=1e-6)


def test_label_smoothing_and_ignored_targets_equal_pytorch():
    torch = pytest.importorskip("torch")
    logits = torch.tensor(draw(dict(logits=(17, 509)))["logits"], requires_grad=True)
    targets = ids((17,), 509, -1)
    loss = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets, dtype=torch.long), label_smoothing=0.1, ignore_index=-1)
    loss = loss + 0.01 * (logits.logsumexp(-1)[torch.tensor(targets != -1)] ** 2).mean()
    (loss * float(cotangent(()))).backward()
    check(result("cross_entropy", 0, "reference"),
          {"y": loss.detach().numpy(), "logits": logits.grad.numpy()})


# ---- norms


@pytest.mark.parametrize("implementation", implementations("layer_norm"))
def test_layer_norm_of_constant_and_of_shifted_rows(implementation):
    arrays = draw(dict(x=(17, 10), weight=(10,), bias=(10,)))
    plain = run("layer_norm", implementation, arrays, dict(eps=0.1))["y"]
    arrays["x"] += 100
    arrays["x"][3] = 7
    got = run("layer_norm", implementation, arrays, dict(eps=0.1))
    np.testing.assert_allclose(got["y"][3], arrays["bias"], atol=1e-6)
    rest = np.arange(17) != 3
    np.testing.assert_allclose(got["y"][rest], plain[rest], atol=1e-4)
    assert all(np.isfinite(a).all() for a in got.values())


# ---- dropout


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dropout_zeroes_and_scales_forward_and_backward(dtype):
    arrays = draw(dict(x=(13, 509)))
    x, dy = tensors(arrays, dtype)["x"], np.ones((13, 509), np.float32)
    for p in (0.2, 0.9):
        y = kernels.dropout(x, p, Tensor(KEY))
        grad = (y.cast(dtypes.float32) * Tensor(dy)).sum().gradient(x)[0]
        assert y.dtype == grad.dtype == x.dtype
        ours = {"y": y.cast(dtypes.float32).numpy(), "x": grad.cast(dtypes.float32).numpy()}
        check(ours, {"y": np_dropout(arrays["x"], p, KEY), "x": np_dropout(dy, p, KEY)}, dtype)
        assert abs((ours["x"] == 0).mean() - p) < 0.02


def test_dropout_without_a_key_or_probability_is_the_identity():
    x = Tensor.ones(3)
    assert kernels.dropout(x, 0.5, None) is x and kernels.dropout(x, 0.0, Tensor(KEY)) is x


def test_dropout_depends_on_key_and_position_alone():
    x = Tensor(np.ones(1009, np.float32)).realize()
    first, again, other = (kernels.dropout(x, 0.5, Tensor(make_key(*words))).numpy()
                           for words in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert 0.4 < (first != other).mean() < 0.6
    np.testing.assert_array_equal(random_bits(Tensor(KEY), (1009,)).numpy(), np_bits(KEY, 1009))
