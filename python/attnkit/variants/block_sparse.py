"""The block-sparse family, static members: softmax attention over the pairs of a pattern known beforehand.

With ``p = i + kv_len - q_len``, where query i stands among the keys, it sees key j if::

    Strided(l)           p - l <= j <= p,  or  j <= p and (p - j) % l == 0        both, or one per head in turn
    Fixed(l, c)          j <= p and (j // l == p // l,  or  l - (n+1) c <= j % l < l - n c)     n = h % verts
    Band(w, d, g)        |p - j| <= w d and (p - j) % d == 0,  or  j < g,  or  p < g
    Layout(blocks)       blocks[b, h, i // q_block, j // kv_block]                 BigBird, Longformer, any stored map
    HeadKinds(kinds)     kinds[h] = 0: all;  -1: the first blocks and the last;  n: blocks[n - 1, i // R, j // C]
    Subset(kept, w)      kept[j],  or  |p - j| <= w                                one random subset, for all heads

Each is a mask, to be used like `attnkit.causal`: a function ``(b, h, q_idx, kv_idx)`` that composes with ``&``, ``|``
and ``~``; and it can list the keys of one query from its definition. ``causal=True`` leaves the pairs with ``j <= p``.
Rows whose pattern is empty have ``o = 0`` and ``lse = -inf``. Selections that depend on q and k are `block_select`.

`window_layout` and `bigbird_layout` make maps; `layout_from_lists`, `layout_from_rows` (block-CSR) and
`layout_from_gaps` read other libraries' forms of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from attnkit.errors import error
from attnkit.ir.mods import Mask, causal as causal_mask, load, position
from attnkit.ir.trace import build_text, trace
from attnkit.variants.sequences import Array, Float64, Lengths, Piece, sequences

Bool = NDArray[np.bool_]


class Query(NamedTuple):
    """One query: its sequence, its head and index, and the lengths of its sequence."""

    b: int
    h: int
    i: int
    q_len: int
    kv_len: int

    @property
    def p(self) -> int:
        """Where it stands among the keys; negative if before the first."""
        return self.i + self.kv_len - self.q_len


class Pattern(Mask):
    """A mask that can also list, from its definition, the keys that one query sees."""

    def keys(self, at: Query) -> Iterable[int]:
        """The keys that the query sees, in any order; some may be named twice, or lie outside the sequence."""
        raise NotImplementedError


# --- patterns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strided(Pattern):
    """The strided pattern of the Sparse Transformer: near keys, and every ``stride``-th one before.

    ``heads="union"``: every head sees both; ``"alternate"``: even heads the near keys, odd heads the others.
    """

    stride: int
    heads: str = "union"

    def __post_init__(self) -> None:
        _require_positive(stride=self.stride)
        if self.heads not in ("union", "alternate"):
            raise error("AK401", where="heads", given=repr(self.heads), allowed="'union', 'alternate'")

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        p = position(q_idx)
        near, column = kv_idx >= p - self.stride, (p - kv_idx) % self.stride == 0
        if self.heads == "alternate":
            near, column = (h % 2 == 0) & near, (h % 2 == 1) & column
        return (kv_idx <= p) & (near | column)

    def keys(self, at: Query) -> Iterable[int]:
        near = range(max(0, at.p - self.stride), at.p + 1)
        columns = range(at.p, -1, -self.stride)
        return [*near, *columns] if self.heads == "union" else near if at.h % 2 == 0 else columns


@dataclass(frozen=True)
class Fixed(Pattern):
    """The fixed pattern: the query's own stretch of ``stride`` keys, and the summary at the end of every stretch.

    A summary is ``summary`` keys wide; of ``verts`` summaries side by side, head h sees the one ``h % verts`` from the
    end of the stretch. ``stride`` must have room for all of them (else AK401).
    """

    stride: int
    summary: int
    verts: int = 1

    def __post_init__(self) -> None:
        _require_positive(stride=self.stride, summary=self.summary, verts=self.verts)
        if self.summary * self.verts > self.stride:
            given = f"{self.verts} summaries of {self.summary}"
            raise error("AK401", where="summary", given=given, allowed=f"at most {self.stride} keys in all")

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        p = position(q_idx)
        from_end = self.stride - 1 - kv_idx % self.stride
        own = kv_idx // self.stride == p // self.stride
        return (kv_idx <= p) & (own | (from_end // self.summary == h % self.verts))

    def keys(self, at: Query) -> Iterable[int]:
        own = range(at.p // self.stride * self.stride, at.p + 1)
        end = self.stride - at.h % self.verts * self.summary
        summary = range(end - self.summary, end)
        return [*own, *(j for j in range(at.p + 1) if j % self.stride in summary)]


@dataclass(frozen=True)
class Band(Pattern):
    """Longformer's: a window of ``reach`` keys to both sides, ``step`` apart; ``first`` tokens see, and are seen by, all."""

    reach: int
    step: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        _require_positive(step=self.step)

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        p = position(q_idx)
        near = ((p - kv_idx).abs() <= self.reach * self.step) & ((p - kv_idx) % self.step == 0)
        return near | (kv_idx < self.first) | (p < self.first)

    def keys(self, at: Query) -> Iterable[int]:
        if at.p < self.first:
            return range(at.kv_len)
        near = (at.p + n * self.step for n in range(-self.reach, self.reach + 1))
        return [*range(self.first), *near]


