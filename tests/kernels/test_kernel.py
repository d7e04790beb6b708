"""How C kernels read the views of each other's outputs."""

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.kernels.cpu.kernel import memory, plain

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
