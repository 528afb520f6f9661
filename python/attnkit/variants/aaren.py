"""Attention as a recurrent network (Aaren, arXiv 2405.13956): one learned query, and the softmax of every prefix.

With a query ``w_h`` that all tokens of a head share and ``s_j = scale * w_h . k_j``::

    o_i   = sum_{j <= i} exp(s_j - lse_i) v_j          lse_i = log sum_{j <= i} exp(s_j)

Causal attention whose queries are all equal, so that a state of constant size says everything about a prefix. The
state is ``(m, u, w)`` with ``m = max s``, ``u = sum exp(s - m)`` and ``w = sum exp(s - m) v``; two stretches combine to
``m = max(m1, m2)``, ``u = u1 exp(m1 - m) + u2 exp(m2 - m)`` and so for w, which is associative, with ``(-inf, 0, 0)``
neutral. ``o = w / u`` and ``lse = m + log u`` hold the same: combining states is merging results.

Parameters: ``scale`` (``D ** -0.5``); ``initial_state``, the ``o [B, H, Dv]`` and ``lse [B, H]`` of what came before;
``cu_seqlens`` as in `linear`.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import numpy as np

from attnkit.variants.linear import layout, sequences_of
from attnkit.variants.sequences import Array, Float64, write


class Parameters(TypedDict, total=False):
    """What picks a member of the family."""

    scale: float
    initial_state: tuple[Any, Any]
    cu_seqlens: Any


State = tuple[Float64, Float64, Float64]  # m [...], u [...], w [..., Dv]


def program(**parameters: Unpack[Parameters]) -> tuple[str, list[Any]]:
    """The text of a member's program (not canonical) and the arrays that its buffers are. Its inputs: `inputs`."""
    tokens, buffers = layout(**parameters)
    declared = ["query: hd", f"k: {tokens}", f"v: {tokens}"]
    lines = [
        "queries = map(k, query) { value = y }",
        f"o, lse = attend(queries, k, v, scale = {parameters.get('scale', 'default')}) {{",
        "  mask = kv_idx <= q_idx + (kv_len - q_len)",
        "}",
    ]
    if "initial_state" in parameters:
        declared += [f"before: {tokens}", "before_lse: bhs"]
        lines += ["o1, lse1 = merge(before, before_lse, o, lse)", "return o1, lse1"]
    else:
        lines += ["return o, lse"]
    return write(declared, lines, buffers), buffers


def inputs(query: Array, k: Array, v: Array, **parameters: Unpack[Parameters]) -> list[Any]:
    """The arrays that `program` takes, in its order: query, k, v, and for each token what came before its sequence."""
    if "initial_state" not in parameters:
        return [query, k, v]
    before = [np.zeros(v.shape), np.full(v.shape[:3], -np.inf)]
    for n, b, rows in sequences_of(k.shape[0], k.shape[2], **parameters):
        for tokens, state in zip(before, parameters["initial_state"], strict=True):
            tokens[b, :, rows] = state[n][:, None]
    return [query, k, v, *before]


def naive(query: Array, k: Array, v: Array, **parameters: Unpack[Parameters]) -> tuple[Float64, Float64]:
    """The family's equation in float64, one token at a time: knows nothing of the IR.

    ``query [H, D]``, ``k [B, H, S, D]``, ``v [B, H, S, Dv]``. Returns ``o [B, H, S, Dv]`` and ``lse [B, H, S]``; the
    last ones are the state.
    """
    scale = parameters.get("scale", k.shape[3] ** -0.5)
    o, lse = np.zeros(v.shape), np.full(v.shape[:3], -np.inf)
    for n, b, rows in sequences_of(k.shape[0], k.shape[2], **parameters):
        state = empty(k.shape[1], v.shape[3])
        if "initial_state" in parameters:
            before_o, before_lse = (np.asarray(x[n], np.float64) for x in parameters["initial_state"])
            seen = before_lse > -np.inf
            state = before_lse, seen.astype(np.float64), seen[:, None] * before_o
        for t in range(rows.start, rows.stop):
            s = scale * np.sum(query.astype(np.float64) * k[b, :, t], axis=1)
            state = combine(state, (s, np.ones(s.shape), v[b, :, t].astype(np.float64)))
            o[b, :, t], lse[b, :, t] = result(state)
    return o, lse


def empty(num_heads: int, v_head_dim: int) -> State:
    """The state of nothing."""
    return np.full(num_heads, -np.inf), np.zeros(num_heads), np.zeros((num_heads, v_head_dim))


def combine(first: State, second: State) -> State:
    """The state of two stretches of tokens."""
    (m1, u1, w1), (m2, u2, w2) = first, second
    m = np.maximum(m1, m2)
    pivot = np.where(m == -np.inf, 0, m)
    a1, a2 = np.exp(m1 - pivot), np.exp(m2 - pivot)
    return m, u1 * a1 + u2 * a2, w1 * a1[..., None] + w2 * a2[..., None]


def result(state: State) -> tuple[Float64, Float64]:
    """``o`` and ``lse`` of a state."""
    m, u, w = state
    some = u > 0
    lse = np.where(some, m + np.log(np.where(some, u, 1)), -np.inf)
    return np.where(some[..., None], w / np.where(some, u, 1)[..., None], 0), lse


# Named members: name -> parameters.
CASES: dict[str, Parameters] = {"aaren": {}, "aaren_scaled": {"scale": 0.25}}
