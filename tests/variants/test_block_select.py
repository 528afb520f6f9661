"""MoBA, NSA and Sparsifiner: choices by hand, limits, causality, and the programs."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing.gradients import agree, differences
from attnkit.variants import block_select as bsel, dense

pytestmark = pytest.mark.shows
Array = Any
SHAPES = [(2, 4, 2, 11), (1, 4, 1, 8), (1, 2, 2, 1), (1, 4, 2, 0)]  # (batch, Hq, Hkv, S)


def tensors(rng: np.random.Generator, shape: tuple[int, ...], q_len: int | None = None) -> list[Array]:
    batch, heads, kv_heads, length = shape
    kv = (batch, kv_heads, length)
    return [
        rng.standard_normal((batch, heads, length if q_len is None else q_len, 4)),
        rng.standard_normal((*kv, 4)),
        rng.standard_normal((*kv, 3)),
    ]


def more(
    name: str, rng: np.random.Generator, shape: tuple[int, ...], q_len: int | None = None
) -> list[Array]:
    """The inputs of a member after q, k, v."""
    batch, heads, kv_heads, length = shape
    if name.startswith("nsa"):
        return [rng.random((batch, heads, length if q_len is None else q_len)) for _ in range(3)]
    if name.startswith("sparsifiner"):
        return [
            rng.standard_normal((batch, heads, length if q_len is None else q_len, 2)),
            rng.standard_normal((batch, kv_heads, length, 2)),
        ]
    return []


def reference(name: str, inputs: list[Array], **parameters: Any) -> list[Array]:
    program, _, given = bsel.CASES[name]
    text, buffers = program(**given | parameters)
    return run(parse(text), inputs, buffers)


def naive(name: str, inputs: list[Array], **parameters: Any) -> list[Array]:
    _, function, given = bsel.CASES[name]
    results = function(*inputs, **given | parameters)
    return list(results) if isinstance(results, tuple) else [results]


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        agree(one, other, tolerance)


def both(name: str, inputs: list[Array], expected: Any, **parameters: Any) -> None:
    close(naive(name, inputs, **parameters), expected)
    close(reference(name, inputs, **parameters), expected)


def column(*values: float) -> Array:
    return np.array(values, np.float64)[None, None, :, None]


# --- by hand ----------------------------------------------------------------------------------------------


def test_best_breaks_ties_by_index() -> None:
    assert bsel.best([1, 3, 3, 2], 2) == [1, 2]
    assert bsel.best([1, 1, 1], 2) == [0, 1]
    assert bsel.best([1], 5) == [0]
    assert bsel.best([1, 2], 0) == []


def test_moba_by_hand() -> None:
    """Blocks {0,1}, {2,3}, {4,5} of mean key 1, 5, ..: query 5 of +1 takes block 1, of -1 block 0, and its own."""
    k, v = column(1, 1, 5, 5, 0, 0), np.eye(6)[None, None]
    for sign, seen in ((1, [2, 3, 4, 5]), (-1, [0, 1, 4, 5])):
        q = column(*[sign] * 6)
        for results in (naive("moba", [q, k, v], block=2), reference("moba", [q, k, v], block=2)):
            assert list(np.flatnonzero(results[0][0, 0, 5])) == seen
            assert list(np.flatnonzero(results[0][0, 0, 2])) == [0, 1, 2]  # one block before: no choice
            assert list(np.flatnonzero(results[0][0, 0, 1])) == [0, 1]


def test_moba_ties_go_to_the_first_block() -> None:
    q, k, v = column(*[1] * 6), column(*[2] * 6), np.eye(6)[None, None]
    for results in (naive("moba", [q, k, v], block=2), reference("moba", [q, k, v], block=2)):
        assert list(np.flatnonzero(results[0][0, 0, 5])) == [0, 1, 4, 5]


def test_nsa_branches_by_hand() -> None:
    """One key a block: compressed is what ended, selected is chosen and forced, sliding is a window."""
    q, k, v = column(*[1] * 6), column(0, 3, 9, 2, 1, 0), np.eye(6)[None, None]
    none, one = np.zeros((1, 1, 6)), np.ones((1, 1, 6))
    for gates, seen in (
        ((one, none, none), [0, 1, 2, 3, 4, 5]),
        ((none, one, none), [0, 2, 4, 5]),
        ((none, none, one), [4, 5]),
    ):
        parameters = {"block": 1, "top_k": 1, "left": 1}
        for (o,) in (
            naive("nsa", [q, k, v, *gates], **parameters),
            reference("nsa", [q, k, v, *gates], **parameters),
        ):
            assert list(np.flatnonzero(o[0, 0, 5])) == seen


def test_sparsifiner_by_hand() -> None:
    low, up = column(1, -1), column(3, 1, 2)
    q, k, v = column(0, 0), column(0, 0, 0), np.eye(3)[None, None]
    inputs = [q, k, v, low, up]
    third, half = np.log(3), np.log(2)
    both("sparsifiner", inputs, [[[[[0.5, 0, 0.5], [0, 0.5, 0.5]]]], [[[half, half]]]], top_k=2)
    both(
        "sparsifiner_threshold", inputs, [[[[[0.5, 0, 0.5], [0, 0, 0]]]], [[[half, -np.inf]]]], threshold=1.5
    )
    both("sparsifiner", inputs, [[[[[1 / 3] * 3] * 2]], [[[third] * 2]]], top_k=7)


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_moba_limits(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    inputs = tensors(rng, shape)
    for parameters in ({"block": 3, "top_k": 5}, {"block": 1, "top_k": 20}, {"block": 20, "top_k": 1}):
        both("moba", inputs, dense.naive(*inputs, causal=True), **parameters)
    # top_k = 1 is the own block, not all of them
    blocks = np.arange(shape[3]) // 3
    both("moba", inputs, dense.naive(*inputs, causal=True, document=(blocks, blocks)), block=3, top_k=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_nsa_limits(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    inputs = tensors(rng, shape)
    none, one = np.zeros(inputs[0].shape[:3]), np.ones(inputs[0].shape[:3])
    causal = dense.naive(*inputs, causal=True)[0]
    window = dense.naive(*inputs, causal=True, window=(2, 0))[0]
    every = {"block": 2, "top_k": 6, "left": 2}
    both("nsa", [*inputs, none, one, none], [causal], **every)
    both("nsa", [*inputs, none, none, one], [window], **every)
    both("nsa", [*inputs, none, 2 * one, 3 * one], [2 * causal + 3 * window], **every)
    both("nsa", [*inputs, one, none, none], [causal], block=1, top_k=1, left=0)  # a block is a key
    both("nsa", [*inputs, one, none, none], [0 * causal], block=20, top_k=1, left=0)  # none has ended


def test_grouped_heads_choose_together(rng: np.random.Generator) -> None:
    """NSA: a head alone would choose other blocks than its group does; MoBA: every head for itself."""
    inputs = tensors(rng, (1, 4, 1, 12))
    inputs[0] *= 4
    gates = [np.zeros((1, 4, 12)), np.ones((1, 4, 12)), np.zeros((1, 4, 12))]
    together = reference("nsa", [*inputs, *gates])[0]
    alone = [
        reference("nsa", [x[:, h : h + 1] if x.shape[1] == 4 else x for x in (*inputs, *gates)])[0]
        for h in range(4)
    ]
    assert not np.allclose(np.concatenate(alone, axis=1), together)
    together = reference("moba", inputs)[0]
    alone = [reference("moba", [inputs[0][:, h : h + 1], *inputs[1:]])[0] for h in range(4)]
    np.testing.assert_allclose(np.concatenate(alone, axis=1), together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["moba", "moba_local", "nsa", "sparsifiner_causal"])
def test_nothing_sees_what_comes_later(name: str, rng: np.random.Generator) -> None:
    shape = (1, 2, 1, 11)
    inputs = tensors(rng, shape) + more(name, rng, shape)
    expected = reference(name, inputs)
    for t in (3, 7):
        changed = [x.copy() for x in inputs]
        for x in (changed[1], changed[2], *([changed[4]] if name.startswith("sparsifiner") else [])):
            x[:, :, t:] = np.nan
        for found, want in zip(reference(name, changed), expected, strict=True):
            np.testing.assert_array_equal(found[:, :, :t], want[:, :, :t])


def test_a_gate_that_is_no_number_ranks_last(rng: np.random.Generator) -> None:
    """A key of NaN spoils its block's gate, not the choice among the others."""
    q, k, v = tensors(rng, (1, 2, 1, 12))
    k[:, :, 4] = np.nan
    o, _ = reference("moba", [q, k, v])
    assert np.isnan(o[:, :, 4:6]).all()  # they see the key: blocks are {0, 1, 2}, {3, 4, 5}, ..
    assert np.isfinite(o[:, :, [*range(4), *range(6, 12)]]).all()  # {0, 1, 2} is there to be chosen instead


