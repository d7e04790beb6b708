"""A trained model's matrices in 8 or 16 bits, to write text with: less memory, and less of it to
read for every token."""

import numpy as np
from tinygrad import Tensor

from tinygpt import device, kernels
from tinygpt.model.layers import replace_linear_layers

KINDS = ("int8", "fp16")


def quantize(model, kind: str) -> None:
    """Puts quantized layers in the place of a GPT's linear layers and of its output layer.

    Embeddings that are not the output layer too, norms and biases stay float32. The replaced
    matrices are freed one by one. Raises ValueError where kind is none of KINDS, or the model is
    quantized already.
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
    """A matrix (N, C): `weight` int8 with a float32 `scale` (N,) a row, or float16 without.

    int8 rounds each row to 255 steps of its largest magnitude / 127, to the nearest.
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
    """In the place of a Linear."""

    def __init__(self, linear, kind: str):
        super().__init__(linear.weight, kind)
        self.bias = linear.bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return kernels.quantized_linear(x, self.weight, self.scale, self.bias, residual)


class QuantizedEmbedding(QuantizedMatrix):
    """In the place of an Embedding that is the output layer too."""

    def __init__(self, embedding, kind: str):
        super().__init__(embedding.weight, kind)

    def __call__(self, idx: Tensor) -> Tensor:
        return kernels.quantized_embedding(idx, self.weight, self.scale)

    def unembed(self, x: Tensor) -> Tensor:
        return kernels.quantized_linear(x, self.weight, self.scale)
