"""Regional attention: what a query may see, or how much of it, is a matter of the regions that the tokens are in.

    Regions(rq, rk, allow)     query i sees key j if allow[rq_i, rk_j]
    Boxes(boxes, width)        keys are a grid of that width, y = j // width, x = j % width; query i sees the keys with
                               top_i <= y < bottom_i and left_i <= x < right_i
    weights w[rq_i, rk_j] >= 0 multiply the softmax weights P_ij. Renormalised, that is a logit bias log w; otherwise
                               o_i = sum_j P_ij w[rq_i, rk_j] v_j, whose rows do not sum to 1

A weight of 0 leaves the pair in existence: it takes part in the softmax if weights are not renormalised. A query whose
region or box is empty has ``o = 0``. The masks compose with ``&``, ``|``, ``~`` and with `attnkit.causal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit.ir.mods import load
from attnkit.variants.block_sparse import Pattern, Query
from attnkit.variants.sequences import Array, Float64, write


@dataclass(frozen=True, eq=False)
class Regions(Pattern):
    """Region ids, ints ``[Sq]`` or ``[B, Sq]`` and ``[Skv]`` or ``[B, Skv]``; ``allow`` bool ``[regions, regions]``."""

    q_regions: Any
    kv_regions: Any
    allow: Any

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        regions = load(self.q_regions, b, q_idx), load(self.kv_regions, b, kv_idx)
        return q_idx.context.load(self.allow, regions)

    def keys(self, at: Query) -> Iterable[int]:
        own, of_keys = _own(self.q_regions, at.b)[at.i], _own(self.kv_regions, at.b)
        return [j for j in range(at.kv_len) if self.allow[own, of_keys[j]]]


@dataclass(frozen=True, eq=False)
class Boxes(Pattern):
    """A box per query: ``boxes`` ints ``[Sq, 4]`` or ``[B, Sq, 4]``, top, bottom, left and right, each end exclusive."""

    boxes: Any
    width: int

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        lead = (b,) if len(self.boxes.shape) == 3 else ()
        top, bottom, left, right = (q_idx.context.load(self.boxes, (*lead, q_idx, n)) for n in range(4))
        y, x = kv_idx // self.width, kv_idx % self.width
        return (y >= top) & (y < bottom) & (x >= left) & (x < right)

    def keys(self, at: Query) -> Iterable[int]:
        boxes = np.asarray(self.boxes)
        top, bottom, left, right = (boxes[at.b] if boxes.ndim == 3 else boxes)[at.i]
        return [y * self.width + x for y in range(top, bottom) for x in range(left, right)]


def _own(regions: Any, b: int) -> Array:
    regions = np.asarray(regions)
    own: Array = regions[b if len(regions) > 1 else 0] if regions.ndim == 2 else regions
    return own


# --- weights ----------------------------------------------------------------------------------------------


def weighted_program(
    q_regions: Array, kv_regions: Array, weights: Array, *, renormalize: bool = True
) -> tuple[str, list[Any]]:
    """Inputs q, k, v; results o and, if renormalised, lse. Regions are those of `Regions`; ``weights`` is float."""
    of = ["b, " * (np.ndim(regions) - 1) for regions in (q_regions, kv_regions)]
    weighted = f"score = s + log(b2[b0[{of[0]}q_idx], b1[{of[1]}kv_idx]])"
    lines = [f"o, lse = attend(q, k, v, scale = default) {{ {weighted} }}", "return o, lse"]
    if not renormalize:  # exp(lse of the weighted) / exp(lse of all) is the mass that is left
        lines[1:] = [
            "plain, total = attend(q, k, v, scale = default)",
            "o_weighted = map(o, lse, total) { value = where(y > -inf, x * exp(y - z), 0.0) }",
            "return o_weighted",
        ]
    buffers = [q_regions, kv_regions, weights]
    return write(["q: bhsd", "k: bhsd", "v: bhsd"], lines, buffers), buffers


def weighted_naive(
    q: Array,
    k: Array,
    v: Array,
    q_regions: Array,
    kv_regions: Array,
    weights: Array,
    *,
    renormalize: bool = True,
) -> tuple[Float64, Float64]:
    """The definition in float64: weights after the softmax. The lse is that of what they leave of it, in either case."""
    o, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for b, h, i in np.ndindex(q.shape[:3]):
        keys, values = (x[b, h * k.shape[1] // q.shape[1]].astype(np.float64) for x in (k, v))
        z = q.shape[3] ** -0.5 * (keys @ q[b, h, i])
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        p = p * [weights[_own(q_regions, b)[i], region] for region in _own(kv_regions, b)]
        if p.sum() > 0:
            o[b, h, i] = p @ values / (p.sum() if renormalize else 1)
            lse[b, h, i] = z.max() + np.log(np.exp(z - z.max()).sum()) + np.log(p.sum())
    return o, lse


CASES: dict[str, Callable[[int, int, np.random.Generator], Pattern]] = {
    "regions": lambda m, n, rng: Regions(
        rng.integers(0, 3, m).astype(np.int32),
        rng.integers(0, 3, n).astype(np.int32),
        rng.random((3, 3)) < 0.5,
    ),
    "boxes": lambda m, n, rng: Boxes(rng.integers(0, 4, (m, 4)).astype(np.int32), 3),
}
