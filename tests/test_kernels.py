"""Every implementation of every operation: `reference` against numpy, the others against it."""

import functools
import itertools
import math
import os
import subprocess

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, UOp, dtypes

from tinygpt import kernels
from tinygpt.kernels.cpu import launch
from tinygpt.kernels.random import make_key, random_bits

# largest error, as a share of the largest number that is right
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
WEIGHTS = ("weight", "bias")  # float32 whatever the activations are


def ids(shape: tuple[int, ...], high: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(5).integers(low, high, shape).astype(np.int32)


def heads(B: int, H: int, G: int, T: int, S: int, D: int) -> dict[str, tuple[int, ...]]:
    return {"q": (B, H, T, D), "k": (B, G, S, D), "v": (B, G, S, D)}


ANGLES = np.outer(np.arange(3), 1 / np.arange(1, 6)).astype(np.float32)
KEY = make_key(1, 2)
GROUPED = heads(2, 4, 2, 5, 5, 8)
CACHED = heads(1, 5, 1, 3, 13, 6)
SQUARE = heads(1, 4, 2, 7, 7, 7)

# operation: (shapes of the inputs that have a gradient, other arguments), ...; in bfloat16 the
# first of each only
CASES = {
    "linear": [
        (dict(x=(3, 7, 10), weight=(6, 10), bias=(6,), residual=(3, 7, 6)), {}),
        (dict(x=(17, 5), weight=(1, 5)), {}),
        (dict(x=(1, 1, 80), weight=(13, 80), bias=(13,)), {}),
    ],
    "embedding": [
        (dict(weight=(509, 12)), dict(idx=ids((3, 7), 509))),
        (dict(weight=(1, 5)), dict(idx=ids((1, 3), 1))),
    ],
    "layer_norm": [
        (dict(x=(17, 10), weight=(10,), bias=(10,)), dict(eps=0.1)),
        (dict(x=(2, 3, 7, 13), weight=(13,)), {}),
        (dict(x=(1, 1, 80), weight=(80,), bias=(80,)), {}),
    ],
    "rms_norm": [
        (dict(x=(17, 10), weight=(10,)), dict(eps=0.1)),
        (dict(x=(2, 3, 7, 13), weight=(13,)), {}),
    ],
    "gelu": [(dict(x=(17, 10)), dict(tanh=True)), (dict(x=(17, 10)), {}), (dict(x=(1, 3, 1)), {})],
    "swiglu": [(dict(gate=(17, 10), up=(17, 10)), {}), (dict(gate=(1, 3, 1), up=(1, 3, 1)), {})],
    "rope": [
        (dict(x=(2, 5, 3, 10)), dict(cos=np.cos(ANGLES), sin=np.sin(ANGLES))),
        (dict(x=(1, 1, 1, 2)), dict(cos=np.cos(ANGLES[2:, :1]), sin=np.sin(ANGLES[2:, :1]))),
    ],
    "attention": [
        (GROUPED, {}),
        (heads(1, 1, 1, 65, 65, 80), dict(window=17)),
        (CACHED, dict(offset=7, window=4)),
        (heads(2, 2, 2, 1, 9, 4), dict(offset=8)),
        (SQUARE, dict(dropout_p=0.3, dropout_key=KEY)),
    ],
    "cross_entropy": [
        (dict(logits=(17, 509)), dict(targets=ids((17,), 509, -1), label_smoothing=0.1,
                                      z_loss=0.01)),
        (dict(logits=(17, 509)), dict(targets=ids((17,), 509))),
        (dict(logits=(3, 7)), dict(targets=np.array([6, 2, 0], np.int32), ignore_index=2)),
        (dict(logits=(1, 1)), dict(targets=np.array([0], np.int32), z_loss=0.5)),
    ],
}


# ---- the same operations in numpy, in float64


def np_bits(key: np.ndarray, count: int) -> np.ndarray:
    def mix(x):
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)
    return mix(mix(np.arange(count, dtype=np.uint32)) + key)


