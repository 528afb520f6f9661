"""Weights that are not a softmax over the keys: five ways from scores to weights.

With ``s_ij = scale * q_i . k_j`` over the visible pairs, ``o_i = sum_j w_ij v_j`` and::

    signed      w_ij = sign(s_ij) exp(|s_ij| - lse_i)           lse_i = log sum_j exp(|s_ij|)      Cog, 2411.07176
    over_queries   a_ij = exp(s_ij - L_j), w_ij = a_ij          L_j = log sum_i exp(s_ij)          reversed, 2304.03282
                   or a_ij / (sum_j a_ij + epsilon)             with ``epsilon``: slot attention
    sigmoid     w_ij = sigmoid(s_ij + bias)                     bias = -log(kv_len) unless given   2409.04431
    laplace     w_ij = (1 + erf((s_ij - mu) / (sigma sqrt 2))) / 2     mu = sqrt(1/2), sigma = 1 / sqrt(4 pi)   Mega
    sum         w_ij = g_ij / (sum_j g_ij + epsilon)            g_ij = s_ij ** 2, or what a program's score gives

Parameters: ``kind``; ``epsilon`` float (over_queries, sum); ``bias`` float, or ``"visible"`` for minus the logarithm of
how many keys the query sees (sigmoid, causal); ``causal`` bool. Only ``signed`` has an lse, and so a merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack

import numpy as np

from attnkit.variants.sequences import CAUSAL, Array, Float64, Lengths, layouts, sequences, write

Kind = Literal["signed", "over_queries", "sigmoid", "laplace", "sum"]
MU, SIGMA = math.sqrt(0.5), 1 / math.sqrt(4 * math.pi)

_SCORES = {
    "signed": "s",
    "over_queries": "s",
    "laplace": f"0.5 * (1.0 + erf((s - {MU!r}) / {SIGMA * math.sqrt(2)!r}))",
    "sum": "s * s",
}
_NORMALIZERS = {
    "signed": "signed_softmax", "over_queries": "softmax_over_queries", "sigmoid": "none", "laplace": "none", "sum": "sum",
}  # fmt: skip


def program(
    kind: Kind, *, causal: bool = False, epsilon: float | None = None, bias: float | str | None = None,
    **lengths: Unpack[Lengths],
) -> tuple[str, list[Any]]:  # fmt: skip
    """Inputs q, k, v; results o, and lse if ``kind`` is signed."""
    buffers: list[Any] = []
    q, kv = layouts(buffers, **lengths)
    results = "o, lse" if kind == "signed" else "o"
    lines = [
        f"{results} = attend(q, k, v, scale = default) {{",
        *([f"mask = {CAUSAL}"] if causal else []),
        f"score = {_sigmoid(bias) if kind == 'sigmoid' else _SCORES[kind]}",
        f"normalizer = {_NORMALIZERS[kind]}{'' if epsilon is None else f'(epsilon = {epsilon!r})'}",
        "}",
        f"return {results}",
    ]
    return write([f"q: {q}", f"k: {kv}", f"v: {kv}"], lines, buffers), buffers


def _sigmoid(bias: float | str | None) -> str:
    if bias is None:
        return "sigmoid(s - log(float(kv_len)))"
    if bias == "visible":
        return "sigmoid(s - log(float(q_idx + (kv_len - q_len) + 1)))"
    return f"sigmoid(s + {bias!r})"


def naive(
    q: Array, k: Array, v: Array, kind: Kind, *, scale: float | None = None, causal: bool = False,
    epsilon: float | None = None, bias: float | str | None = None, **lengths: Unpack[Lengths],
) -> tuple[Float64, Float64]:  # fmt: skip
    """The equations in float64: ``o [B, Hq, Sq, Dv]`` and ``lse [B, Hq, Sq]`` (of kinds other than signed: NaN)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], np.nan)
    for piece in sequences(q, k, **lengths):
        last = piece.position if causal else np.full((piece.q_len, 1), piece.kv_len)
        seen = np.arange(piece.kv_len)[None, :] <= last
        for h in range(q.shape[1]):
            at = (piece.batch, h, piece.rows)
            kv = (piece.batch, h * k.shape[1] // q.shape[1], piece.keys)
            s = scale * (q[at] @ k[kv].T)
            weights, lse[at] = _weights(s, seen, kind, epsilon, bias)
            o[at] = weights @ v[kv]
    return o, lse


def _weights(
    s: Array, seen: Array, kind: Kind, epsilon: float | None, bias: float | str | None
) -> tuple[Array, Any]:
    """Weights ``[q_len, kv_len]``, 0 where a pair does not exist; and lse ``[q_len]`` or NaN."""
    w = np.zeros(s.shape)
    if kind == "over_queries":
        for j in range(s.shape[1]):
            rows = np.flatnonzero(seen[:, j])
            w[rows, j] = np.exp(s[rows, j] - np.logaddexp.reduce(s[rows, j], initial=-np.inf))
        return (w if epsilon is None else w / (w.sum(axis=1, keepdims=True) + epsilon)), np.nan
    lse = np.full(len(s), -np.inf)
    for i in np.flatnonzero(seen.any(axis=1)):
        exists = np.flatnonzero(seen[i])
        z = s[i, exists]
        if kind == "signed":
            lse[i] = np.logaddexp.reduce(np.abs(z))
            w[i, exists] = np.sign(z) * np.exp(np.abs(z) - lse[i])
        elif kind == "sigmoid":
            added = bias if isinstance(bias, float) else -math.log(s.shape[1] if bias is None else len(z))
            w[i, exists] = 1 / (1 + np.exp(-z - added))
        elif kind == "laplace":
            w[i, exists] = [0.5 * (1 + math.erf((x - MU) / (SIGMA * math.sqrt(2)))) for x in z]
        else:
            w[i, exists] = z**2 / (np.sum(z**2) + (epsilon or 0))
    return w, lse if kind == "signed" else np.nan


CASES: dict[str, tuple[Kind, Callable[[int], dict[str, Any]]]] = {
    "signed": ("signed", lambda n: {}),
    "signed_causal": ("signed", lambda n: {"causal": True}),
    "reversed": ("over_queries", lambda n: {}),
    "reversed_causal": ("over_queries", lambda n: {"causal": True}),
    "slots": ("over_queries", lambda n: {"epsilon": 1e-8}),
    "sigmoid": ("sigmoid", lambda n: {}),
    "sigmoid_fixed": ("sigmoid", lambda n: {"bias": -math.log(max(n, 1)), "causal": True}),
    "sigmoid_visible": ("sigmoid", lambda n: {"bias": "visible", "causal": True}),
    "laplace": ("laplace", lambda n: {}),
    "laplace_causal": ("laplace", lambda n: {"causal": True}),
    "sum": ("sum", lambda n: {"causal": True}),
    "sum_epsilon": ("sum", lambda n: {"epsilon": 1e-3}),
}
