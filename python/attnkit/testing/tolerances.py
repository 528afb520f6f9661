"""When a result is close enough. Two gates, and both must be passed.

1. FlashAttention's rule: the largest error is at most twice that of the naive computation in the same dtype (the
   worst of a few orders of its sums), plus two units in the last place. It scales with the difficulty of the problem,
   but trusts somebody else's errors.
2. An a-priori bound, element by element: ``|o - o*| <= kappa * u * o_terms + 2 u |o*|`` with ``u`` the unit
   roundoff. With weights ``P``, logits ``z`` and ``a = scale * |q| . |k|``, what rounds on the way to a weight is of
   size ``A = 1 + a + |z|``, and to first order that moves o by ``o_terms = (P A) |v| + (P A) 1 |o*|``, lse by
   ``lse_terms = (P A) 1``. Small where the values are small; ``kappa`` is measured, recorded per kernel, and may
   only go down. (It holds for scores that do not stretch: ``|dz/ds| <= 1``.)

16-bit results (`Expected.dtype`) are computed in float32 and rounded once, so ``u`` stays float32's, and rounding o
adds its own ``u |o*|``. Where weights are rounded to bfloat16 for the dot-product instructions, after they were summed,
``rounded_p`` roundings of 2^-8 each may move o by ``P |v|``. Scores, sums and lse are float32 everywhere.

Before any tolerance, NaN and infinities must be where the oracle has them, dead rows must be exactly zero, and the
oracle's result must be worth comparing with: nine tenths zeros, or a constant, would prove nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnkit.testing.floats import FORMATS
from attnkit.testing.oracle import Expected

Array = NDArray[Any]


class Kappa(NamedTuple):
    """Constants of the a-priori bound, for o and for lse, and how often weights are rounded to bfloat16."""

    o: int
    lse: int
    rounded_p: float = 0


# By kernel, and dtype where it is not float32. The largest needed by tests/conformance on every instruction set and ten
# seeds was 4.4 for o (outliers), 5.9 for lse (all scores equal: their errors have one sign); 12.1 for the lse of bfloat16,
# whose exponentials are good to 2^-19 (one-hot keys). A kernel's constants may go down, never up.
KAPPA: dict[str, Kappa] = {
    "cpu": Kappa(o=5, lse=6),
    "cpu bfloat16": Kappa(o=5, lse=14, rounded_p=1),
    "cpu float16": Kappa(o=5, lse=6),
    # Triton's kernels interpreted, where exponentials are numpy's: 1.3 for o and 1.9 for lse were needed. On a GPU nothing was
    # measured yet.
    "interpreted": Kappa(o=2, lse=3),
    "interpreted float16": Kappa(o=2, lse=3, rounded_p=0.125),
    "triton": Kappa(o=5, lse=6),
    "triton float16": Kappa(o=5, lse=6, rounded_p=0.125),
    "triton bfloat16": Kappa(o=5, lse=6, rounded_p=1),
}

FACTOR = 2.0  # of the naive computation's error
_ULPS = 2.0
_HALF_ULP = 0.5  # what rounding to 16 bits costs
_MIN_SIZE = 16  # fewer elements may well be equal


class Measured(NamedTuple):
    """How close a result is: errors relative to the two gates; up to 1 (up to kappa) passes.

    ``o_ratio`` is the largest error over what FlashAttention's rule allows, ``o_kappa`` the smallest constant with
    which the a-priori bound would hold; likewise for lse.
    """

    o_ratio: float
    lse_ratio: float
    o_kappa: float
    lse_kappa: float


def check(
    o: Array,
    lse: Array,
    expected: Expected,
    *,
    kernel: str = "cpu",
    mostly_dead: bool = False,
    what: str = "",
) -> Measured:
    """Assert that a result passes both gates; returns how close it is.

    Args:
        o: ``[B, Hq, Sq, Dv]``, float32 (also where its values are those of bfloat16 or float16).
        lse: ``[B, Hq, Sq]``, float32.
        expected: what `oracle.attention` gives for the same problem.
        kernel: whose constants to use; with the dtype, where it is not float32, a key of `KAPPA`.
        mostly_dead: the problem is about rows that see nothing; do not ask for a rich result.
        what: names the problem in messages.

    Raises:
        AssertionError: a gate is missed, or the comparison would be vacuous.
    """
    if not mostly_dead:
        _not_vacuous(expected.o, what)
    for name, got, want in (("o", o, expected.o), ("lse", lse, expected.lse)):
        _same_pattern(got, want, f"{what} {name}")
    dead = np.isneginf(expected.lse)
    assert not np.any(o[dead]), f"{what}: o is not exactly 0 in a row that sees nothing"
    kappa = KAPPA[kernel if expected.dtype in ("float32", "float64") else f"{kernel} {expected.dtype}"]
    measured = measure(o, lse, expected, kappa.rounded_p)
    for name, got, want, value, limit in (
        ("o: error over FlashAttention's rule", o, expected.o, measured.o_ratio, 1.0),
        ("lse: error over FlashAttention's rule", lse, expected.lse, measured.lse_ratio, 1.0),
        ("o: kappa", o, expected.o, measured.o_kappa, kappa.o),
        ("lse: kappa", lse, expected.lse, measured.lse_kappa, kappa.lse),
    ):
        assert value <= limit, f"{what} {name} is {value:.3g}, allowed {limit}; {_worst(got, want)}"
    return measured


def measure(o: Array, lse: Array, expected: Expected, rounded_p: float = 0) -> Measured:
    """How close ``o`` and ``lse`` are to ``expected``; see `check` for shapes and `Kappa` for ``rounded_p``."""
    computed = FORMATS[o.dtype.name]
    stored = computed if computed.digits > FORMATS["float32"].digits else FORMATS[expected.dtype]
    # What underflows on the way: every product and every sum may lose half the smallest number. The dot-product
    # instructions know no subnormal numbers at all.
    lost = expected.kv_len * (computed.smallest_normal if rounded_p else computed.spacing(0))
    ratios, kappas = [], []
    for got, naive, want, terms, weights, to in (
        (o, expected.naive_o, expected.o, expected.o_terms, expected.o_weights, stored),
        (lse, expected.naive_lse, expected.lse, expected.lse_terms, np.zeros(()), computed),
    ):
        known = np.isfinite(want)
        error, size = _error(got, want, known), np.abs(np.where(known, want, 0))
        # A naive result that overflowed has no error to compare with.
        naive_error = max(float(_error(one, want, known & np.isfinite(one)).max(initial=0)) for one in naive)
        ulps = _ULPS if to is computed else _HALF_ULP
        allowed = FACTOR * naive_error + ulps * to.spacing(float(size.max(initial=0)))
        ratios.append(float(error.max(initial=0)) / (allowed + (lost if rounded_p else 0)))
        rounding = 2 * computed.unit_roundoff * size
        rounding += rounded_p * FORMATS["bfloat16"].unit_roundoff * np.where(known, weights, 0)
        if to is not computed:
            rounding += to.unit_roundoff * size + to.spacing(0) / 2
        beyond = error - rounding - lost
        unit = computed.unit_roundoff * np.where(known, terms, 0)
        needed = np.divide(beyond, unit, out=np.where(beyond > 0, np.inf, 0), where=unit > 0)
        kappas.append(float(needed.max(initial=0)))
    return Measured(ratios[0], ratios[1], kappas[0], kappas[1])


def _error(got: Array, want: Array, known: Array) -> Array:
    difference: Array = np.where(known, got, 0).astype(np.float64) - np.where(known, want, 0)
    return np.abs(difference)


def _not_vacuous(want: Array, what: str) -> None:
    if want.size < _MIN_SIZE:
        return
    zeros = float(np.mean(want == 0))
    assert zeros <= 0.9, f"MISTRUSTED {what}: {zeros:.0%} of the reference is zero"
    assert not np.all(want == want.flat[0]), f"MISTRUSTED {what}: the reference is constant"


def _same_pattern(got: Array, want: Array, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    for name, pattern in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differ = np.argwhere(pattern(got) != pattern(want))
        assert not len(differ), (
            f"{what}: {name} at {len(differ)} elements where it must not be, or missing; "
            f"first {differ[0].tolist()}: {got[tuple(differ[0])]} for {want[tuple(differ[0])]}"
        )


def _worst(got: Array, want: Array) -> str:
    error = _error(got, want, np.isfinite(want))
    at = np.unravel_index(int(error.argmax()), error.shape)
    return f"largest error at {[int(i) for i in at]}: {got[at]!r} for {want[at]!r}"