# --- the programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", bsel.CASES)
def test_program_is_the_equation(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    inputs = tensors(rng, shape) + more(name, rng, shape)
    close(reference(name, inputs), naive(name, inputs))
    close(reference(name, inputs, scale=0.3), naive(name, inputs, scale=0.3))


@pytest.mark.parametrize("name", bsel.CASES)
def test_packed(name: str, rng: np.random.Generator) -> None:
    shape = (1, 4, 2, 11)
    inputs = tensors(rng, shape) + more(name, rng, shape)
    ends = np.array([0, 5, 5, 11], np.int32)
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}
    close(reference(name, inputs, **lengths), naive(name, inputs, **lengths))


@pytest.mark.parametrize("name", ["moba", "moba_local", "nsa", "sparsifiner_causal"])
def test_a_step_is_a_row_of_the_whole(name: str, rng: np.random.Generator) -> None:
    shape = (2, 4, 2, 9)
    inputs = tensors(rng, shape) + more(name, rng, shape)
    whole = reference(name, inputs)
    of_keys = (1, 2, 4) if name.startswith("sparsifiner") else (1, 2)
    for t, new in ((0, 1), (4, 1), (6, 3), (8, 1)):
        step = [x[:, :, : t + new] if n in of_keys else x[:, :, t : t + new] for n, x in enumerate(inputs)]
        past = {} if name.startswith("sparsifiner") else {"past": np.array([t, t], np.int32)}
        close(reference(name, step, **past), [x[:, :, t : t + new] for x in whole])


