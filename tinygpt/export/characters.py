"""The letters and the numbers of Unicode, as tiktoken's splitting pattern sees them.

A browser's regular expressions know an older or a newer Unicode, and C has none, so that exports
bring these tables along and split every text as tiktoken does.
"""

import functools

import numpy as np
import tiktoken


@functools.cache
def runs_of(category: str) -> list[tuple[int, int]]:
    """The first and the last code point of every run of characters in a category, as "L" or "N"."""
    encoding = tiktoken.Encoding(category, pat_str=rf"\p{{{category}}}", special_tokens={},
                                 mergeable_ranks={bytes([b]): b for b in range(256)})
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    found = bytes(encoding.encode_ordinary(everything)).decode()  # what is in no match is left out
    points = np.array([ord(c) for c in found])
    starts = np.flatnonzero(np.diff(points, prepend=-2) > 1)
    ends = np.append(starts[1:], len(points)) - 1
    return list(zip(points[starts].tolist(), points[ends].tolist(), strict=True))
