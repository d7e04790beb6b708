"""C kernels are called by name, and read the views of each other's outputs."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinygpt import kernels
from tinygpt.kernels.cpu.kernel import Kernel, memory, plain

# y = factor x + bias, and the dot product of the weights with the first elements of the parts
EXAMPLE = """
#include "pool.h"

void NAME(ARGUMENTS) {
  DECLARE_NAMES
  const float* b = bias;
  for (long i = 0; i < n; i++) y[i] = (y_t)(factor * x[i] + (b ? b[i] : 0.f));
  dot[0] = 0;
  for (int i = 0; i < COUNT; i++) dot[0] += weights[i] * parts[i][0];
}
"""


@pytest.fixture
def example(tmp_path):
    (tmp_path / "example.c").write_text(EXAMPLE)
    return Kernel(str(tmp_path / "example.c"), COUNT=3)


def run_example(example, x: Tensor, y: Tensor, bias: Tensor | None, gradient=None) -> dict:
    parts = [Tensor([i], dtype="int32").realize() for i in (5, 7, 11)]
    return example(outputs=dict(y=y, dot=Tensor.empty(1, dtype="int32")), gradient=gradient,
                   inputs=dict(x=x, bias=bias, parts=parts),
                   sizes=dict(n=x.numel(), weights=[2, 3, -1], factor=0.5))


def test_c_sees_tensors_and_sizes_under_their_names(example):
    x, bias = Tensor([4.0, 7.0, -9.0]).realize(), Tensor([1.0, 2.0, 3.0]).realize()
    made = run_example(example, x, Tensor.empty(3), bias)
    assert made["y"].tolist() == [3.0, 5.5, -1.5] and made["dot"].tolist() == [20]
    made = run_example(example, x, Tensor.empty(3, dtype="int32"), None)  # another type, no bias
    assert made["y"].tolist() == [2, 3, -4] and made["y"].dtype == dtypes.int32


def test_gradients_of_a_kernel_have_the_names_of_its_inputs(example):
    x = Tensor([4.0, 7.0, -9.0]).realize()
    y = run_example(example, x, Tensor.empty(3), None, lambda dy, made: dict(
        x=dy * 0.5 + made["dot"].sum(), bias=dy))["y"]
    assert y.sum().gradient(x)[0].tolist() == [20.5, 20.5, 20.5]
    with pytest.raises(AssertionError):
        run_example(example, x, Tensor.empty(3), None, lambda dy, made: dict(y=dy))["y"].sum(
            ).gradient(x)

VIEWS = {
    "reshaped": lambda x: x.reshape(6, 20),
    "swapped": lambda x: x.transpose(1, 2),
    "swapped twice": lambda x: x.transpose(1, 2).transpose(1, 2).reshape(2, 60),
    "a slice": lambda x: x[:, :, 2:4],
    "heads of a slice": lambda x: x.reshape(2, 3, 20)[:, :, 4:12].reshape(2, 3, 4, 2)
    .transpose(1, 2),
    "merged after a swap": lambda x: x.transpose(1, 2).reshape(2, 12, 5),
    "part of a merged swap": lambda x: x.transpose(1, 2).reshape(2, 12, 5)[1:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_kernels_output_is_read_as_what_it_shows(name, rng):
    array = rng.standard_normal((2, 3, 4, 5), dtype=np.float32)
    ones = Tensor.ones(5).contiguous().realize()
    made = kernels.rms_norm(Tensor(array), ones, implementation="cpu")
    shown = VIEWS[name](Tensor(made.numpy())).numpy()
    view = VIEWS[name](kernels.rms_norm(Tensor(array), ones, implementation="cpu"))
    assert np.array_equal(kernels.gelu(view, implementation="cpu").numpy().ravel(),
                          kernels.gelu(Tensor(shown), implementation="cpu").numpy().ravel())
    source, start, strides = memory(view)
    flat = source.numpy().ravel()
    at = start + sum(i * s for i, s in zip(np.indices(view.shape), strides, strict=True))
    assert np.array_equal(flat[at], shown)


def test_only_what_lies_there_whole_and_in_order_is_read_without_a_copy():
    x = kernels.gelu(Tensor.ones(2, 3, 4, 5).contiguous().realize(), implementation="cpu")
    whole = {name for name, view in VIEWS.items() if plain(view(x)).uop is plain(x).uop}
    assert whole == {"reshaped", "swapped twice"}
