"""Tree attention: the draft tokens of speculative decoding, each of which sees the cache and its own ancestors.

The queries are the last ``q_len`` keys and the nodes of a forest: ``parents[i] < i`` is the parent of node i, -1 for a
root. With ``prefix = kv_len - q_len`` tokens committed before them::

    visible(i, j)  =  j < prefix   or   node j - prefix is node i or an ancestor of it

A node's position is the prefix plus its depth, not its slot; rotations by position happen before the program.

Parameters: ``parents``, ints ``[q_len]``, or ``[B, q_len]`` for a tree per sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnkit.variants.sequences import Array, Float64, write


def program(parents: Array) -> tuple[str, list[Any]]:
    """Inputs q, k, v; results o, lse. The tree is a bool buffer ``[q_len, q_len]`` or ``[B, q_len, q_len]``."""
    seen = np.stack([ancestors(p) for p in np.atleast_2d(parents)])
    node = "max(kv_idx - (kv_len - q_len), 0)"  # the load happens for keys of the prefix too
    tree = f"b0[b, q_idx, {node}]" if np.ndim(parents) == 2 else f"b0[q_idx, {node}]"
    lines = [
        "o, lse = attend(q, k, v, scale = default) {",
        f"mask = (kv_idx < kv_len - q_len) | {tree}",
        "normalizer = softmax",
        "}",
        "return o, lse",
    ]
    buffers = [seen if np.ndim(parents) == 2 else seen[0]]
    return write(["q: bhsd", "k: bhsd", "v: bhsd"], lines, buffers), buffers


def naive(
    q: Array, k: Array, v: Array, parents: Array, *, scale: float | None = None
) -> tuple[Float64, Float64]:
    """The equation in float64: every node walks up its tree. ``o [B, Hq, Sq, Dv]`` and ``lse [B, Hq, Sq]``."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    prefix = k.shape[2] - q.shape[2]
    o, lse = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:3])
    parents = np.broadcast_to(parents, (q.shape[0], q.shape[2]))
    for b, h, i in np.ndindex(q.shape[:3]):
        j = [*range(prefix), *(prefix + node for node in path(parents[b], i))]
        keys, values = (x[b, h * k.shape[1] // q.shape[1], j] for x in (k, v))
        z = scale * (keys @ q[b, h, i])
        lse[b, h, i] = np.logaddexp.reduce(z)
        o[b, h, i] = np.exp(z - lse[b, h, i]) @ values
    return o, lse


def path(parents: Array, node: int) -> list[int]:
    """The nodes from a root to ``node``."""
    found: list[int] = []
    while node >= 0:
        found.append(node)
        node = int(parents[node])
    return found[::-1]


def ancestors(parents: Array) -> NDArray[np.bool_]:
    """Which nodes each node sees among the nodes: itself and its ancestors, ``[q_len, q_len]``."""
    seen = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(np.asarray(parents).tolist()):  # a parent comes before its children
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def depths(parents: Array) -> Array:
    """How far each node is from its root: its position after the prefix. ``[q_len]``."""
    return np.array([len(path(parents, node)) - 1 for node in range(len(parents))])


def bits(seen: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """`ancestors` as words of 64 nodes, node n at bit ``n % 64`` of word ``n // 64``: ``[q_len, ceil(q_len / 64)]``."""
    padded = np.pad(seen, ((0, 0), (0, -seen.shape[1] % 64))).reshape(len(seen), -1, 64)
    words: NDArray[np.uint64] = np.bitwise_or.reduce(
        padded.astype(np.uint64) << np.arange(64, dtype=np.uint64), axis=2
    )
    return words


CASES: dict[str, list[int]] = {
    "chain": [-1, 0, 1, 2, 3, 4],
    "star": [-1, 0, 0, 0, 0, 0],
    "binary": [-1, 0, 0, 1, 1, 2],
    "forest": [-1, -1, 0, 1, 2, -1],
}
