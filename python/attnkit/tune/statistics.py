"""Medians and the intervals they lie in."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_ROUNDS = 6  # of fewer values the median has no 95 % interval


@dataclass(frozen=True)
class Interval:
    """A median, the 95 % interval it lies in, and the number of values it is the median of."""

    median: float
    lo: float
    hi: float
    n: int

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit."""
        return Interval(self.median * factor, self.lo * factor, self.hi * factor, self.n)


def interval(values: list[float]) -> Interval:
    """The median of ``values`` and its distribution-free 95 % interval (order statistics).

    With fewer than `LEAST_ROUNDS` values no such interval exists, and the range is given.
    """
    ordered = sorted(values)
    n = len(ordered)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    rank = _lower_rank(n)
    return Interval(middle, ordered[rank], ordered[n - 1 - rank], n)


def _lower_rank(n: int) -> int:
    """The rank r for which the median lies between the r-th and (n-1-r)-th value in 95 % of cases (0 if n < 6).

    The normal approximation of the binomial, rounded to the safe side.
    """
    return max(0, int((n - 1 - 1.96 * math.sqrt(n)) / 2))
