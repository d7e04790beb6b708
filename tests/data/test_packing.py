"""Conversations in rows: all of them, whole, apart, in a resumable order."""

import numpy as np
import pytest

from tinygpt.data import DataError
from tinygpt.data.packing import Encoded, PackedBatches, pack

T = 16


def encoded(lengths, first: int = 1) -> Encoded:
    """Conversations of different ids, of which every third is learned."""
    ids = np.arange(first, first + sum(lengths))
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return Encoded.of([(part.tolist(), (part % 3 == 0).tolist()) for part in parts])


def read(batch) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of the conversations in the rows of a batch, by their starts."""
    found = []
    for ids, targets, starts in zip(*batch, strict=True):
        assert starts[0] == 0 and (starts <= np.arange(T)).all()
        for begin in np.unique(starts):
            here = np.flatnonzero(starts == begin)
            assert here[0] == begin and (np.diff(here) == 1).all()
            assert begin == 0 or targets[begin - 1] == -1  # nothing predicts another conversation
            if (targets[here] >= 0).any():
                found.append((ids[here].tolist(), targets[here].tolist()))
    return found


@pytest.mark.parametrize("size", [5, 17, 40])
def test_packing_wastes_little_and_overfills_no_bin(size):
    lengths = np.random.default_rng(2).integers(1, size // 2 + 1, 300).tolist()
    bins = pack(lengths, size)
    assert sorted(i for items in bins for i in items) == list(range(300))
    used = [sum(lengths[i] for i in items) for items in bins]
    assert max(used) <= size and sum(used) > 0.97 * size * (len(bins) - 1)


def test_an_epoch_has_every_conversation_once_and_whole():
    lengths = np.random.default_rng(3).integers(4, T + 2, 50).tolist()
    conversations = encoded(lengths)
    batches = PackedBatches(conversations, T, 1, seed=7)
    assert batches.batch(0)[0].dtype == np.int32 and "50 conversations" in batches.note
    assert "; 0 were longer" in batches.note
    rows = len(batches.rows)
    for epoch in (0, 1):
        found = [c for n in range(rows) for c in read(batches.batch(epoch * rows + n))]
        by_first = {ids[0]: (ids, targets) for ids, targets in found}
        assert len(found) == len(by_first) == 50
        for ids, targets in conversations:
            # the last id may be a target alone, where the row ends
            shown, learned = by_first[ids[0]]
            assert shown[:len(ids)] in (ids.tolist(), ids[:-1].tolist())
            assert learned[:len(ids) - 1] == targets[1:].tolist()
            assert not any(i >= 0 for i in learned[len(ids) - 1:])
    orders = [[batches.batch(n)[0][0, 0] for n in range(e * rows, (e + 1) * rows)] for e in (0, 1)]
    assert orders[0] != orders[1]


def test_batches_are_pure_functions_of_their_number():
    one, other = (PackedBatches(encoded([9, 5, 12, 7, 8]), T, 3, seed=7) for _ in "ab")
    for n in (5, 0, 2):
        for a, b in zip(one.batch(n), other.batch(n), strict=True):
            np.testing.assert_array_equal(a, b)
    spread = [row[0] for n in range(2) for row in one.spread(n, 2)[0].tolist()]
    assert len(spread) == 6 and set(spread) == {row[0] for row in one.batch(0)[0].tolist()}


def test_what_is_longer_than_a_row_is_cut_and_said():
    batches = PackedBatches(encoded([T + 1, T + 2, 3 * T]), T, 1, seed=7)
    assert "2 were longer than a row and cut" in batches.note and "--block_size" in batches.note
    ids, targets, _ = (np.concatenate(a) for a in zip(*map(batches.batch, range(3)), strict=True))
    assert sorted(ids[:, 0].tolist()) == [1, T + 2, 2 * T + 4]
    assert ((targets == -1) | (targets % 3 == 0)).all() and (targets[:, -1] != 0).all()


def test_a_conversation_of_which_nothing_is_learned_is_left_out():
    silent = Encoded.of([([1, 2, 3], [False] * 3), ([4], [True]), ([5, 6], [False, True])])
    batches = PackedBatches(silent, T, 1, seed=7)
    assert "1 conversations lie in 1 rows" in batches.note and "2 left out" in batches.note
    assert batches.batch(0)[1][0, 0] == 6
    with pytest.raises(DataError, match="no conversation has a word of the assistant"):
        PackedBatches(Encoded.of([([1, 2], [True, False])]), T, 1, seed=7)
