"""Regional masks and weights: by hand, limits, the programs."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing.gradients import agree, differences
from attnkit.variants import block_sparse as bs, dense, regions

pytestmark = pytest.mark.shows
Array = Any


def tensors(rng: np.random.Generator, q_len: int, kv_len: int, batch: int = 1) -> list[Array]:
    shapes = ((2, q_len, 4), (1, kv_len, 4), (1, kv_len, 3))
    return [rng.standard_normal((batch, *shape)) for shape in shapes]


def reference(inputs: list[Array], pattern: bs.Pattern) -> list[Array]:
    text, buffers = bs.program(pattern)
    return run(parse(text), inputs, buffers)


def weighted(inputs: list[Array], *of: Array, **parameters: Any) -> list[Array]:
    text, buffers = regions.weighted_program(*of, **parameters)
    return run(parse(text), inputs, buffers)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        agree(one, other, tolerance)


def ids(*values: int) -> Array:
    return np.array(values, np.int32)


def test_regions_and_boxes_by_hand(rng: np.random.Generator) -> None:
    q, k, v = np.zeros((1, 1, 3, 1)), np.zeros((1, 1, 6, 1)), np.eye(6)[None, None]
    allow = np.array([[True, False, True], [False, False, False], [True, True, True]])
    pattern = regions.Regions(ids(0, 1, 2), ids(0, 0, 1, 1, 2, 2), allow)
    for o, lse in (reference([q, k, v], pattern), bs.naive(q, k, v, pattern)):
        assert [list(np.flatnonzero(row)) for row in o[0, 0]] == [[0, 1, 4, 5], [], [0, 1, 2, 3, 4, 5]]
        np.testing.assert_array_equal(lse[0, 0, 1], -np.inf)
    boxes = regions.Boxes(np.array([[0, 1, 0, 3], [0, 2, 1, 2], [1, 1, 0, 3]], np.int32), 3)  # keys are 2 x 3
    for o, _ in (reference([q, k, v], boxes), bs.naive(q, k, v, boxes)):
        assert [list(np.flatnonzero(row)) for row in o[0, 0]] == [[0, 1, 2], [1, 4], []]


def test_limits(rng: np.random.Generator) -> None:
    inputs = tensors(rng, 5, 6, 2)
    q_ids, kv_ids = rng.integers(0, 3, (2, 5)).astype(np.int32), rng.integers(0, 3, (2, 6)).astype(np.int32)
    every, boxes = np.ones((3, 3), bool), np.tile(np.array([0, 2, 0, 3], np.int32), (5, 1))
    for pattern in (regions.Regions(q_ids, kv_ids, every), regions.Boxes(boxes, 3)):
        close(reference(inputs, pattern), dense.naive(*inputs))
    same = regions.Regions(q_ids, kv_ids, np.eye(3, dtype=bool))  # documents
    for b in range(2):
        one = [x[b : b + 1] for x in inputs]
        close(
            [x[b : b + 1] for x in reference(inputs, same)], dense.naive(*one, document=(q_ids[b], kv_ids[b]))
        )


@pytest.mark.parametrize("name", regions.CASES)
def test_mask_programs_are_the_equations(name: str, rng: np.random.Generator) -> None:
    for q_len, kv_len in ((5, 12), (1, 3), (7, 6)):
        inputs = tensors(rng, q_len, kv_len, 2)
        pattern = regions.CASES[name](q_len, kv_len, rng)
        close(reference(inputs, pattern), bs.naive(*inputs, pattern))
    batched = regions.Boxes(rng.integers(0, 3, (2, 7, 4)).astype(np.int32), 2)
    close(reference(inputs, batched), bs.naive(*inputs, batched))


def test_weights_by_hand() -> None:
    q, k, v = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 3, 1)), np.eye(3)[None, None]
    of = ids(0), ids(0, 1, 2), np.array([[1, 2, 0]], np.float32)
    close(weighted([q, k, v], *of), [[[[[1 / 3, 2 / 3, 0]]]], [[[np.log(3)]]]])
    close(weighted([q, k, v], *of, renormalize=False), [[[[[1 / 3, 2 / 3, 0]]]]])
    of = ids(0), ids(0, 1, 2), np.array([[1, 3, 2]], np.float32)
    close(weighted([q, k, v], *of), [[[[[1 / 6, 1 / 2, 1 / 3]]]], [[[np.log(6)]]]])
    close(weighted([q, k, v], *of, renormalize=False), [[[[[1 / 3, 1, 2 / 3]]]]])


@pytest.mark.parametrize("renormalize", [False, True])
def test_weights(renormalize: bool, rng: np.random.Generator) -> None:
    inputs = tensors(rng, 5, 6, 2)
    q_ids, kv_ids = rng.integers(0, 3, 5).astype(np.int32), rng.integers(0, 3, (2, 6)).astype(np.int32)
    q_ids[0] = 1
    weights = rng.random((3, 3)).astype(np.float32)
    weights[1], weights[0, 2] = 0, 0  # a query that nothing is left for
    found = weighted(inputs, q_ids, kv_ids, weights, renormalize=renormalize)
    expected = regions.weighted_naive(*inputs, q_ids, kv_ids, weights, renormalize=renormalize)
    close(found, expected[: len(found)])
    assert (found[0][:, :, 0] == 0).all()
    ones = np.ones((3, 3), np.float32)
    close(weighted(inputs, q_ids, kv_ids, ones, renormalize=renormalize)[:1], dense.naive(*inputs)[:1])
    allow = regions.Regions(q_ids, kv_ids, weights > 0)  # weights of 0 and 1, renormalised, are a mask
    close(weighted(inputs, q_ids, kv_ids, np.sign(weights)), reference(inputs, allow))


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients(renormalize: bool, rng: np.random.Generator) -> None:
    """By q, k, v and by the weights."""
    inputs = tensors(rng, 4, 5)
    q_ids, kv_ids = ids(0, 1, 1, 0), ids(0, 1, 0, 1, 1)
    weights = (0.5 + rng.random((2, 2))).astype(np.float32)
    text, buffers = regions.weighted_program(q_ids, kv_ids, weights, renormalize=renormalize)
    cotangents = [rng.standard_normal((1, 2, 4, 3)), rng.standard_normal((1, 2, 4))][: 1 + renormalize]

    def naive(q: Array, k: Array, v: Array, weights: Array) -> Any:
        results = regions.weighted_naive(q, k, v, q_ids, kv_ids, weights, renormalize=renormalize)
        return results[: 1 + renormalize]

    found = gradients(parse(text), inputs, cotangents, buffers)
    close(
        [*found.inputs, found.buffers[2]],
        differences(naive, [*inputs, weights.astype(float)], cotangents),
        1e-6,
    )
