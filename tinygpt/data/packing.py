"""Conversations packed into rows of one length, which keep them apart."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinygpt.data import DataError


@dataclass(frozen=True)
class Encoded:
    """Conversations as ids (N,) one after another, where each of them ends (n,), and mask (N,)
    bool: which ids are the assistant's, and so are learned."""

    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[tuple[list[int], list[bool]]]) -> "Encoded":
        """The conversations of which pairs has ids and mask."""
        ids, mask = (np.concatenate([np.array(pair[i], dtype) for pair in pairs])
                     for i, dtype in ((0, np.uint32), (1, bool)))
        return cls(ids, mask, np.cumsum([len(pair[0]) for pair in pairs]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids and the targets (n,) int32 of a conversation: a target is the id itself where it
        is learned, else -1. The first id, which nothing precedes, is not learned."""
        here = slice(self.ends[index - 1] if index else 0, self.ends[index])
        ids = self.ids[here].astype(np.int32)
        targets = np.where(self.mask[here], ids, -1)
        targets[:1] = -1
        return ids, targets


class PackedBatches:
    """Batches of rows of conversations; each is a pure function of its number.

    A row of block_size + 1 ids holds whole conversations and padding, which is not learned; a
    longer conversation is cut, and one of which nothing is learned left out. An epoch has every
    row once, in an order drawn from (seed, epoch). note: a line about this. Raises DataError where
    nothing is learned at all.
    """

    has_starts = True

    def __init__(self, conversations: Encoded, block_size: int, batch_size: int, seed: int):
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self._order: tuple[int, np.ndarray] | None = None  # an epoch, and that of its rows
        self.parts = []  # ids and targets of the conversations, cut to a row
        lengths = np.diff(conversations.ends, prepend=0)
        for index in range(len(conversations)):
            ids, targets = (part[:block_size + 1] for part in conversations[index])
            if (targets >= 0).any():
                self.parts.append((ids, targets))
        if not self.parts:
            raise DataError("no conversation has a word of the assistant among its first "
                            f"{block_size + 1} tokens: give others, or a larger --block_size")
        self.rows = pack([len(ids) for ids, _ in self.parts], block_size + 1)
        cut, unused = int((lengths > block_size + 1).sum()), len(conversations) - len(self.parts)
        self.note = (
            f"{len(self.parts):,} conversations lie in {len(self.rows):,} rows of {block_size} "
            f"tokens; {cut:,} were longer than a row and cut"
            + (f", {unused:,} left out, of which the assistant says nothing" if unused else "")
            + (": a larger --block_size keeps them whole" if cut else ""))

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Batch `number`, from 0: ids, the ids that follow them, -1 where they are not learned, and
        where the conversation of each id begins in its row; all (B, T) int32."""
        first = number * self.batch_size
        return self._stack([self._row_at(p) for p in range(first, first + self.batch_size)])

    def spread(self, number: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Batch `number` of `count` batches whose rows are spread evenly over all."""
        positions = np.arange(self.batch_size) + number * self.batch_size
        index = positions * ((len(self.rows) - 1) / max(1, count * self.batch_size - 1))
        return self._stack([self.rows[i] for i in index.round().astype(np.int64)])

    def _row_at(self, position: int) -> list[int]:
        epoch, index = divmod(position, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = epoch, rng.permutation(len(self.rows))
        return self.rows[self._order[1][index]]

    def _stack(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(map(np.stack, zip(*map(self._row, rows), strict=True)))

    def _row(self, row: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        T, at = self.block_size, 0
        ids, starts = np.zeros((2, T + 1), np.int32)
        targets = np.full(T + 1, -1, np.int32)
        for part in row:
            end = at + len(self.parts[part][0])
            ids[at:end], targets[at:end] = self.parts[part]
            starts[at:end] = at
            at = end
        starts[at:] = at  # padding
        return ids[:-1], targets[1:], starts[:-1]


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of items of these lengths, none above size, in bins of that size: the longest
    first, each into the bin with the least space that is enough."""
    bins, with_space, spaces = [], {}, []  # the bins with each space, and these spaces in order
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        at = bisect_left(spaces, lengths[index])
        if at == len(spaces):
            chosen, space = len(bins), size
            bins.append([])
        else:
            space = spaces[at]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        bins[chosen].append(index)
        left = space - lengths[index]
        if left not in with_space:
            insort(spaces, left)
        with_space.setdefault(left, []).append(chosen)
    return bins
