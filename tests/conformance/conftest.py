"""One way to compare: attnkit's result against the float64 oracle, through both gates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import testing
from attnkit.testing.floats import rounded

Compare = Callable[..., testing.Measured]


@pytest.fixture
def dtype() -> str:
    """What q, k, v and o are stored as. Tests of 16-bit floats are parametrized with others."""
    return "float32"


@pytest.fixture
def compare(dtype: str) -> Compare:
    """``compare(q, k, v, oracle={...}, **keywords of ak.attention)`` on float32 arrays, rounded to ``dtype``."""

    def run(
        q: Any, k: Any, v: Any, *, oracle: dict[str, Any] | None = None, what: str = "", mostly_dead: bool = False,
        function: Callable[..., Any] = ak.attention, **call: Any,
    ) -> testing.Measured:  # fmt: skip
        arrays = [rounded(x, dtype) for x in (q, k, v)] if dtype != "float32" else [q, k, v]
        stored = getattr(torch, dtype)
        o, lse = function(*(torch.from_numpy(x).to(stored) for x in arrays), return_lse=True, **call)
        assert o.dtype == stored
        assert lse.dtype == torch.float32
        for orders in (1, 8, 32):  # one that few naive orders let through, more of them do
            expected = testing.attention(*arrays, dtype=dtype, orders=orders, **(oracle or {}))
            try:
                return testing.check(
                    o.float().numpy(), lse.numpy(), expected, what=what, mostly_dead=mostly_dead
                )
            except AssertionError:
                if orders == 32:
                    raise
        raise AssertionError("unreachable")

    return run


@pytest.fixture
def compare_reference() -> Callable[..., None]:
    """The same for the reference backend, which computes in float64: it must agree to float64 rounding."""

    def run(q: Any, k: Any, v: Any, *, oracle: dict[str, Any] | None = None, **call: Any) -> None:
        expected = testing.attention(*(x.astype(np.float64) for x in (q, k, v)), orders=1, **(oracle or {}))
        tensors = (torch.from_numpy(x).double() for x in (q, k, v))
        o, lse = ak.attention(*tensors, return_lse=True, backend="reference", **call)
        assert o.dtype == torch.float64
        assert testing.measure(o.numpy(), expected.lse, expected).o_kappa <= 16
        np.testing.assert_allclose(lse.numpy(), expected.lse, rtol=2e-7, atol=2e-7)

    return run
