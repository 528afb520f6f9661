"""The canonical form says the same with less, and what is already canonical stays what it is."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from attnkit.analysis.canonical import canonical, fold
from attnkit.backends.reference import evaluate
from attnkit.ir.expr import Expr
from attnkit.ir.program import Program
from attnkit.ir.text import parse, parse_expr, print_expr
from attnkit.testing.strategies import PAIR_VARIABLES, expressions, programs

FOLDED = {
    "(1 != 0) & (kv_idx <= q_idx)": "kv_idx <= q_idx",
    "(0 != 0) | (h < 2 * 3)": "h < 6",
    "(h < 2) & (2 < 1)": "false",
    "where(true, q_idx, kv_idx) + 0": "q_idx",
    "0 + (h + 0 * 3)": "h",
    "(h < 2) & ((b < 1) & (h + 0 < 2))": "(b < 1) & (h < 2)",
    "((h < 2) & (b < 1)) & (b < 1)": "(h < 2) & (b < 1)",
    "where(b < 1, h, h)": "h",
    "s * (2.0 * 3.0)": "s * (2.0 * 3.0)",  # floats are left to the backend
    "2147483647 + 1": "2147483647 + 1",  # what leaves 32 bits is for the verifier of the engine to refuse
}


@pytest.mark.parametrize("text", FOLDED)
def test_what_is_folded(text: str) -> None:
    assert print_expr(fold(parse_expr(text))) == FOLDED[text]


@settings(max_examples=300)
@given(st.one_of(expressions("float"), expressions("bool"), expressions("int")))
def test_values_stay(root: Expr) -> None:
    variables = {
        name: np.float64(0.5) if name == "s" else np.int64(i + 1) for i, name in enumerate(PAIR_VARIABLES)
    }
    before, after = evaluate([root, fold(root)], variables)
    np.testing.assert_array_equal(before, after)


@given(programs())
def test_canonical_is_a_legal_program_and_its_own_canonical_form(program: Program) -> None:
    once = canonical(program)
    assert parse(once.text) is once
    assert canonical(once) is once
