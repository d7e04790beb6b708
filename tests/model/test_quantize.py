"""Quantized matrices: the operations, what rounding costs, and a model that has them."""

import itertools

import numpy as np
import pytest
from test_gpt import COMBINATIONS, ids, make
from tinygrad import Tensor, dtypes
from tinygrad.helpers import GlobalCounters
from tinygrad.nn.state import get_state_dict

from gpt import GPT, GPTConfig, TrainConfig
from tinygpt import kernels
from tinygpt.data.tokenizer import ByteTokenizer
from tinygpt.kernels.cpu import kernel
from tinygpt.model.quantize import KINDS, QuantizedMatrix
from train import train

SHAPES = [(1, 13, 80), (3, 5, 7), (7, 1, 1), (9, 64, 100), (40, 70, 1100)]  # M, N, K
for_each = pytest.mark.parametrize("implementation", ["reference", "portable", "cpu"])
for_each_kind = pytest.mark.parametrize("kind", KINDS)


def draw(M: int, N: int, K: int, kind: str, rng) -> tuple:
    """x, weight, scale, bias and residual; what the weights stand for."""
    x, bias, residual = (rng.standard_normal(s, dtype=np.float32)
                         for s in ((M, 1, K), (N,), (M, 1, N)))
    if kind == "fp16":
        weight = rng.standard_normal((N, K)).astype(np.float16)
        return (x, weight, None, bias, residual), weight.astype(np.float64)
    if kind == "int4":
        groups = -(-K // 32)
        halves = rng.integers(0, 16, (2, N, groups, 16))
        scale = rng.random((N, groups)).astype(np.float16)
        weight = (halves[0] + 16 * halves[1]).astype(np.uint8).reshape(N, -1)
        matrix = (np.concatenate(halves, axis=-1) - 8.0) * scale[..., None]
        return (x, weight, scale, bias, residual), matrix.reshape(N, -1)[:, :K]
    weight = rng.integers(-127, 128, (N, K)).astype(np.int8)
    scale = rng.random(N, dtype=np.float32)
    return (x, weight, scale, bias, residual), weight * scale[:, None].astype(np.float64)


def tensors(arrays) -> list[Tensor | None]:
    return [a if a is None else Tensor(a).realize() for a in arrays]


@for_each
@for_each_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_rows_equal_numpy(shape, kind, implementation, rng, monkeypatch):
    monkeypatch.setattr(kernels.cpu, "integer_defines", dict)
    arrays, matrix = draw(*shape, kind, rng)
    x, _, _, bias, residual = arrays
    x_, weight, scale, bias_, residual_ = tensors(arrays)
    whole = kernels.quantized_linear(x_, weight, scale, bias_, residual_, implementation)
    bare = kernels.quantized_linear(x_, weight, scale, implementation=implementation)
    right = x.astype(np.float64) @ matrix.T
    for ours, wanted in ((whole, right + bias + residual), (bare, right)):
        assert ours.dtype == dtypes.float32
        assert np.abs(ours.numpy() - wanted).max() <= 2e-6 * max(np.abs(wanted).max(), 1)
    idx = ids(rng, 3, 2, vocab=shape[1])
    rows = kernels.quantized_embedding(Tensor(idx), weight, scale, implementation).numpy()
    np.testing.assert_allclose(rows[..., :shape[2]], matrix[idx], rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(9, 64, 100), (40, 70, 1100), (151, 1550, 1601)])
