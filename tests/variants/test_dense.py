"""The dense family beyond what the kernels are tested with: sinks, merging, dropout, layouts, and every gradient."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from attnkit.variants import dense
from attnkit.variants.dropout import kept

pytestmark = pytest.mark.shows


def qkv(rng: np.random.Generator, sq: int = 5, skv: int = 7) -> Any:
    return (
        rng.standard_normal((2, 4, sq, 6)),
        rng.standard_normal((2, 2, skv, 6)),
        rng.standard_normal((2, 2, skv, 3)),
    )


# --- by hand ----------------------------------------------------------------------------------------------

Q, K, V = (np.array(x, float).reshape(1, 1, -1, 1) for x in ([1, 2], [0, 1, -1], [1, 2, 4]))
# (parameters, o of both queries, lse of both queries)
BY_HAND: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    "bottom right": ({"causal": True}, [1.731059, 1.914442], [1.313262, 2.142932]),
    "first two keys": ({"prefix": 2}, [1.731059, 1.880797], [1.313262, 2.126928]),
    "sink": ({"causal": True, "sink": np.zeros(1)}, [1.364176, 1.713438], [1.551445, 2.253856]),
    "sink of -inf": (
        {"causal": True, "sink": np.array([-np.inf])},
        [1.731059, 1.914442],
        [1.313262, 2.142932],
    ),
    "sink alone": ({"window": (0, -5), "sink": np.array([0.5])}, [0, 0], [0.5, 0.5]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_worked_numbers(name: str) -> None:
    parameters, o, lse = BY_HAND[name]
    got, got_lse = dense.naive(Q, K, V, scale=1.0, **parameters)
    np.testing.assert_allclose(got.ravel(), o, atol=6e-7)
    np.testing.assert_allclose(got_lse.ravel(), lse, atol=6e-7)


# --- laws of the equation ---------------------------------------------------------------------------------


def test_against_torch(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    bias = rng.standard_normal((4, 5, 7))
    got, _ = dense.naive(q, k, v, bias=bias)
    want = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (q, k, v)), attn_mask=torch.from_numpy(bias), enable_gqa=True
    )
    np.testing.assert_allclose(got, want, atol=1e-14)


def test_sink_takes_its_share(rng: np.random.Generator) -> None:
    """Rows sum to 1 - exp(sink - lse); the sink is one more key with a value of 0."""
    q, k, _ = qkv(rng)
    ones, sink = np.ones((2, 2, 7, 1)), rng.standard_normal(4)
    mass, lse = dense.naive(q, k, ones, causal=True, sink=sink)
    np.testing.assert_allclose(mass[..., 0], 1 - np.exp(sink[:, None] - lse), rtol=1e-12)
    _, plain = dense.naive(q, k, ones, causal=True)
    np.testing.assert_allclose(lse, np.logaddexp(plain, sink[:, None]), rtol=1e-12)


def test_packed_is_the_loop(rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((1, h, n, 4)) for h, n in ((2, 9), (1, 11), (1, 11)))
    cu_q, cu_kv = np.array([0, 3, 3, 5, 9], np.int32), np.array([0, 2, 5, 5, 11], np.int32)
    got, lse = dense.naive(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    for rows, keys in zip(pairwise(cu_q), pairwise(cu_kv), strict=True):
        part = [x[:, :, slice(*cut)] for x, cut in ((q, rows), (k, keys), (v, keys))]
        want, want_lse = dense.naive(*part, causal=True)
        np.testing.assert_array_equal(got[:, :, slice(*rows)], want)
        np.testing.assert_array_equal(lse[:, :, slice(*rows)], want_lse)
    assert (lse[:, :, 3:5] == -np.inf).all()


def test_dropout_is_thinned_weights(rng: np.random.Generator) -> None:
    """lse stays; weights are dropped after normalising, what is left grows; p = 0 is nothing and p = 1 everything."""
    q, k, _ = qkv(rng, 6, 6)
    eye = np.broadcast_to(np.eye(6), (2, 2, 6, 6))
    plain, lse = dense.naive(q, k, eye, causal=True)
    thinned, same_lse = dense.naive(q, k, eye, causal=True, dropout=0.25, seed=11)
    np.testing.assert_array_equal(same_lse, lse)
    keep = np.stack([[kept(11, 0.25, b, h, 6, 6) for h in range(4)] for b in range(2)])
    np.testing.assert_allclose(thinned, np.where(keep, plain / 0.75, 0), atol=1e-15)
    np.testing.assert_array_equal(dense.naive(q, k, eye, causal=True, dropout=0.0)[0], plain)
    assert not dense.naive(q, k, eye, causal=True, dropout=1.0)[0].any()
