"""The optimizers, the gradient's norm and clipping against numpy."""

import itertools

import numpy as np
import pytest
from operations import np_orthogonalize
from tinygrad import Tensor, TinyJit

from tinygpt import device
from tinygpt.kernels.blockwise import dequantize, quantize
from tinygpt.training.config import TrainConfig
from tinygpt.training.optim import (
    EMA,
    OPTIMIZERS,
    AdamW,
    AdamW8bit,
    Lion,
    Muon,
    clip_scale,
    global_norm,
    make_optimizer,
)

SHAPES = {"matrix": (3, 5), "vector": (7,), "one": (1,), "cube": (2, 3, 2)}
SHAPES |= {f"h.0.{r}x{c}": (r, c) for r, c in ((8, 24), (24, 8), (7, 7), (1, 9), (9, 1), (1, 1))}
SHAPES |= {"h.0.bias": (9,), "large": (67, 71), "long": (4096,)}
SKIPPED = (0, 13, 14)


class NumpyAdamW:
    """Algorithm 2 of arXiv:1711.05101 as PyTorch has it, in float64."""

    def __init__(self, params, beta1, beta2, weight_decay, eps=1e-8):
        self.params = {name: p.astype(np.float64) for name, p in params.items()}
        self.betas, self.weight_decay, self.eps, self.count = (beta1, beta2), weight_decay, eps, 0
        self.m = {name: np.zeros(p.shape) for name, p in params.items()}
        self.v = {name: np.zeros(p.shape) for name, p in params.items()}

    def update(self, grads, lr):
        self.count += 1
        b1, b2 = self.betas
        for name, p in self.params.items():
            self.m[name] = b1 * self.m[name] + (1 - b1) * grads[name]
            self.v[name] = b2 * self.v[name] + (1 - b2) * grads[name] ** 2
            if p.ndim >= 2:
                p *= 1 - lr * self.weight_decay
            m, v = self.m[name] / (1 - b1**self.count), self.v[name] / (1 - b2**self.count)
            p -= lr * m / (np.sqrt(v) + self.eps)


class NumpyMuon:
    """Algorithm 1 of arXiv:2502.16982 with Nesterov's momentum, in float64, on h.*'s matrices."""

    def __init__(self, params, weight_decay, **options):
        self.m = {name: np.zeros(p.shape) for name, p in params.items()
                  if name.startswith("h.") and p.ndim == 2}
        self.rest = NumpyAdamW({k: p for k, p in params.items() if k not in self.m},
                               weight_decay=weight_decay, **options)
        self.params = {name: self.rest.params.get(name, p.astype(np.float64))
                       for name, p in params.items()}
        self.weight_decay, self.count = weight_decay, 0

    def update(self, grads, lr):
        self.count += 1
        self.rest.update(grads, lr)
        for name, m in self.m.items():
            m[...] = 0.95 * m + grads[name]
            step = np_orthogonalize(grads[name] + 0.95 * m) * 0.2 * np.sqrt(max(m.shape))
            self.params[name] -= lr * (step + self.weight_decay * self.params[name])


class NumpyLion:
    """Algorithm 2 of arXiv:2302.06675, in float64."""

    def __init__(self, params, beta1, beta2, weight_decay):
        self.params = {name: p.astype(np.float64) for name, p in params.items()}
        self.betas, self.weight_decay, self.count = (beta1, beta2), weight_decay, 0
        self.m = {name: np.zeros(p.shape) for name, p in params.items()}

    def update(self, grads, lr):
        self.count += 1
        b1, b2 = self.betas
        for name, p in self.params.items():
            step = np.sign(b1 * self.m[name] + (1 - b1) * grads[name])
            p -= lr * (step + (self.weight_decay * p if p.ndim >= 2 else 0))
            self.m[name] = b2 * self.m[name] + (1 - b2) * grads[name]


class NumpyAdamW8bit(NumpyAdamW):
    """AdamW whose moments are rounded to the dynamic map between steps, in float64."""

    def update(self, grads, lr):
        super().update(grads, lr)
        for name, p in self.params.items():
            if p.size >= 4096:
                self.m[name] = rounded(self.m[name], True)
                self.v[name] = rounded(self.v[name], False)


