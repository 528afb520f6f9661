"""The dense family: softmax attention over every pair that the mask leaves.

With ``s_ij = scale * q_i . k_j`` and the query's position among the keys ``p_i = i + kv_len - q_len``::

    z_ij  = cap(s_ij) - slope_h * |p_i - j| + bias_ij           cap(s) = c * tanh(s / c)
    o_i   = sum_j exp(z_ij - lse_i) * r_ij * v_j                j over the visible pairs alone
    lse_i = log (sum_j exp(z_ij) + exp(sink_h))                 r_ij = 0 if dropped, else 1 / (1 - p)

A pair is visible if it passes every one of these that is given: causal ``j <= p_i`` or prefix ``j < n`` (either is
enough where both are given), window ``p_i - left <= j <= p_i + right``, document ``q_ids[i] == kv_ids[j]``. A row
that sees nothing has ``o = 0`` and ``lse = -inf`` (with a sink: the sink).

Parameters (the keywords of `mods`, `naive`, `visible` and `added_bias`): ``causal`` bool; ``window`` (left, right)
with None or -1 for unbounded; ``prefix`` int; ``document`` (q_ids ``[Sq]``, kv_ids ``[Skv]``) ints; ``softcap``
float; ``alibi_slopes`` ``[Hq]``. Beside them `program` and `naive` take ``bias`` ``[Sq, Skv]``, ``[Hq, Sq, Skv]`` or
``[B, Hq, Sq, Skv]``; ``sink`` ``[Hq]``; ``dropout``, a probability (`variants.dropout` says which pairs it drops); and
the `Lengths` of sequences that are packed or padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from attnkit.ir import mods as ir
from attnkit.ir.trace import trace
from attnkit.variants.dropout import kept
from attnkit.variants.sequences import Array, Float64, Lengths, layouts, sequences, write

Bool = NDArray[np.bool_]


class Parameters(TypedDict, total=False):
    """What picks a member of the family; nothing given is full attention."""

    causal: bool
    window: tuple[int | None, int | None]
    prefix: int
    document: tuple[Any, Any]
    softcap: float
    alibi_slopes: Any


class _All(Parameters, Lengths, total=False):
    pass


# --- as programs ------------------------------------------------------------------------------------------


def mods(**parameters: Unpack[Parameters]) -> tuple[ir.ScoreFunction | None, ir.MaskFunction | None]:
    """The score and mask functions of a member; arrays may be numpy's or torch's. None: nothing to apply."""
    scores = []
    if "softcap" in parameters:
        scores.append(ir.softcap(parameters["softcap"]))
    if "alibi_slopes" in parameters:
        scores.append(ir.alibi(parameters["alibi_slopes"]))

    def score(s: Any, *index: Any) -> Any:
        for each in scores:
            s = each(s, *index)
        return s

    mask: ir.Mask | None = ir.causal() if parameters.get("causal") else None
    if "prefix" in parameters:
        mask = ir.prefix(parameters["prefix"]) | mask if mask else ir.prefix(parameters["prefix"])
    for name, constructor in (("window", ir.window), ("document", ir.document)):
        if name in parameters:
            other = constructor(*parameters[name])  # type: ignore[literal-required]
            mask = mask & other if mask else other
    return score if scores else None, mask


def program(
    *, bias: Any = None, sink: Any = None, dropout: float | None = None, **parameters: Unpack[_All]
) -> tuple[str, list[Any]]:
    """The text of a member's program (not canonical) and the arrays that its buffers are."""
    lengths, rest = _split(parameters)
    score, mask = mods(**rest)
    if bias is not None:
        first, then = score, ir.bias(bias)
        score = then if first is None else lambda s, *index: then(first(s, *index), *index)
    traced = trace(score, mask)
    normalizer = "softmax" if sink is None else f"softmax(sink = b{traced.context.capture(sink)[0]})"
    q, kv = layouts(traced.buffers, **lengths)
    attributes = "scale = default" if dropout is None else f"scale = default, dropout = {dropout!r}"
    lines = [
        f"o, lse = attend(q, k, v, {attributes}) {{",
        *traced.lines,
        *([] if traced.score is None else [f"score = {traced.score}"]),
        *([] if traced.mask is None else [f"mask = {traced.mask}"]),
        f"normalizer = {normalizer}",
        "}",
        "return o, lse",
    ]
    inputs = [f"q: {q}", f"k: {kv}", f"v: {kv}"]
    return write(inputs, lines, traced.buffers, len(traced.params)), traced.buffers