def test_products_of_integers_differ_by_the_rounding_of_each_group(shape, kind, rng, monkeypatch):
    """To multiples of its largest magnitude / 32767, whatever other groups have."""
    monkeypatch.setattr(kernels.cpu, "integer_defines", lambda: {"VNNI": 1})
    arrays, matrix = draw(*shape, kind, rng)
    x = arrays[0]
    x *= 10.0 ** rng.integers(-6, 6, x.shape)
    x[0], x[1, :, 32:64] = 0, 1e-38
    right = x.astype(np.float64) @ matrix.T
    groups = np.pad(np.abs(x), ((0, 0), (0, 0), (0, -shape[2] % 32))).reshape(*x.shape[:2], -1, 32)
    step = (groups.max(-1, keepdims=True) / 32767).repeat(32, -1).reshape(*x.shape[:2], -1)
    bound = (0.501 * step[..., :shape[2]] + 1e-6 * np.abs(x)) @ np.abs(matrix).T + 1e-30
    x_, weight, scale, bias, residual = tensors(arrays)
    bare = kernels.quantized_linear(x_, weight, scale, implementation="cpu").numpy()
    assert (np.abs(bare - right) <= bound).all() and not bare[0].any()
    whole = kernels.quantized_linear(x_, weight, scale, bias, residual, "cpu").numpy()
    np.testing.assert_allclose(whole, bare + arrays[3] + arrays[4], rtol=1e-6, atol=1e-5)
    x[2, :, 5], x[3, :, 70] = np.nan, np.inf
    broken = kernels.quantized_linear(Tensor(x), weight, scale, implementation="cpu").numpy()
    assert not np.isfinite(broken[2:4]).any()
    np.testing.assert_array_equal(np.delete(broken, [2, 3], 0), np.delete(bare, [2, 3], 0))


@pytest.mark.parametrize("instructions", [True, False])
def test_every_finite_float16_is_read_exactly(instructions, monkeypatch):
    source = kernel.source

    def without(*file):
        name, code = source(*file)
        return f"{name}_soft", "#undef __F16C__\n#undef __AVX512F__\n#undef __aarch64__\n" + code
    if not instructions:
        monkeypatch.setattr(kernel, "source", without)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 16)
    weight, wanted = Tensor(halves).realize(), halves.astype(np.float32)
    idx = Tensor(np.arange(len(halves), dtype=np.int32))
    got = kernels.quantized_embedding(idx, weight, implementation="cpu").numpy()
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))
    unit = Tensor(np.eye(16, dtype=np.float32)[:5])  # by the vectors of the matrix product
    got = kernels.quantized_linear(unit, weight, implementation="cpu").numpy()
    np.testing.assert_array_equal(got, wanted.T[:5])


def test_rounding_is_to_the_nearest_step_of_each_row(rng):
    matrix = rng.standard_normal((6, 40), dtype=np.float32) * 10.0 ** np.arange(-3, 3)[:, None]
    matrix[2] = 0
    with np.errstate(all="raise"):
        q = QuantizedMatrix(Tensor(matrix.astype(np.float32)), "int8")
    weight, scale = q.weight.numpy().astype(np.float64), q.scale.numpy()[:, None]
    assert (np.abs(weight * scale - matrix) <= scale * 0.5001).all() and (scale > 0).all()
    assert (np.abs(weight).max(axis=1) == [127, 127, 0, 127, 127, 127]).all()
    huge = QuantizedMatrix(Tensor(np.array([[1e6, -1e6]], np.float32)), "fp16").weight.numpy()
    assert huge.tolist() == [[65504, -65504]]


def test_four_bits_round_each_group_to_the_steps_that_it_reaches(rng):
    """As llama.cpp's Q4_0: of 16 steps the largest magnitude is the one that has no opposite."""
    matrix = rng.standard_normal((5, 70)).astype(np.float32) * 10.0 ** np.arange(-2, 3)[:, None]
    matrix[2, 32:64] = 0
    with np.errstate(all="raise"):
        q = QuantizedMatrix(Tensor(matrix.astype(np.float32)), "int4")
    weight, scale = q.weight.numpy(), q.scale.numpy().astype(np.float64)
    assert weight.shape == (5, 48) and scale.shape == (5, 3) and q.scale.dtype == dtypes.float16
    for row, group in np.ndindex(scale.shape):
        numbers = matrix[row, 32 * group:32 * group + 32]
        packed = weight[row, 16 * group:16 * group + 16]
        steps = np.concatenate([packed & 15, packed >> 4]).astype(int)[:len(numbers)] - 8
        d = scale[row, group]
        if numbers.any():
            assert steps[np.abs(numbers).argmax()] == -8
            assert np.abs(steps * d - numbers).max() <= abs(d) * 1.01  # 8 steps are cut to 7
            assert (np.abs(steps * d - numbers) <= abs(d) * 0.51)[steps < 7].all()
        else:
            assert not (steps * d).any()


