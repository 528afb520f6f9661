"""Static block-sparse patterns: the sets by hand, limits, stored layouts of every form, and the programs."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.errors import AttnkitError
from attnkit.ir.mods import Mask, causal
from attnkit.ir.text import parse
from attnkit.ir.trace import build_text, trace
from attnkit.testing.gradients import agree, differences
from attnkit.variants import block_sparse as bs, dense

pytestmark = pytest.mark.shows
Array = Any
# (batch, Hq, Hkv, Sq, Skv): grouped heads, fewer and more queries than keys, nothing at all
SHAPES = [(2, 4, 2, 11, 11), (1, 4, 1, 5, 9), (1, 2, 2, 9, 5), (1, 4, 4, 0, 3), (1, 4, 4, 3, 0)]


def tensors(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    batch, heads, kv_heads, q_len, kv_len = shape
    kv = (batch, kv_heads, kv_len)
    return (
        rng.standard_normal((batch, heads, q_len, 4)),
        rng.standard_normal((*kv, 4)),
        rng.standard_normal((*kv, 3)),
    )


def reference(q: Array, k: Array, v: Array, pattern: bs.Pattern, **parameters: Any) -> list[Array]:
    text, buffers = bs.program(pattern, **parameters)
    return run(parse(text), [q, k, v], buffers)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        agree(one, other, tolerance)


def seen(pattern: bs.Pattern, n: int, head: int = 0, causal: bool = False) -> list[set[int]]:
    """What each of n queries sees of n keys: by the program, which the definition must agree with."""
    text, buffers = bs.program(pattern, causal=causal)
    heads = 4
    q, k = np.zeros((1, heads, n, 1)), np.zeros((1, 1, n, 1))
    o = run(parse(text), [q, k, np.eye(n)[None, None]], buffers)[0]
    sets = [set(np.flatnonzero(row)) for row in o[0, head]]
    piece = next(bs.sequences(q, k))
    assert sets == [set(np.flatnonzero(row)) for row in bs.visible(pattern, piece, head, causal)]
    return sets


# --- by hand ----------------------------------------------------------------------------------------------


def test_the_worked_sets() -> None:
    assert seen(bs.Fixed(2, 1), 4) == [{0}, {0, 1}, {1, 2}, {1, 2, 3}]
    assert seen(bs.Strided(2), 4) == [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}]


def test_more_sets_by_hand() -> None:
    assert seen(bs.Strided(2, "alternate"), 5, 0) == [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3, 4}]
    assert seen(bs.Strided(2, "alternate"), 5, 1) == [{0}, {1}, {0, 2}, {1, 3}, {0, 2, 4}]
    # stretches of 4, summaries of 1: the last key of a stretch for even heads, the last but one for odd
    assert seen(bs.Fixed(4, 1, 2), 6, 2)[5] == {3, 4, 5}
    assert seen(bs.Fixed(4, 1, 2), 6, 1)[5] == {2, 4, 5}
    assert seen(bs.Band(1, 2), 6)[3] == {1, 3, 5}
    assert seen(bs.Band(1, 2), 6, causal=True)[3] == {1, 3}
    assert seen(bs.Band(1, 1, 1), 5) == [{0, 1, 2, 3, 4}, {0, 1, 2}, {0, 1, 2, 3}, {0, 2, 3, 4}, {0, 3, 4}]
    assert seen(bs.Subset(np.array([1, 0, 0, 1, 0], bool), 0), 5)[2] == {0, 2, 3}


def test_heads_of_each_kind() -> None:
    kinds = bs.HeadKinds(
        np.array([0, -1, 1, 2], np.int32), np.stack([np.eye(4, dtype=bool), np.ones((4, 4), bool)]), 1, 2, 2
    )
    assert seen(kinds, 8, 0)[5] == set(range(8))
    assert seen(kinds, 8, 1)[5] == {0, 1, 2, 3, 4, 5}
    assert seen(kinds, 8, 1)[7] == {0, 1, 4, 5, 6, 7}
    assert seen(kinds, 8, 2)[5] == {4, 5}
    assert seen(kinds, 8, 2, causal=True)[4] == {4}
    assert seen(kinds, 8, 3, causal=True)[4] == set(range(5))


def test_a_streaming_head_is_sinks_and_a_window_of_blocks(rng: np.random.Generator) -> None:
    """With blocks of 1: the first n keys, and the last w."""
    q, k, v = tensors(rng, (1, 2, 2, 4, 9))
    streaming = bs.HeadKinds(np.array([-1, -1], np.int32), np.zeros((1, 4, 9), bool), 2, 3, 1)
    mask = Mask(lambda b, h, i, j: j < 2) | Mask(lambda b, h, i, j: j > bs.position(i) - 3)
    traced = trace(None, mask & causal())
    expected = run(parse(build_text(traced)), [q, k, v], traced.buffers)
    close(reference(q, k, v, streaming, causal=True), expected)


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [bs.Strided(1), bs.Strided(20), bs.Fixed(20, 1), bs.Fixed(1, 1)], ids=repr
)
def test_limits_are_dense_causal(pattern: bs.Pattern, rng: np.random.Generator) -> None:
    for shape in SHAPES[:3]:
        q, k, v = tensors(rng, shape)
        expected = dense.naive(q, k, v, causal=True)
        close(bs.naive(q, k, v, pattern), expected)
        close(reference(q, k, v, pattern), expected)


def test_a_full_layout_is_dense_bit_for_bit(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, SHAPES[0])
    text, _ = dense.program()
    expected = run(parse(text), [q, k, v])
    for full in (bs.Layout(np.ones((3, 3), bool), 4, 5), bs.Subset(np.ones(11, bool)), bs.Band(11)):
        for found, want in zip(reference(q, k, v, full), expected, strict=True):
            np.testing.assert_array_equal(found, want)


def test_a_causal_list_of_blocks_is_causal(rng: np.random.Generator) -> None:
    """Blocks below and on the diagonal, with and without the element's own test, o and all gradients."""
    q, k, v = tensors(rng, (1, 2, 1, 11, 11))
    layout = bs.Layout(np.tril(np.ones((3, 3), bool)), 4, 4)
    (text, buffers), (plain, _) = bs.program(layout, causal=True), dense.program(causal=True)
    cotangents = [rng.standard_normal((1, 2, 11, 3)), rng.standard_normal((1, 2, 11))]
    found = gradients(parse(text), [q, k, v], cotangents, buffers).inputs
    expected = gradients(parse(plain), [q, k, v], cotangents).inputs
    for one, other in [*zip(found, expected, strict=True), *zip(run(parse(text), [q, k, v], buffers), run(parse(plain), [q, k, v]), strict=True)]:  # fmt: skip
        np.testing.assert_array_equal(one, other)


