"""Tree attention: draft tokens see the cache and their own ancestors."""

from typing import Any

import numpy as np
import pytest

from attnkit import testing
from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.variants import dense, tree

pytestmark = pytest.mark.shows


def qkv(rng: np.random.Generator, nodes: int = 6, prefix: int = 4) -> Any:
    k, v = rng.standard_normal((2, 2, prefix + nodes, 5)), rng.standard_normal((2, 2, prefix + nodes, 3))
    return rng.standard_normal((2, 4, nodes, 5)), k, v


def test_ancestors_by_hand() -> None:
    """0 - (1 - (3, 4), 2 - 5)."""
    parents = tree.CASES["binary"]
    assert [np.flatnonzero(row).tolist() for row in tree.ancestors(parents)] == [
        [0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]
    ]  # fmt: skip
    assert tree.depths(parents).tolist() == [0, 1, 1, 2, 2, 2]
    assert tree.bits(tree.ancestors(parents)).ravel().tolist() == [
        0b1,
        0b11,
        0b101,
        0b1011,
        0b10011,
        0b100101,
    ]
    long = tree.bits(tree.ancestors([-1, *range(69)]))
    assert long.shape == (70, 2)
    assert long[69].tolist() == [2**64 - 1, 2**6 - 1]
    assert long[63].tolist() == [2**64 - 1, 0]


def test_a_chain_is_causal(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    for got, want in zip(
        tree.naive(q, k, v, tree.CASES["chain"]), dense.naive(q, k, v, causal=True), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-14)


@pytest.mark.parametrize("name", tree.CASES)
def test_every_path_is_sequential_decoding(rng: np.random.Generator, name: str) -> None:
    """Accept a node: its path, compacted behind the prefix, decoded token by token, gives the same outputs."""
    parents = tree.CASES[name]
    q, k, v = qkv(rng)
    o, lse = tree.naive(q, k, v, parents)
    for node in range(len(parents)):
        accepted = tree.path(parents, node)
        assert len(accepted) == tree.depths(parents)[node] + 1
        slots = [*range(4), *(4 + n for n in accepted)]
        want, want_lse = dense.naive(q[:, :, accepted], k[:, :, slots], v[:, :, slots], causal=True)
        np.testing.assert_allclose(o[:, :, accepted], want, atol=1e-14)
        np.testing.assert_allclose(lse[:, :, accepted], want_lse, atol=1e-14)


def test_nodes_see_no_strangers(rng: np.random.Generator) -> None:
    """What is not an ancestor may hold anything."""
    q, k, v = qkv(rng)
    o, _ = tree.naive(q, k, v, tree.CASES["binary"])
    k[:, :, 4 + 2], v[:, :, 4 + 2] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        got, _ = tree.naive(q, k, v, tree.CASES["binary"])
    np.testing.assert_array_equal(got[:, :, [0, 1, 3, 4]], o[:, :, [0, 1, 3, 4]])
    assert not np.isfinite(got[:, :, [2, 5]]).any()


# --- as programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tree.CASES)
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_the_program_is_the_equation(rng: np.random.Generator, name: str, prefix: int) -> None:
    q, k, v = qkv(rng, prefix=prefix)
    text, buffers = tree.program(tree.CASES[name])
    want = tree.naive(q, k, v, tree.CASES[name])
    for got, expected in zip(run(parse(text), [q, k, v], buffers), want, strict=True):
        testing.agree(got, expected)


def test_a_tree_per_sequence(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    parents = np.array([tree.CASES["binary"], tree.CASES["forest"]])
    text, buffers = tree.program(parents)
    want = tree.naive(q, k, v, parents)
    for got, expected in zip(run(parse(text), [q, k, v], buffers), want, strict=True):
        testing.agree(got, expected)


def test_gradients(rng: np.random.Generator) -> None:
    inputs = [x[:1] for x in qkv(rng, nodes=6, prefix=2)]
    text, buffers = tree.program(tree.CASES["binary"])
    cotangents = [rng.standard_normal((1, 4, 6, 3)), rng.standard_normal((1, 4, 6))]
    want = testing.differences(lambda *x: tree.naive(*x, tree.CASES["binary"]), inputs, cotangents)
    got = gradients(parse(text), inputs, cotangents, buffers)
    for a, b in zip(got.inputs, want, strict=True):
        testing.agree(a, b, 1e-6)
