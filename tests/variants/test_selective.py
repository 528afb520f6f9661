"""Selective attention: by hand, as an equation, step by step, and as a program."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from attnkit.variants import dense, selective

pytestmark = pytest.mark.shows

# Logits of one head, causal; the queries are rows of the identity times them, the keys unit vectors.
LOGITS = np.array([[0.5, 0, 0, 0], [2, 1, 0, 0], [1, 3, 0.2, 0], [0, -1, 2, 1]])


def by_hand() -> tuple[Any, Any, Any]:
    """q, k, v of one head with ``q k^T`` equal to `LOGITS`."""
    return LOGITS[None, None], np.eye(4)[None, None], np.eye(4)[None, None]


def qkv(
    rng: np.random.Generator, b: int = 2, hq: int = 4, hkv: int = 2, sq: int = 6, skv: int = 6, d: int = 5
) -> Any:
    q, k = rng.standard_normal((b, hq, sq, d)), rng.standard_normal((b, hkv, skv, d))
    return 2 * q, k, rng.standard_normal((b, hkv, skv, 3))


# --- by hand ----------------------------------------------------------------------------------------------


def test_worked_numbers() -> None:
    """S_21 = 3 and S_32 = 2 alone; row 3 sees F = [0, 3, 0, 0]."""
    got = selective.naive(*by_hand(), scale=1.0)
    np.testing.assert_array_equal(got.f[0, 3], [0, 3, 0, 0])
    np.testing.assert_array_equal(got.carry[0], [0, 3, 2, 0])
    weights = got.o[0, 0]  # the values are unit vectors
    np.testing.assert_allclose(weights[3], [0.089882, 0.001646, 0.664146, 0.244326], atol=6e-7)
    plain, _ = dense.naive(*by_hand(), scale=1.0, causal=True)
    np.testing.assert_allclose(plain[0, 0, 3], [0.087144, 0.032059, 0.643914, 0.236883], atol=6e-7)
    np.testing.assert_allclose(weights[:3], plain[0, 0, :3], atol=1e-15)  # F is 0 there


def test_memory_loss_by_hand() -> None:
    """Rows see F = 0 but for F_31 = 3, which is beyond tau: the worst row remembers 3 of 4 tokens."""
    f = selective.naive(*by_hand(), scale=1.0).f
    assert selective.memory_loss(f).tolist() == [3 / 4]
    assert selective.memory_loss(f, tau=6.0).tolist() == [3.5 / 4]


# --- laws of the equation ---------------------------------------------------------------------------------


def test_the_loop_is_the_equation(rng: np.random.Generator) -> None:
    """F = exclusive cumulative sum of S over queries; rows 0 and 1 and column 0 are 0; F never falls."""
    q, k, v = qkv(rng, hq=2, hkv=2)
    got = selective.naive(q, k, v)
    n = q.shape[2]
    causal = np.tril(np.ones((n, n), bool))
    logits = q @ np.swapaxes(k, 2, 3) * q.shape[3] ** -0.5
    s = np.where(np.tril(causal, -1), np.maximum(logits[:, 0], 0), 0)
    s[:, :, 0] = 0
    f = np.cumsum(s, axis=1) - s
    np.testing.assert_allclose(np.where(causal, got.f, 0), np.where(causal, f, 0), atol=1e-14)
    z = np.where(causal, logits - f[:, None], -np.inf)
    weights = np.exp(z - z.max(axis=3, keepdims=True))
    expected = weights / weights.sum(axis=3, keepdims=True) @ v
    np.testing.assert_allclose(got.o, expected, atol=1e-14)
    assert not f[:, :2].any()
    assert not f[:, :, 0].any()
    assert not np.diagonal(f, axis1=1, axis2=2).any()
    assert (np.diff(f, axis=1) >= 0).all()
    assert f.max() > 0.5


def test_a_head_that_selects_nothing_is_dense(rng: np.random.Generator) -> None:
    """A^0 <= 0 everywhere: no head forgets anything."""
    q, k, v = qkv(rng)
    q[:, 0], k[:, 0] = -abs(q[:, 0]), abs(k[:, 0])
    got = selective.naive(q, k, v)
    expected, lse = dense.naive(q, k, v, causal=True)
    np.testing.assert_allclose(got.o, expected, atol=1e-14)
    np.testing.assert_allclose(got.lse, lse, atol=1e-14)
    assert not got.carry.any()


@pytest.mark.parametrize("budget", [None, 2, 3, 5])
def test_steps_are_the_whole(rng: np.random.Generator, budget: int | None) -> None:
    """Chunks of any size with the carry handed on, and single steps, give the same bits' worth."""
    q, k, v = qkv(rng, sq=9, skv=9)
    whole = selective.naive(q, k, v, budget=budget)
    for cuts in ([4, 9], [1, 2, 7, 9], list(range(1, 10))):
        carry, start = np.zeros((2, 0)), 0
        for stop in cuts:
            carry = np.pad(carry, ((0, 0), (0, stop - start)))
            part = selective.naive(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], carry, budget=budget)
            np.testing.assert_allclose(part.o, whole.o[:, :, start:stop], atol=1e-13)
            np.testing.assert_allclose(part.lse, whole.lse[:, :, start:stop], atol=1e-13)
            carry, start = part.carry, stop
        np.testing.assert_allclose(carry, whole.carry, atol=1e-13)


def test_a_budget_forgets_for_good(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, sq=10, skv=10)
    unlimited = selective.naive(q, k, v)
    for budget in (10, 50):
        for got, want in zip(selective.naive(q, k, v, budget=budget), unlimited, strict=True):
            np.testing.assert_array_equal(got, want)
    pruned = selective.naive(q, k, v, budget=4)
    seen = pruned.f < np.inf
    assert seen.sum(axis=2).max() == 4
    assert (seen.sum(axis=2) == np.minimum(np.arange(10) + 1, 4)).all()
    assert seen[:, :, 0].all()
    assert np.diagonal(seen, axis1=1, axis2=2).all()
    causal = np.tril(np.ones((10, 10), bool))
    assert ((np.diff(seen.astype(int), axis=1) <= 0) | ~causal[:-1]).all(), "what is gone stays gone"


def test_a_budget_by_hand() -> None:
    """Budget 3: query 3 forgets key 1 (F = 3, the largest). With no selection the oldest goes, never the first."""
    got = selective.naive(*by_hand(), scale=1.0, budget=3)
    assert np.flatnonzero(got.f[0, 3] < np.inf).tolist() == [0, 2, 3]
    assert got.carry[0].tolist() == [0, np.inf, 2, 0]
    tied = selective.naive(np.zeros((1, 1, 5, 2)), np.ones((1, 1, 5, 2)), np.ones((1, 1, 5, 2)), budget=3)
    assert [np.flatnonzero(row < np.inf).tolist() for row in tied.f[0]] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 2, 3],
        [0, 3, 4],
    ]


def test_documents_start_anew(rng: np.random.Generator) -> None:
    """Packed sequences are the loop over them: each has a first token of its own, and no carry crosses."""
    q, k, v = qkv(rng, b=1, sq=11, skv=11)
    cu = np.array([0, 4, 4, 5, 11], np.int32)
    packed = selective.naive(q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu)
    for start, stop in pairwise(cu):
        part = (slice(None), slice(None), slice(start, stop))
        alone = selective.naive(q[part], k[part], v[part])
        np.testing.assert_array_equal(packed.o[part], alone.o)
        np.testing.assert_array_equal(packed.carry[:, start:stop], alone.carry)
    assert packed.carry[0, 0] == packed.carry[0, 4] == packed.carry[0, 5] == 0