@dataclass(frozen=True, eq=False)
class Layout(Pattern):
    """A stored map of blocks: bool ``[nq, nk]``, ``[H|1, nq, nk]`` or ``[B|1, H|1, nq, nk]``."""

    blocks: Any
    q_block: int = 128
    kv_block: int = 128

    def __post_init__(self) -> None:
        _require_positive(q_block=self.q_block, kv_block=self.kv_block)

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx.context.load(
            self.blocks, (*self._of(b, h), q_idx // self.q_block, kv_idx // self.kv_block)
        )

    def _of(self, b: Any, h: Any) -> list[Any]:
        """Which map is the head's: the index before the blocks' own."""
        sizes = self.blocks.shape[:-2]
        return [0 if size == 1 else i for size, i in zip(sizes, (b, h)[2 - len(sizes) :], strict=True)]

    def keys(self, at: Query) -> Iterable[int]:
        row = np.asarray(self.blocks)[(*self._of(at.b, at.h), at.i // self.q_block)]
        return [j for n in np.flatnonzero(row) for j in range(n * self.kv_block, (n + 1) * self.kv_block)]


@dataclass(frozen=True, eq=False)
class HeadKinds(Pattern):
    """Every head of a kind of its own: ``kinds`` int32 ``[Hq]``.

    0 sees all; -1 streams: it sees the first ``sink`` blocks and the last ``local``, the query's own being the last;
    n > 0 sees ``blocks[n - 1]`` of the bool maps ``[n, nq, nk]``. Blocks are ``block`` square.
    """

    kinds: Any
    blocks: Any
    sink: int = 1
    local: int = 3
    block: int = 128

    def __post_init__(self) -> None:
        _require_positive(block=self.block)

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kind, own, of = load(self.kinds, h), position(q_idx) // self.block, kv_idx // self.block
        streams = (of < self.sink) | ((of > own - self.local) & (of <= own))
        index = ((kind - 1).clamp(min=0), q_idx // self.block, of)  # loaded by all heads, used by some
        stored = q_idx.context.load(self.blocks, index)
        return (kind == 0) | ((kind == -1) & streams) | ((kind > 0) & stored)

    def keys(self, at: Query) -> Iterable[int]:
        kind = int(self.kinds[at.h])
        if kind == 0:
            return range(at.kv_len)
        if kind > 0:
            return Layout(np.asarray(self.blocks)[kind - 1], self.block, self.block).keys(at)
        own = at.p // self.block
        last = range((own - self.local + 1) * self.block, (own + 1) * self.block)
        return [*range(self.sink * self.block), *last]


@dataclass(frozen=True, eq=False)
class Subset(Pattern):
    """Stochastic subsampling: the keys of one random subset (bool ``[Skv]``), and those within ``near``, if given.

    Draw ``kept`` anew for every step and layer with `draw_subset`; attend densely when testing. Weights are not divided
    by the share that is kept: the softmax renormalises.
    """

    kept: Any
    near: int | None = None

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kept = load(self.kept, kv_idx)
        return kept if self.near is None else kept | ((position(q_idx) - kv_idx).abs() <= self.near)

    def keys(self, at: Query) -> Iterable[int]:
        near = [] if self.near is None else range(at.p - self.near, at.p + self.near + 1)
        return [*np.flatnonzero(np.asarray(self.kept)[: at.kv_len]), *near]


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise error("AK401", where=name, given=f"{size}", allowed="at least 1")


# --- maps of blocks ---------------------------------------------------------------------------------------


def window_layout(rows: int, columns: int, reach: int, first: int = 0) -> Bool:
    """Blocks within ``reach`` of the diagonal, and the ``first`` rows and columns. bool ``[rows, columns]``."""
    row, column = np.ogrid[:rows, :columns]
    return (abs(row - column) <= reach) | (row < first) | (column < first)


def bigbird_layout(
    rows: int, columns: int, heads: int, *, reach: int, first: int, random: int, seed: int
) -> Bool:
    """BigBird's: `window_layout` and, for every head and row, ``random`` of the other blocks. bool ``[H, rows, columns]``.

    Made once and stored: training and decoding must see the same blocks.
    """
    rng = np.random.default_rng(seed)
    layout = np.repeat(window_layout(rows, columns, reach, first)[None], heads, axis=0)
    for row in layout.reshape(-1, columns):
        others = np.flatnonzero(~row)
        row[rng.choice(others, size=min(random, len(others)), replace=False)] = True
    return layout


def layout_from_lists(indices: Array, columns: int, counts: Array | None = None) -> Bool:
    """The map of lists of blocks: ints ``[..., nq, n]``, -1 for none, or ``counts [..., nq]`` of them valid."""
    layout = np.zeros((*indices.shape[:-1], columns), bool)
    for at in np.ndindex(indices.shape[:-1]):
        listed = indices[at] if counts is None else indices[at][: counts[at]]
        layout[at][listed[listed >= 0]] = True
    return layout


def layout_from_rows(indptr: Sequence[int], indices: Array, columns: int) -> Bool:
    """The map of block-CSR: row r has the blocks ``indices[indptr[r] : indptr[r + 1]]``. bool ``[nq, columns]``."""
    layout = np.zeros((len(indptr) - 1, columns), bool)
    for row in range(len(layout)):
        layout[row, indices[indptr[row] : indptr[row + 1]]] = True
    return layout


def layout_from_gaps(gaps: Array, counts: Array, columns: int) -> Bool:
    """The map of SpargeAttn's tables: the distance of each block from the one before, ``counts`` of them valid."""
    return layout_from_lists(np.cumsum(gaps, axis=-1), columns, counts)


def draw_subset(kv_len: int, keep: int, seed: int) -> Bool:
    """``keep`` of the keys, drawn without replacement. bool ``[Skv]``."""
    kept = np.zeros(kv_len, bool)
    kept[np.random.default_rng(seed).permutation(kv_len)[:keep]] = True
    return kept


# --- as programs and as equations -------------------------------------------------------------------------


def program(
    pattern: Pattern, *, causal: bool = False, scale: float | None = None, **lengths: Unpack[Lengths]
) -> tuple[str, list[Any]]:
    """Inputs q, k, v; results o, lse. The text, not canonical, and the arrays that its buffers are."""
    traced = trace(None, pattern & causal_mask() if causal else pattern)
    return build_text(traced, scale=scale, **lengths), traced.buffers


def naive(
    q: Array, k: Array, v: Array, pattern: Pattern, *, causal: bool = False, scale: float | None = None,
    **lengths: Unpack[Lengths],
) -> tuple[Float64, Float64]:  # fmt: skip
    """The equation in float64: every query gathers the keys that its pattern lists. See `attend_pairs`."""
    return attend_pairs(q, k, v, lambda piece, h: visible(pattern, piece, h, causal), scale=scale, **lengths)


def visible(pattern: Pattern, piece: Piece, h: int, causal: bool = False) -> Bool:
    """The pairs of one head of one sequence, ``[q_len, kv_len]``."""
    seen = np.zeros((piece.q_len, piece.kv_len), bool)
    for i in range(piece.q_len):
        at = Query(piece.b, h, i, piece.q_len, piece.kv_len)
        for j in pattern.keys(at):
            if 0 <= j < piece.kv_len and (j <= at.p or not causal):
                seen[i, j] = True
    return seen


def attend_pairs(
    q: Array, k: Array, v: Array, pairs: Callable[[Piece, int], Bool], *, scale: float | None = None,
    bias: Callable[[Piece, int], Array] | None = None, **lengths: Unpack[Lengths],
) -> tuple[Float64, Float64]:  # fmt: skip
    """Softmax attention in float64 over the pairs ``[q_len, kv_len]`` that a function names for each head.

    ``q [B, Hq, Sq, D]``, ``k [B, Hkv, Skv, D]``, ``v [B, Hkv, Skv, Dv]``; ``bias`` is added to the scaled logits.
    Returns ``o [B, Hq, Sq, Dv]`` and ``lse [B, Hq, Sq]``.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for piece in sequences(q, k, **lengths):
        for h in range(q.shape[1]):
            seen, head = pairs(piece, h), (piece.batch, h // (q.shape[1] // k.shape[1]))
            added = np.zeros(seen.shape) if bias is None else bias(piece, h)
            for i in range(piece.q_len):
                at, j = (piece.batch, h, piece.rows.start + i), np.flatnonzero(seen[i])
                j = j[added[i, j] > -np.inf]
                if len(j):
                    z = scale * (k[head][piece.keys][j] @ q[at]) + added[i, j]
                    lse[at] = z.max() + np.log(np.exp(z - z.max()).sum())
                    o[at] = np.exp(z - lse[at]) @ v[head][piece.keys][j]
    return o, lse


# Named members: name -> pattern for (num_heads, q_len, kv_len).
CASES: dict[str, Callable[[int, int, int], Pattern]] = {
    "strided": lambda h, m, n: Strided(4),
    "strided_alternate": lambda h, m, n: Strided(3, "alternate"),
    "fixed": lambda h, m, n: Fixed(4, 1),
    "fixed_verts": lambda h, m, n: Fixed(6, 2, 2),
    "longformer": lambda h, m, n: Band(2, 1, 1),
    "dilated": lambda h, m, n: Band(2, 3),
    "bigbird": lambda h, m, n: Layout(
        bigbird_layout(-(-m // 4), -(-n // 3), h, reach=0, first=1, random=1, seed=0), 4, 3
    ),
    "head_kinds": lambda h, m, n: HeadKinds(
        np.arange(h, dtype=np.int32) % 4 - 1,
        np.stack([window_layout(-(-m // 2), -(-n // 2), 1), window_layout(-(-m // 2), -(-n // 2), 0, 1)]), 1, 2, 2,
    ),
    "subsampled": lambda h, m, n: Subset(draw_subset(n, n // 3, 0)),
    "subsampled_near": lambda h, m, n: Subset(draw_subset(n, n // 3, 1), 1),
}  # fmt: skip
