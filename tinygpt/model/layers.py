"""The linear layers of a GPT's blocks, which LoRA and quantization replace by their own."""

from collections.abc import Callable, Iterator

from tinygrad import Tensor


def linear_layers(model) -> dict[str, object]:
    """The linear layers in a GPT's blocks, by name; a bigram model has none."""
    return {name: getattr(owner, attribute) for name, owner, attribute in _places(model)}


def replace_linear_layers(model, replacement: Callable[[str, object], object]) -> None:
    """Puts replacement(name, layer) in the place of each of these layers, one after another."""
    for name, owner, attribute in _places(model):
        setattr(owner, attribute, replacement(name, getattr(owner, attribute)))


def _places(model) -> Iterator[tuple[str, object, str]]:
    for i, block in enumerate(getattr(model, "h", ())):
        for part in ("attn", "mlp"):
            owner = getattr(block, part)
            for attribute in list(vars(owner)):
                w = getattr(getattr(owner, attribute), "weight", None)
                if isinstance(w, Tensor) and w.ndim == 2:
                    yield f"h.{i}.{part}.{attribute}", owner, attribute