@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_padded_decoding(name: str, rng: np.random.Generator) -> None:
    """Two queries at the end of sequences of different lengths."""
    shape, lens = (3, 4, 2, 11), np.array([11, 2, 7], np.int32)
    inputs = tensors(rng, shape, 2) + more(name, rng, shape, 2)
    for b, length in enumerate(lens):
        inputs[1][b, :, length:] = inputs[2][b, :, length:] = np.nan
    found = reference(name, inputs, past=lens - 2, kv_lens=lens)
    close(found, naive(name, inputs, kv_lens=lens))


@pytest.mark.parametrize("name", bsel.CASES)
def test_gradients(name: str, rng: np.random.Generator) -> None:
    """Also by the gates, and through pooled keys and values; none by what only chooses."""
    shape = (1, 2, 1, 7)
    inputs = tensors(rng, shape) + more(name, rng, shape)
    cotangents = [rng.standard_normal((1, 2, 7, 3))]
    if not name.startswith("nsa"):
        cotangents.append(rng.standard_normal((1, 2, 7)))
    program, _, given = bsel.CASES[name]
    text, buffers = program(**given)
    found = gradients(parse(text), inputs, cotangents, buffers).inputs
    expected = differences(lambda *x: naive(name, list(x)), inputs, cotangents)
    for n, (one, other) in enumerate(zip(found, expected, strict=True)):
        if name.startswith("sparsifiner") and n > 2:
            assert one is None or (one == 0).all()
            assert (other == 0).all()
        else:
            close([one], [other], 1e-6)
