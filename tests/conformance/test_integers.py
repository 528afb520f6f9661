"""Integers of a score, at every instruction set: floor division, remainder and bits, against Python's, to the ends of 32 bits."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak

MOST = 2**31 - 1
ENDS = [0, 1, -1, 2, -2, 3, 63, 64, -64, 65, 2**30, -(2**30), 2**24 + 1, MOST, -MOST]
Operator = Callable[[Any, Any], Any]


@pytest.fixture
def numbers(rng: np.random.Generator) -> np.ndarray:
    """Integers of every length, and those beside which something changes."""
    some = rng.integers(-MOST, MOST, 100) >> rng.integers(0, 31, 100)
    return np.concatenate([some, ENDS])


def check(x: np.ndarray, y: np.ndarray, of_traced: Operator, of_arrays: Operator) -> None:
    """Every pair says what numpy says: those that do not are missing in the sum of weights, which all are 1."""
    left, right = (torch.from_numpy(a.astype(np.int32)) for a in (x, y))
    want = torch.from_numpy(of_arrays(x[:, None], y[None, :]).astype(np.int32))

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.where(of_traced(left[q_idx], right[kv_idx]) == want[q_idx, kv_idx], 0.0, -torch.inf)

    q, k = torch.zeros(1, 1, len(x), 8), torch.zeros(1, 1, len(y), 8)
    _, lse = ak.attention(q, k, k, score=score, return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(len(y))))


@pytest.mark.parametrize("of_arrays", [operator.floordiv, operator.mod])
@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 64, 1000, 2**30, MOST, -1, -2, -5, -64, -MOST])
def test_of_a_constant(of_arrays: Operator, divisor: int, isa: str, numbers: np.ndarray) -> None:
    check(numbers, np.full(9, divisor), lambda x, y: of_arrays(torch.clamp(x, min=-MOST), divisor), of_arrays)


@pytest.mark.parametrize("of_arrays", [operator.floordiv, operator.mod])
@pytest.mark.parametrize("sign", [1, -1])
def test_of_each_pair(of_arrays: Operator, sign: int, isa: str, numbers: np.ndarray) -> None:
    """Divisors that the analysis knows not to be 0, for they are cut off there."""
    cut = (lambda y: torch.clamp(y, min=1)) if sign > 0 else (lambda y: torch.clamp(y, max=-1))
    divisors = np.maximum(numbers, 1) if sign > 0 else np.minimum(numbers, -1)
    check(numbers, divisors, lambda x, y: of_arrays(torch.clamp(x, min=-MOST), cut(y)), of_arrays)


@pytest.mark.parametrize("of_arrays", [operator.and_, operator.or_, operator.xor])
def test_bits(of_arrays: Operator, isa: str, numbers: np.ndarray) -> None:
    check(numbers, numbers[::-1], of_arrays, of_arrays)


@pytest.mark.parametrize("literal", [0, 1, 12, 63, 0x55555555, MOST, -1, -4, -64, -11, -(2**31)])
@pytest.mark.parametrize("of_arrays", [operator.and_, operator.or_, operator.xor])
def test_bits_of_a_literal(of_arrays: Operator, literal: int, isa: str, numbers: np.ndarray) -> None:
    check(numbers, np.full(9, literal), lambda x, y: of_arrays(x, literal), of_arrays)
