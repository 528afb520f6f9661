"""What an expression can be on a box of variables: interval arithmetic with the rules of the op table.

Always sound: a range holds every value that the float64 reference and a float32 kernel compute. Exact for sums of
integers and their comparisons (see `analysis.linear`); elsewhere a variable that occurs twice counts as two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnkit.analysis.linear import COMPARISONS, difference, form_of
from attnkit.ir.expr import Expr, topological
from attnkit.ir.intervals import ANY, FALSE, INT64_MAX, INT64_MIN, TRUE, UNKNOWN, Interval, point, widen
from attnkit.ir.optable import OPS

Box = Mapping[str, Interval]


@dataclass(frozen=True)
class Facts:
    """What is known besides the box.

    ``buffers`` holds the captured arrays (numpy), None where the contents are unknown; ``params`` the values
    of the run-time scalars. What is not listed can be anything.
    """

    buffers: Sequence[np.ndarray[Any, Any] | None] = ()
    params: Sequence[float] = ()
    _ranges: dict[tuple[object, ...], Interval] = field(default_factory=dict, repr=False, compare=False)

    def load(self, node: Expr, index: Sequence[Interval]) -> Interval:
        """The range of the elements that a load can read. Anything, if the index can leave the buffer."""
        slot = int(node.attr or 0)
        array = self.buffers[slot] if slot < len(self.buffers) else None
        if array is None or any(i.lo < 0 or i.hi >= n for i, n in zip(index, array.shape, strict=True)):
            return ANY[node.dtype]
        key = (slot, *index)
        found = self._ranges.get(key)
        if found is None:
            part = array[tuple(slice(int(i.lo), int(i.hi) + 1) for i in index)]
            found = self._ranges[key] = _range(part)
        return found


NOTHING = Facts()


def evaluate(roots: Sequence[Expr], box: Box, facts: Facts = NOTHING) -> list[Interval]:
    """Ranges of the roots where each variable is in its interval of the box (anything, if it has none)."""
    return evaluate_order(topological(roots), roots, box, facts)


def evaluate_order(order: Sequence[Expr], roots: Sequence[Expr], box: Box, facts: Facts) -> list[Interval]:
    """`evaluate` with the topological order of the roots at hand, for calls that repeat."""
    ranges: dict[Expr, Interval] = {}
    with np.errstate(all="ignore"):  # infinities are values here
        for node in order:
            known = _evaluate_linear(node, ranges)
            ranges[node] = known or _evaluate_node(node, [ranges[arg] for arg in node.args], box, facts)
    return [ranges[root] for root in roots]


_ZERO = point(0)


def _evaluate_linear(node: Expr, ranges: Mapping[Expr, Interval]) -> Interval | None:
    """The range of a sum of integers, or of a comparison of two; None if it is neither or may leave 64 bits."""
    if node.dtype == "int" and node.args:
        form = form_of(node)
        return None if node in form.terms else form.range(ranges)
    if node.op not in COMPARISONS or node.args[0].dtype != "int":
        return None
    # What wraps around compares differently from what does not.
    sides = [form_of(arg).range(ranges) for arg in node.args]
    form = difference(node)
    distance = form.range(ranges)
    if distance is None or None in sides:
        return None
    known = OPS[node.op].interval(distance, _ZERO)
    if known == UNKNOWN and node.op in ("eq", "ne") and form.avoids_zero(ranges):
        return FALSE if node.op == "eq" else TRUE
    return known


def _evaluate_node(node: Expr, args: list[Interval], box: Box, facts: Facts) -> Interval:
    if node.op == "var":
        return box.get(str(node.attr), ANY[node.dtype])
    if node.op == "load":
        return facts.load(node, args)
    if node.op == "const" and node.attr is not None and not isinstance(node.attr, str):
        return _settle(node, point(node.attr), 0.5)
    if node.op == "param":
        index = int(node.attr or 0)
        known = index < len(facts.params)
        return _settle(node, point(float(facts.params[index])), 0.5) if known else ANY["float"]
    info = OPS[node.op]
    return _settle(node, info.interval(*args), info.ulp)


def _settle(node: Expr, x: Interval, ulp: float) -> Interval:
    """Bring the result of a rule into its dtype: widened for rounding, or cut at what wraps around."""
    if node.dtype == "float":
        return widen(Interval(float(x.lo), float(x.hi), x.nan), ulp)
    if node.dtype == "int" and not INT64_MIN <= x.lo <= x.hi <= INT64_MAX:
        return ANY["int"]
    return x


def _range(values: np.ndarray[Any, Any]) -> Interval:
    if values.dtype.kind == "f":
        nan = bool(np.isnan(values).any())
        if nan and np.isnan(values).all():
            return ANY["float"]
        return Interval(float(np.nanmin(values)), float(np.nanmax(values)), nan)
    return Interval(int(values.min()), int(values.max()))
