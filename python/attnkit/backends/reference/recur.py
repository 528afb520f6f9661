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

    ``q [Hq, n, D]``, ``k [Hk, n, D]``, ``v [H, n, Dv]``, H a multiple of Hk, and Hq of H or H of Hq; ``gate [H]``,
    ``[H, n]`` or ``[H, n, D]``, ``beta [H, n]``, ``bonus [H, D]``. There are as many heads of ``o`` as of q or v.
    """
    heads, n, width = v.shape
    k = k.repeat(heads // max(k.shape[0], 1))
    q = q.repeat(max(heads // max(q.shape[0], 1), 1))
    shared = q.shape[0] // max(heads, 1)  # by how many queries a state is read
    q = q * (q.shape[2] ** -0.5 if op.scale is None else op.scale)
    if op.coefficients is not None:
        q, k = _features(q, op.coefficients), _features(k, (1.0,) * len(op.coefficients))
    decay = None if gate is None else exp(gate.reshape(*gate.shape, *(1,) * (3 - len(gate.shape))))
    bonus = None if bonus is None else bonus.reshape(heads, 1, -1)
    # The normaliser is one more channel, of values that are 1.
    v = concatenate([v, Node(np.ones((heads, n, 1)))], axis=2)
    state = Node(np.zeros((heads, k.shape[2], width))) if initial is None else initial
    norm = Node(np.zeros((heads, k.shape[2]))) if initial_norm is None else initial_norm
    state = concatenate([state, norm.reshape(heads, -1, 1)], axis=2)
    rows = [Node(np.zeros((q.shape[0], 0, width + 1)))]
    if not op.causal:
        state = state + k.swap() @ v
        rows = [q @ state.repeat(shared)]
    for t in range(n if op.causal else 0):
        now = slice(t, t + 1)
        q_t, k_t, v_t = q[:, now], k[:, now], v[:, now]
        if bonus is not None:
            rows.append(q_t @ (state + (k_t * bonus).swap() @ v_t).repeat(shared))
        if decay is not None:
            state = state * decay[:, min(t, decay.shape[1] - 1)].reshape(heads, -1, 1)
        if beta is not None:
            v_t = (v_t - k_t @ state) * beta[:, now].reshape(heads, 1, 1)
        state = state + k_t.swap() @ v_t
        if bonus is None:
            rows.append(q_t @ state.repeat(shared))
    o = concatenate(rows, axis=1)
    return [_normalised(op, o, width), state[:, :, :width], state[:, :, width]]


def _normalised(op: Recur, o: Node, width: int) -> Node:
    if not op.normalize:
        return o[:, :, :width]
    total = o[:, :, width:] + op.epsilon
    dead = total.value == 0
    return where(dead, 0.0, o[:, :, :width] / where(dead, 1.0, total))


def _features(x: Node, coefficients: tuple[float, ...]) -> Node:
    """1, x and, with three coefficients, x (x) x, each times its coefficient: ``[H, n, 1 + D (+ D * D)]``."""
    heads, n, d = x.shape
    parts = [Node(np.ones((heads, n, 1))), x]
    if len(coefficients) == 3:
        parts.append((x.reshape(heads, n, d, 1) * x.reshape(heads, n, 1, d)).reshape(heads, n, d * d))
    return concatenate([part * a for part, a in zip(parts, coefficients, strict=True)], axis=2)
