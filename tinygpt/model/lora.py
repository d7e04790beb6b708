"""Which weights a run changes: low-rank adapters of linear layers, and frozen weights.

LoRA (arXiv:2106.09685): y = W x + alpha / rank * B A x, of which only A (rank, C) and B (N, rank)
are trained. A is drawn and B begins as zeros, so that the model does not change at first.
"""

from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt import checkpoint, device, kernels
from tinygpt.data.tokenizer import Tokenizer, fingerprint
from tinygpt.model.layers import linear_layers, replace_linear_layers

FILE = "lora.safetensors"


class LoRA:
    """An adapter, which is added to a linear layer's output: x (..., C) -> (..., N)."""

    def __init__(self, a: np.ndarray, b: np.ndarray, alpha: float):
        self.a, self.b = Tensor(a).realize(), Tensor(b).realize()
        self.alpha = alpha

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(kernels.linear(x, self.a), self.b) * self._scale()

    def matrix(self) -> np.ndarray:
        """What it adds to the layer's weight when it is merged, (N, C) float32."""
        return (self.b.numpy() @ self.a.numpy()) * np.float32(self._scale())

    def _scale(self) -> float:
        return self.alpha / self.a.shape[0]


class LoRALinear:
    """Replaces a Linear: its output plus that of an adapter."""

    __slots__ = ("__dict__", "linear")  # get_state_dict skips slots: linear has the same weights

    def __init__(self, linear, lora: LoRA):
        self.linear = linear
        self.weight, self.bias, self.lora = linear.weight, linear.bias, lora

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return kernels.linear(x, self.weight, self.bias, residual) + self.lora(x)

    def merged(self):
        """The Linear, with the adapter added to its weight."""
        device.write(self.weight, self.weight.numpy() + self.lora.matrix())
        self.linear.weight, self.linear.bias = self.weight, self.bias
        return self.linear


def adapters(model) -> tuple[LoRA, ...]:
    """The adapters that a GPT has."""
    return tuple(layer.lora for layer in linear_layers(model).values()
                 if isinstance(layer, LoRALinear))


def _layers(model) -> dict[str, object]:
    """The linear layers of a GPT. Raises ValueError where one is not float32."""
    layers = linear_layers(model)
    for name, layer in layers.items():
        if layer.weight.dtype != dtypes.float32:
            raise ValueError(f"{name} is {layer.weight.dtype.name}, but adapters need float32: "
                             "load the model without as_stored, and quantize it afterwards")
    return layers


def _put(model, found: dict[str, LoRA]) -> None:
    """Merges the adapters that a GPT has, and gives it others, by the names of their layers."""
    merge(model)
    replace_linear_layers(model, lambda name, layer: LoRALinear(layer, found[name])
                          if name in found else layer)


