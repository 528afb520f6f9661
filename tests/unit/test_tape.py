"""The tape: the cotangents of every operation against differences, and how they add up."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import tape
from attnkit.backends.reference.tape import Node, backward

CONDITION = np.array([[True, False, True], [False, False, True]])
TWICE = np.array([1, 0, 1])
OPERATIONS: dict[str, tuple[Callable[..., Node], tuple[tuple[int, ...], ...]]] = {
    "add": (lambda a, b: a + b, ((2, 3), (2, 3))),
    "add, broadcast": (lambda a, b: a + b, ((2, 3), (3,))),
    "add a number": (lambda a: a + 2.5, ((2, 3),)),
    "sub": (lambda a, b: a - b, ((2, 3), (2, 1))),
    "sub, to the left": (lambda a, b: a - b, ((1, 3), (4, 2, 3))),
    "mul": (lambda a, b: a * b, ((2, 3), (2, 3))),
    "mul, broadcast": (lambda a, b: a * b, ((2, 1, 3), (4, 1))),
    "mul by itself": (lambda a: a * a, ((2, 3),)),
    "div": (lambda a, b: a / (b * b + 1.0), ((2, 3), (2, 3))),
    "div, broadcast": (lambda a, b: a / (b * b + 1.0), ((3,), (2, 3))),
    "matmul": (lambda a, b: a @ b, ((2, 3, 4), (2, 4, 5))),
    "matmul, broadcast": (lambda a, b: a @ b, ((1, 3, 4), (2, 4, 5))),
    "matmul, shared": (lambda a, b: a @ b, ((2, 3, 4), (1, 4, 5))),
    "slice": (lambda a: a[:, 1:], ((2, 3),)),
    "index twice": (lambda a: a[:, TWICE], ((2, 3),)),
    "one element": (lambda a: a[1, 2], ((2, 3),)),
    "swap": (lambda a: a.swap(), ((2, 3, 4),)),
    "reshape": (lambda a: a.reshape(3, 2), ((2, 3),)),
    "repeat": (lambda a: a.repeat(3), ((2, 3),)),
    "sum": (lambda a: a.sum(1), ((2, 3, 4),)),
    "before": (lambda a: a.before(), ((2, 4, 3),)),
    "exp": (tape.exp, ((2, 3),)),
    "log": (lambda a: tape.log(a * a + 0.5), ((2, 3),)),
    "sqrt": (lambda a: tape.sqrt(a * a + 0.5), ((2, 3),)),
    "where": (lambda a, b: tape.where(CONDITION, a, b), ((2, 3), (2, 3))),
    "where, broadcast": (lambda a, b: tape.where(CONDITION, a, b), ((3,), (2, 1))),
    "where, a number": (lambda a: tape.where(CONDITION, 1.0, a), ((2, 3),)),
    "concatenate": (lambda a, b: tape.concatenate([a, b, a], 1), ((2, 3), (2, 1))),
    "concatenate one": (lambda a: tape.concatenate([a], 0), ((2, 3),)),
    "weighted": (
        lambda a, v: tape.weighted(tape.where(CONDITION[None], a, 0.0), CONDITION[None], v), ((1, 2, 3), (1, 3, 4))
    ),
    "pointwise": (
        lambda a, b: tape.pointwise(np.sin(a.value) * b.value, (a, np.cos(a.value) * b.value), (b, np.sin(a.value))),
        ((2, 3), (2, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_cotangents_against_differences(name: str, rng: np.random.Generator) -> None:
    function, shapes = OPERATIONS[name]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    leaves = [Node(a) for a in arrays]
    out = function(*leaves)
    cotangent = rng.standard_normal(out.shape)
    found = backward([out], [cotangent], leaves)
    for i, array in enumerate(arrays):
        expected = np.zeros(array.shape)
        for at in np.ndindex(array.shape):
            ends = []
            for d in (1e-6, -1e-6):
                moved = [a.copy() for a in arrays]
                moved[i][at] += d
                ends.append(function(*map(Node, moved)))
            expected[at] = np.sum(cotangent * (ends[0].value - ends[1].value)) / 2e-6
        np.testing.assert_allclose(found[i], expected, rtol=1e-7, atol=1e-8)


def test_every_operation_of_the_tape_is_above() -> None:
    methods = {
        name for name, held in vars(Node).items() if callable(held) and name not in ("__init__", "shape")
    }
    assert {name.strip("_") for name in methods} == {
        "add", "sub", "mul", "truediv", "matmul", "getitem", "swap", "reshape", "repeat", "sum", "before",
    }  # fmt: skip


def test_cotangents_add_up(rng: np.random.Generator) -> None:
    x, unused = Node(rng.standard_normal(3)), Node(np.ones(2))
    y, z = x * 2.0, x * x
    g = rng.standard_normal(3)
    found = backward([y, z, y, x], [g, g, g, g], [x, y, unused])
    np.testing.assert_allclose(found[0], 5 * g + 2 * x.value * g)
    np.testing.assert_allclose(found[1], 2 * g)  # of an inner node too
    np.testing.assert_array_equal(found[2], np.zeros(2))


def test_long_chains_need_no_recursion() -> None:
    x = Node(np.ones(1))
    y = x
    for _ in range(20_000):
        y = y + 1.0
    assert backward([y], [np.ones(1)], [x])[0] == 1


def test_what_does_not_move_has_no_gradient_however_steep() -> None:
    x = Node(np.array([0.0, 4.0]))
    with np.errstate(all="ignore"):
        for y in (tape.log(x), tape.sqrt(x)):
            (found,) = backward([y], [np.array([0.0, 1.0])], [x])
            assert found[0] == 0
            assert found[1] == 0.25
        steep = tape.pointwise(x.value, (x, np.array([np.inf, 1.0])))
        assert backward([steep], [np.array([0.0, 1.0])], [x])[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weighted_keeps_what_is_not_a_number_to_those_who_see_it(bad: float) -> None:
    weights, visible = Node(np.array([[[0.5, 0.0], [0.5, 0.5]]])), np.array([[[True, False], [True, True]]])
    v = Node(np.array([[[2.0, 4.0], [bad, 6.0]]]))
    with np.errstate(invalid="ignore"):
        o: Any = tape.weighted(weights, visible, v).value
    np.testing.assert_array_equal(o[0, 0], [1.0, 2.0])
    assert not np.isfinite(o[0, 1, 0])
    assert o[0, 1, 1] == 5.0