# ---- a model


@pytest.mark.parametrize("kind, options", list(
    itertools.product(KINDS, COMBINATIONS[:2])), ids=str)
def test_a_quantized_model_decodes_as_its_full_forward(kind, options, rng):
    model = make(**options).quantize(kind)
    text = model.generate(ids(rng, 2, 3), 9, temperature=0, window_hop=1).numpy()
    windows = np.concatenate([text[:, end - 8:end] for end in range(8, 12)])
    likeliest = model(Tensor(windows)).numpy().argmax(-1)
    assert (likeliest[:, -1] == text[:, 8:].T.ravel()).all()
    assert (likeliest[:2, 2:7] == text[:, 3:8]).all()


@for_each_kind
def test_the_portable_kernels_write_the_same_text(kind, rng):
    prompt = ids(rng, 2, 3)
    model = make(n_layer=1).quantize(kind)
    expected = model.generate(prompt, 9, temperature=0).numpy()
    model.free_decoders()
    kernels.use("portable")
    try:
        got = model.generate(prompt, 9, temperature=0).numpy()
    finally:
        kernels.use("auto")
    assert (got == expected).all()


def test_what_was_compiled_before_is_compiled_again(rng):
    model, prompt = make(), ids(rng, 1, 3)
    model.generate(prompt, 4, temperature=0)
    model.quantize("int8")
    for layer in (model.wte, model.h[0].mlp.c_fc):
        layer.weight.assign(layer.weight.zeros_like()).realize()
    assert (model.generate(prompt, 4, temperature=0).numpy()[0, 3:] == 0).all()


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.27), ("int4", 0.16), ("fp16", 0.51)])
def test_the_float32_matrices_are_gone(kind, share):
    config = GPTConfig(block_size=8, vocab_size=2000, n_layer=2, n_head=2, n_embd=128, bias=False)
    before = GlobalCounters.mem_used
    model = GPT(config)
    whole = GlobalCounters.mem_used - before
    model.generate([[1, 2]], 6)  # its compiled step holds the matrices too
    model.quantize(kind)
    assert GlobalCounters.mem_used - before < share * whole
    assert sum(t.nbytes() for t in get_state_dict(model).values()) < share * whole


def test_a_quantized_model_is_not_trained_saved_or_quantized_again(tmp_path):
    model = make()
    path = model.save_checkpoint(1, None, tmp_path)
    before = path.read_bytes()
    model.quantize("int8")
    for use in (lambda: model.save_checkpoint(1, None, tmp_path), lambda: model.quantize("fp16"),
                lambda: model.load_checkpoint(path), lambda: train(
                    model, TrainConfig(out_dir=str(tmp_path / "run")), np.arange(400) % 61)):
        with pytest.raises(ValueError, match="a quantized model cannot be"):
            use()
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"quantize='int2'.*int8, int4, fp16"):
        make().quantize("int2")


def test_a_trained_model_loses_next_to_nothing(tmp_path, text):
    data = np.frombuffer(text.encode(), np.uint8)
    config = GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config)
    model.tokenizer = ByteTokenizer()
    run = TrainConfig(batch_size=8, max_iters=150, eval_interval=150, eval_iters=1,
                      learning_rate=1e-2, warmup_iters=10, out_dir=str(tmp_path))
    path = train(model, run, data.astype(np.int32)).last
    windows = data[:40 * 33].reshape(40, 33).astype(np.int32)
    x, y = Tensor(windows[:, :-1].copy()), Tensor(windows[:, 1:].copy())

    def look(kind=None) -> tuple[np.ndarray, float]:
        model = GPT.from_checkpoint(path)
        logits, loss = (model.quantize(kind) if kind else model)(x, y)
        return logits.numpy().argmax(-1), loss.item()
    likeliest, loss = look()
    assert loss < 2  # it learned, so that its guesses mean something
    for kind, same, cost in (("fp16", 0.99, 0.001), ("int8", 0.95, 0.02),
                             ("int4", 0.8, 0.1)):
        theirs, their_loss = look(kind)
        assert (theirs == likeliest).mean() >= same
        assert abs(their_loss - loss) <= cost
