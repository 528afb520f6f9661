"""Combiner (fixed pattern): a token attends to its own segment, and to one summary of every segment before it.

With ``qbar_s, kbar_s`` the pooled queries and keys of segment s, ``segment`` tokens long::

    vbar_s = sum_j softmax_j(scale * qbar_s . k_j) v_j        over the tokens j of segment s
    z_ij   = scale * q_i . k_j                                for j <= i in the segment of i, with value v_j
    z_is   = scale * q_i . kbar_s                             for every segment s before it, with value vbar_s

and o_i is one softmax over both kinds. Every token is reached, the distant ones through their summary; the work is
O(S sqrt(S)) for segments of sqrt(S). Only segments that have ended are summed up, so nothing sees what comes later.

Parameters: ``segment``; ``how`` "mean", "max" or "sum" pools; ``relu`` takes max(x, 0) of queries and keys before pooling
(a learned map before it belongs outside); ``scale``; ``cu_seqlens`` ``[N + 1]`` for packed batches. Queries are the keys'
own tokens, and ``Hq == Hkv``, for summaries of
values differ between query heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnkit.variants.sequences import Array, Float64, Lengths, sequences, write


def program(
    *, segment: int, how: str = "mean", relu: bool = False, scale: float | None = None, cu_seqlens: Any = None
) -> tuple[str, list[Any]]:
    """Inputs q, k, v; results o, lse. The text, not canonical, and the arrays that its buffers are."""
    factor = "default" if scale is None else repr(float(scale))
    mapped = [f"{x}_relu = map({x}) {{ value = max(x, 0.0) }}" for x in "qk"] if relu else []
    suffix = "_relu" if relu else ""
    lines = [
        *mapped,
        *(f"{x}bar = pool({x}{suffix}, size = {segment}, how = {how})" for x in "qk"),
        f"vbar, lse_bar = attend(qbar, k, v, scale = {factor}) {{ mask = kv_idx // {segment} == q_idx }}",
        f"o_near, lse_near = attend(q, k, v, scale = {factor}) {{",
        f"mask = (kv_idx <= q_idx) & (kv_idx // {segment} == q_idx // {segment})",
        "}",
        f"o_far, lse_far = attend(q, kbar, vbar, scale = {factor}) {{ mask = kv_idx < q_idx // {segment} }}",
        "o, lse = merge(o_near, lse_near, o_far, lse_far)",
        "return o, lse",
    ]
    layout, buffers = ("bhsd", []) if cu_seqlens is None else ("packed[b0]", [cu_seqlens])
    return write([f"{x}: {layout}" for x in "qkv"], lines, buffers), buffers


def naive(
    q: Array, k: Array, v: Array, *, segment: int, how: str = "mean", relu: bool = False, scale: float | None = None,
    cu_seqlens: Any = None,
) -> tuple[Float64, Float64]:  # fmt: skip
    """The equation in float64, a token at a time. ``o [B, H, S, Dv]`` and ``lse [B, H, S]``."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    lengths: Lengths = {} if cu_seqlens is None else {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
    for piece in sequences(q, k, **lengths):
        for h in range(q.shape[1]):
            queries, keys, values = (x[piece.batch, h, piece.keys].astype(np.float64) for x in (q, k, v))
            for i in range(piece.q_len):
                start = i // segment * segment
                seen_keys, seen_values = list(keys[start : i + 1]), list(values[start : i + 1])
                for s in range(0, start, segment):
                    of = slice(s, s + segment)
                    qbar, kbar = (_pool(x[of], how, relu) for x in (queries, keys))
                    seen_keys.append(kbar)
                    seen_values.append(_softmax(scale * keys[of] @ qbar)[0] @ values[of])
                at = (piece.batch, h, piece.rows.start + i)
                weights, lse[at] = _softmax(scale * np.array(seen_keys) @ queries[i])
                o[at] = weights @ np.array(seen_values)
    return o, lse


def _pool(tokens: Float64, how: str, relu: bool) -> Float64:
    tokens = np.maximum(tokens, 0) if relu else tokens
    pooled: Float64 = getattr(np, how)(tokens, axis=0)
    return pooled


def _softmax(z: Float64) -> tuple[Float64, float]:
    weights = np.exp(z - z.max())
    return weights / weights.sum(), float(z.max() + np.log(weights.sum()))


CASES: dict[str, dict[str, Any]] = {
    "combiner": {"segment": 3},
    "combiner_relu_max": {"segment": 2, "how": "max", "relu": True},
    "combiner_sum": {"segment": 4, "how": "sum", "scale": 0.3},
}
