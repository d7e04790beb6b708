"""Operations on float16 activations: large ones, tensor cores' products, and C's conversions."""

import ctypes

import numpy as np
import pytest
from operations import check, cotangent, draw, implementations, run
from test_gpt import ids, make
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.kernels import portable
from tinygpt.kernels.cases import heads
from tinygpt.kernels.cpu.compile import FOLDER, function

# rows and columns that fill no vector; whatever is not in SMALL is multiplied by 300
LARGE = {
    "linear": dict(x=(17, 80), weight=(13, 80), bias=(13,), residual=(17, 13)),
    "layer_norm": dict(x=(17, 13), weight=(13,), bias=(13,)),
    "rms_norm": dict(x=(3, 5, 31), weight=(31,)),
    "gelu": dict(x=(17, 13)),
    "gelu_tanh": dict(x=(17, 13)),
    "swiglu": dict(gate=(17, 13), up=(17, 13)),
    "attention": heads(2, 4, 2, 7, 7, 10),
    "cross_entropy": dict(logits=(17, 101)),
}
SMALL = ("weight", "bias", "k", "up")  # else the output of swiglu is above 65504
TARGETS = np.arange(17, dtype=np.int32) * 5


def in_torch(case: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output ("y") and gradients, in float64."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    t = {k: torch.tensor(a, dtype=torch.float64, requires_grad=True) for k, a in arrays.items()}
    operations = {
        "linear": lambda: F.linear(t["x"], t["weight"], t["bias"]) + t["residual"],
        "layer_norm": lambda: F.layer_norm(t["x"], (13,), t["weight"], t["bias"]),
        "rms_norm": lambda: F.rms_norm(t["x"], (31,), t["weight"], 1e-5),
        "gelu": lambda: F.gelu(t["x"]),
        "gelu_tanh": lambda: F.gelu(t["x"], approximate="tanh"),
        "swiglu": lambda: F.silu(t["gate"]) * t["up"],
        "attention": lambda: F.scaled_dot_product_attention(
            t["q"], *(t[n].repeat_interleave(2, 1) for n in "kv"), is_causal=True),
        "cross_entropy": lambda: F.cross_entropy(t["logits"], torch.tensor(TARGETS).long()),
    }
    y = operations[case]()
    (y * torch.tensor(cotangent(tuple(y.shape)))).sum().backward()
    return {"y": y.detach().numpy(), **{k: x.grad.numpy() for k, x in t.items()}}


def large(case: str) -> dict[str, np.ndarray]:
    """What float16 holds exactly."""
    arrays = draw(LARGE[case])
    return {k: a if k in SMALL else (a * 300).astype(np.float16).astype(np.float32)
            for k, a in arrays.items()}


OPTIONS = {"gelu_tanh": dict(tanh=True), "cross_entropy": dict(targets=TARGETS)}
BOTH = [(case, i) for case in LARGE for i in implementations(case.removesuffix("_tanh"))]


@pytest.mark.parametrize("case, implementation", BOTH)
def test_activations_of_300_are_as_pytorch_has_them(case, implementation):
    arrays = large(case)
    ours = run(case.removesuffix("_tanh"), implementation, arrays, OPTIONS.get(case, {}), "float16")
    check(ours, in_torch(case, arrays), "float16")


@pytest.mark.parametrize("case", ["linear", "attention"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_16_bits_as_on_a_gpu(case, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(portable, "_multiplies_in_16_bits", lambda x: asked.append(x) or True)
    ours = run(case, "portable", draw(LARGE[case]), {}, dtype)
    check(ours, in_torch(case, draw(LARGE[case])), dtype)
    assert len(asked) == (1 if case == "linear" else 2)
    if dtype == "float16":
        large_ones = run(case, "portable", large(case), {}, dtype)
        assert all(np.isfinite(a).all() for a in large_ones.values())


@pytest.mark.parametrize("implementation", ["auto", "portable"])
def test_cached_decoding_is_the_full_forward(implementation, rng):
    model = make(n_layer=1, position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2)
    x = ids(rng, 2, 8)
    right = model(Tensor(x)).numpy()
    model.compute_dtype = "float16"
    kernels.use(implementation)
    try:
        whole = model(Tensor(x)).cast(dtypes.float32).numpy()
        cache = model._new_cache(2)
        steps = [model._next_logits(Tensor(x[:, :6]), cache, 0, 5).numpy()]
        steps += [model._next_logits(Tensor(x[:, p:p + 1]), cache, p, 0).numpy() for p in (6, 7)]
    finally:
        kernels.use("auto")
    assert cache.layers[0][0].dtype == dtypes.float16
    for ours in (np.stack(steps, axis=1), whole[:, 5:]):
        assert 1e-6 < np.abs(ours - right[:, 5:]).max() / np.abs(right).max() < 5e-3


CONVERSIONS = """
void convert(const float* from, f16* to, const f16* half, float* back, long n) {
  for (long i = 0; i < n; i += LANES) {
    STORE(to + i, LOAD(from + i));
    STORE(back + i, LOAD(half + i));
    for (long j = i; j < i + LANES; j += 7) PUT(to + j, from[j]), back[j] = GET(half + j);
    const float4 x = LOAD4(half + i);
    for (int j = 0; j < 4; j++) back[i + j] = x[j];
  }
}
"""


@pytest.mark.parametrize("by_hand", [False, True])
def test_conversions_in_c_are_numpys(by_hand, rng):
    """Those of the processor, and those for processors that have none."""
    vector = (FOLDER / "vector.h").read_text(encoding="utf-8")
    undone = [f"#undef {name}\n" for name in ("__F16C__", "__AVX512F__", "__aarch64__")]
    convert = function("convert", "".join(undone if by_hand else []) + vector + CONVERSIONS)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = half.astype(np.float32)
    finite = np.sort(numbers[np.isfinite(numbers)])
    between = (finite[1:] + finite[:-1]) / 2  # ties
    edges = [65504, 65519.996, 65520, 1e6, 1e-8, 2**-25, 2**-25 * 1.001, 1e-42, np.inf, np.nan]
    wild = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    given = np.concatenate([numbers, between, np.nextafter(between, np.float32(np.inf)), wild,
                            np.float32(edges), -np.float32(edges)])
    given = np.resize(given, -(-len(given) // 16) * 16)
    halves = np.resize(half, len(given))
    to, back = np.empty(len(given), np.float16), np.empty(len(given), np.float32)
    convert(*(ctypes.c_uint64(a.ctypes.data) for a in (given, to, halves, back)),
             ctypes.c_uint64(len(given)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(to, given.astype(np.float16))
    np.testing.assert_array_equal(back, halves.astype(np.float32))
    assert np.array_equal(np.signbit(to)[~np.isnan(to)], np.signbit(given)[~np.isnan(given)])
