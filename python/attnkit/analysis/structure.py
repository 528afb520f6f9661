"""The block structure of a mask as data: for each row of blocks the runs that are not empty.

A run is a stretch of neighbouring blocks of one kind. Masks that people write have a few runs a row however long
the sequences are, so this is small where a map of all blocks is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

EMPTY, PARTIAL, FULL = range(3)
KINDS = ("empty", "partial", "full")
MARKS = ".+#"  # how they are drawn

Map = npt.NDArray[np.uint8]


class BlockCounts(NamedTuple):
    """How many blocks of each kind; they sum to the number of blocks."""

    empty: int
    full: int
    partial: int


class Sizes(NamedTuple):
    """What a block structure is of: ``batch`` x ``heads`` masks of ``q_len`` x ``kv_len`` pairs, and its blocks.

    Blocks are ``q_block`` x ``kv_block`` pairs, the last ones cut at the lengths. A batch or head count of 1
    stands for any number of equal ones.
    """

    batch: int
    heads: int
    q_len: int
    kv_len: int
    q_block: int
    kv_block: int

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.q_len // self.q_block)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.kv_block)


@dataclass(frozen=True, eq=False)
class Structure:
    """The blocks that are not empty, as runs.

    Row r (batch-major, then head, then block of queries) has the runs ``runs[offsets[r]:offsets[r + 1]]``: int32
    ``[n, 3]``, each (first kv block, end kv block, kind), in order, PARTIAL or FULL; what lies between is EMPTY.
    """

    sizes: Sizes
    offsets: npt.NDArray[np.int64]
    runs: npt.NDArray[np.int32]

    @cached_property
    def counts(self) -> BlockCounts:
        """How many blocks of each kind, over all batch entries and heads held."""
        lengths = (self.runs[:, 1] - self.runs[:, 0]).astype(np.int64)
        full, held = int(lengths[self.runs[:, 2] == FULL].sum()), int(lengths.sum())
        return BlockCounts((len(self.offsets) - 1) * self.sizes.columns - held, full, held - full)

    @property
    def by_kind(self) -> dict[str, int]:
        """The counts by the names of `KINDS`."""
        return {kind: getattr(self.counts, kind) for kind in KINDS}

    @property
    def of_heads(self) -> str:
        """Which heads the counts are of, in words."""
        batch, heads = self.sizes[:2]
        if batch == heads == 1:
            return "of every head"
        return f"of {batch} x {heads} heads together" if batch > 1 else f"of {heads} heads together"

    @property
    def pairs(self) -> int:
        """The pairs in blocks that are not empty, those cut at the lengths counted as they are."""
        q_len, kv_len, q_block, kv_block = self.sizes[2:]
        row = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets)) % self.sizes.rows
        heights = np.minimum((row + 1) * q_block, q_len) - row * q_block
        first, end = self.runs[:, :2].T.astype(np.int64) * kv_block
        return int(heights @ (np.minimum(end, kv_len) - first))

    @property
    def density(self) -> float:
        """The share of blocks that are not empty; 0 where there are none."""
        total = sum(self.counts)
        return 1 - self.counts.empty / total if total else 0.0

    def rows(self, b: int = 0, h: int = 0) -> list[list[list[int]]]:
        """The runs of one head, row by row."""
        first = (b * self.sizes.heads + h) * self.sizes.rows
        ends = self.offsets[first : first + self.sizes.rows + 1]
        return [self.runs[i:j].tolist() for i, j in pairwise(ends)]

    def to_dense(self) -> Map:
        """The kind of every block: uint8 ``[batch, heads, rows, columns]``."""
        sizes = self.sizes
        kinds = np.zeros((len(self.offsets) - 1, sizes.columns + 1), np.int8)
        row = np.repeat(np.arange(len(kinds)), np.diff(self.offsets))
        first, end, kind = self.runs.T
        np.add.at(kinds, (row, first), kind.astype(np.int8))  # each run as its two edges
        np.subtract.at(kinds, (row, end), kind.astype(np.int8))
        dense = np.cumsum(kinds, axis=1, dtype=np.int8)[:, :-1].astype(np.uint8)
        return dense.reshape(sizes.batch, sizes.heads, sizes.rows, sizes.columns)

    @classmethod
    def from_dense(cls, kinds: Map, sizes: Sizes) -> Structure:
        """The structure with these kinds, uint8 ``[batch, heads, rows, columns]``."""
        flat = kinds.reshape(-1, sizes.columns)
        edged = np.pad(flat, ((0, 0), (1, 1)))
        change = edged[:, 1:] != edged[:, :-1]  # a run starts, or ends, at column j
        row, first = np.nonzero(change[:, :-1] & (flat != EMPTY))
        _, end = np.nonzero(change[:, 1:] & (flat != EMPTY))
        runs = np.stack([first, end + 1, flat[row, first]], axis=1).astype(np.int32)
        offsets = np.zeros(len(flat) + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=len(flat)), out=offsets[1:])
        return cls(sizes, offsets, runs)

    def coarse(self, b: int, h: int, max_rows: int, max_columns: int) -> Map:
        """A smaller map of one head: cells of several blocks, PARTIAL where they differ."""
        rows, columns = self.sizes.rows, self.sizes.columns
        tall, wide = -(-rows // max_rows), -(-columns // max_columns)
        cells: list[Any] = []
        starts = np.arange(0, columns, wide)
        base = (b * self.sizes.heads + h) * rows
        for top in range(0, rows, tall):
            bottom = min(top + tall, rows)
            runs = self.runs[self.offsets[base + top] : self.offsets[base + bottom]]
            edges = np.zeros((2, columns + 1), np.int64)
            for index, of_kind in enumerate((runs, runs[runs[:, 2] == FULL])):
                np.add.at(edges[index], of_kind[:, 0], 1)
                np.subtract.at(edges[index], of_kind[:, 1], 1)
            held = np.add.reduceat(np.cumsum(edges, axis=1)[:, :-1], starts, axis=1)
            area = (bottom - top) * (np.minimum(starts + wide, columns) - starts)
            cells.append(np.where(held[1] == area, FULL, np.where(held[0] > 0, PARTIAL, EMPTY)))
        return np.array(cells, np.uint8)

    def draw(self, b: int = 0, h: int = 0, max_rows: int = 32, max_columns: int = 64) -> str:
        """A map of one head in `MARKS`, cells standing for several blocks where there are many."""
        return "\n".join("".join(MARKS[k] for k in row) for row in self.coarse(b, h, max_rows, max_columns))
