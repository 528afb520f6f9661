"""Attention by the definition, one sequence at a time: every score of every head is materialised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit.backends.reference.evaluate import Scope
from attnkit.backends.reference.philox import kept
from attnkit.backends.reference.select import Relation
from attnkit.backends.reference.tape import Array, Node, concatenate, exp, log, weighted, where
from attnkit.errors import error
from attnkit.ir.program import Attend

Q_TILE, KV_TILE, SKIP_ROWS = 128, 64, 16  # of density and of skipping: they are part of the meaning


@dataclass(frozen=True)
class Related:
    """What else one attention of one sequence reads: relations, the carry to start with, the seed of dropout."""

    b: int
    blocks: Relation | None = None
    groups: tuple[Relation, Relation] | None = None
    initial: Node | None = None
    seed: int | None = None


def attend(
    op: Attend, q: Node, segments: list[tuple[Node, Node]], related: Related, scope: Scope
) -> list[Node]:
    """The outputs of ``op`` for one sequence: ``q [Hq, n, D]``, segments of ``k [Hkv, m, D]`` and ``v [Hkv, m, Dv]``.

    Raises:
        AttnkitError: AK601, a load leaves its buffer at a pair that exists.
    """
    heads, q_len = q.shape[:2]
    group = heads // max(segments[0][0].shape[0], 1)
    k, v = (concatenate([pair[i] for pair in segments], axis=1).repeat(group) for i in (0, 1))
    pairs = {
        "b": related.b, "h": np.arange(heads)[:, None, None], "q_idx": np.arange(q_len)[:, None],
        "kv_idx": np.arange(k.shape[1]), "q_len": q_len, "kv_len": k.shape[1],
    }  # fmt: skip
    shape = (heads, q_len, k.shape[1])
    exists = np.ones(shape, bool)
    if op.mask is not None:
        mask, outside = scope.plain(op.mask, pairs)
        exists = np.broadcast_to(mask, shape)
        _inside("mask", outside & exists, op.mask)
    if related.initial is not None:
        exists = exists & (
            related.initial.value < np.inf
        )  # what was evicted before is gone, and its slot may hold anything
    possible = exists
    if related.blocks is not None:
        exists = exists & related.blocks.pairs(heads, q_len, k.shape[1])
    seen = np.any(exists, axis=1)[:, :, None]  # what nobody sees reaches nothing, gradients included
    k, v = where(seen, k, 0.0), where(seen, v, 0.0)
    scale = q.shape[2] ** -0.5 if op.scale is None else op.scale
    s = (q @ k.swap()) * scale
    variables: dict[str, Any] = {**pairs, "s": s}
    carried = None
    if op.carry is not None:
        carried, exists = _carry(op, s, exists, variables, related, scope)
        variables["f"] = carried[:, :q_len]
    z, outside = scope.apply(op.score, variables, s.shape)
    _inside("score", outside & exists, op.score)
    sink = None if op.normalizer.sink is None else scope.buffers[op.normalizer.sink]
    keep = None
    if op.dropout is not None:
        p = scope.number(op.dropout)
        keep = kept(related.seed, related.b, s.shape, p) / (1 - p if p < 1 else 1)
    visited = exists
    if op.skip is not None:
        exists = _unskipped(z.value, exists, scope.number(op.skip))
    if related.groups is not None:
        return [_grouped(op, z, exists, v, keep, related.groups)]
    weights, lse, top = _normalise(op, z, exists, sink)
    dropped = weights if keep is None else weights * keep
    found = _Outputs(op, z, visited, possible, weights, lse, top)
    given = {"o": lambda: weighted(dropped, exists, v), "weights": lambda: dropped}
    if carried is not None:
        given["carry"] = lambda: carried[0, q_len]
    return [given[name]() if name in given else getattr(found, name)() for name in op.outputs]


def _inside(name: str, outside: Array, root: Any) -> None:
    if np.any(outside):
        raise error("AK601", where=f"{name}, at a visible pair", given=repr(root))


def _normalise(op: Attend, z: Node, exists: Array, sink: Any) -> tuple[Node, Node, Array]:
    """Weights, lse ``[H, n]`` and the largest score, where there is such a thing."""
    kind = op.normalizer.kind
    live = exists & (z.value != -np.inf)  # a score of -inf has weight 0
    if kind in ("none", "sum"):
        weights = where(live, z, 0.0)
        if kind == "sum":
            weights = _divide(weights, weights.sum(2) + (op.normalizer.epsilon or 0.0))
        return weights, Node(np.zeros(z.shape[:2])), np.zeros(z.shape[:2])
    if kind == "softmax_over_queries":
        weights, _, _ = _softmax(z.swap(), live.swapaxes(1, 2), None)
        weights = weights.swap()
        if op.normalizer.epsilon is not None:
            weights = _divide(weights, weights.sum(2) + op.normalizer.epsilon)
        return weights, Node(np.zeros(z.shape[:2])), np.zeros(z.shape[:2])
    sign = np.sign(z.value) if kind == "signed_softmax" else np.ones(z.shape)
    weights, lse, top = _softmax(z * sign, live, sink)
    return weights * sign, lse, top


def _softmax(z: Node, live: Array, sink: Any) -> tuple[Node, Node, Array]:
    top = np.max(np.where(live, z.value, -np.inf), axis=2, initial=-np.inf, keepdims=True)
    logit = None if sink is None else sink.reshape(-1, 1, 1)
    if logit is not None:
        top = np.maximum(top, logit.value)
    pivot = np.where(top == -np.inf, 0.0, top)
    weights = where(live, exp(where(live, z, 0.0) - pivot), 0.0)
    total = weights.sum(2)
    if logit is not None:
        total = total + exp(logit - pivot)
    lse = log(total) + pivot
    return _divide(weights, total), lse.reshape(*lse.shape[:2]), top[..., 0]


def _divide(weights: Node, total: Node) -> Node:
    """Rows by their totals; a row of nothing stays nothing."""
    dead = total.value == 0
    return where(np.broadcast_to(dead, weights.shape), 0.0, weights / where(dead, 1.0, total))


def _carry(
    op: Attend, s: Node, exists: Array, variables: dict[str, Any], related: Related, scope: Scope
) -> tuple[Node, Array]:
    """The accumulator before every query and after the last, ``[1, n + 1, m]``; and the pairs that the budget leaves."""
    assert op.carry is not None
    if op.head >= s.shape[0]:
        raise error("AK401", where="head of attend", given=str(op.head), allowed=f"0..{s.shape[0] - 1}")
    of_head = {**variables, "s": s[op.head : op.head + 1], "h": np.full((1, 1, 1), op.head)}
    shape = (1, *s.shape[1:])
    added, outside = scope.apply(op.carry, of_head, shape)
    _inside("carry", outside & exists[op.head], op.carry)
    added = where(exists[op.head : op.head + 1], added, 0.0)
    padded = concatenate([added, Node(np.zeros((1, 1, shape[2])))], axis=1)
    carried = padded.before()
    if related.initial is not None:
        if related.initial.shape[0] < shape[2]:
            given, allowed = f"{related.initial.shape[0]} keys", f"at least {shape[2]}"
            raise error("AK403", where="initial of attend", given=given, allowed=allowed)
        carried = carried + related.initial[: shape[2]].reshape(1, 1, -1)
    if op.budget is None:
        return carried, exists
    evicted = _evicted(op.budget, carried.value[0], exists[op.head])
    return where(evicted, np.inf, carried), exists & ~evicted[:-1]


def _evicted(budget: int, f: Array, exists: Array) -> Array:
    """Which keys each query, and the one after the last, finds gone: what is evicted never comes back. ``[n + 1, m]``."""
    q_len, kv_len = exists.shape
    gone = np.zeros((q_len + 1, kv_len), bool)
    evicted = np.zeros(kv_len, bool)
    for i in range(q_len):
        live = exists[i] & ~evicted
        own = np.max(np.flatnonzero(live), initial=-1)
        while live.sum() > budget:
            candidates = np.flatnonzero(live)
            candidates = candidates[(candidates != candidates[0]) & (candidates != own)]
            worst = candidates[np.argmax(f[i, candidates])]  # ties: the oldest
            live[worst], evicted[worst] = False, True
        gone[i] = evicted
    gone[q_len] = evicted
    return gone


def _unskipped(z: Array, exists: Array, threshold: float) -> Array:
    """The pairs that online skipping keeps (SpargeAttn, stage 2): in tiles of 16 queries and 64 keys a tile is left
    out if every row's maximum lies ``threshold`` (in log2) or more below the running one; never the first tile that
    its 128 queries visit, nor the last two."""
    out = exists.copy()
    heads, q_len, kv_len = z.shape
    for h, first in np.ndindex(heads, -(-q_len // Q_TILE)):
        block = slice(first * Q_TILE, min((first + 1) * Q_TILE, q_len))
        starts = range(0, kv_len, KV_TILE)
        tiles = [slice(j, j + KV_TILE) for j in starts if exists[h, block, j : j + KV_TILE].any()]
        for row in range(block.start, block.stop, SKIP_ROWS):
            rows = slice(row, min(row + SKIP_ROWS, block.stop))
            running = np.full(rows.stop - rows.start, -np.inf)
            for t, keys in enumerate(tiles):
                scores = np.where(exists[h, rows, keys], z[h, rows, keys], -np.inf)
                top = scores.max(axis=1, initial=-np.inf)
                live = top > -np.inf
                below = np.max((top - running)[live] / np.log(2), initial=-np.inf)
                if 0 < t < len(tiles) - 2 and not below + threshold > 0:
                    out[h, rows, keys] = False
                running = np.maximum(running, top)
    return out


def _grouped(
    op: Attend, z: Node, exists: Array, v: Node, keep: Any, groups: tuple[Relation, Relation]
) -> Node:
    """Attention within each group, and the mean of a token's results over its groups."""
    heads, q_len, _ = z.shape
    in_q, in_k = groups
    total, count = Node(np.zeros((heads, q_len, v.shape[2]))), np.zeros((heads, q_len, 1))
    for c in range(in_q.array.shape[2]):
        members = in_q.rows(heads)[:, 0, c, :, None]
        inside = exists & members & in_k.of_queries(heads, q_len, c)
        weights, _, _ = _normalise(op, z, inside, None)
        weights = weights if keep is None else weights * keep
        total, count = total + weighted(weights, inside, v) * members, count + members
    return total / np.maximum(count, 1)


