"""Texts end at stop strings."""

import numpy as np
import pytest

from tinygpt.inference.stop import StopFilter


@pytest.mark.parametrize("seed", range(40))
def test_a_stop_string_is_found_wherever_pieces_break(seed):
    """Of several the one that is complete first, and of those the longest."""
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab"), 40))
    stops = ["".join(rng.choice(list("ab"), rng.integers(1, 7))) for _ in range(seed % 4)]
    ends = ((n, stop) for n in range(len(text) + 1) for stop in sorted(stops, key=len)[::-1]
            if text[:n].endswith(stop))
    n, stop = next(ends, (len(text), ""))
    until, out, rest = StopFilter(stops), "", text
    while rest:
        size = int(rng.integers(1, 4))
        out, rest = out + until.push(rest[:size]), rest[size:]
    out += until.finish()
    assert out == text[:n - len(stop)] and until.stopped == bool(stop)
