"""Linear additive attention: one global vector, its causal form, and the program."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing import agree, differences
from attnkit.variants import aaren, additive

pytestmark = pytest.mark.shows
Array = Any


def random(rng: np.random.Generator, batch: int = 2, length: int = 7) -> list[Array]:
    return [rng.standard_normal((batch, 2, length, 3)) for _ in range(3)] + [rng.standard_normal((2, 3))]


def test_one_vector_by_hand() -> None:
    q, k, v = (np.array(x, np.float64)[None, None, :, None] for x in ([0, np.log(3)], [1, 2], [5, 7]))
    o = additive.naive(q, k, v, np.ones((1, 1)))
    g = 0.75 * np.log(3)  # weights 1 and 3
    agree(o.ravel(), [5 * g, 14 * g])


def test_no_learned_vector_is_a_mean(rng: np.random.Generator) -> None:
    q, k, v, w = random(rng)
    agree(additive.naive(q, k, v, 0 * w), k * q.mean(axis=2, keepdims=True) * v)


def test_the_causal_form_is_the_scan(rng: np.random.Generator) -> None:
    q, k, v, w = random(rng)
    found = additive.naive(q, k, v, w, causal=True)
    agree(found, k * aaren.naive(w, q, q)[0] * v)
    agree(found[:, :, -1], additive.naive(q, k, v, w)[:, :, -1])


def test_packed_is_a_loop_over_sequences(rng: np.random.Generator) -> None:
    q, k, v, w = random(rng, batch=1)
    ends = np.array([0, 3, 3, 7], np.int32)
    for parameters in additive.CASES.values():
        o = additive.naive(q, k, v, w, cu_seqlens=ends, **parameters)
        for n in range(3):
            rows = slice(ends[n], ends[n + 1])
            agree(o[:, :, rows], additive.naive(*(x[:, :, rows] for x in (q, k, v)), w, **parameters))


@pytest.mark.parametrize("name", additive.CASES)
def test_tokens_may_be_shuffled_unless_it_is_causal(name: str, rng: np.random.Generator) -> None:
    q, k, v, w = random(rng)
    order = np.array([3, 1, 0, 2, 6, 5, 4])
    o = additive.naive(q, k, v, w, **additive.CASES[name])
    shuffled = additive.naive(*(x[:, :, order] for x in (q, k, v)), w, **additive.CASES[name])
    assert np.allclose(shuffled, o[:, :, order]) == (name == "additive")


# --- the program, on the reference backend ----------------------------------------------------------------

LAYOUTS = {"plain": (2, {}), "packed": (1, {"cu_seqlens": [0, 3, 3, 7]})}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", additive.CASES)
def test_program_is_the_equation(name: str, layout: str, rng: np.random.Generator) -> None:
    batch, lengths = LAYOUTS[layout]
    arrays = random(rng, batch)
    parameters = additive.CASES[name] | {key: np.array(x, np.int32) for key, x in lengths.items()}
    text, buffers = additive.program(**parameters)
    (found,) = run(parse(text), additive.inputs(*arrays, **parameters), buffers)
    agree(found, additive.naive(*arrays, **parameters))


@pytest.mark.parametrize("name", additive.CASES)
def test_program_has_the_gradients_of_the_equation(name: str, rng: np.random.Generator) -> None:
    arrays, parameters = random(rng, batch=1, length=4), additive.CASES[name]
    text, buffers = additive.program(**parameters)
    y = rng.standard_normal(arrays[2].shape)
    found = gradients(parse(text), additive.inputs(*arrays, **parameters), [y], buffers).inputs
    expected = differences(lambda *inputs: [additive.naive(*inputs, **parameters)], arrays, [y])
    for one, other in zip(found, expected, strict=True):
        agree(one.reshape(other.shape), other, 1e-6)
