"""`ak.attention` with other normalisers than softmax: the reference runs them, the engine says that it does not."""

from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak

CASES: dict[str, Any] = {
    "sigmoid": ak.sigmoid,
    "signed": ak.signed_softmax,
    "queries": ak.softmax_over_queries,
}


def expected(name: str, z: Any, visible: Any) -> Any:
    if name == "sigmoid":
        return np.where(visible, 1 / (1 + np.exp(-(z - np.log(z.shape[1])))), 0)
    axis, size = (0, z) if name == "queries" else (1, abs(z))
    e = np.where(visible, np.exp(size), 0)
    total = e.sum(axis=axis, keepdims=True)
    return np.divide(e, total, out=np.zeros_like(e), where=total > 0) * (
        1 if name == "queries" else np.sign(z)
    )


@pytest.mark.parametrize("name", CASES)
def test_reference_runs_it(name: str, rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((1, 1, n, d)) for n, d in ((5, 4), (7, 4), (7, 3)))
    o = ak.attention(
        *map(torch.from_numpy, (q, k, v)), mask=ak.causal(), normalizer=CASES[name](), backend="reference"
    )
    visible = np.arange(7) <= np.arange(5)[:, None] + 2
    np.testing.assert_allclose(
        o[0, 0].numpy(), expected(name, q[0, 0] @ k[0, 0].T / 2, visible) @ v[0, 0], atol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_engine_says_that_it_does_not(name: str) -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ak.AttnkitError, match="AK502"):
        ak.attention(q, q, q, normalizer=CASES[name]())


@pytest.mark.parametrize("name", ["sigmoid", "queries"])
def test_no_lse_where_there_is_none(name: str) -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ak.AttnkitError, match="AK221"):
        ak.attention(q, q, q, normalizer=CASES[name](), return_lse=True)


def test_bias_of_sigmoid_is_a_number() -> None:
    with pytest.raises(ak.AttnkitError, match="AK402"):
        ak.sigmoid("0")  # type: ignore[arg-type]
