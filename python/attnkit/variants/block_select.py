"""The block-sparse family, members whose pairs depend on q and k: MoBA, NSA, and Sparsifiner's single pairs.

``p = i + kv_len - q_len`` is where query i stands among the keys, ``own = p // block`` its block, and ``kmean_n`` the
mean key of block n. Selections carry no gradient; ties go to the lowest index.

MoBA: a query sees its own block up to itself and, of the blocks before it, the ``top_k - 1`` of largest
``q . kmean_n``, without scale: one softmax over the union. ``top_k=1`` is the own block alone.

NSA: three attentions, mixed by gates per query and head::

    o = g_cmp o_cmp + g_slc o_slc + g_swa o_swa
    o_cmp  over the mean keys and values of the blocks that end at p or before
    o_slc  over the keys j <= p of the blocks chosen: the ``top_k`` of largest weight in o_cmp, that being the mean over
           the query heads that share a kv head; and in any case the first block, the own and the one before
    o_swa  over p - left <= j <= p

Sparsifiner: a query sees the keys whose connectivity ``low_i . up_j`` is among its ``top_k`` largest, or above
``threshold``; ``low [B, Hq, Sq, r] = q k_proj^T`` and ``up [B, Hkv, Skv, r]`` are of low rank r and made outside.

``past`` int32 ``[B]`` is each sequence's ``kv_len - q_len``, needed where it is not 0: a selection counts blocks and
does not know how many keys there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np

from attnkit.variants.block_sparse import Bool, attend_pairs
from attnkit.variants.sequences import CAUSAL, Array, Float64, Lengths, Piece, layouts, sequences, write

# --- MoBA -------------------------------------------------------------------------------------------------


def moba_program(
    *, block: int, top_k: int, past: Any = None, scale: float | None = None, **lengths: Unpack[Lengths]
) -> tuple[str, list[Any]]:
    """Inputs q, k, v; results o, lse."""
    inputs, p, buffers = _start(past, lengths)
    lines = [
        f"pooled = pool(k, size = {block}, how = mean)",
        f"chosen = select(q, pooled, scale = 1.0, top_k = {top_k - 1}) {{",
        f"mask = kv_idx < ({p}) // {block}",
        f"force = kv_idx == ({p}) // {block}",
        "}",
        f"o, lse = attend(q, k, v, scale = {_scale(scale)}, blocks = chosen) {{ mask = {CAUSAL} }}",
        "return o, lse",
    ]
    return write(inputs, lines, buffers), buffers


def moba_naive(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int,
    top_k: int,
    scale: float | None = None,
    **lengths: Unpack[Lengths],
) -> tuple[Float64, Float64]:
    """The definition in float64, a query at a time."""

    def pairs(piece: Piece, h: int) -> Bool:
        queries, keys = _tokens(q, piece.rows, piece, h), _tokens(k, piece.keys, piece, h, q.shape[1])
        seen = np.zeros((piece.q_len, piece.kv_len), bool)
        for i, p in enumerate(piece.position[:, 0]):
            own = max(p // block, 0)
            gates = [float(queries[i] @ keys[n * block : (n + 1) * block].mean(axis=0)) for n in range(own)]
            for n in [*best(gates, top_k - 1), own]:
                seen[i, n * block : max(min((n + 1) * block, p + 1), 0)] = True
        return seen

    return attend_pairs(q, k, v, pairs, scale=scale, **lengths)


# --- NSA --------------------------------------------------------------------------------------------------


def nsa_program(
    *, block: int, top_k: int, left: int, past: Any = None, scale: float | None = None,
    **lengths: Unpack[Lengths],
) -> tuple[str, list[Any]]:  # fmt: skip
    """Inputs q, k, v and the gates g_cmp, g_slc, g_swa ``[B, Hq, Sq]``; result o."""
    inputs, p, buffers = _start(past, lengths)
    inputs += ["g_cmp: bhs", "g_slc: bhs", "g_swa: bhs"]
    own, ended, factor = f"({p}) // {block}", f"kv_idx < ({p} + 1) // {block}", _scale(scale)
    lines = [
        f"k_cmp = pool(k, size = {block}, how = mean)",
        f"v_cmp = pool(v, size = {block}, how = mean)",
        f"o_cmp, lse_cmp = attend(q, k_cmp, v_cmp, scale = {factor}) {{ mask = {ended} }}",
        f"chosen = select(q, k_cmp, scale = {factor}, top_k = {top_k}, heads = group) {{",
        f"mask = {ended}",
        f"force = (kv_idx == 0) | (kv_idx == {own} - 1) | (kv_idx == {own})",
        "}",
        f"o_slc, lse_slc = attend(q, k, v, scale = {factor}, blocks = chosen) {{ mask = {CAUSAL} }}",
        f"o_swa, lse_swa = attend(q, k, v, scale = {factor}) {{",
        "p = q_idx + (kv_len - q_len)",
        f"mask = (kv_idx >= p - {left}) & (kv_idx <= p)",
        "}",
        "o_two = map(o_cmp, g_cmp, o_slc, g_slc) { value = x * y + z * w }",
        "o = map(o_two, o_swa, g_swa) { value = x + y * z }",
        "return o",
    ]
    return write(inputs, lines, buffers), buffers


def nsa_naive(
    q: Array, k: Array, v: Array, g_cmp: Array, g_slc: Array, g_swa: Array, *, block: int, top_k: int, left: int,
    scale: float | None = None, **lengths: Unpack[Lengths],
) -> Float64:  # fmt: skip
    """The definition in float64, a query and a kv head at a time."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    compressed = np.zeros((*q.shape[:3], v.shape[3]))
    chosen: dict[tuple[int, int], Bool] = {}
    for piece in sequences(q, k, **lengths):
        for shared in range(k.shape[1]):
            keys, values = (x[piece.batch, shared, piece.keys].astype(np.float64) for x in (k, v))
            seen = chosen[piece.b, shared] = np.zeros((piece.q_len, piece.kv_len), bool)
            for i, p in enumerate(piece.position[:, 0]):
                if p < 0:
                    continue
                blocks = [slice(n * block, (n + 1) * block) for n in range((p + 1) // block)]
                weights = np.zeros((group, len(blocks)))
                for head in range(group if blocks else 0):
                    at = (piece.batch, shared * group + head, piece.rows.start + i)
                    z = np.array([scale * float(q[at] @ keys[n].mean(axis=0)) for n in blocks])
                    weights[head] = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                    compressed[at] = weights[head] @ [values[n].mean(axis=0) for n in blocks]
                own = p // block
                for n in {*best(weights.mean(axis=0), top_k), 0, max(own - 1, 0), own}:
                    seen[i, n * block : min((n + 1) * block, p + 1)] = True

    def near(piece: Piece, h: int) -> Bool:
        j = np.arange(piece.kv_len)[None]
        return (j >= piece.position - left) & (j <= piece.position)

    selected, _ = attend_pairs(q, k, v, lambda piece, h: chosen[piece.b, h // group], scale=scale, **lengths)
    sliding, _ = attend_pairs(q, k, v, near, scale=scale, **lengths)
    mixed: Float64 = g_cmp[..., None] * compressed + g_slc[..., None] * selected + g_swa[..., None] * sliding
    return mixed


# --- Sparsifiner ------------------------------------------------------------------------------------------


def sparsifiner_program(
    *, top_k: int | None = None, threshold: float | None = None, causal: bool = False, scale: float | None = None,
    **lengths: Unpack[Lengths],
) -> tuple[str, list[Any]]:  # fmt: skip
    """Inputs q, k, v, low, up; results o, lse. One of ``top_k`` and ``threshold`` is given."""
    inputs, _, buffers = _start(None, lengths)
    tokens = [kind.partition(" ")[2] for kind in inputs]
    inputs += [f"low: {tokens[0]}", f"up: {tokens[1]}"]
    rule = f"top_k = {top_k}" if threshold is None else f"threshold = {float(threshold)}"
    mask = f"{{ mask = {CAUSAL} }}" if causal else ""
    lines = [
        f"chosen = select(low, up, scale = 1.0, {rule}) {mask}",
        f"o, lse = attend(q, k, v, scale = {_scale(scale)}, blocks = chosen) {mask}",
        "return o, lse",
    ]
    return write(inputs, lines, buffers), buffers


def sparsifiner_naive(
    q: Array, k: Array, v: Array, low: Array, up: Array, *, top_k: int | None = None, threshold: float | None = None,
    causal: bool = False, scale: float | None = None, **lengths: Unpack[Lengths],
) -> tuple[Float64, Float64]:  # fmt: skip
    """The definition in float64, a query at a time."""

    def pairs(piece: Piece, h: int) -> Bool:
        rows, columns = _tokens(low, piece.rows, piece, h), _tokens(up, piece.keys, piece, h, q.shape[1])
        seen = np.zeros((piece.q_len, piece.kv_len), bool)
        for i, p in enumerate(piece.position[:, 0]):
            connectivity = columns[: max(p + 1, 0) if causal else None] @ rows[i]
            kept = (
                best(connectivity, top_k or 0)
                if threshold is None
                else np.flatnonzero(connectivity > threshold)
            )
            seen[i, kept] = True
        return seen

    return attend_pairs(q, k, v, pairs, scale=scale, **lengths)


# --- what they share --------------------------------------------------------------------------------------


def best(scores: Sequence[float] | Array, n: int) -> list[int]:
    """The indices of the n largest scores (all, if there are fewer), of equal ones the first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:n]


def _tokens(x: Array, of: slice, piece: Piece, h: int, heads: int | None = None) -> Float64:
    """The tokens of one sequence that query head h, one of ``heads``, reads. ``[S, D]``."""
    shared = h if heads is None else h * x.shape[1] // heads
    return x[piece.batch, shared, of].astype(np.float64)


def _start(past: Any, lengths: Lengths) -> tuple[list[str], str, list[Any]]:
    """The inputs q, k and v, where a query stands among the keys, and the buffers that these need."""
    buffers = [] if past is None else [past]
    q, kv = layouts(buffers, **lengths)
    return [f"q: {q}", f"k: {kv}", f"v: {kv}"], "q_idx" if past is None else "q_idx + b0[b]", buffers


def _scale(scale: float | None) -> str:
    return "default" if scale is None else repr(float(scale))


# Named members: name -> (program, naive, parameters).
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "moba": (moba_program, moba_naive, {"block": 3, "top_k": 2}),
    "moba_local": (moba_program, moba_naive, {"block": 3, "top_k": 1}),
    "nsa": (nsa_program, nsa_naive, {"block": 2, "top_k": 1, "left": 1}),
    "sparsifiner": (sparsifiner_program, sparsifiner_naive, {"top_k": 3}),
    "sparsifiner_threshold": (sparsifiner_program, sparsifiner_naive, {"threshold": 0.5}),
    "sparsifiner_causal": (sparsifiner_program, sparsifiner_naive, {"top_k": 2, "causal": True}),
}
