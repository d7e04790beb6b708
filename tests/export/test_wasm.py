"""The WebAssembly module under wasmtime: its logits against the model's, draws against numpy."""

import numpy as np
import pytest
from covering import MODEL, covering
from tinygrad import Tensor

from gpt import GPT, GPTConfig
from tinygpt import kernels
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.export import wasm
from tinygpt.inference.sampling import OPTIONS
from tinygpt.kernels.random import make_key

wasmtime = pytest.importorskip("wasmtime")

T, V = 9, 97
SHAPE = dict(vocab_size=V, n_layer=2, n_head=4, n_embd=24, block_size=T + 3)
IDS = np.random.default_rng(3).integers(0, V, T).astype(np.int32)


class Instance:
    """A module that runs."""

    def __init__(self, module: wasm.Module):
        engine = wasmtime.Engine()
        self.store, self.layout = wasmtime.Store(engine), module.layout
        made = wasmtime.Instance(self.store, wasmtime.Module(engine, module.code), [])
        self.exports = made.exports(self.store)
        self.write("first", np.frombuffer(module.weights, np.uint8))

    def __getattr__(self, name):
        return lambda *values: self.exports[name](self.store, *map(int, values))

    def write(self, place: str, array: np.ndarray) -> None:
        self.exports["memory"].write(self.store, array.tobytes(), self.layout[place])

    def read(self, place: str, *shape: int, dtype=np.float32) -> np.ndarray:
        first, size = self.layout[place], int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.exports["memory"].read(self.store, first, first + size),
                             dtype).reshape(shape)


class Tokens(ByteTokenizer):
    vocab_size = V


@pytest.fixture
def float_products(monkeypatch):
    """Our int8 products in float32, so that the module's rounding is all there is."""
    monkeypatch.setattr(kernels.cpu, "integer_defines", dict)


@pytest.mark.parametrize("row", covering(MODEL | dict(quantize=["none", "int8", "fp16"])), ids=str)
def test_logits_and_attention(row, float_products):
    kind, options = row["quantize"], {k: v for k, v in row.items() if k != "quantize"}
    ours, rng = GPT(GPTConfig(**SHAPE | options)), np.random.default_rng(11)
    ours.load_state_dict({name: w.numpy() + 0.1 * rng.standard_normal(w.shape)
                          for name, w in ours.state_dict().items()})
    ours.tokenizer = Tokens()
    if kind != "none":
        ours.quantize(kind)
    expected = ours(Tensor(IDS.reshape(1, T))).numpy()[0]
    instance = Instance(wasm.build(ours))
    instance.write("tokens", IDS)
    instance.prefill(0, 3)  # an even number of tokens, then an odd one
    found = [instance.read("logits", V)]
    instance.write("tokens", IDS[4:])
    instance.prefill(4, 2)
    found.append(instance.read("logits", V))
    for p in range(7, T):
        instance.write("token", IDS[p:p + 1])
        instance.step(p)
        found.append(instance.read("logits", V))
    np.testing.assert_allclose(found, expected[[3, 6, *range(7, T)]], atol=1e-4)
    weights = instance.read("attention", 2, 4, T + 3)
    first = T - row["sliding_window"] if row["sliding_window"] else 0
    assert (weights[..., :first] == 0).all() and (weights[..., first:T] > 0).all()
    np.testing.assert_allclose(weights[..., :T].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("sizes", [
    dict(n_embd=21, n_head=3, n_inner=37), dict(n_embd=4, n_head=1, n_inner=40000)], ids=str)
def test_odd_and_large_sizes_of_int8(sizes, float_products):
    """In the large one all addends of a sum are equal, and so it is as large as it can be."""
    config = GPTConfig(**SHAPE | dict(n_layer=1, position="learned") | sizes)
    ours, rng = GPT(config), np.random.default_rng(5)
    weights = {name: rng.standard_normal(w.shape) for name, w in ours.state_dict().items()}
    if config.n_inner > 1000:
        weights["h.0.mlp.c_fc.weight"] = np.full((config.n_inner, 4), 1e-3)
        weights["h.0.mlp.c_fc.bias"] = np.ones(config.n_inner)
        weights["h.0.mlp.c_proj.weight"] = np.repeat([[1e-5], [2e-5], [0], [-4e-5]], 40000, 1)
    ours.load_state_dict(weights)
    ours.tokenizer = Tokens()
    ours.quantize("int8")
    instance = Instance(wasm.build(ours))
    for p in range(T):
        instance.write("token", IDS[p:p + 1])
        instance.step(p)
    expected = ours(Tensor(IDS.reshape(1, T))).numpy()[0, -1]
    np.testing.assert_allclose(instance.read("logits", V), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def sampler():
    model = GPT(GPTConfig(block_size=4, vocab_size=V + 2, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = Tokens()  # the last two ids are never drawn
    return Instance(wasm.build(model))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def mix(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def drawn(logits, seen, key, temperature, top_k, top_p, min_p, repetition_penalty):
    """The next token by definition, in float64."""
    x = np.where(seen, np.where(logits > 0, logits / repetition_penalty,
                                logits * repetition_penalty), logits).astype(np.float64)
    if not temperature:
        return x.argmax()
    x /= temperature
    if top_k:
        x[x < np.sort(x)[-int(top_k)]] = -np.inf
    if top_p:
        order = np.argsort(-x)
        x[order[1:][np.cumsum(softmax(x)[order])[:-1] >= top_p]] = -np.inf
    x[softmax(x) < min_p * softmax(x).max()] = -np.inf
    bits = mix(mix(np.arange(len(x), dtype=np.uint32)) + np.uint32(key))
    return (x - np.log(-np.log(((bits >> np.uint32(9)) + 0.5) * 2.0**-23))).argmax()


@pytest.mark.parametrize("options", [
    {}, dict(temperature=0), dict(temperature=0, repetition_penalty=3), dict(top_k=5),
    dict(top_p=0.7), dict(min_p=0.1), dict(repetition_penalty=2),
    dict(temperature=1.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=0.5)], ids=str)
def test_draws(sampler, rng, options):
    values = dict(temperature=0.8, top_k=0, top_p=0, min_p=0, repetition_penalty=1) | options
    sampler.write("parameters", np.array([values[name] for name in OPTIONS], np.float32))
    for n in range(100):
        logits = rng.normal(0, 3, V + 2).astype(np.float32)
        logits[V:] = 100
        seen, key = rng.random(V) < 0.3, make_key(7, n)[0]
        sampler.write("logits", logits)
        sampler.write("seen", seen.astype(np.uint8))
        token = sampler.sample(np.int32(key))
        assert token == drawn(logits[:V], seen, key, **values)
        seen[token] = True
        assert np.array_equal(sampler.read("seen", V, dtype=np.uint8), seen)
        assert np.array_equal(sampler.read("logits", V + 2), logits)
        np.testing.assert_allclose(sampler.read("probabilities", V), softmax(logits[:V]),
                                   rtol=1e-5, atol=1e-7)


def test_keys(sampler):
    for seed in (0, 1, 1337, 2**31, 2**32 - 1):
        for length in (0, 1, 500, 2**20):
            word = sampler.make_key(np.uint32(seed).view(np.int32), length)
            assert np.int32(word).view(np.uint32) == make_key(seed, length)[0]


def test_a_model_that_no_memory_holds_is_refused(sampler, monkeypatch):
    model = GPT(GPTConfig(block_size=4, vocab_size=V, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = Tokens()
    monkeypatch.setattr(wasm, "LARGEST", 1 << 28)
    with pytest.raises(ValueError, match=r"WebAssembly can address.*--quantize int8"):
        wasm.build(model)
