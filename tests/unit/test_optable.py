"""The op table: complete rows, type rules, and numpy functions that mean what the table says."""

import math
from typing import Any

import numpy as np
import pytest

from attnkit.ir.optable import CALLS, INFIX, OPS, PREFIXES, OpInfo

DTYPES = ("float", "int", "bool")


@pytest.mark.parametrize("info", OPS.values(), ids=OPS)
def test_rows_are_complete(info: OpInfo) -> None:
    assert info.arity in (1, 2, 3)
    assert info.cpu
    assert info.symbol
    assert info.ulp >= 0
    spellings = CALLS if info.precedence == 0 else INFIX if info.arity == 2 else PREFIXES
    assert spellings[info.symbol] is info


@pytest.mark.parametrize("info", OPS.values(), ids=OPS)
def test_every_row_accepts_bools_and_casts_to_known_types(info: OpInfo) -> None:
    typed = info.rule(("bool",) * info.arity)
    assert typed is not None
    wanted, result = typed
    assert len(wanted) == info.arity
    assert {*wanted, result} <= set(DTYPES)


@pytest.mark.parametrize("info", OPS.values(), ids=OPS)
def test_numpy_gives_the_dtype_of_the_rule(info: OpInfo) -> None:
    kinds = {"float": np.float64, "int": np.int64, "bool": np.bool_}
    for dtype in DTYPES:
        typed = info.rule(
            (("bool",) if info.name == "where" else ()) + (dtype,) * (info.arity - (info.name == "where"))
        )
        if typed is None:
            continue
        wanted, result = typed
        args = [np.ones(3, dtype=kinds[d]) for d in wanted]
        assert np.asarray(info.numpy(*args)).dtype == kinds[result]


def test_joins() -> None:
    assert OPS["add"].rule(("int", "float")) == (("float", "float"), "float")
    assert OPS["add"].rule(("bool", "bool")) == (("int", "int"), "int")
    assert OPS["div"].rule(("int", "int")) == (("float", "float"), "float")
    assert OPS["eq"].rule(("bool", "bool")) == (("bool", "bool"), "bool")
    assert OPS["eq"].rule(("bool", "int")) == (("int", "int"), "bool")
    assert OPS["lt"].rule(("bool", "bool")) == (("int", "int"), "bool")
    assert OPS["where"].rule(("bool", "int", "float")) == (("bool", "float", "float"), "float")
    assert OPS["where"].rule(("int", "int", "float")) is None
    assert OPS["and"].rule(("bool", "int")) == (("int", "int"), "int")
    assert OPS["and"].rule(("bool", "float")) is None
    assert OPS["not"].rule(("int",)) is None
    assert OPS["not"].rule(("float",)) is None


@pytest.mark.parametrize("x", [-7, -6, -1, 0, 1, 6, 7])
@pytest.mark.parametrize("y", [-3, -1, 1, 3])
def test_integer_division_is_that_of_python(x: Any, y: Any) -> None:
    assert OPS["floordiv"].numpy(np.int64(x), np.int64(y)) == x // y
    assert OPS["mod"].numpy(np.int64(x), np.int64(y)) == x % y


def test_float_division_by_definition() -> None:
    with np.errstate(all="ignore"):
        assert OPS["floordiv"].numpy(np.float64(-7.5), np.float64(2.0)) == -4.0
        assert OPS["mod"].numpy(np.float64(-7.5), np.float64(2.0)) == 0.5
        assert np.isinf(OPS["floordiv"].numpy(np.float64(1.0), np.float64(0.0)))


def test_functions_without_a_numpy_name() -> None:
    x = np.array([-50.0, -1.0, 0.0, 2.0])
    np.testing.assert_allclose(OPS["sigmoid"].numpy(x), [1 / (1 + math.exp(-v)) for v in x], rtol=1e-14)
    np.testing.assert_allclose(OPS["erf"].numpy(x), [math.erf(v) for v in x])
    np.testing.assert_allclose(OPS["rsqrt"].numpy(np.array([4.0])), [0.5])


def test_min_and_max_propagate_nan() -> None:
    assert np.isnan(OPS["min"].numpy(np.nan, 1.0))
    assert np.isnan(OPS["max"].numpy(1.0, np.nan))
