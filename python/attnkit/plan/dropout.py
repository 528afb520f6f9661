"""Dropout as kernels take it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from attnkit.ir.expr import Expr


class Dropped(NamedTuple):
    """A pair is kept iff its random word is at least ``threshold``; then its weight is taken ``factor`` times.

    With p = 1 no pair is kept: no threshold of 32 bits says so, a factor of 0 does.
    """

    threshold: int
    factor: float

    @classmethod
    def of(cls, dropout: Expr, params: Sequence[float]) -> Dropped:
        """The numbers of a call of a program with this ``dropout``, a constant or one of its ``params``."""
        p = float(params[int(dropout.attr or 0)] if dropout.op == "param" else dropout.attr or 0)
        threshold = math.ceil(p * 2.0**32)
        return cls(2**32 - 1, 0.0) if threshold == 2**32 else cls(threshold, 1.0 / (1.0 - p))
