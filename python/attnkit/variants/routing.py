"""The routing family: tokens meet the tokens of their clusters.

Each head has C centroids ``mu_c``. With ``n`` the queries and keys after `qk_norm`, and ``w = cluster_size``::

    I_c, J_c = the w queries, and the w keys, of largest n . mu_c          balanced; ties to the lowest index
    o_i^c    = softmax attention of query i over the keys J_c              only j <= p_i if causal, by true index
    o_i      = mean of o_i^c over the clusters with i in I_c, 0 if there are none

``p = i + kv_len - q_len`` is where a query stands among the keys. A cluster that has no key for a query gives it 0 and
counts. Centroids get no gradient: how they are learned (k-means on the fly) is a small program beside this one.

``membership="whole"`` looks at the whole sequence, so which keys are in a cluster depends on later tokens although no
value does: not for decoding. ``"prefix"`` is strictly causal: a query belongs to the cluster of largest ``n_i . mu_c``, and
sees of its keys the w best among those before the ``block`` of queries that it is in, and all keys of that block up to
itself.

Parameters: ``cluster_size``; ``causal`` bool; ``qk_norm`` "none", "l2" or "layer" (mean 0, variance 1), which affects
membership alone; ``membership``; ``block`` (of queries, with prefix); ``scale`` of the logits.
"""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from attnkit.variants.block_select import best
from attnkit.variants.sequences import CAUSAL, Array, Float64, Lengths, layouts, sequences, write


def program(
    *, cluster_size: int, causal: bool = False, qk_norm: str = "l2", membership: str = "whole", block: int = 128,
    scale: float | None = None, **lengths: Unpack[Lengths],
) -> tuple[str, list[Any]]:  # fmt: skip
    """Inputs q, k, v and the centroids ``[Hq, C, D]``; result o. The text and the arrays that its buffers are."""
    buffers: list[Any] = []
    q, kv = layouts(buffers, **lengths)
    qn, kn = ("q", "k") if qk_norm == "none" else ("qn", "kn")
    normed = [] if qk_norm == "none" else [f"{x}n = map({x}, norm = {qk_norm})" for x in "qk"]
    prefix = membership == "prefix"
    queries, keys = ("per = column, top_k = 1", f"top_k = {cluster_size}, prefix = {block}") if prefix else (
        f"top_k = {cluster_size}",
    ) * 2  # fmt: skip
    mask = f"{{ mask = {CAUSAL} }}" if causal or prefix else ""
    lines = [
        *normed,
        f"rows = select(centroids, {qn}, scale = 1.0, {queries})",
        f"columns = select(centroids, {kn}, scale = 1.0, {keys})",
        f"o = attend(q, k, v, scale = {'default' if scale is None else repr(float(scale))}, groups = (rows, columns)) {mask}",
        "return o",
    ]
    return write([f"q: {q}", f"k: {kv}", f"v: {kv}", "centroids: hsd"], lines, buffers), buffers


def naive(
    q: Array, k: Array, v: Array, centroids: Array, *, cluster_size: int, causal: bool = False, qk_norm: str = "l2",
    membership: str = "whole", block: int = 128, scale: float | None = None, **lengths: Unpack[Lengths],
) -> Float64:  # fmt: skip
    """The equations in float64, a query of a cluster at a time. ``o [B, Hq, Sq, Dv]``."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for piece in sequences(q, k, **lengths):
        for h in range(q.shape[1]):
            queries = q[piece.batch, h, piece.rows].astype(np.float64)
            keys, values = (x[piece.batch, h, piece.keys].astype(np.float64) for x in (k, v))
            near_q, near_k = (normalize(x, qk_norm) @ centroids[h].T for x in (queries, keys))  # [tokens, C]
            parts: list[list[Float64]] = [[] for _ in queries]
            for c in range(centroids.shape[1]):
                if membership == "prefix":
                    members = [i for i in range(len(queries)) if best(near_q[i], 1) == [c]]
                else:
                    members = best(near_q[:, c], cluster_size)
                for i in members:
                    p = i + piece.kv_len - piece.q_len
                    if membership == "prefix":
                        start = max(p // block * block, 0)
                        seen = [*best(near_k[:start, c], cluster_size), *range(start, p + 1)]
                    else:
                        seen = [j for j in best(near_k[:, c], cluster_size) if j <= p or not causal]
                    of = np.array(seen, int)
                    parts[i].append(_attend(scale * keys[of] @ queries[i], values[of]))
            for i in range(len(queries)):
                if parts[i]:
                    o[piece.batch, h, piece.rows.start + i] = np.mean(parts[i], axis=0)
    return o


def normalize(x: Float64, how: str) -> Float64:
    """Tokens ``[S, D]`` of length 1 ("l2"), or of mean 0 and variance 1 ("layer"); a constant token becomes 0."""
    if how == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    if how in ("l2", "layer"):
        length = np.sqrt((x**2).sum(axis=1, keepdims=True) / (x.shape[1] if how == "layer" else 1))
        x = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return x


def _attend(z: Float64, values: Float64) -> Float64:
    if not len(z):
        return np.zeros(values.shape[1])
    weights = np.exp(z - z.max())
    return weights @ values / weights.sum()  # type: ignore[no-any-return]


CASES: dict[str, dict[str, Any]] = {
    "routing": {"cluster_size": 4},
    "routing_causal": {"cluster_size": 5, "causal": True},
    "routing_layer_norm": {"cluster_size": 3, "qk_norm": "layer"},
    "routing_no_norm": {"cluster_size": 4, "qk_norm": "none", "causal": True, "scale": 0.7},
    "routing_prefix": {"cluster_size": 2, "membership": "prefix", "block": 3},
}