def attach(model, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Gives an adapter to every linear layer whose name one of the patterns matches.

    Those that are there are merged first. Raises ValueError where a pattern matches none.
    """
    layers, rng, found = _layers(model), np.random.default_rng([seed, rank]), {}
    for name in _matching(targets, layers, "lora_targets"):
        N, C = layers[name].weight.shape
        if rank > min(N, C):
            raise ValueError(f"lora_rank={rank} is above {min(N, C)}, the highest rank that {name} "
                             "can have: choose a smaller one")
        a = rng.standard_normal((rank, C), dtype=np.float32) / np.float32(np.sqrt(C))
        found[name] = LoRA(a, np.zeros((N, rank), np.float32), alpha)
    _put(model, found)


def merge(model) -> None:
    """Adds every adapter to the weight of its Linear, and puts the Linear back."""
    replace_linear_layers(model, lambda _, layer: layer.merged()
                          if isinstance(layer, LoRALinear) else layer)


def is_adapter(name: str) -> bool:
    """Whether a weight of that name belongs to an adapter."""
    return name.endswith((".lora.a", ".lora.b"))


def adopt(model, arrays: dict[str, np.ndarray], alpha: float | None, path: str | Path) -> None:
    """Gives a GPT the adapters in arrays, `<layer>.lora.a` and `.lora.b`.

    Raises CheckpointError where they do not fit its layers, or have no alpha.
    """
    layers, found = _layers(model), {}
    if arrays and alpha is None:
        raise checkpoint.CheckpointError(f"{path} has LoRA adapters, but no lora_alpha in its "
                                         "metadata: use another one")
    for name in arrays:
        prefix, _, kind = name.rpartition(".")
        layer = layers.get(layer_name := prefix.removesuffix(".lora"))
        a, b = arrays.get(f"{prefix}.a"), arrays.get(f"{prefix}.b")
        if layer is None or a is None or b is None or a.ndim != 2 or b.ndim != 2 or (
                (b.shape[0], a.shape[1]) != layer.weight.shape or not a.shape[0] == b.shape[1] > 0):
            raise checkpoint.CheckpointError(f"{path} has {name}, which does not fit the model: "
                                             "use the one that it was trained on")
        if kind == "a":
            found[layer_name] = LoRA(a.astype(np.float32), b.astype(np.float32), alpha)
    _put(model, found)


def check_same(model, file: checkpoint.Checkpoint) -> None:
    """Raises CheckpointError, which names the setting, where the adapters of a model have another
    rank or alpha than those in a checkpoint."""
    ranks = [sum(shape[:1]) for name, shape in file.shapes.items() if name.endswith(".lora.a")]
    theirs = {"lora_rank": ranks[0] if ranks else 0, "lora_alpha": file.header.get("lora_alpha")}
    ours = {"lora_rank": next((a.a.shape[0] for a in adapters(model)), 0),
            "lora_alpha": alpha_of(model)}
    checkpoint.check_same(file.path, theirs, ours)


def save(model, weights: dict[str, Tensor], metadata: dict, out_dir: Path) -> Path:
    """Writes the adapters among weights into out_dir/lora.safetensors; returns its path."""
    tensors = {f"lora.{k}": w.numpy() for k, w in weights.items() if is_adapter(k)}
    return checkpoint.save(out_dir / FILE, tensors, metadata | {
        "lora_alpha": alpha_of(model), "lora_tokenizer": _identity(model.tokenizer)})


def load(model, path: str | Path) -> None:
    """Merges adapters in a file that `save` wrote into a GPT. Raises CheckpointError, with nothing
    changed, where they were trained with another configuration or tokenizer."""
    with checkpoint.Checkpoint(path) as file:
        if not file.part("lora.") or file.header.get("lora_alpha") is None:
            raise checkpoint.CheckpointError(f"{path} has no LoRA adapters: name the {FILE} of a "
                                             "run with --lora_rank")
        _check_base(model, file)
        arrays = {k: file.read_float(f"lora.{k}") for k in file.part("lora.")}
    adopt(model, arrays, file.header["lora_alpha"], path)
    merge(model)


def _check_base(model, file: checkpoint.Checkpoint) -> None:
    """Raises CheckpointError where the adapters were trained on another model; block_size and
    dropout may differ."""
    theirs, ours = file.header["model_config"], asdict(model.config)
    for key in theirs.keys() & ours.keys() - {"block_size", "dropout"}:
        if theirs[key] != ours[key]:
            raise checkpoint.CheckpointError(
                f"{file.path} has adapters that were trained on a model with {key}="
                f"{checkpoint.one_line(theirs[key])}, but this one has {key}={ours[key]}: use the "
                "one that they were trained on")
    theirs, ours = file.header.get("lora_tokenizer"), _identity(model.tokenizer)
    if theirs and ours and theirs != ours:
        raise checkpoint.CheckpointError(
            f"{file.path} has adapters that were trained with the tokenizer "
            f"{_named(theirs)}, but the model has {_named(ours)}: use the one that they were "
            "trained on")


def _identity(tokenizer: Tokenizer | None) -> dict | None:
    return tokenizer and {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                          "fingerprint": fingerprint(tokenizer)}


def _named(identity: dict) -> str:
    kind, size, digest = (checkpoint.one_line(identity.get(key)) for key in (
        "kind", "vocab_size", "fingerprint"))
    return f"{kind} of {size} ids with the fingerprint {digest}"


def alpha_of(model) -> float | None:
    """The alpha of a GPT's adapters; None without any."""
    return next((adapter.alpha for adapter in adapters(model)), None)


def trainable(weights: dict[str, Tensor], freeze: str | None) -> dict[str, Tensor]:
    """The weights that training changes: the adapters where there are any, else all, without those
    whose names a pattern of freeze matches. Raises ValueError where none is left, or where a
    pattern matches nothing."""
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