def dynamic_map(signed: bool) -> np.ndarray:
    """bitsandbytes' create_dynamic_map: 256 values in order."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1 if signed else 2**(i + 1) + 1)
        means = 10.0**(i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *(-means if signed else ())]
    return np.sort(values)


def rounded(x: np.ndarray, signed: bool) -> np.ndarray:
    """x as the nearest values in blocks of 256; without a sign only zero becomes zero."""
    values = dynamic_map(signed)
    blocks = np.pad(x.ravel(), (0, -x.size % 256)).reshape(-1, 256)
    tops = np.abs(blocks).max(-1, keepdims=True)
    share = blocks / np.where(tops > 0, tops, 1)
    nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, share)]
    if not signed:
        nearest = np.where((share > 0) & (nearest == 0), values[1], nearest)
    return (nearest * tops).ravel()[:x.size].reshape(x.shape)


PEERS = {AdamW: NumpyAdamW, Lion: NumpyLion, Muon: NumpyMuon, AdamW8bit: NumpyAdamW8bit}
TOLERANCE = {AdamW: 2e-5, Lion: 2e-5, Muon: 1e-4, AdamW8bit: 1e-4}


def draw(rng) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def make(arrays, cls=AdamW, **options):
    return cls({name: Tensor(a).realize() for name, a in arrays.items()}, **options)


def input_buffers(*names: str) -> dict[str, Tensor]:
    """A buffer for each gradient, for a number of each name, and for whether a step applies."""
    shapes = SHAPES | {name: (1,) for name in names}
    buffers = {name: Tensor.zeros(*shape).contiguous().realize() for name, shape in shapes.items()}
    return buffers | {"apply": Tensor([True]).contiguous().realize()}


def stepper(optimizer):
    """The optimizer's step, compiled once: on gradients and numbers as numpy has them."""
    inputs = input_buffers("lr", "scale")

    @TinyJit
    def step(lr, scale, apply, **grads):
        Tensor.realize(*optimizer.update([grads[name] for name in SHAPES], lr, scale[0], apply[0]))

    def call(grads, lr, scale=1.0, apply=True):
        for name, value in {**grads, "lr": [lr], "scale": [scale], "apply": [apply]}.items():
            device.write(inputs[name], value)
        step(**inputs)
    return call


def everything(optimizer) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in (optimizer.state_dict() | optimizer.params).items()}


def assert_same(ours, theirs):
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("cls, numpy_cls", PEERS.items())
@pytest.mark.parametrize("options", [dict(beta1=0.9, beta2=0.99, weight_decay=0.1),
                                     dict(beta1=0.0, beta2=0.999, weight_decay=0.0)])
def test_it_equals_numpy_over_50_steps(rng, cls, numpy_cls, options):
    start = draw(rng)
    ours, theirs = make(start, cls, **options), numpy_cls(start, **options)
    step = stepper(ours)
    for number in range(50):
        grads = {name: g * 10.0 ** rng.integers(-6, 3) for name, g in draw(rng).items()}
        grads = {name: g.astype(np.float32) for name, g in grads.items()}
        lr = 0.1 * (number + 1) / 50
        if number in SKIPPED:
            before = everything(ours)
            step({name: g * np.float32("nan") for name, g in grads.items()}, lr, apply=False)
            assert_same(everything(ours), before)
        else:
            scale = (1.0, 0.3)[number % 2]
            step(grads, lr, scale)
            theirs.update({name: g * scale for name, g in grads.items()}, lr)
        if number % 7 == 0 or number in (*SKIPPED, 49):
            for name, p in theirs.params.items():
                np.testing.assert_allclose(ours.params[name].numpy(), p, atol=TOLERANCE[cls],
                                           err_msg=name)
    assert ours.step.item() == theirs.count == 47


@pytest.mark.parametrize("cls", PEERS)
def test_only_matrices_decay(rng, cls):
    start = draw(rng)
    optimizer = make(start, cls, weight_decay=0.5)
    stepper(optimizer)({name: np.zeros_like(a) for name, a in start.items()}, 0.1)
    for name, a in start.items():
        kept = 0.95 if a.ndim >= 2 else 1.0
        np.testing.assert_allclose(optimizer.params[name].numpy(), a * kept, rtol=1e-6)


