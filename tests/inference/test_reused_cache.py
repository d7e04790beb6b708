"""A cache that is used again for a text that begins like the one before it."""

import numpy as np
import pytest
from test_decoder import CHANGES, RAGGED, small

from tinygpt.inference import decoder


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of tokens that each step reads."""
    counts, call = [], decoder.Decoder._call

    def counted(self, tokens, start_pos, row, keys):
        counts.extend([tokens.shape[1]] * len(keys))
        return call(self, tokens, start_pos, row, keys)

    monkeypatch.setattr(decoder.Decoder, "_call", counted)
    monkeypatch.setattr(decoder, "CHUNKS", (4, 16))
    return counts


@pytest.mark.parametrize("options", [
    dict(), dict(position="rope", n_kv_head=2, sliding_window=5)], ids=["gpt2", "llama"])
def test_a_text_over_a_cache_that_is_used_again_is_the_same(options, computed):
    """A conversation of four turns, the last one too long, and one that differs in the middle."""
    model = small(block_size=32, **options)
    ids = [5, 1, 7]
    for new in ([], [3, 9, 60], [2], [8] * 20):
        ids = ids + new
        computed.clear()
        found = list(model.stream(ids, 5, temperature=0, reuse_cache=True))
        if len(ids) < 20:
            assert computed == [4, 1, 1, 1, 1]
        assert found == list(model.stream(ids, 5, temperature=0))
        ids += found
    other = ids[:10] + [44] + ids[11:20]
    computed.clear()
    found = list(model.stream(other, 5, temperature=0, reuse_cache=True))
    assert found == list(model.stream(other, 5, temperature=0))


def test_what_is_cached_is_known_after_texts_that_are_abandoned_repeated_or_in_a_batch(computed):
    model = small(block_size=32)
    ids = list(range(20))
    expected = list(model.stream(ids, 5, temperature=0))
    abandoned = model.stream(ids, 5, temperature=0)
    assert [next(abandoned), next(abandoned)] == expected[:2]
    abandoned.close()
    for count in (5, 4):  # all of the prompt is cached but for its last token
        computed.clear()
        assert list(model.stream(ids, count, temperature=0, reuse_cache=True)) == expected[:count]
        assert computed == [1] * count

    def written(rows: list[list[int]], **options) -> list[list[int]]:
        steps = model.stream_batch(rows, 5, temperature=0, **options)
        return np.array([drawn.tokens for drawn in steps]).T.tolist()

    for rows, steps in (([ids, [*ids[:-1], 50]], [1] * 5), (RAGGED, [16, 1, 1, 1, 1])):
        expected = written(rows)
        model.generate([rows[0]] * 2, 5, temperature=0)
        computed.clear()
        assert written(rows, reuse_cache=True) == expected and computed == steps


def test_a_prompt_is_read_in_chunks_of_which_the_last_is_the_shortest_that_holds_the_rest(
        computed, monkeypatch):
    monkeypatch.setattr(decoder, "CHUNKS", (4, 8, 16))
    model = small(block_size=32)
    for count, steps in ((1, [4]), (4, [4]), (5, [8]), (9, [16]), (17, [16, 1]), (21, [16, 8]),
                         (27, [16, 16])):
        computed.clear()
        list(model.stream(list(range(count)), 1))
        assert computed == steps


def test_the_decoder_is_taken_whose_cache_has_most_of_the_text(computed):
    model = small(block_size=32)
    texts = [[n] * 20 for n in (1, 2, 3)]
    together = [model.stream(text, 1, temperature=0) for text in texts]
    for stream in together:
        next(stream)
    del together, stream
    for text in (texts[1], texts[2], texts[0]):
        computed.clear()
        list(model.stream([*text, 4, 5], 1, reuse_cache=True, temperature=0))
        assert computed == [4]


def test_a_cache_of_other_weights_is_not_used_again(computed):
    model, ids = small(block_size=32), list(range(20))
    list(model.stream(ids, 4, temperature=0))
    CHANGES["tinygrad's load_state_dict"](model, None)
    computed.clear()
    after = list(model.stream(ids, 4, temperature=0, reuse_cache=True))
    assert computed == [16, 4, 1, 1, 1]
    assert after == list(model.stream(ids, 4, temperature=0))
