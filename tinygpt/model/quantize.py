"""Matrices of 8 or 16 bits, to generate text with: a token reads less memory."""

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt import device, kernels
from tinygpt.model.layers import replace_linear_layers
from tinygpt.safetensors_file import widened

KINDS = ("int8", "fp16")
ROWS = 4096  # of a matrix that are converted at once


def quantize(model, kind: str) -> None:
    """Replaces a GPT's linear layers and its output layer by quantized ones.

    Norms, biases and embeddings other than a tied output layer stay float32. The replaced matrices
    are freed one by one. Raises ValueError where kind is none of KINDS, or the model is quantized
    already.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} is unknown: choose one of {', '.join(KINDS)}")
    refuse_quantized(model, "quantized again")
    replace_linear_layers(model, lambda _, layer: _replacement(layer, kind))
    if model.lm_head is None:
        model.wte = QuantizedEmbedding(model.wte, kind)
    else:
        model.lm_head = QuantizedLinear(model.lm_head, kind)
    device.free_memory()


def _replacement(layer, kind: str) -> "QuantizedLinear":
    device.free_cached()  # the matrix that was replaced before
    return QuantizedLinear(layer, kind)


def refuse_quantized(model, what: str) -> None:
    """Raises ValueError where the model is quantized, since it cannot be `what`."""
    if isinstance(model.lm_head or model.wte, QuantizedMatrix):
        raise ValueError(f"a quantized model cannot be {what}: load its checkpoint again")


class QuantizedMatrix:
    """A matrix (N, C): `weight` int8 with a float32 `scale` (N,) for its rows, or float16.

    int8 rounds to the nearest multiple of scale, the largest magnitude of the row / 127.
    """

    def __init__(self, matrix: Tensor, kind: str):
        N, C = matrix.shape
        weight = np.empty((N, C), np.int8 if kind == "int8" else np.float16)
        scale = np.ones(N, np.float32)
        for begin in range(0, N, ROWS):
            rows = slice(begin, begin + ROWS)
            array = device.read(matrix, rows)
            array = widened(array) if matrix.dtype == dtypes.bfloat16 else array
            if kind == "int8":
                scale[rows] = np.abs(array).max(axis=1) / 127
                scale[rows][scale[rows] == 0] = 1  # a row of zeros
                weight[rows] = np.rint(array / scale[rows, None])
            else:
                limit = np.finfo(np.float16).max
                weight[rows] = array.clip(-limit, limit)
        self.weight = device.tensor_of(weight)
        self.scale = device.tensor_of(scale) if kind == "int8" else None


class QuantizedLinear(QuantizedMatrix):
    """Replaces a Linear."""

    def __init__(self, linear, kind: str):
        super().__init__(linear.weight, kind)
        self.bias = linear.bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return kernels.quantized_linear(x, self.weight, self.scale, self.bias, residual)


class QuantizedEmbedding(QuantizedMatrix):
    """Replaces an Embedding that is the output layer too."""

    def __init__(self, embedding, kind: str):
        super().__init__(embedding.weight, kind)

    def __call__(self, idx: Tensor) -> Tensor:
        return kernels.quantized_embedding(idx, self.weight, self.scale)

    def unembed(self, x: Tensor) -> Tensor:
        return kernels.quantized_linear(x, self.weight, self.scale)
