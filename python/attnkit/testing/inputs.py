"""Problems that are hard in different ways: queries, keys and values by the name of their distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnkit.testing.floats import rounded

Array = NDArray[Any]
Float32 = NDArray[np.float32]


class Dims(NamedTuple):
    """The sizes of one problem, in the words of the API: ``q [batch, q_heads, q_len, head_dim]`` and so on."""

    batch: int = 1
    q_heads: int = 2
    kv_heads: int = 2
    q_len: int = 32
    kv_len: int = 32
    head_dim: int = 16
    v_head_dim: int = 16

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of q, k and v."""
        return (
            (self.batch, self.q_heads, self.q_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.v_head_dim),
        )


def qkv(
    distribution: str, rng: np.random.Generator, dims: Dims, dtype: str = "float32"
) -> tuple[Float32, Float32, Float32]:
    """Queries, keys and values of a named distribution, float32; the same for the same state of ``rng``.

    Their values are those that ``dtype`` has.

    Raises:
        KeyError: ``distribution`` is not one of `DISTRIBUTIONS`.
    """
    q, k, v = (rng.standard_normal(shape) for shape in dims.shapes)
    q, k, v = DISTRIBUTIONS[distribution](rng, q, k, v)
    return tuple(rounded(x.astype(np.float32), dtype) for x in (q, k, v))  # type: ignore[return-value]


Maker = Callable[[np.random.Generator, Array, Array, Array], tuple[Array, Array, Array]]


def _gaussian(rng: np.random.Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q, k, v


def _outlier(rng: np.random.Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """One element in a hundred is twenty times larger, as activations of language models have it."""

    def spike(x: Array) -> Array:
        spiked: Array = x * np.where(rng.random(x.shape) < 0.01, 20.0, 1.0)
        return spiked

    return spike(q), spike(k), spike(v)


def _near_tie(rng: np.random.Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Keys that differ in their last bits: every score of a row is nearly the largest."""
    return q, k[:, :, :1] + 1e-6 * k, v


def _huge(rng: np.random.Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Logits of about 1e4 in size at the default scale: one weight is 1, the others underflow."""
    return 1e4 * q, k, v


def _tiny(rng: np.random.Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Products and results among the subnormal numbers."""
    return 1e-20 * q, 1e-20 * k, 1e-38 * v


def _constant(rng: np.random.Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Every score is the same, so every weight is."""
    return np.ones_like(q), np.ones_like(k), v


def _one_hot(rng: np.random.Generator, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Queries and keys with a single channel: a score is large where the channels agree, and exactly 0 elsewhere."""

    def hot(x: Array) -> Array:
        channel = rng.integers(0, x.shape[3], x.shape[:3])
        size = rng.uniform(4.0, 12.0, (*x.shape[:3], 1))
        single: Array = size * (channel[..., None] == np.arange(x.shape[3]))
        return single

    return hot(q), hot(k), v


DISTRIBUTIONS: dict[str, Maker] = {
    "gaussian": _gaussian,
    "outlier": _outlier,
    "near_tie": _near_tie,
    "huge": _huge,
    "tiny": _tiny,
    "constant": _constant,
    "one_hot": _one_hot,
}
