"""Matrices of 4, 8 or 16 bits, to generate text with: a token reads less memory."""

import numpy as np
from tinygrad import Tensor

from tinygpt import device, kernels
from tinygpt.model.layers import replace_linear_layers

KINDS = ("int8", "int4", "fp16")
GROUP = 32  # int4's weights that share a scale


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
    """A matrix (N, C): `weight` and `scale` as `kernels.quantized_linear` takes them."""

    def __init__(self, matrix: Tensor, kind: str):
        rounded = {"int8": round_to_int8, "int4": round_to_int4, "fp16": round_to_fp16}[kind]
        weight, scale = rounded(matrix.numpy())
        self.weight = Tensor(weight).realize()
        self.scale = None if scale is None else Tensor(scale).realize()


def round_to_fp16(matrix: np.ndarray) -> tuple[np.ndarray, None]:
    """float16, at most the largest that is finite."""
    limit = np.finfo(np.float16).max
    return matrix.clip(-limit, limit).astype(np.float16), None


def round_to_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multiples -127 .. 127 of a scale (N,): the largest magnitude of the row / 127."""
    scale = np.abs(matrix).max(axis=1) / 127
    scale[scale == 0] = 1  # a row of zeros
    return np.rint(matrix / scale[:, None]).astype(np.int8), scale


def round_to_int4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multiples -8 .. 7 of a scale (N, G) for each group of a row, as in llama.cpp's Q4_0: the
    number of the largest magnitude is -8 times its group's scale. Rows are filled up with zeros."""
    N, C = matrix.shape
    groups = np.pad(matrix, ((0, 0), (0, -C % GROUP))).reshape(N, -1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scale = np.where(largest == 0, 1, largest / -8)  # 1: a group of zeros
    steps = np.floor(groups / scale + 8.5).clip(0, 15).astype(np.uint8)
    packed = steps[..., :GROUP // 2] | steps[..., GROUP // 2:] << 4
    return packed.reshape(N, -1), scale[..., 0].astype(np.float16)


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
        self.size = embedding.weight.shape[1]

    def __call__(self, idx: Tensor) -> Tensor:
        return kernels.quantized_embedding(idx, self.weight, self.scale)[..., :self.size]

    def unembed(self, x: Tensor) -> Tensor:
        return kernels.quantized_linear(x, self.weight, self.scale)
