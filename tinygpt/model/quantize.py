"""Matrices of 4, 8 or 16 bits, to generate text with: a token reads less memory."""

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt import device, kernels
from tinygpt.model.layers import replace_linear_layers
from tinygpt.safetensors_file import widened

KINDS = ("int8", "int4", "fp16")
ROWS = 4096  # of a matrix that are converted at once
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
    """A matrix (N, C): `weight` and `scale` as `kernels.quantized_linear` takes them."""

    def __init__(self, matrix: Tensor, kind: str):
        N, _ = matrix.realize().shape
        round_rows = {"int8": round_to_int8, "int4": round_to_int4, "fp16": round_to_fp16}[kind]
        weight, scale = [], []
        for begin in range(0, N, ROWS):
            rows = device.read(matrix, slice(begin, begin + ROWS))
            rows = widened(rows) if matrix.dtype == dtypes.bfloat16 else rows.astype(np.float32)
            for parts, part in zip((weight, scale), round_rows(rows), strict=True):
                parts.append(part)
        self.weight = device.tensor_of(np.concatenate(weight))
        self.scale = None if kind == "fp16" else device.tensor_of(np.concatenate(scale))


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
