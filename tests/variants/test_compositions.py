"""Programs of several attentions."""

import math

import numpy as np
import pytest

from attnkit.variants import compositions, dense

pytestmark = pytest.mark.shows


def test_differential_at_lambda_0_is_one_attention(rng: np.random.Generator) -> None:
    q, k, q1, k1 = rng.standard_normal((4, 2, 2, 5, 4))
    v = rng.standard_normal((2, 2, 5, 8))
    for causal in (False, True):
        got = compositions.differential(q, k, q1, k1, v, 0.0, causal=causal)
        np.testing.assert_allclose(got, dense.naive(q, k, v, causal=causal)[0], atol=1e-15)
    same = compositions.differential(q, k, q, k, v, 0.25)
    np.testing.assert_allclose(same, 0.75 * dense.naive(q, k, v)[0], atol=1e-15)


def test_differential_norm(rng: np.random.Generator) -> None:
    """Rows have the rms that is promised, whatever the size of the values."""
    q, k, q1, k1 = rng.standard_normal((4, 2, 2, 5, 4))
    v = 1000 * rng.standard_normal((2, 2, 5, 8))
    start = compositions.lambda_init(1)
    got = compositions.differential(q, k, q1, k1, v, 0.3, gain=np.full((2, 8), 2.0), lambda_init=start)
    np.testing.assert_allclose(np.sqrt(np.mean(got**2, axis=3)), 2 * (1 - start))


def test_lambda() -> None:
    assert math.isclose(compositions.lambda_init(1), 0.2)
    assert math.isclose(compositions.lambda_init(2), 0.8 - 0.6 * math.exp(-0.3))
    a, zero = np.array([1.0, 2]), np.zeros(2)
    assert math.isclose(compositions.learned_lambda(a, a, zero, zero, 0.2), math.exp(5) - 1 + 0.2)