@pytest.mark.parametrize("cls", PEERS)
def test_a_loaded_state_continues_where_it_was_saved(rng, cls):
    first = make(draw(rng), cls)
    step = stepper(first)
    for _ in range(3):
        step(draw(rng), 0.01)
    state = {name: t.numpy() for name, t in first.state_dict().items()}
    assert first.nbytes() == sum(a.nbytes for a in state.values())
    second = make({name: p.numpy() for name, p in first.params.items()}, cls)
    second.load_state_dict(state)
    assert_same(everything(second), everything(first))
    grads, resumed = draw(rng), stepper(second)
    step(grads, 0.01)
    resumed(grads, 0.01)
    assert_same(everything(second), everything(first))


def test_the_names_of_a_state(rng):
    arrays = draw(rng)
    matrices = {name for name in arrays if name.startswith("h.") and name != "h.0.bias"}
    assert set(make(arrays).state_dict()) == {"step", *(f"{kind}.{k}" for kind in "mv"
                                                        for k in arrays)}
    assert set(make(arrays, Muon).state_dict()) == {
        "step", *(f"muon.{k}" for k in matrices),
        *(f"{kind}.{k}" for kind in "mv" for k in set(arrays) - matrices)}
    assert set(make(arrays, Lion).state_dict()) == {"step", *(f"lion.{k}" for k in arrays)}
    large = {"large", "long"}
    assert set(make(arrays, AdamW8bit).state_dict()) == {
        "step", *(f"{kind}.{k}" for kind in "mv" for k in set(arrays) - large),
        *(f"adamw8bit.{kind}.{k}" for kind in ("m", "m_max", "v", "v_max") for k in large)}


@pytest.mark.parametrize("cls, other", list(itertools.permutations(PEERS, 2)))
def test_the_state_of_another_optimizer_is_refused_by_name(rng, cls, other):
    optimizer = make(start := draw(rng), cls)
    before = everything(optimizer)
    state = {name: t.numpy() + 1 for name, t in make(start, other).state_dict().items()}
    with pytest.raises(ValueError, match=f"file has .* {other.__name__.lower()}, not of "
                                         f"{cls.__name__.lower()}: use --optimizer"):
        optimizer.load_state_dict(state, "file")
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize("name, cls", OPTIMIZERS.items())
def test_an_optimizer_is_made_as_the_configuration_says(rng, name, cls):
    params = make(draw(rng)).params
    made = make_optimizer(params, TrainConfig(optimizer=name, beta1=0.3, beta2=0.4,
                                              weight_decay=0.5))
    assert type(made) is cls and made.params is params
    inner = {"muon": "rest", "adamw8bit": "exact"}.get(name)
    for part in (made, *([getattr(made, inner)] if inner else [])):
        for field, value in (("beta1", 0.3), ("beta2", 0.4), ("weight_decay", 0.5)):
            assert getattr(part, field, value) == value


