"""Aaren: the scan is causal attention with equal queries; states combine in any grouping; the program."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing import agree, differences
from attnkit.variants import aaren, dense

pytestmark = pytest.mark.shows
Array = Any


def random(rng: np.random.Generator, batch: int = 2, length: int = 7) -> tuple[Array, Array, Array]:
    shape = (batch, 2, length)
    return rng.standard_normal((2, 3)), rng.standard_normal((*shape, 3)), rng.standard_normal((*shape, 2))


def test_prefixes_by_hand() -> None:
    k, v = (np.array(x, np.float64)[None, None, :, None] for x in ([0, np.log(2), np.log(5)], [1, 4, 2]))
    o, lse = aaren.naive(np.ones((1, 1)), k, v, scale=1.0)
    agree(o.ravel(), [1, (1 + 8) / 3, (1 + 8 + 10) / 8])  # weights 1, 2, 5
    agree(lse.ravel(), np.log([1, 3, 8]))


@pytest.mark.parametrize("name", aaren.CASES)
def test_it_is_causal_attention_with_equal_queries(name: str, rng: np.random.Generator) -> None:
    query, k, v = random(rng)
    queries = np.broadcast_to(query[:, None], k.shape)
    expected = dense.naive(queries, k, v, causal=True, scale=aaren.CASES[name].get("scale"))
    for found, want in zip(aaren.naive(query, k, v, **aaren.CASES[name]), expected, strict=True):
        agree(found, want)


def test_states_combine_in_any_grouping(rng: np.random.Generator) -> None:
    query, k, v = random(rng, batch=1)
    logits = 3**-0.5 * np.einsum("hd,hsd->sh", query, k[0])
    tokens = [(logits[t], np.ones(2), v[0, :, t]) for t in range(7)]
    tokens[3] = aaren.empty(2, 2)  # neutral, wherever it stands

    def tree(states: list[aaren.State]) -> aaren.State:
        if len(states) == 1:
            return states[0]
        half = len(states) // 2
        return aaren.combine(tree(states[:half]), tree(states[half:]))

    left = tokens[0]
    for token in tokens[1:]:
        left = aaren.combine(left, token)
    kept = [t for t in range(7) if t != 3]
    o, lse = aaren.naive(query, k[:, :, kept], v[:, :, kept])
    for state in (left, tree(tokens)):
        found = aaren.result(state)
        agree(found[0], o[0, :, -1])
        agree(found[1], lse[0, :, -1])
    nothing = aaren.result(aaren.combine(aaren.empty(2, 2), aaren.empty(2, 2)))
    assert (nothing[0] == 0).all()
    assert (nothing[1] == -np.inf).all()


def test_large_logits_do_not_overflow() -> None:
    k, v = (np.array(x, np.float64)[None, None, :, None] for x in ([-2000, 0, 2000], [1, 4, 2]))
    o, lse = aaren.naive(np.ones((1, 1)), k, v, scale=1.0)
    agree(o.ravel(), [1, 4, 2])
    agree(lse.ravel(), [-2000, 0, 2000])


def test_state_carries_a_sequence_on(rng: np.random.Generator) -> None:
    query, k, v = random(rng)
    o, lse = aaren.naive(query, k, v)
    first_o, first_lse = aaren.naive(query, k[:, :, :4], v[:, :, :4])
    carried = {"initial_state": (first_o[:, :, -1], first_lse[:, :, -1])}
    rest_o, rest_lse = aaren.naive(query, k[:, :, 4:], v[:, :, 4:], **carried)
    agree(np.concatenate([first_o, rest_o], axis=2), o)
    agree(np.concatenate([first_lse, rest_lse], axis=2), lse)


def test_packed_is_a_loop_over_sequences(rng: np.random.Generator) -> None:
    query, k, v = random(rng, batch=1)
    ends = np.array([0, 3, 3, 7], np.int32)
    o, lse = aaren.naive(query, k, v, cu_seqlens=ends)
    for n in range(3):
        rows = slice(ends[n], ends[n + 1])
        alone = aaren.naive(query, k[:, :, rows], v[:, :, rows])
        agree(o[:, :, rows], alone[0])
        agree(lse[:, :, rows], alone[1])


# --- the program, on the reference backend ----------------------------------------------------------------


def reference(query: Array, k: Array, v: Array, **parameters: Any) -> list[Array]:
    text, buffers = aaren.program(**parameters)
    return run(parse(text), aaren.inputs(query, k, v, **parameters), buffers)


LAYOUTS = {"plain": (2, {}), "packed": (1, {"cu_seqlens": [0, 3, 3, 7]})}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", aaren.CASES)
def test_program_is_the_equation(name: str, layout: str, rng: np.random.Generator) -> None:
    batch, lengths = LAYOUTS[layout]
    query, k, v = random(rng, batch)
    parameters = aaren.CASES[name] | {key: np.array(x, np.int32) for key, x in lengths.items()}
    sequences = 2 if layout == "plain" else 3
    state = rng.standard_normal((sequences, 2, 2)), rng.standard_normal((sequences, 2))
    for extra in ({}, {"initial_state": state}):
        expected = aaren.naive(query, k, v, **parameters, **extra)
        for found, want in zip(reference(query, k, v, **parameters, **extra), expected, strict=True):
            agree(found, want)


def test_program_carries_a_sequence_on(rng: np.random.Generator) -> None:
    query, k, v = random(rng)
    o, lse = reference(query, k, v)
    first_o, first_lse = reference(query, k[:, :, :4], v[:, :, :4])
    state = {"initial_state": (first_o[:, :, -1], first_lse[:, :, -1])}
    rest_o, rest_lse = reference(query, k[:, :, 4:], v[:, :, 4:], **state)
    agree(np.concatenate([first_o, rest_o], axis=2), o)
    agree(np.concatenate([first_lse, rest_lse], axis=2), lse)


def test_program_has_the_gradients_of_the_equation(rng: np.random.Generator) -> None:
    query, k, v = random(rng, batch=1, length=4)
    state = rng.standard_normal((1, 2, 2)), rng.standard_normal((1, 2))

    def function(query: Array, k: Array, v: Array, *state: Array) -> Any:
        return aaren.naive(query, k, v, initial_state=state)

    text, buffers = aaren.program(initial_state=state)
    cotangents = [rng.standard_normal(x.shape) for x in function(query, k, v, *state)]
    found = gradients(parse(text), aaren.inputs(query, k, v, initial_state=state), cotangents, buffers).inputs
    expected = differences(function, [query, k, v, *state], cotangents)
    for one, other in zip([*found[:3], *(x.sum(axis=2) for x in found[3:])], expected, strict=True):
        agree(one, other, 1e-6)  # the state stands before every token
