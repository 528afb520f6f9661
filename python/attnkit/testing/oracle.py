"""Attention in float64, from the equation alone: it knows nothing of programs, tracing or backends.

Beside the result stands what a tolerance needs: the same equation in the dtype of the inputs, and how much a
rounding error may grow on its way to the result (`tolerances` explains both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnkit.testing.floats import rounded

Array = NDArray[Any]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of one head of one sequence: ``q_idx [q_len, 1]`` and ``kv_idx [1, kv_len]`` broadcast to them.

    ``b`` is the sequence and ``h`` the query head; in a packed batch all indices and lengths are the segment's own.
    """

    b: int
    h: int
    q_idx: Array
    kv_idx: Array
    q_len: int
    kv_len: int

    @property
    def position(self) -> Array:
        """Where each query stands among the keys: the last query at the last key. ``[q_len, 1]``."""
        return self.q_idx + self.kv_len - self.q_len


# ``score(s, pairs)`` takes scaled logits [q_len, kv_len] and gives logits; ``mask(pairs)`` is True where a pair exists.
Score = Callable[[Array, Pairs], Array]
Mask = Callable[[Pairs], Array]


@dataclass(frozen=True, eq=False)
class Expected:
    """What attention must give, and how far from it a result in the inputs' dtype may lie.

    ``o [B, Hq, Sq, Dv]`` and ``lse [B, Hq, Sq]`` are float64. ``naive_o`` and ``naive_lse`` have one more dimension
    in front: the same equation in the inputs' dtype, with its sums in several orders, because the errors of a single
    order are a matter of luck. ``o_terms`` and ``lse_terms`` are what the a-priori bound multiplies by the unit
    roundoff, ``o_weights`` (``P |v|``) what it multiplies by that of rounded weights; ``kv_len`` is the most
    terms that any sum has.
    """

    o: Float64
    lse: Float64
    naive_o: Array
    naive_lse: Array
    o_terms: Float64
    lse_terms: Float64
    o_weights: Float64
    kv_len: int
    dtype: str


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    score: Score | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    sink: Array | None = None,
    kv_lens: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    dtype: str | None = None,
    orders: int = 8,
) -> Expected:
    """Softmax attention of ``q [B, Hq, Sq, D]`` over ``k [B, Hkv, Skv, D]`` and ``v [B, Hkv, Skv, Dv]``.

    A masked pair does not exist: what its key and value hold reaches nothing. A row that sees nothing has ``o`` 0
    and ``lse`` -inf, or the sink's logit where there is a sink (``[Hq]``). ``kv_lens [B]`` and ``cu_seqlens [N + 1]``
    mean what they mean in `attnkit.attention`. ``dtype`` is what the naive computation has, if not that of ``q``:
    ``"bfloat16"`` or ``"float16"`` for float32 arrays of such values. Its products then round to it, scores, weights
    and outputs; sums and exponentials are float32, as torch and FlashAttention have them. ``orders`` is how many orders of
    its sums are tried: where two huge scores nearly tie, the largest error of few says little about chance.
    """
    dtype = dtype or q.dtype.name
    expected = Expected(
        o=np.zeros((*q.shape[:3], v.shape[3])),
        lse=np.full(q.shape[:3], -np.inf),
        naive_o=np.zeros((orders, *q.shape[:3], v.shape[3]), q.dtype),
        naive_lse=np.full((orders, *q.shape[:3]), -np.inf, q.dtype),
        o_terms=np.zeros((*q.shape[:3], v.shape[3])),
        lse_terms=np.zeros(q.shape[:3]),
        o_weights=np.zeros((*q.shape[:3], v.shape[3])),
        kv_len=k.shape[2],
        dtype=dtype,
    )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    for b, batch, rows, keys in _sequences(q, k, kv_lens, cu_seqlens_q, cu_seqlens_kv):
        for h in range(q.shape[1]):
            tensors = q[batch, h, rows], k[batch, h // group, keys], v[batch, h // group, keys]
            q_len, kv_len = len(tensors[0]), len(tensors[1])
            pairs = Pairs(b, h, np.arange(q_len)[:, None], np.arange(kv_len)[None, :], q_len, kv_len)
            visible = np.broadcast_to(True if mask is None else mask(pairs), (q_len, kv_len))
            logit = None if sink is None else float(sink[h])
            at = (batch, h, rows)
            with np.errstate(all="ignore"):
                q64, k64, v64 = (x.astype(np.float64) for x in tensors)
                head = _Head(q64, k64, v64, score, visible, scale, logit, pairs)
                expected.o[at], expected.lse[at] = head.o, head.lse
                expected.o_terms[at], expected.lse_terms[at] = head.terms()
                expected.o_weights[at] = head.p @ head.v_size
                for order in range(orders):
                    naive = _Head(*tensors, score, visible, scale, logit, pairs, order, dtype)
                    expected.naive_o[order, *at], expected.naive_lse[order, *at] = naive.o, naive.lse
    return expected


class _Head:
    """One head of one sequence, every pair materialised, in the dtype of ``q``.

    ``order`` 0 sums as the tensors lie; others shuffle channels and keys; odd ones scale and divide at other times.
    """

    def __init__(
        self, q: Array, k: Array, v: Array, score: Score | None, visible: Array, scale: float, sink: float | None,
        pairs: Pairs, order: int = 0, storage: str | None = None,
    ) -> None:  # fmt: skip
        dtype = q.dtype.type

        def stored(x: Array) -> Array:
            return x if storage in (None, q.dtype.name) else rounded(x, storage)

        shuffle = np.random.default_rng(order).permutation if order else np.arange
        channels, keys = shuffle(q.shape[1]), shuffle(k.shape[0])
        # The size of the terms of a score: what its rounding error scales with.
        self.size = dtype(scale) * (abs(q) @ abs(k).T)
        q, k = q[:, channels], k[:, channels]
        s = stored(stored(dtype(scale) * q) @ k.T) if order % 2 else stored(dtype(scale) * stored(q @ k.T))
        z = s if score is None else stored(np.broadcast_to(score(s, pairs), s.shape).astype(dtype))
        live = visible & (z != -np.inf)  # a score of -inf has weight 0
        z, live, visible, v, self.sink = z[:, keys], live[:, keys], visible[:, keys], v[keys], sink
        self.v_size = abs(np.where(np.isfinite(v), v, 0))
        self.z = np.where(live, z, 0)
        top = np.max(np.where(live, z, -np.inf), axis=1, initial=-np.inf if sink is None else sink)
        pivot = np.where(top == -np.inf, 0, top).astype(dtype)
        weights = np.where(live, np.exp(z - pivot[:, None]), dtype(0))
        total = weights.sum(axis=1)
        sink_weight = np.zeros_like(total) if sink is None else np.exp(dtype(sink) - pivot)
        total = total + sink_weight
        self.lse = pivot + np.log(total)  # log(0) is -inf: nothing was seen
        dead = total == 0
        total = np.where(dead, dtype(1), total)
        self.p, self.sink_weight = stored(weights / total[:, None]), sink_weight / total
        late = order % 2 == 1
        o = _sum(stored(weights), visible, v) / total[:, None] if late else _sum(self.p, visible, v)
        self.o = np.where(dead[:, None], 0, stored(o))  # also where values that are not numbers have weight 0

    def terms(self) -> tuple[Array, Array]:
        """First-order growth of rounding errors: each weight may be wrong by its share of 1 + |score| + its terms."""
        wrong = np.where(self.p > 0, self.p * (1 + self.size + abs(self.z)), 0)  # what is not seen may be NaN
        sink = 0 if self.sink in (None, -np.inf) else self.sink_weight * (1 + abs(self.sink))
        row = wrong.sum(axis=1) + sink
        return wrong @ self.v_size + row[:, None] * abs(self.o), row


def _sum(weights: Array, visible: Array, v: Array) -> Array:
    """Weighted values ``[q_len, Dv]``; NaN and infinities reach only the rows that see them."""
    # BLAS has another, more exact way for a single row: four copies of it go the way of all others.
    rows = np.repeat(weights, 4, axis=0) if len(weights) == 1 else weights
    o: Array = (rows @ np.where(np.isfinite(v), v, 0))[: len(weights)]
    for j in np.flatnonzero(~np.isfinite(v).all(axis=1)):
        bad = ~np.isfinite(v[j])
        o[:, bad] += np.where(visible[:, j, None], weights[:, j, None] * v[j, bad], 0)
    return o


def _sequences(
    q: Array, k: Array, kv_lens: Array | None, cu_seqlens_q: Array | None, cu_seqlens_kv: Array | None
) -> Iterator[tuple[int, int, slice, slice]]:
    """(number, batch entry, query rows, keys) of every sequence."""
    if cu_seqlens_q is not None and cu_seqlens_kv is not None:
        for n in range(len(cu_seqlens_q) - 1):
            yield n, 0, slice(*cu_seqlens_q[n : n + 2]), slice(*cu_seqlens_kv[n : n + 2])
        return
    for b in range(q.shape[0]):
        yield b, b, slice(None), slice(k.shape[2] if kv_lens is None else int(kv_lens[b]))
