"""Runs of blocks as data: every form says the same."""

import itertools
from typing import Any

import numpy as np
from hypothesis import given, strategies as st

from attnkit.analysis.structure import EMPTY, FULL, KINDS, MARKS, PARTIAL, BlockCounts, Sizes, Structure


@st.composite
def maps(draw: st.DrawFn) -> Any:
    """Kinds of blocks in stretches, and sizes that they fit."""
    batch, heads, rows, columns = (draw(st.integers(1, n)) for n in (2, 3, 9, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    kinds = rng.integers(0, 3, (batch, heads, rows, columns), dtype=np.uint8)
    keep = rng.random(kinds.shape) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    kinds = np.where(keep, kinds, kinds[..., :1])
    q_block, kv_block = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    q_len = draw(st.integers((rows - 1) * q_block + 1, rows * q_block))
    kv_len = draw(st.integers((columns - 1) * kv_block + 1, columns * kv_block))
    return kinds, Sizes(batch, heads, q_len, kv_len, q_block, kv_block)


@given(maps())
def test_runs_and_maps_say_the_same(drawn: Any) -> None:
    kinds, sizes = drawn
    found = Structure.from_dense(kinds, sizes)
    assert (sizes.rows, sizes.columns) == kinds.shape[2:]
    np.testing.assert_array_equal(found.to_dense(), kinds)
    assert found.counts == BlockCounts(*(int((kinds == kind).sum()) for kind in (EMPTY, FULL, PARTIAL)))
    assert list(found.by_kind) == list(KINDS)
    assert np.isclose(found.density, (kinds != EMPTY).mean())
    for b, h in np.ndindex(kinds.shape[:2]):
        for row, runs in zip(kinds[b, h], found.rows(b, h), strict=True):
            for (_, end, kind), (first, _, following) in itertools.pairwise(runs):
                assert end < first or (end == first and kind != following)  # as few runs as there can be
            assert sum(end - first for first, end, _ in runs) == (row != EMPTY).sum()


@given(maps())
def test_pairs_are_those_of_blocks_that_are_not_empty(drawn: Any) -> None:
    kinds, sizes = drawn
    cells = np.kron(kinds != EMPTY, np.ones((sizes.q_block, sizes.kv_block), bool))
    assert Structure.from_dense(kinds, sizes).pairs == cells[..., : sizes.q_len, : sizes.kv_len].sum()


@given(maps(), st.integers(1, 6), st.integers(1, 12))
def test_small_maps_sum_up_large_ones(drawn: Any, max_rows: int, max_columns: int) -> None:
    kinds, sizes = drawn
    b, h = sizes.batch - 1, sizes.heads - 1
    found = Structure.from_dense(kinds, sizes)
    small = found.coarse(b, h, max_rows, max_columns)
    assert small.shape[0] <= max_rows
    assert small.shape[1] <= max_columns
    tall, wide = -(-sizes.rows // max_rows), -(-sizes.columns // max_columns)
    for (i, j), kind in np.ndenumerate(small):
        part = kinds[b, h, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
        assert kind == (part[0, 0] if (part == part[0, 0]).all() else PARTIAL)
    drawing = found.draw(b, h, max_rows, max_columns).splitlines()
    assert drawing == ["".join(MARKS[kind] for kind in row) for row in small]
