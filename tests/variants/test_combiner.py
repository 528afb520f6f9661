"""Combiner: by hand, limits, causality, and the program."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing.gradients import agree, differences
from attnkit.variants import combiner, dense

pytestmark = pytest.mark.shows
Array = Any


def tensors(rng: np.random.Generator, length: int, batch: int = 2) -> list[Array]:
    return [rng.standard_normal((batch, 2, length, d)) for d in (4, 4, 3)]


def reference(inputs: list[Array], **parameters: Any) -> list[Array]:
    text, buffers = combiner.program(**parameters)
    return run(parse(text), inputs, buffers)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        agree(one, other, tolerance)


def test_by_hand() -> None:
    """Keys of 0: everything weighs the same, a summary as much as a token."""
    q, k, v = np.ones((1, 1, 5, 1)), np.zeros((1, 1, 5, 1)), np.eye(5)[None, None]
    for o, lse in (combiner.naive(q, k, v, segment=2), reference([q, k, v], segment=2)):
        np.testing.assert_allclose(o[0, 0, 4], [1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 3])
        np.testing.assert_allclose(o[0, 0, 2], [1 / 4, 1 / 4, 1 / 2, 0, 0])
        np.testing.assert_allclose(lse[0, 0], np.log([1, 2, 2, 3, 3]))


@pytest.mark.parametrize("length", [1, 6, 7])
def test_limits(length: int, rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, length)
    expected = dense.naive(q, k, v, causal=True)
    for segment in (length, 1, 100):  # one segment; and segments that are their own summaries
        close(combiner.naive(q, k, v, segment=segment), expected)
        close(reference([q, k, v], segment=segment), expected)
    for parameters in combiner.CASES.values():
        np.testing.assert_allclose(reference([q, k, np.ones_like(v)], **parameters)[0], 1)


@pytest.mark.parametrize("name", combiner.CASES)
def test_program_is_the_equation(name: str, rng: np.random.Generator) -> None:
    parameters = combiner.CASES[name]
    for length in (1, 6, 11):
        inputs = tensors(rng, length)
        close(reference(inputs, **parameters), combiner.naive(*inputs, **parameters))
    ends = np.array([0, 5, 5, 11], np.int32)
    inputs = tensors(rng, 11, 1)
    close(
        reference(inputs, **parameters, cu_seqlens=ends),
        combiner.naive(*inputs, **parameters, cu_seqlens=ends),
    )


@pytest.mark.parametrize("name", combiner.CASES)
def test_nothing_sees_what_comes_later(name: str, rng: np.random.Generator) -> None:
    inputs = tensors(rng, 9)
    expected = reference(inputs, **combiner.CASES[name])
    for t in (4, 6):
        changed = [np.where(np.arange(9)[:, None] < t, x, np.nan) for x in inputs]
        for found, want in zip(reference(changed, **combiner.CASES[name]), expected, strict=True):
            np.testing.assert_array_equal(found[:, :, :t], want[:, :, :t])
        shorter = reference([x[:, :, :t] for x in inputs], **combiner.CASES[name])
        close(shorter, [x[:, :, :t] for x in expected])


@pytest.mark.parametrize("name", combiner.CASES)
def test_gradients(name: str, rng: np.random.Generator) -> None:
    inputs = tensors(rng, 7, 1)
    parameters = combiner.CASES[name]
    cotangents = [rng.standard_normal((1, 2, 7, 3)), rng.standard_normal((1, 2, 7))]
    text, buffers = combiner.program(**parameters)
    found = gradients(parse(text), inputs, cotangents, buffers).inputs
    close(found, differences(lambda *x: combiner.naive(*x, **parameters), inputs, cotangents), 1e-6)
