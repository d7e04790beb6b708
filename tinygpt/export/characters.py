"""The classes of characters of the splitting pattern, as tiktoken knows them.

A browser's regular expressions know an older or a newer Unicode, and C has none, so that exports
bring these tables along and split every text as tiktoken does.
"""

import functools
import sys

import numpy as np
import tiktoken


@functools.cache
def ranges(pattern: str) -> list[tuple[int, int]]:
    """The first and last code points of the ranges of characters that match a regular expression
    in tiktoken."""
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, special_tokens={},
                                 mergeable_ranks={bytes([b]): b for b in range(256)})
    characters = "".join(chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000)
    matching = encoding.decode(encoding.encode_ordinary(characters))  # the others are left out
    found = np.array([ord(c) for c in matching])
    gaps = np.flatnonzero(np.diff(found) > 1)
    firsts, lasts = found[[0, *(gaps + 1)]], found[[*gaps, -1]]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))