def test_rows_without_blocks(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, (1, 2, 2, 6, 6))
    blocks = np.array([[True, False], [False, False], [False, True]])
    layout = bs.Layout(blocks, 2, 3)
    for o, lse in (reference(q, k, v, layout), bs.naive(q, k, v, layout)):
        assert (o[:, :, 2:4] == 0).all()
        assert (lse[:, :, 2:4] == -np.inf).all()
        assert np.isfinite(lse[:, :, [0, 1, 4, 5]]).all()
    text, buffers = bs.program(layout)
    cotangents = [np.ones((1, 2, 6, 3)), np.ones((1, 2, 6))]
    d_q, d_k, d_v = gradients(parse(text), [q, k, v], cotangents, buffers).inputs
    assert (d_q[:, :, 2:4] == 0).all()
    assert np.isfinite(d_k).all()
    assert np.isfinite(d_v).all()


def test_what_no_block_names_reaches_nothing(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, (1, 2, 2, 6, 6))
    layout = bs.Layout(np.array([[True, False], [True, True]]), 3, 3)
    expected = reference(q, k, v, layout)
    k[:, :, 4], v[:, :, 5] = np.nan, np.inf
    found = reference(q, k, v, layout)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[:, :, :3], other[:, :, :3])
    assert np.isnan(found[0][:, :, 3:]).all()


# --- layouts ----------------------------------------------------------------------------------------------


def test_layouts_of_every_form(rng: np.random.Generator) -> None:
    layout = rng.random((4, 6)) < 0.5
    layout[2] = False
    rows = [rng.permutation(np.flatnonzero(row)) for row in layout]  # the order of a list means nothing
    counts = np.array([len(row) for row in rows])
    padded = np.full((4, 8), -1)
    for row, listed in zip(padded, rows, strict=True):
        row[: len(listed)] = listed
        row[6 : 6 + min(2, len(listed))] = listed[:2]  # nor do duplicates
    indptr = np.concatenate([[0], np.cumsum(counts)])
    ordered = np.array(
        [
            np.pad(np.sort(row), (0, 6 - len(row)), mode="edge") if len(row) else np.zeros(6, int)
            for row in rows
        ]
    )
    gaps = np.diff(ordered, axis=1, prepend=0)
    for found in (
        bs.layout_from_lists(padded, 6),
        bs.layout_from_lists(ordered, 6, counts),
        bs.layout_from_rows(indptr, np.concatenate(rows), 6),
        bs.layout_from_gaps(gaps, counts, 6),
    ):
        np.testing.assert_array_equal(found, layout)
    batched = bs.layout_from_lists(np.stack([[padded, padded[::-1]]]), 6)
    np.testing.assert_array_equal(batched, [[layout, layout[::-1]]])


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_random_layout_is_masked_dense(rank: int, rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, (2, 4, 2, 11, 9))
    blocks = rng.random((2, 4, 4, 2)[4 - rank :]) < 0.6
    for layout in (blocks, blocks[:, :1] if rank == 4 else blocks[:1] if rank == 3 else blocks):
        whole = np.repeat(np.repeat(np.broadcast_to(layout, (2, 4, 4, 2)), 3, axis=2), 5, axis=3)[
            :, :, :11, :9
        ]
        z = np.where(whole, 0.5 * q @ np.repeat(k, 2, axis=1).swapaxes(2, 3), -np.inf)
        lse = np.logaddexp.reduce(z, axis=3)
        p = np.exp(z - np.where(lse == -np.inf, 0, lse)[..., None])
        close(reference(q, k, v, bs.Layout(layout, 3, 5)), (p @ np.repeat(v, 2, axis=1), lse))


