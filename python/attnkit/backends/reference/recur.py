"""Linear recurrences by the definition: one token after the other."""

from __future__ import annotations

import numpy as np

from attnkit.backends.reference.tape import Node, concatenate, exp, where
from attnkit.ir.program import Recur


def recur(
    op: Recur, q: Node, k: Node, v: Node, gate: Node | None, beta: Node | None, bonus: Node | None,
    initial: Node | None, initial_norm: Node | None,
) -> list[Node]:  # fmt: skip
    """``o [H, n, Dv]``, the last state ``[H, F, Dv]`` and the last normaliser ``[H, F]`` of one sequence.

    ``q, k [Hk, n, D]``, ``v [H, n, Dv]``; ``gate [H]``, ``[H, n]`` or ``[H, n, D]``, ``beta [H, n]``, ``bonus [H, D]``.
    """
    heads, n, width = v.shape
    q, k = (x.repeat(heads // max(x.shape[0], 1)) for x in (q, k))
    q = q * (q.shape[2] ** -0.5 if op.scale is None else op.scale)
    if op.coefficients is not None:
        q, k = _features(q, op.coefficients), _features(k, (1.0,) * len(op.coefficients))
    decay, bonus = _decay(gate, heads, n), _of_heads(bonus, heads)
    zeros = Node(np.zeros((heads, k.shape[2], width)))
    state = zeros if initial is None else initial
    norm = Node(np.zeros((heads, k.shape[2], 1)))
    if initial_norm is not None:
        norm = initial_norm.reshape(heads, -1, 1)
    rows = []
    if not op.causal:
        state, norm = state + k.swap() @ v, norm + k.sum(1).swap()
        rows = [_read(op, q, state, norm)]
    for t in range(n if op.causal else 0):
        now = slice(t, t + 1)
        q_t, k_t, v_t = q[:, now], k[:, now], v[:, now]
        if bonus is not None:
            rows.append(q_t @ (state + (k_t * bonus).swap() @ v_t))
        if decay is not None:
            d = decay[:, min(t, decay.shape[1] - 1)].reshape(heads, -1, 1)
            state, norm = state * d, norm * d
        if beta is not None:
            b = beta[:, now].reshape(heads, 1, 1)
            state = state + k_t.swap() @ ((v_t - k_t @ state) * b)
        else:
            state, norm = state + k_t.swap() @ v_t, norm + k_t.swap()
        if bonus is None:
            rows.append(_read(op, q_t, state, norm))
    o = concatenate(rows, axis=1) if rows else Node(np.zeros((heads, 0, width)))
    return [o, state, norm.reshape(heads, -1)]


def _read(op: Recur, q: Node, state: Node, norm: Node) -> Node:
    o = q @ state
    if not op.normalize:
        return o
    total = q @ norm + op.epsilon
    dead = total.value == 0
    return where(dead, 0.0, o / where(dead, 1.0, total))


def _features(x: Node, coefficients: tuple[float, ...]) -> Node:
    """1, x and, with three coefficients, x (x) x, each times its coefficient: ``[H, n, 1 + D (+ D * D)]``."""
    heads, n, d = x.shape
    parts = [Node(np.ones((heads, n, 1))), x]
    if len(coefficients) == 3:
        parts.append((x.reshape(heads, n, d, 1) * x.reshape(heads, n, 1, d)).reshape(heads, n, d * d))
    return concatenate([part * a for part, a in zip(parts, coefficients, strict=True)], axis=2)


def _decay(gate: Node | None, heads: int, n: int) -> Node | None:
    """``[H, 1 or n, 1 or D]``."""
    if gate is None:
        return None
    if len(gate.shape) == 1:
        gate = gate.reshape(-1, 1, 1)
    elif len(gate.shape) == 2:
        gate = gate.reshape(*gate.shape, 1)
    return _of_heads(exp(gate), heads) if n else None


def _of_heads(x: Node | None, heads: int) -> Node | None:
    if x is None:
        return None
    x = x if len(x.shape) == 3 else x.reshape(x.shape[0], 1, -1)
    return x.repeat(heads // max(x.shape[0], 1))