def np_dropout(x, p, key):
    return np.where(np_bits(key, x.size).reshape(x.shape) / 2**32 >= p, x / (1 - p), 0)


def np_linear(x, weight, bias=0, residual=0):
    return residual + np.einsum("...c,nc->...n", x, weight) + bias


def np_embedding(idx, weight):
    return weight[idx]


def np_layer_norm(x, weight, bias=0, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def np_rms_norm(x, weight, eps=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def np_gelu(x, tanh=False):
    if tanh:
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def np_swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def np_rope(x, cos, sin):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def np_attention(q, k, v, offset=0, window=None, dropout_p=0.0, dropout_key=None):
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    distance = offset + np.arange(T)[:, None] - np.arange(S)
    scores = np.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    scores[:, :, (distance < 0) | (distance >= (window or math.inf))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (np_dropout(weights, dropout_p, dropout_key) if dropout_p else weights) @ v


def np_cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0, ignore_index=-1):
    rows, counted = np.arange(len(targets)), targets != ignore_index
    top = logits.max(-1)
    log_z = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    wanted = ((1 - label_smoothing) * logits[rows, targets] + label_smoothing * logits.mean(-1))
    return (log_z - wanted + z_loss * log_z**2)[counted].mean()


def np_orthogonalize(x):
    x = x / (np.linalg.norm(x) + 1e-7)
    if len(x) > x.shape[1]:
        return np_orthogonalize(x.T).T
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


# ---- running them


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in arrays.items()}


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the output's gradient is."""
    return np.random.default_rng(9).standard_normal(shape, dtype=np.float32)


def tensors(arrays: dict, dtype: str = "float32") -> dict:
    """The arrays in that dtype, weights in float32."""
    kinds = {name: dtypes.float32 if name in WEIGHTS else getattr(dtypes, dtype) for name in arrays}
    return {name: Tensor(a).cast(kinds[name]).contiguous().realize() for name, a in arrays.items()}


def constants(options: dict) -> dict:
    return {name: Tensor(a).realize() if isinstance(a, np.ndarray) else a
            for name, a in options.items()}


def call(operation: str, implementation: str, *inputs: Tensor, **options) -> Tensor:
    """The output, or a skip where the implementation has none for such inputs."""
    try:
        return getattr(kernels, operation)(*inputs, **options, implementation=implementation)
    except ValueError as error:
        pytest.skip(f"not offered: {error}")


def differentiate(operation: str, implementation: str, inputs: dict[str, Tensor], options: dict,
                  dy: np.ndarray | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradient of each input, where the output's gradient is dy."""
    y = call(operation, implementation, **inputs, **options)
    dy = Tensor(cotangent(y.shape) if dy is None else dy)
    grads = (y.cast(dtypes.float32) * dy).sum().gradient(*inputs.values())
    return y, dict(zip(inputs, grads, strict=True))


def run(operation: str, implementation: str, arrays: dict[str, np.ndarray], options: dict,
        dtype: str = "float32", dy: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Output ("y") and gradients as float32 arrays."""
    y, grads = differentiate(operation, implementation, tensors(arrays, dtype),
                             constants(options), dy)
    Tensor.realize(y, *grads.values())
    for name, g in grads.items():
        assert g.shape == arrays[name].shape
        assert g.dtype == (dtypes.float32 if name in WEIGHTS else getattr(dtypes, dtype)), name
    in_float32 = operation in ("embedding", "cross_entropy")
    assert y.dtype == (dtypes.float32 if in_float32 else getattr(dtypes, dtype))
    return {name: t.cast(dtypes.float32).numpy() for name, t in {"y": y, **grads}.items()}


@functools.cache
def result(operation: str, number: int, implementation: str, dtype: str = "float32"):
    shapes, options = CASES[operation][number]
    return run(operation, implementation, draw(shapes), options, dtype)


def check(ours: dict, theirs: dict, dtype: str = "float32") -> None:
    for name, right in theirs.items():
        assert np.isfinite(ours[name]).all(), name
        error = np.abs(ours[name] - right).max() / max(np.abs(right).max(), 0.01)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


def implementations(operation: str, but: str = "") -> list[str]:
    return [name for name, module in kernels.IMPLEMENTATIONS.items()
            if name != but and hasattr(module, operation)]


NUMBERED = [(operation, n) for operation, cases in CASES.items() for n in range(len(cases))]
OTHERS = [(o, n, i) for o, n in NUMBERED for i in implementations(o, but="reference")]
IN_BFLOAT16 = [(o, i) for o in CASES for i in implementations(o)]
for_each_attention = pytest.mark.parametrize("implementation", implementations("attention"))
for_each_cross_entropy = pytest.mark.parametrize("implementation", implementations("cross_entropy"))


@pytest.fixture
def restore():
    yield
    kernels.use("auto")


# ---- what holds for every operation


@pytest.mark.parametrize("operation, number", NUMBERED)
def test_reference_equals_numpy(operation, number):
    shapes, options = CASES[operation][number]
    in_numpy = functools.partial(globals()[f"np_{operation}"], **options)
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


@pytest.mark.parametrize("operation, implementation", IN_BFLOAT16)
def test_bfloat16_is_close_to_float32(operation, implementation):
    check(result(operation, 0, implementation, "bfloat16"), result(operation, 0, "reference"),
          "bfloat16")


@pytest.mark.parametrize("implementation", kernels.IMPLEMENTATIONS)
def test_same_under_the_jit(implementation):
    offered = [o for o in CASES if implementation in implementations(o)]
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
    monkeypatch.setattr(kernels.flash, "fits", lambda *_: True)
    before = kernels.gelu(None), kernels.attention(None, None, None)
    for name in kernels.IMPLEMENTATIONS:
        kernels.use(name)
        assert kernels.attention(None, None, None) == name
    kernels.use("tinygrad")
    assert kernels.gelu(None) == "portable"  # tinygrad's has none
    kernels.use("flash")
    assert kernels.gelu(None) == before[0]  # flash has attention alone
    kernels.use("reference")
    assert kernels.gelu(None) == kernels.gelu(None, implementation="auto") == "reference"
    assert kernels.gelu(None, implementation="portable") == "portable"
    with pytest.raises(ValueError, match="nonsense"):
        kernels.use("nonsense")
    assert kernels.gelu(None) == "reference"
    kernels.use("auto")
    assert (kernels.gelu(None), kernels.attention(None, None, None)) == before


# ---- matrix products deeper than a slice and wider than a strip, with edges on every side


DEEP = dict(x=(67, 1100), weight=(530, 1100), bias=(530,), residual=(67, 530))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["", "emulated"])
def test_c_products_of_several_slices(kind, dtype, monkeypatch):
    monkeypatch.setattr(kernels.cpu, "amx", lambda: kind)
    arrays = draw(DEEP)
    right = run("linear", "reference", arrays, {})
    check(run("linear", "cpu", arrays, {}, dtype), right, dtype)
    for name in ("x", "residual"):  # the same numbers come out of numbers that need no rounding
        arrays[name] = np.sign(arrays[name])
    arrays["weight"] = np.round(arrays["weight"])
    exact = run("linear", "cpu", arrays, {}, dtype, dy=np.ones((67, 530), np.float32))
    for name, shape in (("weight", (530, 1100)), ("bias", (530,))):
        column_sums = arrays["x"].sum(0) if name == "weight" else np.float32(67)
        np.testing.assert_array_equal(exact[name], np.broadcast_to(column_sums, shape))


PROCESSORS = {"avx512": ["x86_64", "-march=sapphirerapids"], "sse": ["x86_64", "-march=x86-64"],
              "neon": ["aarch64", "-mcpu=apple-m1"]}


@pytest.fixture(scope="module")
def c_sources():
    """The source of every C kernel that the operations use, with and without AMX."""
    sources, build = {}, launch.program

    def program(name, code, *rest):
        sources[name] = code
        return build(name, code, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "program", program)
        for amx in ("", "real"):
            patch.setattr(kernels.cpu, "amx", lambda amx=amx: amx)
            for operation, dtype in itertools.product(CASES, TOLERANCE):
                if "cpu" in implementations(operation):
                    shapes, options = CASES[operation][0]
                    differentiate(operation, "cpu", tensors(draw(shapes), dtype),
                                  constants(options))
    return sources


@pytest.mark.parametrize("processor", PROCESSORS)
def test_c_compiles_for_other_processors(processor, c_sources):
    assert any("amx1" in name for name in c_sources) and len(c_sources) > 30
    target, *options = PROCESSORS[processor]
    command = [os.environ.get("CC", "clang"), f"--target={target}-none-unknown-elf", *options,
               "-x", "c", "-c", "-O1", "-ffreestanding", "-Wall", "-Werror", "-Wno-psabi",
               "-Wno-unused",
               "-o", os.devnull, "-"]
    for name, code in c_sources.items():
        if "amx1" not in name or processor == "avx512":
            done = subprocess.run(command, input=code, text=True, capture_output=True)
            assert done.returncode == 0, f"{name}: {done.stderr}"


# ---- attention


@for_each_attention
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


@for_each_attention
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


@for_each_attention
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


@for_each_attention
def test_symbolic_offset(implementation):
    arrays = draw(CACHED)
    inputs = tensors(arrays)
    variable = UOp.variable("offset", 0, 10)
    attend = TinyJit(lambda q, k, v, offset: call(
        "attention", implementation, q, k, v, offset=offset, window=4).realize())
    for offset in (1, 10, 0, 7):
        y = attend(*inputs.values(), variable.bind(offset)).numpy()
        check({"y": y}, {"y": np_attention(**arrays, offset=offset, window=4)})


@for_each_attention
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


@for_each_attention
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
def test_ignored_targets_count_for_nothing(implementation):
    logits, targets = draw(dict(logits=(17, 509)))["logits"], ids((17,), 509)
    targets[[0, 5, 16]] = -1
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


# ---- what optimizers use, which has no gradient


@pytest.mark.parametrize("implementation", implementations("orthogonalize"))
@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (64, 16), (1, 7), (7, 1), (67, 530)])
@pytest.mark.parametrize("size", [1e-3, 1e6])
def test_orthogonalize_brings_singular_values_near_one(implementation, shape, size):
    x = draw(dict(x=shape))["x"]
    u, s, v = np.linalg.svd(x, full_matrices=False)
    x = ((u * np.geomspace(1, 0.02, len(s))) @ v * size).astype(np.float32)
    y = kernels.orthogonalize(Tensor(x), implementation=implementation).numpy()
    inside = u.T @ y @ v.T  # y has the singular vectors of x
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=2e-4)
    assert np.diag(inside).min() > 0.6 and np.diag(inside).max() < 1.25
    np.testing.assert_allclose(y, np_orthogonalize(x.astype(np.float64)), atol=2e-4)


@pytest.mark.parametrize("implementation", implementations("orthogonalize"))
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_orthogonalize_leaves_what_a_matrix_lacks_at_zero(implementation, rank):
    arrays = draw(dict(a=(20, rank), b=(rank, 30)))
    x = arrays["a"] @ arrays["b"]
    y = kernels.orthogonalize(Tensor(x), implementation=implementation).numpy()
    np.testing.assert_allclose(y, np_orthogonalize(x.astype(np.float64)), atol=2e-4)



@pytest.mark.parametrize("implementation", implementations("square_sum"))
def test_square_sum(implementation):
    shapes = [(17, 31), (1,), (3, 5, 7), (5000,), *[(n,) for n in range(1, 40)]]
    arrays = draw({str(i): shape for i, shape in enumerate(shapes)})
    total = kernels.square_sum(*map(Tensor, arrays.values()), implementation=implementation)
    assert total.shape == ()
    right = sum((a.astype(np.float64) ** 2).sum() for a in arrays.values())
    np.testing.assert_allclose(total.numpy(), right, rtol=1e-5)


@pytest.mark.parametrize("implementation", implementations("adamw"))
@pytest.mark.parametrize("shape", [(17, 31), (1,), (509,)])
def test_adamw_updates_in_place_or_not_at_all(implementation, shape):
    arrays = draw(dict(p=shape, m=shape, v=shape, grad=shape))
    arrays["v"] = np.abs(arrays["v"])
    lr, b1, b2, eps, decay, debias1, debias2, scale = 0.1, 0.9, 0.95, 1e-3, 0.2, 3.0, 5.0, 0.5
    p, m, v, g = arrays["p"], arrays["m"], arrays["v"], scale * arrays["grad"]
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    p = p * (1 - lr * decay) - lr * (m * debias1) / (np.sqrt(v * debias2) + eps)
    for apply, right in ((1.0, {"p": p, "m": m, "v": v}), (0.0, arrays)):
        state = tensors(arrays | ({} if apply else dict(grad=arrays["grad"] * np.float32("nan"))))
        options = [lr, b1, b2, eps, decay, debias1, debias2, scale, apply]
        try:
            Tensor.realize(*kernels.adamw(*state.values(), Tensor(options, dtype="float32"),
                                          implementation=implementation))
        except ValueError as error:
            pytest.skip(f"not offered: {error}")
        check({n: state[n].numpy() for n in "pmv"}, {n: right[n] for n in "pmv"})


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(17, 31), (1,), (509,)])
def test_lion_updates_in_place_or_not_at_all(implementation, shape):
    arrays = draw(dict(p=shape, m=shape, grad=shape))
    arrays["grad"].flat[0] = arrays["m"].flat[0] = 0.0  # whose sign is 0
    lr, b1, b2, decay, scale = 0.1, 0.9, 0.95, 0.2, 0.5
    p, m, g = arrays["p"], arrays["m"], scale * arrays["grad"]
    p = p * (1 - lr * decay) - lr * np.sign(b1 * m + (1 - b1) * g)
    m = b2 * m + (1 - b2) * g
    for apply, right in ((1.0, {"p": p, "m": m}), (0.0, arrays)):
        state = tensors(arrays | ({} if apply else dict(grad=arrays["grad"] * np.float32("nan"))))
        options = Tensor([lr, b1, b2, decay, scale, apply], dtype="float32")
        Tensor.realize(*kernels.lion(*state.values(), options, implementation=implementation))
        check({n: state[n].numpy() for n in "pm"}, {n: right[n] for n in "pm"})


@pytest.mark.parametrize("n", [1, 300, 20_000])
@pytest.mark.parametrize("apply", [1.0, 0.0])
def test_adamw8bit_is_the_reference(rng, n, apply):
    """But for a code here and there whose neighbour is as near."""
    blocks = -(-n // 256)
    arrays = dict(p=rng.standard_normal(n), m=rng.integers(0, 256, (blocks, 256)),
                  m_tops=rng.uniform(0, 2, (blocks, 1)), v=rng.integers(0, 256, (blocks, 256)),
                  v_tops=rng.uniform(0, 2, (blocks, 1)), grad=rng.standard_normal(n))
    for name in "mv":  # the last block's end is of no weight
        arrays[name].reshape(-1)[n:] = 0
    arrays["m_tops"][-1] = 0.0
    options = [0.1, 0.9, 0.95, 1e-3, 0.2, 3.0, 5.0, 0.5, apply]
    found = []
    for implementation in ("cpu", "reference"):
        state = {k: Tensor(a.astype(np.uint8 if k in "mv" else np.float32)).realize()
                 for k, a in arrays.items()}
        Tensor.realize(*kernels.adamw8bit(*state.values(), Tensor(options, dtype="float32"),
                                          implementation=implementation))
        found.append({k: t.numpy() for k, t in state.items()})
    for name in ("p", "m_tops", "v_tops"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)
    for name in "mv":
        assert (found[0][name] != found[1][name]).mean() < 1e-3
        assert apply or np.array_equal(found[0][name], arrays[name])
