"""Symbolic derivatives against central differences in float64: every row of the op table, and random expressions."""

from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest

from attnkit.analysis.derivative import derivative, float_leaves, gradient
from attnkit.backends.reference.evaluate import evaluate
from attnkit.ir.expr import Expr, const, load, make, param, topological, var
from attnkit.ir.optable import OPS
from attnkit.ir.program import Buffer
from attnkit.testing.expressions import Expressions

NAMES = ("x", "y", "z", "w")
STEP = 1e-5
# What steps from one constant to another has no derivative; the rest of what gives floats of floats has one.
FLAT = {"floor", "floordiv"}
FLOATS = [
    name for name, info in OPS.items() if (info.rule(("float",) * info.arity) or ((), ""))[1] == "float"
]
FLOATS = [name for name in FLOATS if name not in ("float", "where")]


def values_of(root: Expr, at: dict[str, Any]) -> Any:
    return evaluate([root], at)[0]


def difference(root: Expr, at: dict[str, Any], name: str, step: float = STEP) -> Any:
    with np.errstate(all="ignore"):
        above, below = (values_of(root, at | {name: at[name] + d}) for d in (step, -step))
        return np.asarray((above - below) / (2 * step))


def points(rng: np.random.Generator, count: int = 4000) -> dict[str, Any]:
    """Away from the corners: no operand near 0, no two alike, no quotient near an integer."""
    x, y = (np.sign(rng.uniform(-1, 1, count)) * rng.uniform(0.1, 3, count) for _ in range(2))
    smooth = (abs(x - y) > 0.05) & (abs(x / y - np.rint(x / y)) > 0.02) & (abs(x - np.rint(x)) > 0.02)
    return {"x": x[smooth], "y": y[smooth]}


def test_every_operator_of_floats_has_a_derivative_or_is_flat() -> None:
    for name, info in OPS.items():
        gives_floats = name in FLOATS or name == "where"
        assert bool(info.derivative) == (gives_floats and name not in FLAT), name
        assert not info.derivative or len(info.derivative) == info.arity
        assert "" not in info.derivative or name == "where"  # a condition has none


@pytest.mark.parametrize("name", FLOATS)
def test_rows_of_the_table(name: str, rng: np.random.Generator) -> None:
    at = points(rng)
    root = make(name, *(var(v) for v in NAMES[: OPS[name].arity]))
    for v in NAMES[: OPS[name].arity]:
        expected = difference(root, at, v)
        defined = np.isfinite(expected)
        assert defined.sum() > 500
        given = np.broadcast_to(values_of(derivative(root, var(v)), at), expected.shape)
        np.testing.assert_allclose(given[defined], expected[defined], rtol=2e-6, atol=1e-7, err_msg=v)
        if name in FLAT:
            assert derivative(root, var(v)) is const(0.0)


def test_where_takes_the_derivative_of_its_side(rng: np.random.Generator) -> None:
    at = points(rng) | {"h": rng.integers(0, 2, 1)}
    root = make(
        "where", make("eq", var("h"), const(0)), make("sin", var("x")), make("mul", var("x"), var("y"))
    )
    for h, v in product((0, 1), "xy"):
        here = at | {"h": np.array(h)}
        given = np.broadcast_to(values_of(derivative(root, var(v)), here), at["x"].shape)
        np.testing.assert_allclose(given, difference(root, here, v), atol=1e-8)


@pytest.mark.parametrize(
    ("root", "at", "expected"),
    [
        (make("abs", var("x")), {"x": 0.0}, [0.0]),
        (make("min", var("x"), var("y")), {"x": 2.0, "y": 2.0}, [0.5, 0.5]),
        (make("max", var("x"), var("y")), {"x": 2.0, "y": 2.0}, [0.5, 0.5]),
        (make("max", var("x"), var("x")), {"x": 2.0}, [1.0]),
        (make("max", var("x"), const(0.0)), {"x": 0.0}, [0.5]),  # relu
        (make("pow", var("x"), const(0.0)), {"x": 0.0}, [0.0]),
        (make("pow", var("x"), const(2.0)), {"x": 0.0}, [0.0]),
        (make("pow", var("x"), const(2.0)), {"x": -3.0}, [-6.0]),
        (make("pow", const(0.0), var("x")), {"x": 2.0}, [0.0]),
        (make("sqrt", var("x")), {"x": 0.0}, [np.inf]),
        (make("mod", var("x"), const(3.0)), {"x": 3.0}, [1.0]),
        (make("floor", var("x")), {"x": 2.0}, [0.0]),
        (make("float", make("int", var("x"))), {"x": 2.5}, [0.0]),
        (make("float", var("h")), {"h": 1, "x": 1.0}, [0.0]),
    ],
)  # fmt: skip
def test_corners(root: Expr, at: dict[str, float], expected: list[float]) -> None:
    """The mean of both sides; and what does not move has none, whatever it is made of."""
    leaves = [var(name) for name in at if name != "h"]
    assert [float(values_of(each, at)) for each in gradient(root, leaves)] == expected


def test_leaves_that_are_not_read_and_roots_that_are_leaves() -> None:
    assert gradient(var("x"), [var("x"), var("y"), param(0)]) == [const(1.0), const(0.0), const(0.0)]
    loaded = load(0, var("h"))
    assert derivative(make("mul", loaded, var("x")), loaded) is var("x")
    assert float_leaves(make("add", loaded, make("float", var("h")))) == [loaded]


@pytest.mark.parametrize("tame", [True, False], ids=["tame", "wild"])
def test_random_expressions(tame: bool, rng: np.random.Generator) -> None:
    """At every point where two steps of the difference agree, which leaves out corners and jumps.

    As in torch, the side that a where does not take spoils the derivative if it is not a number: left out as well.
    """
    checked = moving = 0
    for seed in range(400):
        random = Random(seed)  # noqa: S311
        root = Expressions(random, ("h", *NAMES), [(0, Buffer("f32", 1))], 1, tame).of("float", 5)
        if root.op == "load" or any(leaf.op != "var" for leaf in float_leaves(root)):
            continue  # they are leaves like the others: see above
        at: dict[str, Any] = {name: rng.uniform(-2, 2, 40) for name in NAMES} | {"h": rng.integers(0, 5, 40)}
        for leaf in float_leaves(root):
            name = str(leaf.attr)
            wide, near = (np.broadcast_to(difference(root, at, name, h), 40) for h in (2 * STEP, STEP))
            with np.errstate(all="ignore"):
                scale = np.maximum(1.0, abs(near))
                settled = (abs(wide - near) < 1e-7 * scale) & np.isfinite(near)
                for value in evaluate(topological([root]), at):
                    settled &= abs(value.astype(np.float64)) < 1e3
                given = np.broadcast_to(values_of(derivative(root, leaf), at), 40)
            np.testing.assert_allclose(
                given[settled], near[settled], rtol=1e-5, atol=1e-6, err_msg=f"seed {seed}: {root}"
            )
            checked, moving = checked + settled.sum(), moving + (settled & (near != 0)).sum()
    assert checked > 3000
    assert moving > 1000
