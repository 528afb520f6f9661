"""Attention over images and videos: windows in two or three dimensions, and keys from a coarser grid.

Tokens are those of a grid ``shape`` in row-major order: token t is at ``y = t // width, x = t % width``, and so on. Query
and key see each other if their coordinates do along every axis, of size L::

    Windows(w, s)        (y - s) // w  equal                  Swin: windows of w, moved by s, cut off at the borders
    Grid(g)              y % ceil(L / g)  equal               MaxViT: g tokens an axis, spread over it evenly
    Halo(b, r)           y0 - r <= y_k < y0 + b + r           HaloNet: y0 = y_q // b * b, the corner of the query's block
    Neighbourhood(n, d)  y_q % d equal, and y_k // d among the n around y_q // d, fewer to one side at a border
    Sampled(f)           y_k is one of the L // f nearest to the centres of as many equal parts

Swin's cyclic shift with region mask is what `Windows` says directly. Positions outside the grid do not exist: nothing is
padded, and no key appears twice. ``Sampled`` (ToDo) is the dense attention over keys and values of the sampled tokens,
which a caller who can gather them runs more cheaply; a query need not see itself.

`relative_bias` adds a learned number per head and offset. Keys that are means of cells (Twins) are a `pool` of tokens that
lie cell by cell. DaViT's channel attention is the dense family with roles exchanged: see `channel_naive`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from attnkit.errors import error
from attnkit.ir.mods import ScoreFunction
from attnkit.ir.trace import build_text, trace
from attnkit.variants.block_sparse import Bool, Pattern, Query, attend_pairs, visible
from attnkit.variants.sequences import Array, Float64, Piece

Shape = tuple[int, ...]
Part = tuple[Sequence[int], Sequence[int]]  # queries and keys


@dataclass(frozen=True)
class GridPattern(Pattern):
    """A pattern over the tokens of a grid: the same question asked of every axis."""

    shape: Shape

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        axes = zip(coordinates(q_idx, self.shape), coordinates(kv_idx, self.shape), strict=True)
        seen = [self.along(axis, y_q, y_k) for axis, (y_q, y_k) in enumerate(axes)]
        together = seen[0]
        for other in seen[1:]:
            together = together & other
        return together

    def along(self, axis: int, y_q: Any, y_k: Any) -> Any:
        """Whether two traced coordinates see each other along one axis."""
        raise NotImplementedError

    exact = True  # whether the parts say it all; else the pattern is a mask within them

    def parts(self, axis: int) -> list[Part]:
        """Coordinates along one axis: which queries see which keys together. Each query is in one part."""
        raise NotImplementedError

    def groups(self) -> tuple[Array, Array, bool]:
        """The pattern as an index map: lists of tokens that attend to each other, and whether they say it all.

        Queries and keys are int32 ``[groups, most]``: ascending, then -1. Each query is in one group.
        """
        together = list(product(*(self.parts(axis) for axis in range(len(self.shape)))))
        lists = [
            [_tokens([part[side] for part in parts], self.shape) for parts in together] for side in (0, 1)
        ]
        return _filled(lists[0]), _filled(lists[1]), self.exact


def coordinates(index: Any, shape: Shape) -> list[Any]:
    """Where a token is in a grid. Works for ints, arrays and traced indices."""
    steps = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return [index // step % size for step, size in zip(steps, shape, strict=True)]


def _tokens(coordinates: Sequence[Sequence[int]], shape: Shape) -> Array:
    tokens = np.zeros(1, np.int32)
    for own, size in zip(coordinates, shape, strict=True):
        tokens = (tokens[:, None] * size + np.asarray(own, np.int32)).ravel()
    return tokens


def _filled(lists: list[Array]) -> Array:
    found = np.full((len(lists), max(map(len, lists))), -1, np.int32)
    for row, tokens in zip(found, lists, strict=True):
        row[: len(tokens)] = tokens
    return found


def _classes(length: int, of: Callable[[int], int]) -> list[Sequence[int]]:
    """Coordinates below ``length`` with the same ``of``, in the order of their first."""
    found: dict[int, list[int]] = {}
    for y in range(length):
        found.setdefault(of(y), []).append(y)
    return list(found.values())


@dataclass(frozen=True)
class Windows(GridPattern):
    """Windows of ``window`` tokens along each axis, the first of them starting at ``shift``."""

    window: Shape
    shift: Shape

    def along(self, axis: int, y_q: Any, y_k: Any) -> Any:
        w, s = self.window[axis], self.shift[axis]
        return (y_q - s) // w == (y_k - s) // w

    def parts(self, axis: int) -> list[Part]:
        w, s = self.window[axis], self.shift[axis]
        return [(own, own) for own in _classes(self.shape[axis], lambda y: (y - s) // w)]

    def places(self) -> Array:
        """Of each token its place in its window, int32 ``[S]``, row-major; those of a window that is cut off stay theirs."""
        at = coordinates(np.arange(prod(self.shape)), self.shape)
        own = [(y - s) % w for y, s, w in zip(at, self.shift, self.window, strict=True)]
        found: Array = np.ravel_multi_index(tuple(own), self.window).astype(np.int32)
        return found

    def keys(self, at: Query) -> Iterable[int]:
        """As Swin does it: pad to whole windows, roll, cut into windows, keep what was together before the roll."""
        pad = [(0, -size % w) for size, w in zip(self.shape, self.window, strict=True)]
        tokens = np.pad(np.arange(prod(self.shape)).reshape(self.shape), pad, constant_values=-1)
        regions = np.zeros(tokens.shape, int)
        cuts = [
            [slice(0, -w), slice(-w, -s or None), slice(-s, None) if s else slice(0, 0)]
            for w, s in zip(self.window, self.shift, strict=True)
        ]
        for number, part in enumerate(product(*cuts)):
            regions[part] = number
        tokens = np.roll(tokens, [-s for s in self.shift], range(tokens.ndim))
        for corner in product(*(range(0, n, w) for n, w in zip(tokens.shape, self.window, strict=True))):
            window = tuple(slice(c, c + w) for c, w in zip(corner, self.window, strict=True))
            inside, region = tokens[window].ravel(), regions[window].ravel()
            if at.i in inside:
                same = region == region[np.flatnonzero(inside == at.i)[0]]
                return [int(token) for token in inside[same & (inside >= 0)]]
        raise AssertionError("every token is in a window")


@dataclass(frozen=True)
class Grid(GridPattern):
    """Groups of ``grid`` tokens along each axis, as far from each other as they can be."""

    grid: Shape

    def along(self, axis: int, y_q: Any, y_k: Any) -> Any:
        step = -(-self.shape[axis] // self.grid[axis])
        return y_q % step == y_k % step

    def parts(self, axis: int) -> list[Part]:
        step = -(-self.shape[axis] // self.grid[axis])
        return [(own, own) for own in _classes(self.shape[axis], lambda y: y % step)]

    def keys(self, at: Query) -> Iterable[int]:
        """Every step-th line of the grid, starting where the query's own position tells."""
        steps = [-(-size // g) for size, g in zip(self.shape, self.grid, strict=True)]
        own = coordinates(at.i, self.shape)
        tokens = np.arange(prod(self.shape)).reshape(self.shape)
        lines = tuple(slice(y % step, None, step) for y, step in zip(own, steps, strict=True))
        return [int(token) for token in tokens[lines].ravel()]


@dataclass(frozen=True)
class Halo(GridPattern):
    """Blocks of queries, each of which sees its block and ``halo`` tokens around."""

    block: Shape
    halo: int

    def along(self, axis: int, y_q: Any, y_k: Any) -> Any:
        size = self.block[axis]
        start = y_q // size * size
        return (y_k >= start - self.halo) & (y_k < start + (size + self.halo))

    def parts(self, axis: int) -> list[Part]:
        size, length, r = self.block[axis], self.shape[axis], self.halo
        blocks = _classes(length, lambda y: y // size)
        return [
            (own, range(max(own[0] // size * size - r, 0), min(own[0] // size * size + size + r, length)))
            for own in blocks
        ]

    def keys(self, at: Query) -> Iterable[int]:
        """The rectangle around the block, cut off at the borders."""
        own = coordinates(at.i, self.shape)
        starts = [y // size * size for y, size in zip(own, self.block, strict=True)]
        tokens = np.arange(prod(self.shape)).reshape(self.shape)
        around = zip(starts, self.block, strict=True)
        cut = tuple(slice(max(y - self.halo, 0), y + size + self.halo) for y, size in around)
        return [int(token) for token in tokens[cut].ravel()]


@dataclass(frozen=True)
class Neighbourhood(GridPattern):
    """The ``size`` tokens nearest to the query along each axis, ``step`` apart; every query sees as many.

    AK401 if an axis has no room for them.
    """

    size: Shape
    step: int = 1

    def __post_init__(self) -> None:
        for length, size in zip(self.shape, self.size, strict=True):
            if size * self.step > length:
                raise error(
                    "AK401",
                    where="size",
                    given=f"{size} tokens, {self.step} apart",
                    allowed=f"within {length}",
                )

    def along(self, axis: int, y_q: Any, y_k: Any) -> Any:
        step, size = self.step, self.size[axis]
        last = (self.shape[axis] - 1 - y_q % step) // step - (size - 1)  # where the last neighbourhood starts
        start = (y_q // step - size // 2).clamp(min=0).min(last)
        near = (y_k // step >= start) & (y_k // step < start + size)
        return near if step == 1 else near & (y_q % step == y_k % step)

    exact = False

    def parts(self, axis: int) -> list[Part]:
        """Queries in stretches of as many as fill the lanes of a tile, with all that one of them sees."""
        step, size = self.step, self.size[axis]
        together = 8 if len(self.shape) == 2 else 96 if len(self.shape) == 1 else 4
        parts: list[Part] = []
        for line in _classes(self.shape[axis], lambda y: y % step):
            for first in range(0, len(line), together):
                last = min(first + together, len(line)) - 1
                start, end = (min(max(y - size // 2, 0), len(line) - size) for y in (first, last))
                parts.append((line[first : last + 1], line[start : end + size]))
        return parts

    def keys(self, at: Query) -> Iterable[int]:
        """Of the lines ``step`` apart on which the query is, the ``size`` whose middle is nearest to it."""
        lines = []
        for y, length, size in zip(coordinates(at.i, self.shape), self.shape, self.size, strict=True):
            line = list(range(y % self.step, length, self.step))
            places = range(len(line) - size + 1)
            start = min(places, key=lambda place: abs(place + size // 2 - line.index(y)))
            lines.append(line[start : start + size])
        return [int(np.ravel_multi_index(where, self.shape)) for where in product(*lines)]


@dataclass(frozen=True)
class Sampled(GridPattern):
    """Keys and values from ``L // factor`` tokens along each axis, chosen as torch's "nearest-exact" does.

    AK401 if an axis is shorter than the factor.
    """

    factor: int

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= min(self.shape):
            raise error(
                "AK401", where="factor", given=f"{self.factor}", allowed=f"from 1 to {min(self.shape)}"
            )

    def along(self, axis: int, y_q: Any, y_k: Any) -> Any:
        # Sampled are the whole parts of the centres (2n + 1) L / (2 count): is the first centre from y on before y + 1?
        length = self.shape[axis]
        count = length // self.factor
        n = (2 * count * y_k + (length - 1)) // (2 * length)
        return (2 * n + 1) * length < 2 * count * (y_k + 1)

    def parts(self, axis: int) -> list[Part]:
        length = self.shape[axis]
        count = length // self.factor
        return [(range(length), [(2 * n + 1) * length // (2 * count) for n in range(count)])]

    def keys(self, at: Query) -> Iterable[int]:
        """The tokens at the whole parts of the centres."""
        lines = [
            [int((n + 0.5) * (length / (length // self.factor))) for n in range(length // self.factor)]
            for length in self.shape
        ]
        return [int(np.ravel_multi_index(where, self.shape)) for where in product(*lines)]


def relative_bias(table: Any, shape: Shape) -> ScoreFunction:
    """``s + table[h, dy + n0 - 1, dx + n1 - 1, ...]`` of the offset from key to query along each axis.

    ``table [Hq, 2 n0 - 1, 2 n1 - 1, ...]`` is float32, for offsets below n along each axis.
    """

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        axes = zip(coordinates(q_idx, shape), coordinates(kv_idx, shape), table.shape[1:], strict=True)
        return s + q_idx.context.load(table, (h, *(y_q - y_k + (size // 2) for y_q, y_k, size in axes)))

    return score


# --- as programs and as equations -------------------------------------------------------------------------


def program(pattern: GridPattern, *, table: Any = None) -> tuple[str, list[Any]]:
    """Inputs q, k, v, the tokens of one grid; results o, lse. ``table`` is that of `relative_bias`."""
    traced = trace(None if table is None else relative_bias(table, pattern.shape), pattern)
    return build_text(traced), traced.buffers


def naive(
    q: Array, k: Array, v: Array, pattern: GridPattern, *, table: Array | None = None
) -> tuple[Float64, Float64]:
    """The definition in float64: every query lists its keys and looks up its offset from each."""

    where = np.array(coordinates(np.arange(prod(pattern.shape)), pattern.shape)).T

    def pairs(piece: Piece, h: int) -> Bool:
        return visible(pattern, piece, h)

    def bias(piece: Piece, h: int) -> Float64:
        added = np.zeros((piece.q_len, piece.kv_len))
        if table is not None:
            for i, j in np.argwhere(pairs(piece, h)):
                added[i, j] = table[(h, *(where[i] - where[j] + np.array(table.shape[1:]) // 2))]
        return added

    return attend_pairs(q, k, v, pairs, bias=bias)


def channel_naive(q: Array, k: Array, v: Array, *, scale: float | None = None) -> Float64:
    """DaViT's channel attention in float64: ``softmax(scale k^T v) q^T``, transposed back. ``[B, H, S, D]``.

    The dense family with the channels of k as queries, those of v as keys and those of q as values:
    ``attention(k^T, v^T, q^T, scale=D ** -0.5)^T``.
    """
    o = np.zeros(q.shape)
    for b, h in np.ndindex(q.shape[:2]):
        z = (q.shape[3] ** -0.5 if scale is None else scale) * (k[b, h].T.astype(np.float64) @ v[b, h])
        weights = np.exp(z - z.max(axis=1, keepdims=True))
        o[b, h] = (weights / weights.sum(axis=1, keepdims=True) @ q[b, h].T).T
    return o


CASES: dict[str, GridPattern] = {
    "swin": Windows((4, 6), (2, 3), (0, 0)),
    "swin_shifted": Windows((4, 6), (2, 3), (1, 1)),
    "swin_3d": Windows((2, 3, 4), (2, 2, 2), (0, 1, 1)),
    "maxvit_grid": Grid((4, 6), (2, 3)),
    "maxvit_grid_uneven": Grid((5, 3), (2, 2)),
    "halo": Halo((4, 5), (2, 2), 1),
    "neighbourhood": Neighbourhood((5, 4), (3, 3)),
    "neighbourhood_dilated": Neighbourhood((7, 4), (3, 2), 2),
    "neighbourhood_3d": Neighbourhood((2, 3, 4), (2, 3, 3)),
    "todo": Sampled((5, 6), 2),
    "todo_3d": Sampled((2, 4, 3), 2),
}
