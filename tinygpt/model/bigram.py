"""The baseline that a GPT has to beat: the next token is predicted from the last one alone."""

from dataclasses import dataclass
from pathlib import Path

from tinygrad import Tensor

from tinygpt import device, kernels
from tinygpt.config import check, setting
from tinygpt.kernels.loss import Loss
from tinygpt.model.language_model import LanguageModel, LossFunction


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    """The sizes of the table and of a training sequence."""

    block_size: int = setting(128, "tokens of a training sequence", low=1)
    vocab_size: int = setting(256, "number of token ids", low=1)

    dropout = 0.0  # there is nothing to drop

    def __post_init__(self):
        check(self)


class Bigram(LanguageModel):
    """A table (V, V) float32 whose row i has the logits of the token after token i.

    It is trained, saved and sampled as a GPT is. It begins as zeros whatever the seed, so that all
    tokens are equally likely.
    """

    kind, config_class = "bigram", BigramConfig

    def __init__(self, config: BigramConfig, seed: int | None = None):
        device.default()
        device.check_memory(4 * config.vocab_size ** 2, "the table of a bigram model",
                            "choose a smaller vocab_size")
        super().__init__(config)
        self.table = Tensor.zeros(config.vocab_size, config.vocab_size).contiguous().realize()

    def __call__(self, idx: Tensor, targets: Tensor | None = None, dropout_key=None,
                 loss_fn: LossFunction = kernels.cross_entropy,
                 starts: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) for idx (B, T) int32; with targets (B, T) int32 also the loss. Where
        documents begin makes no difference: only the last token matters."""
        self._check_tokens(idx, targets)
        logits = kernels.embedding(idx, self.table)  # (B, T, V)
        if targets is None:
            return logits
        return logits, Loss(self._loss(logits, targets, loss_fn), self.state_dict)

    @property
    def device(self) -> str | tuple[str, ...]:
        return self.table.device

    def _new_cache(self, batch_size: int, start: Tensor | None = None) -> None:
        """None: only the last token matters."""

    def _next_logits(self, tokens: Tensor, cache: None, start_pos, row) -> Tensor:
        return kernels.embedding(tokens[:, row:row + 1], self.table)[:, 0]

    def quantize(self, kind: str) -> "Bigram":
        raise ValueError("a bigram model is not quantized: leave out --quantize")

    def save_pretrained(self, folder: str | Path) -> Path:
        raise ValueError("transformers has no bigram model: leave out --export")

    def state_dict(self) -> dict[str, Tensor]:
        """The table, by its name."""
        return {"table": self.table}

    def estimate_flops(self, length: int | None = None) -> int:
        """0: a row is looked up, nothing is multiplied."""
        return 0

    @classmethod
    def shapes(cls, config: BigramConfig) -> dict[str, tuple[int, ...]]:
        return {"table": (config.vocab_size, config.vocab_size)}
