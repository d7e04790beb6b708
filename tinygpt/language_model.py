"""What every model of tokens does beside its forward pass: it writes text, and it is kept."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from numbers import Integral
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp

from tinygpt import checkpoint
from tinygpt.config import SampleConfig
from tinygpt.decoder import Decoders
from tinygpt.tokenizer import Tokenizer, load_tokenizer

MOST_TOKENS = 10**8  # that `generate` returns at once


class LanguageModel:
    """A subclass names its weights in `state_dict`, gives the logits of a text in
    `_next_logits`, and says what it is in `kind` and `config_class`, a dataclass with block_size
    and vocab_size.

    `compute_dtype` ("float32" or "bfloat16") is what activations are kept in; `tokenizer` is what
    the weights were trained with, where that is known.
    """

    kind: str  # in a checkpoint's metadata
    config_class: type

    def __init__(self, config):
        self.config = config
        self.compute_dtype = "float32"
        self.tokenizer: Tokenizer | None = None
        self._decoders = Decoders()

    def state_dict(self) -> dict[str, Tensor]:
        """Every weight by its name."""
        raise NotImplementedError

    @property
    def device(self) -> str | tuple[str, ...]:
        """The device of the weights, or the devices that each have them."""
        raise NotImplementedError

    def _new_cache(self, batch_size: int, start: Tensor | None = None):
        """What `_next_logits` keeps of the tokens that it has seen. With start (B,) int32 the text
        of row b begins at index start[b], and what is before it is padding."""
        raise NotImplementedError

    def _next_logits(self, tokens: Tensor, cache, position: UOp | int, row: UOp | int) -> Tensor:
        """The logits (B, V) float32 after that row of tokens (B, T), the first of which is at index
        `position`; tokens before it are read from the cache, and these are written to it."""
        raise NotImplementedError

    @classmethod
    def _for_tensors(cls, config, tensors: dict[str, np.ndarray], facts: dict,
                     path: str | Path) -> "LanguageModel":
        """A model that a checkpoint's tensors fit, its weights not drawn. Raises CheckpointError
        where they are not those of its configuration, since a header can claim anything."""
        raise NotImplementedError

    # ---- writing text

    def generate(self, idx, max_new_tokens: int | None = None, *, max_tokens: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None, repetition_penalty: float = 1.0,
                 window_hop: int = 1, seed: int = 1337) -> Tensor | list[list[int]]:
        """Continues each row of idx (B, T): int32 (B, T + max_new_tokens).

        idx is a Tensor, array or nested list of token ids. Rows of different lengths, as in
        [[5, 1], [7]], are one batch too; then the result is a list of lists, each row followed by
        its new tokens. The model sees the last block_size tokens at most. temperature 0 takes the
        likeliest token; the other options are those of `tinygpt.config.SampleConfig`. `max_tokens`
        is another name of max_new_tokens, 100 where neither is given.

        What a row gets depends on its own tokens, its place in the batch and the seed, not on the
        other rows (but for the rounding of sums); the first row gets what it would get alone.
        Weights may be assigned or replaced, and layers exchanged, between two calls.

        Raises ValueError on ids outside the vocabulary, an option out of range, or a text of more
        than MOST_TOKENS tokens in all.
        """
        if max_new_tokens is None and max_tokens is None:
            max_new_tokens = 100
        config = _sample_config(max_new_tokens, max_tokens, temperature=temperature, top_k=top_k,
                                top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
                                window_hop=window_hop, seed=seed)
        prompts = self._check_ids(idx)
        total = sum(map(len, prompts)) + len(prompts) * config.max_new_tokens
        if total > MOST_TOKENS:
            raise ValueError(f"max_new_tokens={config.max_new_tokens} makes {total} tokens in all, "
                             f"above {MOST_TOKENS}: choose fewer, or take them from stream")
        new = np.empty((len(prompts), config.max_new_tokens), np.int32)
        for i, tokens in enumerate(self._decoders.run(self, prompts, config)):
            new[:, i] = tokens
        rows = [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]
        if len(set(map(len, prompts))) > 1:
            return [row.tolist() for row in rows]
        return Tensor(np.stack(rows), dtype="int32")

    def stream(self, idx, config: SampleConfig | None = None, **options) -> Iterator[int]:
        """Yields the ids that continue idx, (T,) or (1, T), one by one as they are drawn.

        Options are those of `generate`, or a SampleConfig that holds them. Several streams may be
        read in turn. Raises ValueError as `generate` does, but for long texts.
        """
        if config is not None and options:
            raise ValueError(f"stream takes a SampleConfig or options, not both: put "
                             f"{', '.join(options)} into the config")
        prompts = self._check_ids(idx, flat=True)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one sequence, not {len(prompts)}: use generate")
        if config is None:
            config = _sample_config(options.pop("max_new_tokens", None),
                                    options.pop("max_tokens", None), **options)
        return (int(t[0]) for t in self._decoders.run(self, prompts, config))

    def free_decoders(self) -> None:
        """Frees the caches and compiled steps of `generate` and `stream`, and the memory of
        replaced weights that the steps hold; they are made anew when they are needed."""
        self._decoders.clear()

    def _check_ids(self, idx, flat: bool = False) -> list[np.ndarray]:
        """The rows of idx, (T,) int32 each; with `flat` also idx (T,), as one row."""
        try:
            ids = idx.numpy() if isinstance(idx, Tensor) else idx
            rows = [np.asarray(row.numpy() if isinstance(row, Tensor) else row) for row in ids]
        except (TypeError, ValueError) as error:  # one number, or lists nested unevenly
            raise ValueError("idx is no list of rows of token ids: give integers (B, T), or a list "
                             "of lists of them") from error
        if flat and rows and all(row.ndim == 0 for row in rows):
            rows = [np.array(rows)]
        if not rows:
            raise ValueError("idx has no rows: give at least one, with at least one token")
        return [self._check_row(row, i) for i, row in enumerate(rows)]

    def _check_row(self, ids: np.ndarray, number: int) -> np.ndarray:
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"row {number} of idx has shape {ids.shape} and dtype {ids.dtype}: "
                             "give integers (T,), at least one")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = ids.max() if ids.max() >= self.config.vocab_size else ids.min()
            raise ValueError(f"token id {bad} is outside the vocabulary 0.."
                             f"{self.config.vocab_size - 1}: was it made by another tokenizer?")
        return ids.astype(np.int32)

    # ---- weights and checkpoints

    def load_state_dict(self, arrays: dict[str, np.ndarray]) -> None:
        """Puts arrays of the same names and shapes in place of the weights.

        Raises ValueError, before anything is changed, where a name or a shape differs.
        """
        weights = self.state_dict()
        checkpoint.check_shapes(arrays, {k: w.shape for k, w in weights.items()})
        for name, weight in weights.items():
            weight.assign(Tensor(arrays[name].astype(np.float32))).realize()

    def save_checkpoint(self, iter_num: int, optimizer=None, out_dir: str | Path = "checkpoints",
                        metadata: dict | None = None, ema=None) -> Path:
        """Writes out_dir/ckpt_<iter_num>.safetensors, whole or not at all, and returns its path.

        It holds the weights, the state of the optimizer and of the EMA where they are given, and
        in its metadata the configuration, the tokenizer and whatever `metadata` adds. Raises
        ValueError where it cannot be written.
        """
        if not isinstance(iter_num, Integral) or iter_num < 0:
            raise ValueError(f"iter_num={iter_num!r} is no number of steps")
        tensors = {prefix + k: t.numpy() for prefix, part in (
            ("model.", self), ("optimizer.", optimizer), ("ema.", ema)) if part is not None
            for k, t in part.state_dict().items()}
        return checkpoint.save(Path(out_dir) / checkpoint.name(iter_num), tensors,
                               self._facts() | {"iter_num": iter_num} | (metadata or {}))

    def _facts(self) -> dict:
        """What a checkpoint's metadata says of the model."""
        return {"model": self.kind, "model_config": asdict(self.config),
                "tokenizer": self.tokenizer and self.tokenizer.to_json()}

    def load_checkpoint(self, path: str | Path, optimizer=None, ema=None) -> dict:
        """Takes weights, and the state of optimizer and EMA, from a checkpoint; returns its
        metadata. Where the checkpoint has no average, the EMA starts at its weights.

        Raises ValueError, with nothing changed, where the file is missing, damaged or of another
        architecture, or has no optimizer though one is given.
        """
        return self._take(*checkpoint.load(path), path, optimizer, ema)

    def _take(self, tensors: dict[str, np.ndarray], facts: dict, path: str | Path, optimizer=None,
              ema=None) -> dict:
        """What `load_checkpoint` does with a file's tensors and metadata."""
        theirs = self._config_of(facts, path)
        checkpoint.check_same(path, asdict(theirs), asdict(self.config), ignore=("dropout",))
        weights = checkpoint.part(tensors, "model.")
        checkpoint.check_shapes(weights, {k: w.shape for k, w in self.state_dict().items()}, path)
        averages = checkpoint.part(tensors, "ema.") or weights
        if ema is not None:
            checkpoint.check_shapes(averages, {k: w.shape for k, w in weights.items()}, path)
        if optimizer is not None:
            optimizer.load_state_dict(checkpoint.part(tensors, "optimizer."), path)
        if ema is not None:
            ema.load_state_dict(averages, path)
        self.load_state_dict(weights)
        if facts.get("tokenizer"):
            self.tokenizer = load_tokenizer(facts["tokenizer"])
        return facts

    @classmethod
    def _config_of(cls, facts: dict, path: str | Path):
        """The configuration in a checkpoint's metadata. Raises CheckpointError."""
        checkpoint.check_kind(path, facts, cls.kind)
        types = {f.name: f.type | int if f.type is float else f.type
                 for f in fields(cls.config_class)}
        settings = facts["model_config"]
        try:
            for name, value in settings.items():
                if not isinstance(value, types[name]):
                    raise TypeError(f"{name}={value!r}")
            return cls.config_class(**settings)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(f"{path} has a model_config that cannot be used "
                                             f"({error}): use another one") from error

    @classmethod
    def from_checkpoint(cls, path: str | Path, ema: bool = False) -> "LanguageModel":
        """The model that a checkpoint holds, with its tokenizer; with ema the moving average of
        its weights. Raises ValueError.
        """
        tensors, facts = checkpoint.load(path)
        config = cls._config_of(facts, path)
        averages = checkpoint.part(tensors, "ema.")
        if ema and not averages:
            raise checkpoint.CheckpointError(f"{path} has no moving average of the weights: leave "
                                             "out --ema, or train with it")
        model = cls._for_tensors(config, checkpoint.part(tensors, "model."), facts, path)
        model._take(tensors, facts, path)
        if ema:
            model.load_state_dict(averages)
        return model


def _sample_config(max_new_tokens: int | None, max_tokens: int | None, **options) -> SampleConfig:
    """A SampleConfig of options, and of a number of tokens under one of its two names."""
    if max_new_tokens is not None and max_tokens is not None:
        raise ValueError(f"max_new_tokens={max_new_tokens} and max_tokens={max_tokens} are two "
                         "names of one option: give one of them")
    count = max_new_tokens if max_tokens is None else max_tokens
    return SampleConfig(**options | ({} if count is None else {"max_new_tokens": count}))
