"""Token ids of two splits, and their batches in a resumable order."""

import shutil
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinygpt.data import DataError
from tinygpt.data.token_files import Ids, chunks, digest
from tinygpt.data.tokenizer import Tokenizer, default_prompt, end_of_text


class SamplePrompt(NamedTuple):
    """What a sample during training begins with: its ids, the text that is shown before what the
    model makes of it, and the ids that end that."""

    ids: list[int]
    shown: str
    stop_ids: Set[int]


@dataclass
class TokenData:
    """Token ids of the training and validation splits (1-d, unsigned) and their metadata.

    tokenizer: None if bare ids were given. source: a path or glob if is_named, else a description.
    fingerprint: a hash of the ids of both splits. new_cache: the cache folder that this call wrote.
    note: a line to log with them.
    """

    train: Ids
    val: Ids
    tokenizer: Tokenizer | None
    source: str
    is_named: bool = True
    fingerprint: str = ""
    new_cache: Path | None = None
    note: str = ""

    def __post_init__(self):
        self.fingerprint = self.fingerprint or f"{digest(self.train)}-{digest(self.val)}"

    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes per validation token, where end-of-text has none; None without a
        tokenizer."""
        return self.tokenizer and mean_bytes(self.val, self.tokenizer, self.source)

    def batches(self, block_size: int, batch_size: int, seed: int) -> tuple["Batches", "Batches"]:
        """Those of the training split and of the validation split."""
        return tuple(Batches(ids, block_size, batch_size, seed) for ids in (self.train, self.val))

    def sample_prompts(self) -> list[SamplePrompt]:
        """What samples begin with; none without a tokenizer."""
        if self.tokenizer is None:
            return []
        prompt = self.tokenizer.encode(default_prompt(self.tokenizer))
        return [SamplePrompt(prompt, "", {end_of_text(self.tokenizer)})]

    def describe(self) -> dict:
        """Metadata of the data for a checkpoint, as JSON values; `check_same` takes it."""
        return {"source": self.source, "fingerprint": self.fingerprint,
                "training_tokens": len(self.train), "validation_tokens": len(self.val)}

    def check_same(self, path: Path, saved: dict | None) -> None:
        """Raises DataError if the checkpoint at path was trained on other ids. saved: what
        `describe` returned then; None, as in older checkpoints, is accepted."""
        ours = self.describe()
        if saved is None or (isinstance(saved, dict)
                             and saved.get("fingerprint") == self.fingerprint):
            return
        if not isinstance(saved, dict) or not ours.keys() <= saved.keys():
            raise DataError(f"{path} has damaged metadata of its data: use another checkpoint")
        names = ["{source} ({training_tokens} training and {validation_tokens} validation tokens, "
                 "fingerprint {fingerprint})".format(**data) for data in (saved, ours)]
        raise DataError(f"{path} was trained on {names[0]}, which is not the same data as "
                        f"{names[1]}: resume with the same data, or start a new run from it with "
                        "--init_from")

    def delete_new_cache(self) -> None:
        """Deletes the cache that was written for a run that is now refused."""
        if self.new_cache is not None:
            shutil.rmtree(self.new_cache, ignore_errors=True)


def mean_bytes(ids: Ids, tokenizer: Tokenizer, source: str, skip: int = 0) -> float | None:
    """Mean UTF-8 bytes per id, the first `skip` ids left out; None if all of them have 0 bytes.
    Raises DataError on an id outside the tokenizer's vocabulary."""
    lengths, total = tokenizer.token_lengths(), 0
    for part in chunks(ids):
        if (largest := part.max()) >= tokenizer.vocab_size:
            raise DataError(f"{source} has token id {largest}, but the tokenizer has "
                            f"{tokenizer.vocab_size} ids: use the one that made the ids")
        total += int(lengths[part].sum())
    total -= int(lengths[ids[:skip]].sum())
    return total / (len(ids) - skip) if total else None


class Batches:
    """Batches of windows of a token array; each is a pure function of its number.

    An epoch has every window of block_size tokens once; their order and the offset of the first
    are drawn from (seed, epoch). Raises DataError if the array has fewer than block_size + 1 ids.
    """

    has_starts = False  # rows are windows of one text
    note = ""

    def __init__(self, tokens: Ids, block_size: int, batch_size: int, seed: int):
        check_length(tokens, block_size)
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed = seed
        self.windows = max(1, len(tokens) // block_size - 1)  # a random offset uses the rest
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number`, from 0: ids and the ids that follow them, both (B, T) int32."""
        positions = np.arange(self.batch_size) + number * self.batch_size
        return self._windows_at([self._start(int(p)) for p in positions])

    def spread(self, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number` of `count` batches whose windows are spread evenly over the array."""
        last = (len(self.tokens) - 1) // self.block_size - 1
        positions = np.arange(self.batch_size) + number * self.batch_size
        index = (positions * (last / max(1, count * self.batch_size - 1))).round().astype(np.int64)
        return self._windows_at(index * self.block_size)

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            slack = len(self.tokens) - 1 - self.windows * self.block_size
            offset = rng.integers(0, min(slack, self.block_size - 1) + 1)
            self._epoch = epoch, offset + rng.permutation(self.windows) * self.block_size
        return int(self._epoch[1][index])

    def _windows_at(self, starts) -> tuple[np.ndarray, np.ndarray]:
        T = self.block_size
        rows = np.stack([self.tokens[s:s + T + 1] for s in starts]).astype(np.int64)
        if rows.max() >= np.iinfo(np.int32).max:
            raise DataError(f"token id {rows.max()} does not fit in 31 bits")
        return rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)


def check_length(tokens: Ids, block_size: int) -> None:
    """Raises DataError if a split has fewer than block_size + 1 tokens."""
    if len(tokens) < block_size + 1:
        raise DataError(f"a split of the data has {len(tokens)} tokens, fewer than block_size + 1 "
                        f"= {block_size + 1}: give more text or a smaller --block_size")
