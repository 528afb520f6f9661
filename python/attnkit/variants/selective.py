"""Selective attention: a head decides which keys no later query needs, and all heads forget them (arXiv 2410.02703).

With ``A^h_ij`` the logits of head h (scaled, then capped), queries at positions ``p_i = i + kv_len - q_len``, and the
visible keys ``j <= p_i``::

    S_ij   = max(A^0_ij, 0)  for 1 <= j < p_i, else 0      the first key and the query's own are never selected against
    F_ij   = F0_j + sum_{k < i} S_kj                       what earlier queries carried onto key j
    o^h_i  = sum_j softmax_j(A^h_ij - F_ij) v_j            for every head, head 0 too
    carry_j = F0_j + sum_i S_ij                            the F0 of the next chunk

With a ``budget`` of n keys, a query that would see more first forgets the keys of largest F (never the first one, nor
its own; of equals the oldest) until n are left. What is forgotten is gone for all heads and all later queries: its
carry is ``+inf`` from then on, so that chunks and single steps forget what the whole would.

The memory loss of a layer is ``max_i M_i / N`` with ``M_i = sum_j (1 - min(F_ij, tau) / tau)`` over visible j.

Parameters: ``head`` int, the one that selects (default 0); ``softcap`` float; ``budget`` int; ``initial`` F0, a float
``[B, Skv]`` (packed ``[1, total]``), default 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import numpy as np

from attnkit.variants.sequences import CAUSAL, Array, Float64, Lengths, layouts, sequences, write


class Selected(NamedTuple):
    """``o [B, Hq, Sq, Dv]``, ``lse [B, Hq, Sq]``, ``carry [B, Skv]`` and ``f [B, Sq, Skv]``, F where a pair exists.

    ``f`` is inf where a pair does not exist: what is not seen is as good as forgotten.
    """

    o: Float64
    lse: Float64
    carry: Float64
    f: Float64


def program(
    *, initial: bool = False, head: int = 0, softcap: float | None = None, budget: int | None = None,
    **lengths: Unpack[Lengths],
) -> tuple[str, list[Any]]:  # fmt: skip
    """Inputs q, k, v (and F0 if ``initial``); results o, lse, carry."""
    attributes = _attributes(initial, head, budget)
    lines = [
        f"o, lse, c = attend(q, k, v, {attributes}, outputs = (o, lse, carry)) {{",
        *_body(softcap),
        "score = t - f",
        "normalizer = softmax",
        "}",
        "return o, lse, c",
    ]
    return _write(lines, initial, lengths)


def memory_program(
    tau: float = 1.0, *, initial: bool = False, head: int = 0, softcap: float | None = None,
    budget: int | None = None, **lengths: Unpack[Lengths],
) -> tuple[str, list[Any]]:  # fmt: skip
    """Inputs as `program`; the result ``[B, Hq, Sq, Dv]`` has ``M_i`` in every head and channel."""
    lines = [
        "ones = map(v) { value = 1.0 }",
        f"m = attend(q, k, ones, {_attributes(initial, head, budget)}, outputs = (o)) {{",
        *_body(softcap),
        f"score = 1.0 - min(f, {tau!r}) / {tau!r}",
        "normalizer = none",
        "}",
        "return m",
    ]
    return _write(lines, initial, lengths)


def _attributes(initial: bool, head: int, budget: int | None) -> str:
    given = ["scale = default", *(["initial = f0"] if initial else []), f"head = {head}"]
    return ", ".join(given if budget is None else [*given, f"budget = {budget}"])


def _body(softcap: float | None) -> list[str]:
    return [
        "t = s" if softcap is None else f"t = {softcap!r} * tanh(s / {softcap!r})",
        f"mask = {CAUSAL}",
        # not max(t, 0): the derivative is 0 where t is 0
        "carry = where((kv_idx >= 1) & (kv_idx < q_idx + (kv_len - q_len)) & (t > 0.0), t, 0.0)",
    ]


def _write(lines: list[str], initial: bool, lengths: Lengths) -> tuple[str, list[Any]]:
    buffers: list[Any] = []
    q, kv = layouts(buffers, **lengths)
    inputs = [f"q: {q}", f"k: {kv}", f"v: {kv}", *(["f0: bs"] if initial else [])]
    return write(inputs, lines, buffers), buffers


# --- as equations -----------------------------------------------------------------------------------------


def naive(
    q: Array, k: Array, v: Array, initial: Array | None = None, *, scale: float | None = None, head: int = 0,
    softcap: float | None = None, budget: int | None = None, **lengths: Unpack[Lengths],
) -> Selected:  # fmt: skip
    """The equation in float64, one query after the other: knows nothing of the IR.

    ``q [B, Hq, Sq, D]``, ``k [B, Hkv, Skv, D]``, ``v [B, Hkv, Skv, Dv]``, ``initial [B, Skv]``.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)
    carry = np.zeros((k.shape[0], k.shape[2])) if initial is None else initial.astype(np.float64)
    f = np.full((q.shape[0], q.shape[2], k.shape[2]), np.inf)
    for piece in sequences(q, k, **lengths):
        keys, values = (x[piece.batch, :, piece.keys] for x in (k, v))
        c = carry[piece.batch, piece.keys]  # a view: the recurrence runs in place
        for i in range(piece.q_len):
            row, position = piece.rows.start + i, i + piece.kv_len - piece.q_len
            if position < 0:
                continue
            if budget is not None:
                _forget(c[: position + 1], budget)
            seen = np.flatnonzero(c[: position + 1] < np.inf)
            f[piece.batch, row, piece.keys.start + seen] = c[seen]
            for h in range(heads):
                z = _logits(q[piece.batch, h, row], keys[h // group, seen], scale, softcap) - c[seen]
                lse[piece.batch, h, row] = top = np.logaddexp.reduce(z)
                o[piece.batch, h, row] = np.exp(z - top) @ values[h // group, seen]
            selecting = _logits(q[piece.batch, head, row], keys[head // group], scale, softcap)
            for j in seen:
                if 1 <= j < position and selecting[j] > 0:
                    c[j] += selecting[j]
    return Selected(o, lse, carry, f)


def _logits(q: Array, keys: Array, scale: float, softcap: float | None) -> Array:
    a: Array = scale * (keys @ q)
    return a if softcap is None else softcap * np.tanh(a / softcap)


def _forget(c: Array, budget: int) -> None:
    """Mark keys by inf until ``budget`` are left, or only the first and the last."""
    while np.count_nonzero(c < np.inf) > max(budget, 2):
        between = np.where(c[1:-1] < np.inf, c[1:-1], -1.0)
        c[1 + np.argmax(between)] = np.inf  # argmax gives the lowest index, the oldest key


def memory_loss(f: Array, tau: float = 1.0) -> Float64:
    """``max_i M_i / N`` of every batch entry, from ``f [B, Sq, Skv]`` of whole sequences. ``[B]``."""
    memory = np.sum(1 - np.minimum(f, tau) / tau, axis=2)
    loss: Float64 = memory.max(axis=1) / f.shape[1]
    return loss


CASES: dict[str, Callable[[int, int, int, np.random.Generator], dict[str, Any]]] = {
    "selective": lambda h, m, n, rng: {},
    "selective_softcap": lambda h, m, n, rng: {"softcap": 2.0},
    "selective_budget": lambda h, m, n, rng: {"budget": max(2, n // 2)},
    "selective_last_head": lambda h, m, n, rng: {"head": h - 1},
}
