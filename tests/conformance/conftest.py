"""One way to compare: attnkit's result against the float64 oracle, through both gates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import testing

Compare = Callable[..., testing.Measured]


@pytest.fixture
def compare() -> Compare:
    """``compare(q, k, v, oracle={...}, **keywords of ak.attention)`` on numpy arrays."""

    def run(
        q: Any, k: Any, v: Any, *, oracle: dict[str, Any] | None = None, what: str = "", mostly_dead: bool = False,
        function: Callable[..., Any] = ak.attention, **call: Any,
    ) -> testing.Measured:  # fmt: skip
        expected = testing.attention(q, k, v, **(oracle or {}))
        o, lse = function(*map(torch.from_numpy, (q, k, v)), return_lse=True, **call)
        assert o.dtype == torch.float32
        assert lse.dtype == torch.float32
        return testing.check(o.numpy(), lse.numpy(), expected, what=what, mostly_dead=mostly_dead)

    return run


@pytest.fixture
def compare_reference() -> Callable[..., None]:
    """The same for the reference backend, which computes in float64: it must agree to float64 rounding."""

    def run(q: Any, k: Any, v: Any, *, oracle: dict[str, Any] | None = None, **call: Any) -> None:
        expected = testing.attention(*(x.astype(np.float64) for x in (q, k, v)), **(oracle or {}))
        tensors = (torch.from_numpy(x).double() for x in (q, k, v))
        o, lse = ak.attention(*tensors, return_lse=True, backend="reference", **call)
        assert o.dtype == torch.float64
        assert testing.measure(o.numpy(), expected.lse, expected).o_kappa <= 16
        np.testing.assert_allclose(lse.numpy(), expected.lse, rtol=2e-7, atol=2e-7)

    return run
