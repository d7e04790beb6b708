"""Matrices of 8 or 16 bits, to generate text with: a token reads less memory."""

import numpy as np
from tinygrad import Tensor

from tinygpt import device, kernels
from tinygpt.model.layers import replace_linear_layers

KINDS = ("int8", "fp16")


def quantize(model, kind: str) -> None:
    """Replaces a GPT's linear layers and its output layer by quantized ones.

    Norms, biases and embeddings other than a tied output layer stay float32. The replaced matrices
    are freed one by one. Raises ValueError where kind is none of KINDS, or the model is quantized
    already.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} is unknown: choose one of {', '.join(KINDS)}")
    refuse_quantized(model, "quantized again")
    replace_linear_layers(model, lambda _, layer: QuantizedLinear(layer, kind))
    if model.lm_head is None:
        model.wte = QuantizedEmbedding(model.wte, kind)
    else:
        model.lm_head = QuantizedLinear(model.lm_head, kind)
    device.free_memory()


def refuse_quantized(model, what: str) -> None:
    """Raises ValueError where the model is quantized, since it cannot be `what`."""
    if isinstance(model.lm_head or model.wte, QuantizedMatrix):
        raise ValueError(f"a quantized model cannot be {what}: load its checkpoint again")


class QuantizedMatrix:
    """A matrix (N, C): `weight` int8 with a float32 `scale` (N,) for its rows, or float16.

    int8 rounds to the nearest multiple of scale, the largest magnitude of the row / 127.
    """

    def __init__(self, matrix: Tensor, kind: str):
        array = matrix.numpy()
        if kind == "fp16":
            limit = np.finfo(np.float16).max
            self.weight = Tensor(array.clip(-limit, limit).astype(np.float16)).realize()
            self.scale = None
            return
        scale = np.abs(array).max(axis=1) / 127
        scale[scale == 0] = 1  # a row of zeros
        steps = np.rint(array / scale[:, None]).astype(np.int8)
        self.weight, self.scale = Tensor(steps).realize(), Tensor(scale).realize()


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
