"""Gradients by finite differences in float64: slow, and right whatever the function is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def central(
    function: Callable[..., Sequence[Array]],
    inputs: Sequence[Array],
    cotangents: Sequence[Array],
    step: float = 1e-5,
) -> list[Float64]:
    """The gradient by every input of ``sum(cotangent * result)`` over the results of ``function(*inputs)``.

    Central differences, one element after the other: two calls for each. At unit scale, and away from corners, they
    are good to about nine digits. The inputs are copied to float64, never written to.
    """
    values = [np.array(x, np.float64) for x in inputs]

    def loss() -> float:
        return float(sum(np.sum(c * r) for c, r in zip(cotangents, function(*values), strict=True)))

    gradients = []
    for x in values:
        gradient = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            centre = x[at]
            x[at] = centre + step
            above = loss()
            x[at] = centre - step
            gradient[at] = (above - loss()) / (2 * step)
            x[at] = centre
        gradients.append(gradient)
    return gradients
