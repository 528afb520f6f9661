"""What people ask of the attention map without wanting the map: sums, maxima and entropies of the softmax weights.

With ``P_ij = exp(z_ij - lse_i)`` over visible pairs, for every query head::

    weights      P_ij                               0 where a pair does not exist
    column_sum   c_j = sum_i P_ij                   how much a key was attended to
    column_max   max_i P_ij
    row_max      max_j P_ij                         exp(m_i - lse_i), m_i the largest logit
    entropy      -sum_j P_ij log P_ij               lse_i - sum_j P_ij z_ij

A row or a column without a pair has 0. Sums over a stretch of queries (eviction policies read the last ones) are those of a
program whose mask leaves only them; the k best keys of a row are `select`'s ``top_k``; full rows are the weights of a
program whose queries are those rows; means over heads are taken outside. A cotangent R of the weights adds ``P * (R -
sum_j P R)`` to the gradient of z.

Parameters: ``causal`` bool; ``first_row`` int, queries before it see nothing; ``softcap`` float.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import numpy as np

from attnkit.variants.sequences import CAUSAL, Array, Float64, Lengths, layouts, sequences, write

OUTPUTS = ("o", "lse", "weights", "column_sum", "column_max", "row_max", "entropy")


class Readouts(NamedTuple):
    """``o [B, Hq, Sq, Dv]``, ``weights [B, Hq, Sq, Skv]``, per key ``[B, Hq, Skv]``, per query ``[B, Hq, Sq]``."""

    o: Float64
    lse: Float64
    weights: Float64
    column_sum: Float64
    column_max: Float64
    row_max: Float64
    entropy: Float64


def program(
    *, causal: bool = False, first_row: int = 0, softcap: float | None = None, **lengths: Unpack[Lengths]
) -> tuple[str, list[Any]]:
    """Inputs q, k, v; results as `OUTPUTS`."""
    buffers: list[Any] = []
    q, kv = layouts(buffers, **lengths)
    masks = [f"({CAUSAL})"] if causal else []
    masks += [f"(q_idx >= {first_row})"] if first_row else []
    results = ", ".join(OUTPUTS)
    lines = [
        f"{results} = attend(q, k, v, scale = default, outputs = ({results})) {{",
        *([f"mask = {' & '.join(masks)}"] if masks else []),
        *([f"score = {softcap!r} * tanh(s / {softcap!r})"] if softcap is not None else []),
        "normalizer = softmax",
        "}",
        f"return {results}",
    ]
    return write([f"q: {q}", f"k: {kv}", f"v: {kv}"], lines, buffers), buffers


def naive(
    q: Array, k: Array, v: Array, *, scale: float | None = None, causal: bool = False, first_row: int = 0,
    softcap: float | None = None, **lengths: Unpack[Lengths],
) -> Readouts:  # fmt: skip
    """The equations in float64, a row of the map at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = np.zeros((*q.shape[:3], v.shape[3]))
    lse, row_max, entropy = np.full(q.shape[:3], -np.inf), np.zeros(q.shape[:3]), np.zeros(q.shape[:3])
    weights = np.zeros((*q.shape[:3], k.shape[2]))
    for piece in sequences(q, k, **lengths):
        for h in range(q.shape[1]):
            kv = (piece.batch, h * k.shape[1] // q.shape[1])
            for i in range(first_row, piece.q_len):
                at = (piece.batch, h, piece.rows.start + i)
                stop = i + piece.kv_len - piece.q_len + 1 if causal else piece.kv_len
                j = np.arange(piece.keys.start, piece.keys.start + max(stop, 0))
                if not len(j):
                    continue
                z = scale * (k[kv][j] @ q[at])
                z = z if softcap is None else softcap * np.tanh(z / softcap)
                lse[at] = np.logaddexp.reduce(z)
                p = np.exp(z - lse[at])
                o[at] = p @ v[kv][j]
                weights[(*at, j)] = p
                row_max[at] = p.max()
                entropy[at] = -np.sum(p * (z - lse[at]))
    return Readouts(o, lse, weights, weights.sum(axis=2), weights.max(axis=2, initial=0), row_max, entropy)


CASES: dict[str, dict[str, Any]] = {
    "readout": {},
    "readout_causal": {"causal": True},
    "readout_last_rows": {"causal": True, "first_row": 2},
    "readout_softcap": {"softcap": 1.5},
}
