"""The baseline that a GPT has to beat: the next token is guessed from the last one alone."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt import checkpoint, device, kernels
from tinygpt.config import SampleConfig, check_range
from tinygpt.decoder import Decoder
from tinygpt.sampling import Controls
from tinygpt.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    """The sizes of the table and of a training sequence."""

    block_size: int = field(default=128, metadata={"help": "tokens of a training sequence"})
    vocab_size: int = field(default=256, metadata={"help": "number of token ids"})

    dropout = 0.0  # there is nothing to drop

    def __post_init__(self):
        check_range(self, "block_size", low=1)
        check_range(self, "vocab_size", low=1)


class Bigram:
    """A table (V, V) float32 whose row i has the logits of what follows token i.

    It is trained, saved and sampled as a GPT is. Zeros at first: every token is as likely.
    """

    def __init__(self, config: BigramConfig):
        device.default()
        self.config, self.compute_dtype = config, "float32"
        self.tokenizer: Tokenizer | None = None
        self.table = Tensor.zeros(config.vocab_size, config.vocab_size).contiguous().realize()

    def __call__(self, idx: Tensor, targets: Tensor | None = None, dropout_key=None,
                 label_smoothing: float = 0.0, z_loss: float = 0.0):
        """Logits (B, T, V) for idx (B, T) int32; with targets (B, T) int32 also the loss."""
        logits = kernels.embedding(idx, self.table)  # (B, T, V)
        if targets is None:
            return logits
        return logits, kernels.cross_entropy(logits.reshape(-1, self.config.vocab_size),
                                             targets.reshape(-1), label_smoothing, z_loss)

    def generate(self, idx, max_new_tokens: int = 100, **options) -> Tensor:
        """Continues each row of idx (B, T): int32 (B, T + max_new_tokens); options are those of
        `tinygpt.config.SampleConfig`. Raises ValueError on ids outside the vocabulary."""
        ids = np.asarray(idx.numpy() if isinstance(idx, Tensor) else idx, dtype=np.int32)
        new = self._decode(ids, SampleConfig(max_new_tokens=max_new_tokens, **options))
        return Tensor(np.concatenate([ids, *(t[:, None] for t in new)], axis=1), dtype="int32")

    def stream(self, idx, config: SampleConfig) -> Iterator[int]:
        """Yields the ids that continue idx (1, T), one by one."""
        return (int(t[0]) for t in self._decode(np.asarray(idx, dtype=np.int32), config))

    def _decode(self, ids: np.ndarray, config: SampleConfig) -> Iterator[np.ndarray]:
        size = self.config.vocab_size
        if ids.ndim != 2 or not ids.size or ids.min() < 0 or ids.max() >= size:
            raise ValueError(f"idx has shape {ids.shape}: give ids 0..{size - 1} as (B, T)")

        def forward(tokens: Tensor, position, row) -> Tensor:
            return kernels.embedding(tokens[:, row:row + 1], self.table)[:, 0]  # (B, V)
        decoder = Decoder(forward, self.config.block_size, size, len(ids),
                          Controls.of(config).enabled)
        return decoder.run(ids, config)

    def quantize(self, kind: str) -> "Bigram":
        raise ValueError("a bigram model is not quantized: leave out --quantize")

    def state_dict(self) -> dict[str, Tensor]:
        """The table, by its name."""
        return get_state_dict({"table": self.table})

    def load_state_dict(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes a table of the same shape. Raises ValueError."""
        checkpoint.check_shapes(arrays, {"table": self.table.shape})
        self.table.assign(Tensor(arrays["table"].astype(np.float32), dtype=dtypes.float32)
                          ).realize()

    def num_params(self) -> int:
        return self.table.numel()

    def estimate_flops(self, length: int | None = None) -> int:
        """0: a row is looked up, nothing is multiplied."""
        return 0

    def save_checkpoint(self, iter_num: int, optimizer=None, out_dir: str | Path = "checkpoints",
                        metadata: dict | None = None, ema=None) -> Path:
        """Writes out_dir/ckpt_<iter_num>.safetensors as GPT.save_checkpoint does."""
        parts = {"model.": self, "optimizer.": optimizer, "ema.": ema}
        tensors = {prefix + k: t.numpy() for prefix, part in parts.items() if part is not None
                   for k, t in part.state_dict().items()}
        facts = {"model": "bigram", "model_config": asdict(self.config), "iter_num": iter_num,
                 "tokenizer": self.tokenizer and self.tokenizer.to_json()}
        return checkpoint.save(Path(out_dir) / checkpoint.name(iter_num), tensors,
                               facts | (metadata or {}))

    def load_checkpoint(self, path: str | Path, optimizer=None, ema=None) -> dict:
        """Takes the table, and the state of optimizer and EMA; returns the metadata.

        Raises ValueError where the file is missing, damaged, or not of this model.
        """
        tensors, facts = checkpoint.load(path)
        checkpoint.check_model(path, facts, "bigram")
        checkpoint.check_same(path, facts["model_config"], asdict(self.config))
        table = checkpoint.part(tensors, "model.")
        checkpoint.check_shapes(table, {"table": self.table.shape}, path)
        if optimizer is not None:
            optimizer.load_state_dict(checkpoint.part(tensors, "optimizer."), path)
        if ema is not None:
            ema.load_state_dict(checkpoint.part(tensors, "ema.") or table, path)
        self.load_state_dict(table)
        if facts.get("tokenizer"):
            self.tokenizer = load_tokenizer(facts["tokenizer"])
        return facts

    @classmethod
    def from_checkpoint(cls, path: str | Path, ema: bool = False) -> "Bigram":
        """The model that a checkpoint holds, with its tokenizer; with ema the moving average."""
        tensors, facts = checkpoint.load(path)
        checkpoint.check_model(path, facts, "bigram")
        table = checkpoint.part(tensors, "ema." if ema else "model.")
        if "table" not in table or table["table"].ndim != 2:
            raise checkpoint.CheckpointError(f"{path} has no {'moving average' if ema else 'table'}"
                                             ": use another one")
        config = BigramConfig(block_size=int(facts["model_config"]["block_size"]),
                              vocab_size=len(table["table"]))
        model = cls(config)
        model.load_checkpoint(path)
        model.load_state_dict(table)
        return model