# --- as equations -----------------------------------------------------------------------------------------


def naive(
    q: Array, k: Array, v: Array, *, scale: float | None = None, rows: Array | None = None, bias: Any = None,
    sink: Any = None, dropout: float | None = None, seed: int = 0, **parameters: Unpack[_All],
) -> tuple[Float64, Float64]:  # fmt: skip
    """The family's equation in float64, one query at a time: knows nothing of the IR.

    ``q [B, Hq, Sq, D]``, ``k [B, Hkv, Skv, D]``, ``v [B, Hkv, Skv, Dv]``; ``rows`` picks query indices (default
    all; not of packed sequences). Returns ``o [B, Hq, rows, Dv]`` and ``lse [B, Hq, rows]``.
    """
    batch, heads, q_len, head_dim = q.shape
    lengths, rest = _split(parameters)
    scale = head_dim**-0.5 if scale is None else scale
    cap, shape = rest.get("softcap"), (batch, heads, q_len if rows is None else len(rows))
    o, lse = np.zeros((*shape, v.shape[3])), np.full(shape, -np.inf)
    for piece in sequences(q, k, **lengths):
        picked = np.arange(piece.q_len) if rows is None else rows
        seen = visible(piece.q_len, piece.kv_len, picked, **rest)
        added = added_bias(piece.q_len, piece.kv_len, picked, **rest)
        added = np.broadcast_to(added, (heads, *seen.shape))
        for h in range(heads):
            kv = (piece.batch, h * k.shape[1] // heads, piece.keys)
            keys, values = k[kv].astype(np.float64), v[kv].astype(np.float64)
            keep = None if dropout is None else kept(seed, dropout, piece.b, h, piece.q_len, piece.kv_len)
            for r, i in enumerate(picked):
                j = slice(None) if seen[r].all() else np.flatnonzero(seen[r])
                z = scale * (keys[j] @ q[piece.batch, h, piece.rows][i].astype(np.float64))
                z = (z if cap is None else cap * np.tanh(z / cap)) + added[h, r, j]
                z = z if bias is None else z + _of_head(bias, piece.b, h)[i, j]
                top = z.max(initial=-np.inf if sink is None else sink[h])
                if top == -np.inf:
                    continue
                weights = np.exp(z - top)
                total = weights.sum() + (0 if sink is None else np.exp(sink[h] - top))
                if keep is not None and dropout is not None:
                    weights = np.divide(weights, 1 - dropout, out=np.zeros_like(weights), where=keep[i, j])
                at = (piece.batch, h, piece.rows.start + r)
                o[at], lse[at] = weights @ values[j] / total, top + np.log(total)
    return o, lse


def visible(q_len: int, kv_len: int, rows: Array | None = None, **parameters: Unpack[Parameters]) -> Bool:
    """Which keys each query sees: bool ``[rows, Skv]``, the same for every batch entry and head."""
    rows = np.arange(q_len) if rows is None else rows
    j = np.arange(kv_len)[None, :]
    position = _positions(q_len, kv_len, rows)
    seen = np.ones((len(rows), kv_len), bool)
    reach = []
    if parameters.get("causal"):
        reach.append(j <= position)
    if "prefix" in parameters:
        reach.append(np.broadcast_to(j < parameters["prefix"], seen.shape))
    if reach:
        seen &= np.logical_or.reduce(reach)
    left, right = parameters.get("window", (None, None))
    if left not in (None, -1):
        seen &= j >= position - left
    if right not in (None, -1):
        seen &= j <= position + right
    if "document" in parameters:
        q_ids, kv_ids = parameters["document"]
        seen &= np.asarray(q_ids)[rows, None] == np.asarray(kv_ids)[None, :]
    return seen


def added_bias(
    q_len: int, kv_len: int, rows: Array | None = None, **parameters: Unpack[Parameters]
) -> Float64:
    """What is added to the capped score: ``[Hq, rows, Skv]``, or ``[1, 1, 1]`` of zero where nothing is."""
    if "alibi_slopes" not in parameters:
        return np.zeros((1, 1, 1))
    rows = np.arange(q_len) if rows is None else rows
    slopes = np.asarray(parameters["alibi_slopes"], np.float64)
    distance = np.abs(_positions(q_len, kv_len, rows) - np.arange(kv_len)[None, :])
    bias: Float64 = -slopes[:, None, None] * distance
    return bias


def _of_head(bias: Any, b: int, h: int) -> Array:
    """What is added to the pairs of one head, ``[Sq, Skv]``."""
    bias = np.asarray(bias)
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    picked: Array = bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0]
    return picked


