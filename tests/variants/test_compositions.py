"""Programs of several attentions."""

import math
from typing import Any

import numpy as np
import pytest

from attnkit import testing
from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
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


# --- as programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", compositions.CASES)
def test_differential_program(rng: np.random.Generator, name: str) -> None:
    """Grouped heads, values twice as wide, the result and every gradient: lambda and gain too."""
    case = dict(compositions.CASES[name])
    lambda_, causal = case["lambda_"], case.get("causal", False)
    q, q1 = rng.standard_normal((2, 1, 4, 5, 3))
    k, k1 = rng.standard_normal((2, 1, 2, 6, 3))
    inputs = [q, k, q1, k1, rng.standard_normal((1, 2, 6, 6))]
    norm = None
    if "lambda_init" in case:
        inputs.append(rng.standard_normal((4, 6)))
        norm = (case["lambda_init"], 6)
    program = parse(compositions.differential_program(causal, norm))

    def naive(lambda_: Any, *x: Any) -> list[Any]:
        gain = {"gain": x[5], "lambda_init": case["lambda_init"]} if norm else {}
        return [compositions.differential(*x[:5], float(lambda_), causal=causal, **gain)]

    (got,) = run(program, inputs, params=[lambda_])
    testing.agree(got, naive(lambda_, *inputs)[0])
    cotangent = rng.standard_normal((1, 4, 5, 6))
    d_lambda, *want = testing.differences(naive, [np.array(lambda_), *inputs], [cotangent])
    found = gradients(program, inputs, [cotangent], params=[lambda_])
    for a, b in zip(found.inputs, want, strict=True):
        testing.agree(a, b, 1e-6)
    testing.agree(found.params[0], d_lambda, 1e-6)


@pytest.mark.parametrize("shape", [(3, 7), (1, 5), (6, 1)], ids=str)
def test_perceiver(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    """Few latents, many tokens, and the other way round."""
    z, x = (rng.standard_normal((1, 2, n, 4)) for n in shape)
    program = parse(compositions.PERCEIVER)
    for got, want in zip(run(program, [z, x]), compositions.perceiver(z, x), strict=True):
        testing.agree(got, want)
    cotangents = [rng.standard_normal(y.shape) for y in (z, x)]
    expected = testing.differences(compositions.perceiver, [z, x], cotangents)
    for a, b in zip(gradients(program, [z, x], cotangents).inputs, expected, strict=True):
        testing.agree(a, b, 1e-6)
