"""Which weights a run changes: low-rank adapters of linear layers, and frozen weights.

LoRA (arXiv:2106.09685): y = W x + alpha / rank * B A x, of which only A (rank, C) and B (N, rank)
are trained. A is drawn, B begins as zeros, so that the model begins as it was.
"""

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from tinygrad import Tensor

from tinygpt import checkpoint, device, kernels

FILE = "lora.safetensors"


class LoRA:
    """What is added to a linear layer's output: x (..., C) -> (..., N)."""

    def __init__(self, a: np.ndarray, b: np.ndarray, alpha: float):
        self.a, self.b = Tensor(a).realize(), Tensor(b).realize()
        self.alpha = alpha

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(kernels.linear(x, self.a), self.b) * self._scale()

    def matrix(self) -> np.ndarray:
        """What it adds to the layer's weight, (N, C) float32."""
        return (self.b.numpy() @ self.a.numpy()) * np.float32(self._scale())

    def _scale(self) -> float:
        return self.alpha / self.a.shape[0]


def linear_layers(model) -> dict[str, object]:
    """The linear layers in a GPT's blocks, by their names; a bigram model has none."""
    return {f"h.{i}.{part}.{name}": layer for i, block in enumerate(getattr(model, "h", ()))
            for part in ("attn", "mlp") for name, layer in vars(getattr(block, part)).items()
            if hasattr(layer, "lora")}


def adapters(model) -> tuple[LoRA, ...]:
    """The adapters that a GPT has."""
    return tuple(layer.lora for layer in linear_layers(model).values() if layer.lora is not None)


def attach(model, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Gives an adapter to every linear layer whose name one of the patterns matches.

    Those that are there are merged first. Raises ValueError where a pattern matches none.
    """
    merge(model)
    layers, rng = linear_layers(model), np.random.default_rng([seed, rank])
    model.forget_decoders()
    for name in _matching(targets, layers, "lora_targets"):
        N, C = layers[name].weight.shape
        if rank > min(N, C):
            raise ValueError(f"lora_rank={rank} is above {min(N, C)}, the highest rank that {name} "
                             "can have: choose a smaller one")
        a = rng.standard_normal((rank, C), dtype=np.float32) / np.float32(np.sqrt(C))
        layers[name].lora = LoRA(a, np.zeros((N, rank), np.float32), alpha)


def merge(model) -> None:
    """Adds every adapter to its layer's weight, and takes it away."""
    for layer in linear_layers(model).values():
        if layer.lora is not None:
            device.write(layer.weight, layer.weight.numpy() + layer.lora.matrix())
            layer.lora = None
            model.forget_decoders()


def adopt(model, arrays: dict[str, np.ndarray], alpha: float, path: str | Path) -> None:
    """Gives a GPT the adapters among arrays, `<layer>.lora.a` and `.lora.b`.

    Raises CheckpointError where they do not fit its layers.
    """
    layers, found = linear_layers(model), {}
    for name in arrays:
        if not name.endswith(".lora.a"):
            continue
        layer, a = layers.get(name.removesuffix(".lora.a")), arrays[name]
        b = arrays.get(name.removesuffix("a") + "b")
        if layer is None or b is None or a.ndim != 2 or b.ndim != 2 or (
                (b.shape[0], a.shape[1]) != layer.weight.shape or a.shape[0] != b.shape[1]):
            raise checkpoint.CheckpointError(f"{path} has {name}, which does not fit the model: "
                                             "use the one that it was trained on")
        found[name] = layer, LoRA(a.astype(np.float32), b.astype(np.float32), alpha)
    for layer, adapter in found.values():
        layer.lora = adapter
        model.forget_decoders()


def save(model, weights: dict[str, Tensor], facts: dict, out_dir: Path) -> Path:
    """Writes the adapters alone, of weights by name, into out_dir; returns the file's path."""
    tensors = {f"lora.{k}": w.numpy() for k, w in weights.items() if ".lora." in k}
    return checkpoint.save(out_dir / FILE, tensors, facts | {"lora_alpha": alpha_of(model)})


def load(model, path: str | Path) -> None:
    """Merges the adapters that `save` wrote into a GPT. Raises CheckpointError."""
    tensors, facts = checkpoint.load(path)
    arrays = checkpoint.part(tensors, "lora.")
    if not arrays or "lora_alpha" not in facts:
        raise checkpoint.CheckpointError(f"{path} has no LoRA adapters: name the {FILE} of a run "
                                         "with --lora_rank")
    adopt(model, arrays, facts["lora_alpha"], path)
    merge(model)


def alpha_of(model) -> float | None:
    """The alpha of a GPT's adapters; None without any."""
    return next((adapter.alpha for adapter in adapters(model)), None)


def trainable(weights: dict[str, Tensor], freeze: str | None) -> dict[str, Tensor]:
    """Those of the weights that training changes: the adapters where there are any, else all; but
    for those whose names a pattern of freeze matches. Raises ValueError where none is left, or
    where a pattern matches nothing."""
    adapted = any(".lora." in name for name in weights)
    left = {name: w for name, w in weights.items() if ".lora." in name or not adapted}
    frozen = set(_matching(freeze, left, "freeze")) if freeze else set()
    left = {name: w for name, w in left.items() if name not in frozen}
    if not left:
        raise ValueError(f"freeze={freeze!r} leaves nothing to train: choose fewer patterns")
    return left


def _matching(patterns: str, names, field: str) -> list[str]:
    """The names that one of the comma-separated patterns matches."""
    wanted = [p.strip() for p in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{field}={patterns!r}: nothing is named like {pattern!r}: choose "
                             f"patterns of names such as {', '.join(list(names)[:4])}")
    return [name for name in names if any(fnmatchcase(name, p) for p in wanted)]