def _split(parameters: _All) -> tuple[Lengths, Parameters]:
    lengths: Any = {name: x for name, x in parameters.items() if name in Lengths.__annotations__}
    rest: Any = {name: x for name, x in parameters.items() if name not in Lengths.__annotations__}
    return lengths, rest


def _positions(q_len: int, kv_len: int, rows: Array) -> Array:
    return np.asarray(rows)[:, None] + kv_len - q_len


# --- by name ----------------------------------------------------------------------------------------------


def describe(**parameters: Unpack[Parameters]) -> str:
    """The parameters in words: which pairs exist, then what happens to their scores."""
    reach = [name for name in ("causal", "prefix") if parameters.get(name)]
    masks = [" | ".join(f"prefix({parameters['prefix']})" if name == "prefix" else name for name in reach)]
    if "window" in parameters:
        masks.append("window({}, {})".format(*parameters["window"]))
    if "document" in parameters:
        masks.append(f"document({len(np.unique(parameters['document'][1]))} documents)")
    scores = [f"softcap({parameters['softcap']:g})"] if "softcap" in parameters else []
    scores += ["alibi"] if "alibi_slopes" in parameters else []
    return "; ".join(filter(None, (" & ".join(filter(None, masks)) or "none", ", ".join(scores))))


def alibi_slopes(num_heads: int) -> Array:
    """The geometric slopes ``2 ** (-8 (h + 1) / Hq)``, float32 ``[Hq]``."""
    return np.exp2(-8 * np.arange(1, num_heads + 1) / num_heads).astype(np.float32)


def documents(q_len: int, kv_len: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Ids of eight documents over the keys; the queries are the last ``q_len`` positions. int32."""
    cuts = np.sort(rng.choice(np.arange(1, kv_len), size=max(min(7, kv_len - 1), 0), replace=False))
    kv_ids = np.searchsorted(cuts, np.arange(kv_len), side="right").astype(np.int32)
    position = np.arange(q_len) + kv_len - q_len
    return np.where(position < 0, -1, np.append(kv_ids, -1)[np.maximum(position, 0)]).astype(np.int32), kv_ids


# Named members: name -> parameters for (num_heads, q_len, kv_len, rng).
CASES: dict[str, Callable[[int, int, int, np.random.Generator], Parameters]] = {
    "full": lambda h, m, n, rng: {},
    "causal": lambda h, m, n, rng: {"causal": True},
    "window": lambda h, m, n, rng: {"causal": True, "window": (min(255, n // 4), 0)},
    "alibi": lambda h, m, n, rng: {"alibi_slopes": alibi_slopes(h)},
    "softcap": lambda h, m, n, rng: {"softcap": 10.0},
    "alibi_softcap": lambda h, m, n, rng: {"softcap": 10.0, "alibi_slopes": alibi_slopes(h)},
    "prefix": lambda h, m, n, rng: {"causal": True, "prefix": n // 2},
    "document": lambda h, m, n, rng: {"causal": True, "document": documents(m, n, rng)},
    "causal_alibi": lambda h, m, n, rng: {"causal": True, "alibi_slopes": alibi_slopes(h)},
    "causal_softcap": lambda h, m, n, rng: {"causal": True, "softcap": 10.0},
    "two_way_window": lambda h, m, n, rng: {"window": (min(128, n // 4), min(127, n // 4))},
    "two_way_document": lambda h, m, n, rng: {"document": documents(m, n, rng)},
}
