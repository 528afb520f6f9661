"""The float formats that results come in. numpy has no bfloat16: its values travel as float32 arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Format(NamedTuple):
    """``digits`` of the significand, the leading one among them, and the exponent of the smallest normal number."""

    digits: int
    lowest: int

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding to nearest."""
        return float(2.0**-self.digits)

    @property
    def smallest_normal(self) -> float:
        """Below it the numbers are equally spaced."""
        return float(2.0**self.lowest)

    def spacing(self, x: float) -> float:
        """The distance of ``x`` from the next larger number, as `numpy.spacing`."""
        exponent = max(int(np.frexp(x)[1]) - 1, self.lowest) if x else self.lowest
        return float(np.ldexp(1.0, exponent - self.digits + 1))


FORMATS = {
    "float64": Format(53, -1022),
    "float32": Format(24, -126),
    "bfloat16": Format(8, -126),
    "float16": Format(11, -14),
}


def rounded(x: Any, dtype: str) -> Array:
    """``x``, a float32 or float64 array, with the values that ``dtype`` has for it (to nearest, ties to even)."""
    x = np.asarray(x)
    if dtype != "bfloat16":
        with np.errstate(over="ignore", under="ignore"):
            result: Array = x.astype(dtype).astype(x.dtype)
        return result
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    result = np.where(np.isnan(x), x, nearest)
    return result.astype(x.dtype)