def test_moments_of_8_bits_take_a_quarter():
    params = {"w": Tensor.zeros(300, 256).contiguous().realize()}
    n = 300 * 256
    assert AdamW(params).nbytes() == 4 + 8 * n
    assert AdamW8bit(params).nbytes() == 4 + 2 * n + 8 * n // 256


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_the_dynamic_map(signed):
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    values = dequantize(Tensor(codes), Tensor([[1.0]]), signed).numpy()[0]
    np.testing.assert_allclose(np.sort(values), dynamic_map(signed), rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_of_the_nearest_value(rng, signed):
    x = rng.standard_normal((64, 256)) * 10.0 ** rng.uniform(-9, 0, (64, 256))
    x = (x if signed else np.abs(x)).astype(np.float32)
    x[3], x[4, 5], x[5] = 0.0, 0.0, 1e-38
    codes, tops = quantize(Tensor(x), signed)
    assert str(codes.dtype) == "dtypes.uchar" and tops.shape == (64, 1)
    found = dequantize(codes, tops, signed).numpy()
    np.testing.assert_allclose(found, rounded(x.astype(np.float64), signed), rtol=1e-6)


def test_a_state_is_loaded_under_a_compiled_step(rng):
    first, second = make(start := draw(rng)), make(start)
    step, other = stepper(first), stepper(second)
    for _ in range(3):
        step(draw(rng), 0.01)
        other(draw(rng), 0.01)
    first.load_state_dict({name: t.numpy() for name, t in second.state_dict().items()})
    for name, p in first.params.items():
        p.assign(Tensor(second.params[name].numpy())).realize()
    grads = draw(rng)
    step(grads, 0.01)
    other(grads, 0.01)
    assert_same(everything(first), everything(second))


@pytest.mark.parametrize("spoil", [
    lambda state: state | {"v.cube": np.zeros((2, 3, 3), np.float32)},
    lambda state: state | {"step": np.zeros((), np.float32)},
    lambda state: state | {"m.unknown": np.zeros(3, np.float32)},
    lambda state: {name: a for name, a in state.items() if name != "v.cube"},
])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changed(rng, spoil):
    optimizer = make(draw(rng))
    before = everything(optimizer)
    state = {name: t.numpy() + 1 for name, t in optimizer.state_dict().items()}
    with pytest.raises(ValueError, match=r"cube|step|unknown"):
        optimizer.load_state_dict(spoil(state), "file")
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_global_norm_equals_numpy(rng, size):
    arrays = [a * np.float32(size) for a in draw(rng).values()]
    norm = global_norm([Tensor(a) for a in arrays])
    right = np.linalg.norm(np.concatenate([a.ravel() for a in arrays]).astype(np.float64))
    assert norm.shape == ()
    np.testing.assert_allclose(norm.item(), right, rtol=1e-6)


@pytest.mark.parametrize("norm, limit, scale", [
    (4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (1e-30, 1e-3, 1.0), (3e4, 1.5, 5e-5),
    (4.0, 0.0, 1.0), (0.0, 0.0, 1.0)])
def test_clip_scale(norm, limit, scale):
    got = clip_scale(Tensor(np.array(norm, np.float32)), limit).item()
    np.testing.assert_allclose(got, scale, rtol=1e-5)


def test_clipped_gradients_have_the_limit_as_their_norm(rng):
    grads = [Tensor(a) for a in draw(rng).values()]
    scale = clip_scale(global_norm(grads), 0.7)
    assert global_norm([g * scale for g in grads]).item() == pytest.approx(0.7, rel=1e-5)


def test_ema_equals_numpy_and_a_skipped_step_changes_nothing(rng):
    params = make(draw(rng)).params
    ema = EMA(params, 0.8)
    expected = {name: p.numpy().astype(np.float64) for name, p in params.items()}
    inputs = input_buffers("count")

    @TinyJit
    def step(count, apply, **new):
        assigns = [p.assign(apply[0].where(new[name], p)) for name, p in params.items()]
        Tensor.realize(*assigns, *ema.update(count, apply[0]))

    for number in range(1, 51):
        new, apply = draw(rng), number not in (3, 20)
        for name, value in {**new, "count": [number], "apply": [apply]}.items():
            device.write(inputs[name], value)
        step(**inputs)
        decay = min(0.8, (1 + number) / (10 + number))
        for name, average in expected.items():
            if apply:
                average[...] = decay * average + (1 - decay) * new[name]
            if number in (1, 2, 3, 19, 20, 50):
                np.testing.assert_allclose(ema.weights[name].numpy(), average, atol=1e-6)


def test_ema_trades_places_with_the_weights_for_a_while(rng):
    start, other = draw(rng), draw(rng)
    params = make(start).params
    ema = EMA(params)
    ema.load_state_dict(other)

    @TinyJit
    def compiled():
        return (params["cube"] + 0).realize()

    for _ in range(3):
        np.testing.assert_array_equal(compiled().numpy(), start["cube"])
    with pytest.raises(KeyError), ema.in_place():
        np.testing.assert_array_equal(compiled().numpy(), other["cube"])
        assert_same({name: t.numpy() for name, t in ema.weights.items()}, start)
        raise KeyError
    np.testing.assert_array_equal(compiled().numpy(), start["cube"])
    assert_same({name: t.numpy() for name, t in ema.weights.items()}, other)
    with pytest.raises(ValueError, match="file has no tensor cube"):
        ema.load_state_dict({name: a for name, a in start.items() if name != "cube"}, "file")
