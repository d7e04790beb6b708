"""What every language model does besides its forward pass: generating text, saving and loading."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from numbers import Integral
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp

from tinygpt import checkpoint, device
from tinygpt.config import SampleConfig, kind_of
from tinygpt.data.tokenizer import Tokenizer
from tinygpt.inference.decoder import Decoders, Drawn
from tinygpt.kernels.jit import is_capturing
from tinygpt.model import lora
from tinygpt.model.quantize import quantize
from tinygpt.stock_optim import check_optimizer, with_state_dict

MOST_TOKENS = 10**8  # that `generate` returns at once
LossFunction = Callable[[Tensor, Tensor], Tensor]  # of logits (N, V) and targets (N,)


class LanguageModel:
    """A subclass has the constructor (config, seed), `state_dict`, `_next_logits`, `kind`, and
    `config_class`, a dataclass with block_size and vocab_size.

    `compute_dtype` ("float32", "bfloat16" or "float16") is the dtype of activations; `tokenizer` is
    the one that the weights were trained with, where it is known.
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
        """A cache for `_next_logits`. With start (B,) int32 the text of row b begins at index
        start[b], after padding."""
        raise NotImplementedError

    def _next_logits(self, tokens: Tensor, cache, start_pos: UOp | int, row: UOp | int) -> Tensor:
        """The logits (B, V) float32 after column `row` of tokens (B, T). The tokens begin at index
        start_pos of the text: those before are read from the cache, these are written to it."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, config) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its name, for a model of that configuration; allocates
        nothing."""
        raise NotImplementedError

    def _loss(self, logits: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
        return loss_fn(logits.reshape(-1, self.config.vocab_size), targets.reshape(-1))

    # ---- generating text

    def generate(self, idx, max_new_tokens: int | None = None, *,
                 config: SampleConfig | None = None, **options) -> Tensor | list[list[int]]:
        """Continues each row of idx (B, T): int32 (B, T + max_new_tokens).

        idx is a Tensor, array or nested list of token ids. Rows of different lengths, as in
        [[5, 1], [7]], are one batch too; then the result is a list of lists, each row followed by
        its new tokens. The model sees the last block_size tokens at most.

        config has the sampling parameters. Instead of it, options are fields of
        `tinygpt.config.SampleConfig`, whose defaults hold for what is not given: generate(idx, 100,
        temperature=0) takes the likeliest token. `max_tokens` is another name of max_new_tokens.

        What a row gets depends on its own tokens, its place in the batch and the seed, not on the
        other rows (except for the rounding of sums); the first row gets what it would get alone.
        Weights may be assigned or replaced, and layers exchanged, between two calls.

        Raises ValueError on ids outside the vocabulary, an option out of range, or a text of more
        than MOST_TOKENS tokens in all.
        """
        config = _sample_config(max_new_tokens, config, options)
        prompts = self._check_ids(idx)
        total = sum(map(len, prompts)) + len(prompts) * config.max_new_tokens
        if total > MOST_TOKENS:
            raise ValueError(f"max_new_tokens={config.max_new_tokens} makes {total} tokens in all, "
                             f"above {MOST_TOKENS}: choose fewer, or take them from stream")
        new = np.empty((len(prompts), config.max_new_tokens), np.int32)
        for i, drawn in enumerate(self._decoders.run(self, prompts, config)):
            new[:, i] = drawn.tokens
        rows = [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]
        if len(set(map(len, prompts))) > 1:
            return [row.tolist() for row in rows]
        return Tensor(np.stack(rows), dtype="int32")

    def stream(self, idx, max_new_tokens: int | None = None, *,
               config: SampleConfig | None = None, reuse_cache: bool = False,
               **options) -> Iterator[int]:
        """Yields the ids that continue idx, (T,) or (1, T), one by one as they are drawn.

        The sampling parameters are given as for `generate`. Several streams may be read in turn.
        With reuse_cache the tokens that an earlier text of the model began with, in the same order,
        are not computed again; the weights must not have changed since then. The text is the same,
        up to the rounding of sums. Raises ValueError as `generate` does, except for long texts.
        """
        config = _sample_config(max_new_tokens, config, options)
        prompts = self._check_ids(idx, flat=True)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one sequence, not {len(prompts)}: use generate")
        drawn = self._decoders.run(self, prompts, config, reuse_cache)
        return (int(step.tokens[0]) for step in drawn)

    def stream_batch(self, idx, max_new_tokens: int | None = None, *,
                     config: SampleConfig | None = None, reuse_cache: bool = False,
                     **options) -> Iterator[Drawn]:
        """Yields, step by step, what `generate` appends to the rows of idx: the tokens (B,) int32,
        and the logits (B, V) float32 of the model, to be read before the next step.

        reuse_cache is as for `stream`. Raises ValueError as `generate` does, except for long texts.
        """
        config = _sample_config(max_new_tokens, config, options)
        return self._decoders.run(self, self._check_ids(idx), config, reuse_cache, with_logits=True)

    def free_decoders(self) -> None:
        """Frees the caches and compiled steps of `generate` and `stream`, and the memory of
        replaced weights that the steps hold; the next call compiles them again."""
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

    def _check_tokens(self, idx: Tensor, targets: Tensor | None) -> None:
        """Raises ValueError where idx or targets has an id outside the vocabulary; negative targets
        are allowed."""
        if is_capturing():
            return
        for name, ids, low in (("idx", idx, 0), ("targets", targets, None)):
            if ids is None:
                continue
            values = ids.numpy()
            bad = values[(values >= self.config.vocab_size) | (low is not None) & (values < 0)]
            if bad.size:
                raise ValueError(f"{name} has token id {bad[0]}, outside the vocabulary 0.."
                                 f"{self.config.vocab_size - 1}: was it made by another tokenizer?")

    # ---- weights and checkpoints

    def num_params(self, non_embedding: bool = False) -> int:
        """The number of weights, tied ones counted once; with non_embedding those of the position
        table are left out."""
        return sum(w.numel() for name, w in self.state_dict().items()
                   if not (non_embedding and name == "wpe.weight"))

    def quantize(self, kind: str) -> "LanguageModel":
        """Quantizes the matrices to "int8", "int4" or "fp16", to generate text with.

        Returns the model, which can then be neither trained nor saved. Raises ValueError where it
        is quantized already.
        """
        self.free_decoders()  # whose compiled steps hold the matrices
        lora.merge(self)
        quantize(self, kind)
        return self

    def load_state_dict(self, arrays: dict[str, np.ndarray]) -> None:
        """Loads arrays of the same names and shapes into the weights.

        Raises ValueError, with nothing changed, where a name or a shape differs.
        """
        weights = self.state_dict()
        checkpoint.check_arrays(arrays, weights)
        for name, weight in weights.items():
            weight.assign(Tensor(arrays[name].astype(np.float32))).realize()

    def save_checkpoint(self, iter_num: int, optimizer=None, out_dir: str | Path = "checkpoints",
                        metadata: dict | None = None, ema=None) -> Path:
        """Writes out_dir/ckpt_<iter_num>.safetensors, atomically, and returns its path.

        It has the weights, the state of the optimizer (one of ours or of tinygrad's `nn.optim`) and
        of the EMA where they are given, and as metadata the configuration, the tokenizer and what
        `metadata` adds. Raises ValueError where it cannot be written, or where a number in it is
        not finite.
        """
        if not isinstance(iter_num, Integral) or isinstance(iter_num, bool) or iter_num < 0:
            raise ValueError(f"iter_num={iter_num!r} is no number of steps")
        weights = self.state_dict()
        optimizer = None if optimizer is None else with_state_dict(optimizer, weights)
        tensors = {prefix + k: t.numpy() for prefix, part in (
            ("model.", self), ("optimizer.", optimizer), ("ema.", ema)) if part is not None
            for k, t in part.state_dict().items()}
        return checkpoint.save(Path(out_dir) / checkpoint.name(iter_num), tensors,
                               self._header() | {"iter_num": int(iter_num)} | (metadata or {}))

    def _header(self) -> dict:
        """The metadata of a checkpoint that describes the model."""
        return {"model": self.kind, "model_config": asdict(self.config),
                "tokenizer": self.tokenizer and self.tokenizer.to_json(),
                "lora_alpha": lora.alpha_of(self)}

    def load_checkpoint(self, path: str | Path, optimizer=None, ema=None) -> dict:
        """Loads weights, and the state of optimizer and EMA, from a checkpoint; returns its
        metadata. Where the checkpoint has no average, the EMA starts at its weights.

        The optimizer is one of ours or of tinygrad's `nn.optim`, of the same kind and for the same
        weights as the one that was saved. Raises ValueError, with nothing changed, where the file
        is missing, damaged or of another architecture, or lacks the optimizer that is given.
        """
        mine = self.state_dict()
        with checkpoint.Checkpoint(path) as file:
            theirs = self._config_of(file.header, path)
            checkpoint.check_same(path, asdict(theirs), asdict(self.config), ignore=("dropout",))
            lora.check_same(self, file)
            checkpoint.check_shapes(file.part("model."), {k: w.shape for k, w in mine.items()},
                                    path)
            tokenizer = checkpoint.tokenizer_of(file)
            weights = {name: file.read_float(f"model.{name}") for name in mine}
            averages = file.read_part("ema.") if ema is not None else {}
            state = file.read_part("optimizer.") if optimizer is not None else {}
        averages = averages or weights
        if ema is not None:
            checkpoint.check_arrays(averages, mine, path)
        if optimizer is not None:
            optimizer = with_state_dict(optimizer, mine)
            check_optimizer(state, optimizer, path)
            optimizer.load_state_dict(state, path)
        if ema is not None:
            ema.load_state_dict(averages, path)
        self.load_state_dict(weights)
        self.tokenizer = tokenizer or self.tokenizer
        return file.header

    @classmethod
    def _config_of(cls, header: dict, path: str | Path):
        """The configuration in a checkpoint's metadata. Raises CheckpointError."""
        checkpoint.check_kind(path, header, cls.kind)
        kinds = {f.name: kind_of(f) for f in fields(cls.config_class)}
        settings = header["model_config"]
        try:
            for name, value in settings.items():
                kind, optional = kinds[name]
                fits = (isinstance(value, int | float if kind is float else kind)
                        and isinstance(value, bool) == (kind is bool)
                        and not (isinstance(value, int) and abs(value) >= 2**53))
                if not fits and not (optional and value is None):
                    raise TypeError(f"{name}={value!r}")
            return cls.config_class(**settings)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path} has a model_config that cannot be used ({checkpoint.one_line(error)}): "
                "use another one") from error

    @classmethod
    def check_fit(cls, config, shapes: dict[str, tuple], path: str | Path) -> None:
        """Raises CheckpointError, before anything is allocated, where the shapes of weights are not
        those of the configuration: a file can claim any size."""
        if (layers := getattr(config, "n_layer", 0)) > len(shapes):
            raise checkpoint.CheckpointError(f"{path} has n_layer={layers}, but only {len(shapes)} "
                                             "tensors: use another one")
        checkpoint.check_shapes(shapes, cls.shapes(config), path)

    @classmethod
    def fitting(cls, config, shapes: dict[str, tuple], path: str | Path) -> "LanguageModel":
        """A model of that configuration, to load weights of those shapes into. Raises
        CheckpointError as check_fit does."""
        cls.check_fit(config, shapes, path)
        return cls(config, seed=None)

    @classmethod
    def _fitting_file(cls, config, file: checkpoint.Checkpoint) -> "LanguageModel":
        """A model, with the adapters of a checkpoint, to load its weights into."""
        shapes = file.part("model.")
        adapters = {k: file.read_float(f"model.{k}") for k in shapes if lora.is_adapter(k)}
        weights = {k: shape for k, shape in shapes.items() if k not in adapters}
        model = cls.fitting(config, weights, file.path)
        lora.adopt(model, adapters, file.header.get("lora_alpha"), file.path)
        return model

    @classmethod
    def from_checkpoint(cls, path: str | Path, ema: bool = True) -> "LanguageModel":
        """The model in a checkpoint, with its tokenizer, and LoRA merged. With ema its weights are
        their moving average, which the run evaluated, where there is one. Raises ValueError."""
        with checkpoint.Checkpoint(path) as file:
            prefix = "ema." if ema and file.part("ema.") else "model."
            config = cls._config_of(file.header, path)
            tokenizer = checkpoint.tokenizer_of(file)
            model = cls._fitting_file(config, file)
            weights = model.state_dict()
            checkpoint.check_shapes(file.part(prefix), {k: w.shape for k, w in weights.items()},
                                    path)
            for name, weight in weights.items():
                device.write(weight, file.read_float(prefix + name))
        lora.merge(model)
        model.tokenizer = tokenizer
        return model


def _sample_config(max_new_tokens: int | None, config: SampleConfig | None,
                   options: dict) -> SampleConfig:
    """The SampleConfig that is given, or that of options and max_new_tokens, which has two names.
    """
    other = options.pop("max_tokens", None)
    if None not in (max_new_tokens, other):
        raise ValueError(f"max_new_tokens={max_new_tokens} and max_tokens={other} are two names of "
                         "one option: give one of them")
    count = max_new_tokens if other is None else other
    options |= {} if count is None else {"max_new_tokens": count}
    if config is not None and options:
        raise ValueError(f"both a SampleConfig and options are given: put {', '.join(options)} "
                         "into the config")
    return config or SampleConfig(**options)
