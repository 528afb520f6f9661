"""Sums of integers as linear forms: ``factor * value + ... + constant``.

A variable that occurs twice in a sum counts once in its form, so its range is exact where that of the sum, taken
operator by operator, is not: ``q_idx - (q_idx - 3)`` is 3.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from attnkit.ir.expr import Expr
from attnkit.ir.intervals import INT64_MAX, INT64_MIN, Interval

_MAX_TERMS = 16
_SUMS = frozenset(("add", "sub", "neg", "mul", "const"))
COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))


class Form(NamedTuple):
    """``sum(factor * value) + constant``. Values are expressions that are no sums themselves."""

    terms: Mapping[Expr, int]
    constant: int

    def range(self, ranges: Mapping[Expr, Interval]) -> Interval | None:
        """Its range, exact if the values are independent; None if it may leave 64 bits."""
        lo = hi = self.constant
        for value, factor in self.terms.items():
            ends = factor * ranges[value].lo, factor * ranges[value].hi
            lo, hi = lo + int(min(ends)), hi + int(max(ends))
        return Interval(lo, hi) if INT64_MIN <= lo <= hi <= INT64_MAX else None

    def avoids_zero(self, ranges: Mapping[Expr, Interval]) -> bool:
        """Whether it can be proved to be 0 nowhere though its range holds 0: ``2 * q_idx - 128 * kv_idx - 1``.

        Asks for whole numbers x and y in their ranges with ``a * x + b * y + c = 0``, which is exact where at most
        two of its values vary.
        """
        c, varying = self.constant, []
        for value, factor in self.terms.items():
            lo, hi = int(ranges[value].lo), int(ranges[value].hi)
            if lo == hi:
                c += factor * lo
            else:
                varying.append((factor, lo, hi))
        if c % (math.gcd(*(factor for factor, _, _ in varying)) or 1):
            return True
        if len(varying) != 2:
            return False
        (a, x_lo, x_hi), (b, y_lo, y_hi) = varying
        step = math.gcd(a, b)
        a, b, c = a // step, b // step, c // step
        # b * y = -c modulo a; and a * x = -(b * y + c) bounds y by the range of x
        residue = -c * pow(b, -1, abs(a)) % abs(a)
        ends = sorted((-(a * x_lo + c), -(a * x_hi + c)), reverse=b < 0)
        first = max(y_lo, -(-ends[0] // b))
        first += (residue - first) % abs(a)
        return first > min(y_hi, ends[1] // b)


# Of sums only: a form that named its own expression would keep that alive.
_forms: weakref.WeakKeyDictionary[Expr, Form | None] = weakref.WeakKeyDictionary()


def form_of(node: Expr) -> Form:
    """The linear form of an int expression; what is no sum is a form of itself."""
    if node.op not in _SUMS or node.dtype != "int":
        return Form({node: 1}, 0)
    if node not in _forms:
        _forms[node] = _sum(node)
    return _forms[node] or Form({node: 1}, 0)


def difference(node: Expr) -> Form:
    """The form of what a comparison compares with 0: its left side less its right side."""
    return _add(form_of(node.args[0]), form_of(node.args[1]), -1)


def _sum(node: Expr) -> Form | None:
    if node.op == "const":
        return Form({}, int(node.attr or 0))
    args = [form_of(arg) for arg in node.args]  # operands are few and seen before: no deep recursion
    if node.op == "neg":
        form = _add(Form({}, 0), args[0], -1)
    elif node.op == "mul":
        constant, other = sorted(args, key=lambda form: len(form.terms))
        if constant.terms:
            return None
        form = _add(Form({}, 0), other, constant.constant)
    else:
        form = _add(args[0], args[1], 1 if node.op == "add" else -1)
    return form if len(form.terms) <= _MAX_TERMS else None


def _add(x: Form, y: Form, factor: int) -> Form:
    terms = dict(x.terms)
    for value, times in y.terms.items():
        terms[value] = terms.get(value, 0) + factor * times
    return Form({value: times for value, times in terms.items() if times}, x.constant + factor * y.constant)