def test_random_blocks_are_stored() -> None:
    layout = bs.bigbird_layout(8, 9, 3, reach=1, first=1, random=2, seed=3)
    window = bs.window_layout(8, 9, 1, 1)
    np.testing.assert_array_equal(layout, bs.bigbird_layout(8, 9, 3, reach=1, first=1, random=2, seed=3))
    assert (layout & window == window).all()
    assert ((layout & ~window).sum(axis=2) == np.minimum(2, (~window).sum(axis=1))).all()
    assert (layout[0] != layout[1]).any()  # every head has its own
    assert (bs.draw_subset(10, 4, 1) == bs.draw_subset(10, 4, 1)).all()
    assert bs.draw_subset(10, 4, 1).sum() == 4
    assert bs.draw_subset(3, 4, 1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: bs.Strided(0),
        lambda: bs.Strided(2, "both"),
        lambda: bs.Fixed(4, 2, 3),
        lambda: bs.Layout([[True]], 0),
    ],
)
def test_refuses(make: Any) -> None:
    with pytest.raises(AttnkitError) as caught:
        make()
    assert caught.value.code == "AK401"


# --- the programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", bs.CASES)
def test_program_is_the_equation(name: str, causal: bool, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        q, k, v = tensors(rng, shape)
        pattern = bs.CASES[name](shape[1], max(shape[3], 1), max(shape[4], 1))
        close(reference(q, k, v, pattern, causal=causal), bs.naive(q, k, v, pattern, causal=causal))


@pytest.mark.parametrize("name", bs.CASES)
def test_packed_and_padded(name: str, rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, (1, 4, 2, 11, 11))
    pattern = bs.CASES[name](4, 11, 11)
    packed = {
        "cu_seqlens_q": np.array([0, 4, 4, 9], np.int32),
        "cu_seqlens_kv": np.array([0, 6, 8, 11], np.int32),
    }
    close(reference(q, k, v, pattern, **packed), bs.naive(q, k, v, pattern, **packed))
    q, k, v = tensors(rng, (3, 4, 2, 5, 11))
    padded = {"kv_lens": np.array([11, 0, 6], np.int32)}
    close(
        reference(q, k, v, pattern, causal=True, **padded), bs.naive(q, k, v, pattern, causal=True, **padded)
    )


@pytest.mark.parametrize(
    "name", ["strided", "strided_alternate", "fixed", "fixed_verts", "dilated", "subsampled_near"]
)
def test_a_step_is_a_row_of_the_whole(name: str, rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, (1, 4, 2, 9, 9))
    pattern = bs.CASES[name](4, 9, 9)
    o, lse = reference(q, k, v, pattern, causal=True)
    for t in range(9):
        step = reference(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], pattern, causal=True)
        close(step, (o[:, :, t : t + 1], lse[:, :, t : t + 1]))


@pytest.mark.parametrize("name", bs.CASES)
def test_two_stretches_of_keys_merge(name: str, rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, (1, 4, 2, 9, 9))
    pattern = bs.CASES[name](4, 9, 9)
    parts = []
    for half in (Mask(lambda b, h, i, j: j < 4), Mask(lambda b, h, i, j: j >= 4)):
        traced = trace(None, pattern & half)
        parts.append(run(parse(build_text(traced)), [q, k, v], traced.buffers))
    lse = np.logaddexp(parts[0][1], parts[1][1])
    pivot = np.where(lse == -np.inf, 0, lse)
    o = sum(np.exp(part[1] - pivot)[..., None] * part[0] for part in parts)
    close((o, lse), reference(q, k, v, pattern))


@pytest.mark.parametrize("name", bs.CASES)
def test_gradients(name: str, rng: np.random.Generator) -> None:
    inputs = list(tensors(rng, (1, 2, 1, 4, 6)))
    pattern = bs.CASES[name](2, 4, 6)
    cotangents = [rng.standard_normal((1, 2, 4, 3)), rng.standard_normal((1, 2, 4))]

    text, buffers = bs.program(pattern, causal=True)
    found = gradients(parse(text), inputs, cotangents, buffers).inputs
    close(found, differences(lambda *x: bs.naive(*x, pattern, causal=True), inputs, cotangents), 1e-6)
