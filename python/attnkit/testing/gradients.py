"""Gradients by finite differences, and how two results in float64 are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def differences(
    function: Callable[..., Sequence[Array]],
    inputs: Sequence[Any],
    cotangents: Sequence[Any],
    step: float = 1e-5,
) -> list[Float64 | None]:
    """The gradient of ``sum(cotangent * result)`` by every float input, one element at a time, by central differences.

    ``function(*inputs)`` gives arrays; results that are not finite (the lse of a row that sees nothing) do not count.
    What is no float array has no gradient: None. Errors are of the order of ``step ** 2``.
    """
    inputs = [np.array(x) for x in inputs]
    gradients: list[Float64 | None] = []

    def total() -> float:
        pairs = zip(function(*inputs), cotangents, strict=True)
        return sum(
            float(np.sum(np.where(np.isfinite(result), result, 0) * cotangent)) for result, cotangent in pairs
        )

    for x in inputs:
        if x.dtype.kind != "f":
            gradients.append(None)
            continue
        gradient = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            kept = x[at]
            x[at] = kept + step
            above = total()
            x[at] = kept - step
            gradient[at] = (above - total()) / (2 * step)
            x[at] = kept
        gradients.append(gradient)
    return gradients


def agree(got: Any, want: Any, tolerance: float = 1e-12, what: str = "") -> None:
    """Raise AssertionError unless NaN and infinities stand at the same places and the rest is as close as it should be.

    The distance is relative to the largest finite element of ``want``, or to 1 if that is less.
    """
    got, want = np.asarray(got), np.asarray(want)
    finite = np.isfinite(want)
    size = max(1.0, float(np.abs(np.where(finite, want, 0)).max(initial=0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * size, err_msg=what)


FACTOR = 3.0  # of the naive computation's error
_ULPS = 4.0


def close(got: Any, naive: Any, want: Any, what: str = "") -> float:
    """Raise AssertionError unless a gradient is about as close as the naive computation in its dtype comes.

    ``got`` and ``naive`` are in the dtype under test, ``want`` in float64. Returns the error over what is allowed.
    """
    got, naive, want = (np.asarray(x) for x in (got, naive, want))
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=f"{what}: where it is finite")
    finite = np.isfinite(want)
    error, naive_error = (
        float(np.abs(np.where(finite, x, 0).astype(np.float64) - np.where(finite, want, 0)).max(initial=0))
        for x in (got, naive)
    )
    largest = float(np.abs(np.where(finite, want, 0)).max(initial=0))
    allowed = FACTOR * naive_error + _ULPS * float(np.spacing(np.asarray(largest, got.dtype)))
    assert error <= allowed, (
        f"{what}: error {error:.3g}, allowed {allowed:.3g}, largest element {largest:.3g}"
    )
    return error / allowed