@dataclass(frozen=True)
class _Outputs:
    """Everything beside o that attention can tell, each made when it is asked for."""

    op: Attend
    z: Node
    visited: Array
    possible: Array
    weights: Node
    sums: Node
    top: Array

    def lse(self) -> Node:
        """The logarithm of the sum of exponentials."""
        return self.sums

    def density(self) -> Node:
        """Tiles visited, of those in which a pair could exist, for each head. A tile that is skipped was visited."""
        visited, possible = (_tiles(x).sum(axis=(1, 2)) for x in (self.visited, self.possible))
        return Node(np.where(possible == 0, 0.0, visited / np.maximum(possible, 1)))

    def column_sum(self) -> Node:
        """The weight that each key gets from all queries."""
        return self.weights.sum(1).reshape(self.z.shape[0], self.z.shape[2])

    def column_max(self) -> Node:
        """The largest weight of each key."""
        return self._largest(1)

    def row_max(self) -> Node:
        """The largest weight of each query."""
        return self._largest(2)

    def entropy(self) -> Node:
        """Of each query's weights, in nats."""
        live = self.weights.value > 0
        logs = log(where(live, self.weights, 1.0))
        return (self.weights * logs * -1.0).sum(2).reshape(*self.z.shape[:2])

    def _largest(self, axis: int) -> Node:
        shape = tuple(n for i, n in enumerate(self.z.shape) if i != axis)
        if self.z.shape[axis] == 0:
            return Node(np.zeros(shape))
        best = np.expand_dims(np.argmax(self.weights.value, axis=axis), axis)
        chosen = best == np.arange(self.z.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        found: Node = (self.weights * chosen).sum(axis).reshape(*shape)
        return found


def _tiles(pairs: Array) -> Array:
    heads, q_len, kv_len = pairs.shape
    rows, columns = -(-q_len // Q_TILE), -(-kv_len // KV_TILE)
    padded = np.zeros((heads, rows * Q_TILE, columns * KV_TILE), bool)
    padded[:, :q_len, :kv_len] = pairs
    return np.asarray(np.any(padded.reshape(heads, rows, Q_TILE, columns, KV_TILE), axis=(2, 4)))
