"""Relations by the definition: which columns each row keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit.backends.reference.evaluate import Scope
from attnkit.backends.reference.tape import Array
from attnkit.ir.program import Select


@dataclass(frozen=True)
class Relation:
    """``array [H, P, rows, columns]``: P is 1, or one relation for every ``prefix`` queries. Sizes are of blocks."""

    array: Array
    row_block: int
    column_block: int
    prefix: int | None

    def rows(self, heads: int) -> Array:
        """The array for all query heads."""
        return np.repeat(self.array, heads // max(self.array.shape[0], 1), axis=0)

    def pairs(self, heads: int, q_len: int, kv_len: int) -> Array:
        """As blocks: which pairs it allows, ``[H, n, m]``."""
        i, j = np.arange(q_len) // self.row_block, np.arange(kv_len) // self.column_block
        allowed: Array = self.rows(heads)[:, 0, i[:, None], j]
        return allowed

    def of_queries(self, heads: int, q_len: int, group: int) -> Array:
        """As groups of keys: the members of one group, as each query sees them, ``[H, n, m]``."""
        position = np.arange(q_len) + self.array.shape[3] - q_len
        part = np.maximum(position, 0) // self.prefix if self.prefix else np.zeros(q_len, int)
        members: Array = self.rows(heads)[:, part, group]
        return members


def select(
    op: Select, rows: Array, columns: Array, coherent: tuple[Array, Array] | None, b: int, scope: Scope,
    blocks: tuple[int, int],
) -> Relation:  # fmt: skip
    """The relation of one sequence: ``rows [Hr, n, D]`` over ``columns [Hc, m, D]``, where Hr is a multiple of Hc.

    ``coherent`` tells for every pooled row and column whether it is (``[Hr, n]``, ``[Hc, m]``).
    """
    heads = max(rows.shape[0], columns.shape[0])
    group = heads // max(columns.shape[0], 1)
    r, c = (np.repeat(x, heads // max(x.shape[0], 1), axis=0) for x in (rows, columns))
    s = (rows.shape[2] ** -0.5 if op.scale is None else op.scale) * (r @ c.swapaxes(1, 2))
    n, m = s.shape[1:]
    variables: dict[str, Any] = {
        "s": s, "b": b, "h": np.arange(heads)[:, None, None], "q_idx": np.arange(n)[:, None], "kv_idx": np.arange(m),
        "q_len": n, "kv_len": m,
    }  # fmt: skip

    def of(expr: Any, otherwise: bool) -> Array:
        found = np.asarray(otherwise) if expr is None else scope.plain(expr, variables)[0]
        return np.broadcast_to(found, s.shape)

    z, candidates, forced = of(op.score, False), of(op.mask, True), of(op.force, False)
    if coherent is not None:
        row_ok, column_ok = (np.repeat(x, heads // max(x.shape[0], 1), axis=0) for x in coherent)
        forced = forced | ~row_ok[:, :, None] | ~column_ok[:, None, :]
        candidates = candidates & column_ok[:, None, :]
    if op.prefix is None:
        chosen = _choose(op, z, candidates, group, scope) | forced
        chosen = chosen[::group] if op.heads == "group" else chosen
        return Relation(chosen[:, None], *blocks, None)
    parts = []
    for start in range(0, max(m, 1), op.prefix):
        before = np.arange(m) < start
        own = (np.arange(m) >= start) & (np.arange(m) < start + op.prefix)
        parts.append(_choose(op, z, candidates & before, group, scope) | own | (forced & before))
    chosen = np.stack(parts, axis=1)
    return Relation(chosen[::group] if op.heads == "group" else chosen, *blocks, op.prefix)


def _choose(op: Select, z: Array, candidates: Array, group: int, scope: Scope) -> Array:
    if op.heads == "group":  # the mean softmax of the query heads that share a kv head
        shape = (len(z) // group, group, *z.shape[1:])
        z = np.repeat(_softmax(z, candidates & ~np.isnan(z)).reshape(shape).mean(axis=1), group, axis=0)
        candidates = np.repeat(candidates.reshape(shape).any(axis=1), group, axis=0)
    if op.per == "column":
        return _rank(op, z.swapaxes(1, 2), candidates.swapaxes(1, 2), scope).swapaxes(1, 2)
    return _rank(op, z, candidates, scope)


def _rank(op: Select, z: Array, candidates: Array, scope: Scope) -> Array:
    value = scope.number(getattr(op, op.rule))
    if op.rule == "threshold":
        kept: Array = candidates & (z > value)
        return kept
    ranked = np.where(candidates & ~np.isnan(z), z, -np.inf)
    order = np.lexsort((-ranked, np.isnan(z), ~candidates))  # the last counts most; ties: the lowest index
    columns = z.shape[2]
    if op.rule == "top_cdf":
        mass = np.take_along_axis(_softmax(ranked, candidates), order, axis=2)
        take = np.cumsum(mass, axis=2) <= value
        take[..., :1] = True
    else:
        count = value if op.rule == "top_k" else max(1, np.floor(value * columns))
        take = np.broadcast_to(np.arange(columns) < count, z.shape)
    chosen = np.zeros(z.shape, bool)
    np.put_along_axis(chosen, order, take, axis=2)
    return chosen & candidates


def _softmax(z: Array, live: Array) -> Array:
    with np.errstate(all="ignore"):
        top = np.max(np.where(live, z, -np.inf), axis=2, keepdims=True, initial=-np.inf)
        e = np.where(live, np.exp(z - np.where(np.isfinite(top), top, 0.0)), 0.0)
        total = e.sum(axis=2, keepdims=True)
        return np.where(total == 0, 0.0, e / np.where(total == 0, 1.0, total))


def coherence(tokens: Array, size: int) -> Array:
    """The mean cosine similarity of the tokens of each block, over all pairs of them: ``[H, blocks]``."""
    with np.errstate(all="ignore"):
        unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
        parts = [unit[:, i : i + size] for i in range(0, tokens.shape[1], size)]
        means = [(part.mean(axis=1) ** 2).sum(axis=1) for part in parts]
    return np.stack(means, axis=1) if means else np.zeros((tokens.shape[0], 0))
