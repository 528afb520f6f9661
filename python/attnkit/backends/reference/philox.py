"""Dropout's random bits: Philox 4x32-10 (Salmon et al., SC 2011), addressed by the pair and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnkit.backends.reference.tape import Array

_M = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_W = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox(key: int, counter: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
    """Four 32-bit words (as uint64) for a 64-bit key and four 32-bit counters, which broadcast."""
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & _LOW for c in counter)
    high: Any = np.uint64(32)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = _M[0] * c0, _M[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> high) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> high) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W[0]) & 0xFFFFFFFF, (k1 + _W[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def kept(seed: int | None, b: int, shape: tuple[int, ...], p: float) -> Array:
    """Which pairs ``[H, n, m]`` dropout keeps: the first word of counter (b, h, q_idx, kv_idx), over 2**32, is >= p."""
    heads, q_len, kv_len = shape
    counter = (
        np.asarray(b),
        np.arange(heads)[:, None, None],
        np.arange(q_len)[:, None],
        np.arange(kv_len),
    )
    word = philox((seed or 0) & 0xFFFFFFFFFFFFFFFF, counter)[0]
    return np.broadcast_to((word.astype(np.float64) * 2.0**-32 >= p) & (p < 1), shape)
