"""Interval rules of the operators: given the ranges of the operands, a range that holds the result.

An `Interval` describes a set of values: ints as Python ints, bools as 0 and 1 (so ``[0, 1]`` is Kleene's
"unknown"), floats as doubles with ``nan`` telling whether NaN is possible too. Rules here are exact or wide
in real arithmetic; `analysis.interval` then widens float results by the operator's error bound, so that a
range holds what a float32 kernel and what the float64 reference compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


class Interval(NamedTuple):
    """All values from ``lo`` to ``hi``, both included; and NaN if ``nan``."""

    lo: float
    hi: float
    nan: bool = False


Rule = Callable[..., Interval]

FALSE, TRUE, UNKNOWN = Interval(0, 0), Interval(1, 1), Interval(0, 1)
ANY_INT = Interval(INT64_MIN, INT64_MAX)
ANY_FLOAT = Interval(-math.inf, math.inf, True)
ANY = {"bool": UNKNOWN, "int": ANY_INT, "float": ANY_FLOAT}


def point(value: bool | int | float) -> Interval:
    """The interval that holds one value only."""
    if isinstance(value, float) and math.isnan(value):
        return ANY_FLOAT
    value = int(value) if isinstance(value, bool) else value
    return Interval(value, value)


def hull(x: Interval, y: Interval) -> Interval:
    """The smallest interval that holds both."""
    return Interval(min(x.lo, y.lo), max(x.hi, y.hi), x.nan or y.nan)


def _spread(candidates: Iterable[float], nan: bool) -> Interval:
    """Range of the values at the corners; a corner that is NaN (0 * inf, inf / inf) stands for 0."""
    values = list(candidates)
    nan = nan or any(v != v for v in values)
    values = [0.0 if v != v else v for v in values]
    return Interval(min(values), max(values), nan)


def _corners(function: Callable[[float, float], float], x: Interval, y: Interval) -> list[float]:
    return [function(a, b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)]


def monotone(function: Callable[[float], float]) -> Rule:
    """The rule of an increasing function that is defined everywhere."""

    def rule(x: Interval) -> Interval:
        return Interval(float(function(x.lo)), float(function(x.hi)), x.nan)

    return rule


def from_zero(function: Callable[[float], float]) -> Rule:
    """The rule of an increasing function that is NaN below zero (sqrt, log)."""

    def rule(x: Interval) -> Interval:
        if x.hi < 0:
            return ANY_FLOAT
        return Interval(float(function(max(x.lo, 0.0))), float(function(x.hi)), x.nan or x.lo < 0)

    return rule


def rsqrt(x: Interval) -> Interval:
    if x.lo <= 0:  # minus zero gives minus infinity
        return ANY_FLOAT
    return Interval(1 / math.sqrt(x.hi), 1 / math.sqrt(x.lo), x.nan)


def wave(x: Interval) -> Interval:
    """sin and cos."""
    return Interval(-1.0, 1.0, x.nan or math.isinf(x.lo) or math.isinf(x.hi))


def neg(x: Interval) -> Interval:
    return Interval(-x.hi, -x.lo, x.nan)


def absolute(x: Interval) -> Interval:
    return Interval(max(x.lo, -x.hi, 0), max(-x.lo, x.hi), x.nan)


def add(x: Interval, y: Interval) -> Interval:
    lo, hi = x.lo + y.lo, x.hi + y.hi
    nan = (
        x.nan or y.nan or (x.hi == math.inf and y.lo == -math.inf) or (x.lo == -math.inf and y.hi == math.inf)
    )
    return Interval(-math.inf if lo != lo else lo, math.inf if hi != hi else hi, nan)


def sub(x: Interval, y: Interval) -> Interval:
    return add(x, neg(y))


def mul(x: Interval, y: Interval) -> Interval:
    # 0 * inf may hide inside the ranges even where no corner shows it
    nan = (_holds_zero(x) and _unbounded(y)) or (_holds_zero(y) and _unbounded(x))
    return _spread(_corners(lambda a, b: a * b, x, y), x.nan or y.nan or nan)


def div(x: Interval, y: Interval) -> Interval:
    if _holds_zero(y):
        return ANY_FLOAT
    nan = x.nan or y.nan or (_unbounded(x) and _unbounded(y))
    return _spread(_corners(lambda a, b: float(np.divide(a, b)), x, y), nan)


def power(x: Interval, y: Interval) -> Interval:
    if x.lo <= 0:
        return ANY_FLOAT
    return _spread(_corners(lambda a, b: float(np.power(float(a), float(b))), x, y), x.nan or y.nan)


def floordiv(x: Interval, y: Interval) -> Interval:
    if isinstance(x.lo, int) and isinstance(y.lo, int):
        pieces = [p for p in (Interval(y.lo, min(y.hi, -1)), Interval(max(y.lo, 1), y.hi)) if p.lo <= p.hi]
        values = [v for piece in pieces for v in _corners(lambda a, b: a // b, x, piece)]
        return _spread([*values, 0] if _holds_zero(y) else values, False)
    # A float32 kernel floors a rounded quotient: widen before flooring, a floor may jump.
    quotient = widen(div(x, y), 0.5)
    return Interval(float(np.floor(quotient.lo)), float(np.floor(quotient.hi)), quotient.nan)


def mod(x: Interval, y: Interval) -> Interval:
    if isinstance(x.lo, int) and isinstance(y.lo, int):
        if y.lo == y.hi != 0 and x.lo // y.lo == x.hi // y.lo:  # within one period
            return Interval(x.lo % y.lo, x.hi % y.lo)
        return Interval(min(0, y.lo + 1), max(0, y.hi - 1))
    if _holds_zero(y) or _unbounded(x) or _unbounded(y):
        return ANY_FLOAT
    # x - floor(x / y) * y: the product is rounded at the magnitude of x
    slack = 2.0**-21 * (max(abs(x.lo), abs(x.hi)) + max(abs(y.lo), abs(y.hi))) + 2.0**-126
    return Interval(min(0.0, y.lo) - slack, max(0.0, y.hi) + slack, x.nan or y.nan)


def minimum(x: Interval, y: Interval) -> Interval:
    return Interval(min(x.lo, y.lo), min(x.hi, y.hi), x.nan or y.nan)


def maximum(x: Interval, y: Interval) -> Interval:
    return Interval(max(x.lo, y.lo), max(x.hi, y.hi), x.nan or y.nan)


def lt(x: Interval, y: Interval) -> Interval:
    """Comparisons with NaN are false, so NaN spoils only the answer "always true"."""
    if x.lo >= y.hi:
        return FALSE
    return TRUE if x.hi < y.lo and not (x.nan or y.nan) else UNKNOWN


def le(x: Interval, y: Interval) -> Interval:
    if x.lo > y.hi:
        return FALSE
    return TRUE if x.hi <= y.lo and not (x.nan or y.nan) else UNKNOWN


def gt(x: Interval, y: Interval) -> Interval:
    return lt(y, x)


def ge(x: Interval, y: Interval) -> Interval:
    return le(y, x)


def eq(x: Interval, y: Interval) -> Interval:
    if x.hi < y.lo or y.hi < x.lo:
        return FALSE
    return TRUE if x.lo == x.hi == y.lo == y.hi and not (x.nan or y.nan) else UNKNOWN


def ne(x: Interval, y: Interval) -> Interval:
    return logical_not(eq(x, y))


def logical_not(x: Interval) -> Interval:
    return Interval(1 - x.hi, 1 - x.lo)


def bitwise_and(x: Interval, y: Interval) -> Interval:
    """Of ints, bools among them: never more than an operand that is not negative, nor than the lesser of two that are."""
    if x.lo == x.hi and y.lo == y.hi:
        return point(int(x.lo) & int(y.lo))
    tops = [z.hi for z in (x, y) if z.lo >= 0]
    most = min(tops) if tops else min(x.hi, y.hi) if x.hi < 0 and y.hi < 0 else max(x.hi, y.hi)
    return Interval(0 if tops else -_whole_bits(x, y), most)


def bitwise_or(x: Interval, y: Interval) -> Interval:
    return _complement(bitwise_and(_complement(x), _complement(y)))


def bitwise_xor(x: Interval, y: Interval) -> Interval:
    if x.lo == x.hi and y.lo == y.hi:
        return point(int(x.lo) ^ int(y.lo))
    end = _whole_bits(x, y)
    signs = {-1 if z.hi < 0 else 1 if z.lo >= 0 else 0 for z in (x, y)}
    alike, unlike = signs in ({1}, {-1}), signs == {1, -1}
    return Interval(0 if alike else -end, -1 if unlike else end - 1)


def _complement(x: Interval) -> Interval:
    return Interval(-1 - x.hi, -1 - x.lo)


def _whole_bits(x: Interval, y: Interval) -> int:
    """The least 2^n of which all values lie in [-2^n, 2^n - 1], which bitwise operators do not leave."""
    return 1 << int(max(x.hi, y.hi, -1 - x.lo, -1 - y.lo)).bit_length()


def where(condition: Interval, x: Interval, y: Interval) -> Interval:
    if condition.lo == condition.hi:
        return x if condition.lo else y
    return hull(x, y)


def to_float(x: Interval) -> Interval:
    return Interval(float(x.lo), float(x.hi))


def to_int(x: Interval) -> Interval:
    if isinstance(x.lo, int):  # a bool
        return x
    if x.nan or x.lo <= INT32_MIN or x.hi >= INT32_MAX:  # what a kernel makes of these is unspecified
        return ANY_INT
    return Interval(math.trunc(x.lo), math.trunc(x.hi))


def widen(x: Interval, ulp: float) -> Interval:
    """Widen a float range so that it also holds results with an error of ``ulp`` float32 ulps."""
    if ulp == math.inf:
        return Interval(-math.inf, math.inf, True)
    if ulp == 0:
        return x
    return Interval(-_round_up(-x.lo, ulp), _round_up(x.hi, ulp), x.nan)


_F32_MAX, _F32_TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def _round_up(value: float, ulp: float) -> float:
    if math.isinf(value):
        return value
    if -_F32_TINY < value < 0:  # a kernel may flush it to zero
        return 0.0
    if abs(value) > _F32_MAX:
        return math.inf if value > 0 else -_F32_MAX
    if ulp > 0.5:
        return value + abs(value) * (ulp + 1) * 2.0**-23
    # A correctly rounded operator is monotone: an end that float32 can represent stays where it is.
    rounded = np.float32(value)
    return value if float(rounded) == value else float(np.nextafter(rounded, np.float32(np.inf)))


def _holds_zero(x: Interval) -> bool:
    return x.lo <= 0 <= x.hi


def _unbounded(x: Interval) -> bool:
    return math.isinf(x.lo) or math.isinf(x.hi)
