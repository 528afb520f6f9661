"""Which weights dropout keeps: Philox 4x32-10 of the pair's own indices, the same on every backend and tile size.

The key is the seed (64 bits, low word first), the counter is ``(b, h, q_idx, kv_idx)``; a pair is kept iff the first word
of the result, as a fraction of 2**32, is at least p. Kept weights are divided by ``1 - p``; p = 1 gives 0. Written from
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in Python's integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and the square root of 3, less 1
_WORD = 2**32


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds on four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(_MULTIPLIERS[0] * c0, _WORD)
        high1, low1 = divmod(_MULTIPLIERS[1] * c2, _WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) % _WORD, (k1 + _WEYL[1]) % _WORD
    return c0, c1, c2, c3


def kept(seed: int, p: float, b: int, h: int, q_len: int, kv_len: int) -> NDArray[np.bool_]:
    """Which pairs of head ``h`` of sequence ``b`` are kept, ``[q_len, kv_len]``."""
    key = (seed % _WORD, seed // _WORD % _WORD)
    keep = np.zeros((q_len, kv_len), bool)
    for i, j in np.ndindex(q_len, kv_len):
        keep[i, j] = philox((b, h, i, j), key)[0] / _WORD >= p
    return keep
