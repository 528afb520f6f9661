"""Routing: membership by hand, limits, laws, causality of both kinds of membership, and the program."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing.gradients import agree, differences
from attnkit.variants import block_select, dense, routing

pytestmark = pytest.mark.shows
Array = Any
SHAPES = [
    (2, 2, 9, 9),
    (1, 3, 4, 9),
    (1, 2, 8, 5),
    (1, 2, 1, 1),
    (1, 2, 0, 3),
    (1, 2, 3, 0),
]  # (batch, H, Sq, Skv)


def tensors(rng: np.random.Generator, shape: tuple[int, ...], clusters: int = 3) -> list[Array]:
    """q, k, v and centroids."""
    batch, heads, q_len, kv_len = shape
    q, k, v = (rng.standard_normal((batch, heads, n, d)) for n, d in ((q_len, 4), (kv_len, 4), (kv_len, 3)))
    return [q, k, v, rng.standard_normal((heads, clusters, 4))]


def reference(inputs: list[Array], **parameters: Any) -> Array:
    text, buffers = routing.program(**parameters)
    (o,) = run(parse(text), inputs, buffers)
    return o


def both(inputs: list[Array], **parameters: Any) -> list[Array]:
    """The result by the equation and by the program."""
    return [routing.naive(*inputs, **parameters), reference(inputs, **parameters)]


def members(inputs: list[Array], cluster_size: int, h: int = 0) -> list[list[int]]:
    """Which queries each cluster of a head has."""
    affinity = inputs[0][0, h] @ inputs[3][h].T
    return [block_select.best(affinity[:, c], cluster_size) for c in range(affinity.shape[1])]


# --- by hand ----------------------------------------------------------------------------------------------


def test_the_worked_membership() -> None:
    """I_0 = {0, 2}, I_1 = {1, 2}: token 3 is in none and gets 0, token 2 is the mean of two clusters."""
    x = np.array([(1, 0), (0, 1), (0.8, 0.6), (-1, 0)])[None, None]
    centroids = np.array([[(1, 0), (0, 1)]], np.float64)
    assert [sorted(of) for of in members([x, x, x, centroids], 2)] == [[0, 2], [1, 2]]
    v = np.eye(4)[None, None]

    def pair(a: int, b: int, query: int) -> Array:
        z = np.exp(2**-0.5 * x[0, 0, [a, b]] @ x[0, 0, query])
        return z[0] / z.sum() * v[0, 0, a] + z[1] / z.sum() * v[0, 0, b]

    for o in both([x, x, v, centroids], cluster_size=2):
        agree(o[0, 0, 0], pair(0, 2, 0))
        agree(o[0, 0, 1], pair(1, 2, 1))
        agree(o[0, 0, 2], (pair(0, 2, 2) + pair(1, 2, 2)) / 2)
        assert (o[0, 0, 3] == 0).all()


def test_a_cluster_with_only_later_keys_counts_as_zero() -> None:
    """Query 0 is in a cluster whose key is 1: nothing to see there, yet it is one of its two clusters."""
    q, k, v = (np.array(x, np.float64)[None, None] for x in ([[1, 1], [0, 0]], [[1, 0], [0, 1]], [[2], [4]]))
    centroids = np.array([[(1, 0), (0, 1)]], np.float64)
    for o in both([q, k, v, centroids], cluster_size=1, causal=True, qk_norm="none"):
        agree(o[0, 0, :, 0], [(2 + 0) / 2, 0])
    for o in both([q, k, v, centroids], cluster_size=1, qk_norm="none"):
        agree(o[0, 0, :, 0], [(2 + 4) / 2, 0])


def test_ties_go_to_the_first_token(rng: np.random.Generator) -> None:
    v = rng.standard_normal((1, 1, 4, 2))
    same = np.ones((1, 1, 4, 2))
    for o in both([same, same, v, np.ones((1, 1, 2))], cluster_size=2):
        agree(o[0, 0], [v[0, 0, :2].mean(axis=0)] * 2 + [np.zeros(2)] * 2)


def test_norms_affect_membership_alone(rng: np.random.Generator) -> None:
    x = np.array([(3.0, 0), (0.9, 0.1), (-1, 2)])[None, None]
    v, centroids = np.eye(3)[None, None], np.array([[(1.0, 0.5)]])
    # long token 0 leads without a norm; with length 1 it is token 1
    for norm, first in (("none", 0), ("l2", 1)):
        for o in both([x, x, v, centroids], cluster_size=1, qk_norm=norm):
            agree(o[0, 0], np.diag([1.0 * (n == first) for n in range(3)]))
    inputs = tensors(rng, (1, 2, 6, 6))
    for norm in ("none", "l2", "layer"):
        expected = dense.naive(*inputs[:3])[0]
        for o in both(inputs, cluster_size=6, qk_norm=norm):
            agree(o, expected)


def test_tokens_without_a_direction(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 2, 6, 6))
    inputs[0][:, :, 2], inputs[1][:, :, 3] = 0, 0
    for norm in ("l2", "layer"):
        naive, program = both(inputs, cluster_size=3, qk_norm=norm)
        assert np.isfinite(naive).all()
        agree(program, naive)


# --- limits and laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_is_dense(causal: bool, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        inputs = tensors(rng, shape, clusters=1)
        expected = dense.naive(*inputs[:3], causal=causal)[0]
        for cluster_size in (max(shape[2:]), 100):  # more than there are is all
            for o in both(inputs, cluster_size=max(cluster_size, 1), causal=causal):
                agree(o, expected)


def test_names_of_clusters_do_not_matter(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 2, 9, 9), clusters=4)
    for causal in (False, True):
        for one, other in zip(both(inputs, cluster_size=3, causal=causal), both([*inputs[:3], inputs[3][:, ::-1]], cluster_size=3, causal=causal), strict=True):  # fmt: skip
            agree(one, other)


def test_disjoint_clusters_are_dense_blocks(rng: np.random.Generator) -> None:
    """Tokens on two axes, shuffled: two dense attentions."""
    side = rng.permutation(np.repeat([0, 1], 4))
    length = 1 + rng.random((8, 1))
    x = (np.eye(2)[side] * length)[None, None]
    v = rng.standard_normal((1, 1, 8, 3))
    for causal in (False, True):
        expected = dense.naive(x, x, v, causal=causal, document=(side, side))[0]
        for o in both([x, x, v, np.eye(2)[None]], cluster_size=4, causal=causal):
            agree(o, expected)


def test_zero_exactly_where_there_is_no_cluster(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 1, 12, 12), clusters=2)
    listed = members(inputs, 3)
    assert sum(map(len, listed)) == 2 * 3
    for o in both(inputs, cluster_size=3, qk_norm="none"):
        assert set(np.flatnonzero((o[0, 0] != 0).any(axis=1))) == {i for of in listed for i in of}


def test_causal_is_by_true_index(rng: np.random.Generator) -> None:
    """Values of later tokens reach nothing, whatever their rank in a cluster; which keys are members may."""
    inputs = tensors(rng, (1, 2, 9, 9))
    expected = reference(inputs, cluster_size=5, causal=True)
    for t in (3, 6):
        changed = [x.copy() for x in inputs]
        changed[2][:, :, t:] = np.nan
        found = reference(changed, cluster_size=5, causal=True)
        np.testing.assert_array_equal(found[:, :, :t], expected[:, :, :t])


def test_whole_membership_looks_ahead_and_prefix_does_not(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 2, 12, 12))
    changed = [x.copy() for x in inputs]
    changed[0][:, :, 9:], changed[1][:, :, 9:] = 5 * rng.standard_normal((2, 1, 2, 3, 4))
    whole = {"cluster_size": 4, "causal": True}
    prefix = {"cluster_size": 2, "membership": "prefix", "block": 3}
    assert not np.allclose(reference(inputs, **whole)[:, :, :9], reference(changed, **whole)[:, :, :9])
    np.testing.assert_array_equal(
        reference(inputs, **prefix)[:, :, :9], reference(changed, **prefix)[:, :, :9]
    )


def test_prefix_limits_and_steps(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (2, 2, 12, 12))
    causal = dense.naive(*inputs[:3], causal=True)[0]
    for parameters in (
        {"cluster_size": 12, "block": 3},
        {"cluster_size": 1, "block": 12},
        {"cluster_size": 1, "block": 50},
    ):
        for o in both(inputs, membership="prefix", **parameters):
            agree(o, causal)
    parameters = {"cluster_size": 2, "membership": "prefix", "block": 3}
    whole = reference(inputs, **parameters)
    q, k, v, centroids = inputs
    for t, new in ((0, 1), (4, 1), (5, 4), (11, 1)):
        step = reference(
            [q[:, :, t : t + new], k[:, :, : t + new], v[:, :, : t + new], centroids], **parameters
        )
        agree(step, whole[:, :, t : t + new])


# --- the program ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", routing.CASES)
def test_program_is_the_equation(name: str, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        naive, program = both(tensors(rng, shape), **routing.CASES[name])
        agree(program, naive)


@pytest.mark.parametrize("name", routing.CASES)
def test_packed_and_padded(name: str, rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 2, 9, 12))
    ends = {
        "cu_seqlens_q": np.array([0, 4, 4, 9], np.int32),
        "cu_seqlens_kv": np.array([0, 7, 9, 12], np.int32),
    }
    naive, program = both(inputs, **routing.CASES[name], **ends)
    agree(program, naive)
    inputs = tensors(rng, (3, 2, 4, 9))
    lens = np.array([9, 0, 5], np.int32)
    for b, length in enumerate(lens):
        inputs[1][b, :, length:] = inputs[2][b, :, length:] = np.nan  # padding is no member
    naive, program = both(inputs, **routing.CASES[name], kv_lens=lens)
    agree(program, naive)


@pytest.mark.parametrize("name", routing.CASES)
def test_gradients(name: str, rng: np.random.Generator) -> None:
    """By q, k and v through the attention; none by the centroids, nor through membership."""
    inputs = tensors(rng, (1, 2, 7, 8))
    parameters = routing.CASES[name]
    text, buffers = routing.program(**parameters)
    cotangents = [rng.standard_normal((1, 2, 7, 3))]
    found = gradients(parse(text), inputs, cotangents, buffers).inputs
    expected = differences(lambda *x: [routing.naive(*x, **parameters)], inputs, cotangents)
    for one, other in zip(found[:3], expected[:3], strict=True):
        agree(one, other, 1e-6)
    assert found[3] is None or (found[3] == 0).all()
    assert (expected[3] == 0).all()
