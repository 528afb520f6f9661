"""What is read off the attention map, against the whole map."""

from typing import Any

import numpy as np
import pytest
import torch

from attnkit.variants import dense, readouts

pytestmark = pytest.mark.shows


def qkv(rng: np.random.Generator, sq: int = 5, skv: int = 7) -> Any:
    return (
        rng.standard_normal((2, 4, sq, 6)),
        rng.standard_normal((2, 2, skv, 6)),
        rng.standard_normal((2, 2, skv, 3)),
    )


def test_by_hand() -> None:
    """The worked example of dense attention: rows [.268941 .731059 0] and [.117310 .866813 .015876]."""
    q, k, v = (np.array(x, float).reshape(1, 1, -1, 1) for x in ([1, 2], [0, 1, -1], [1, 2, 4]))
    got = readouts.naive(q, k, v, scale=1.0, causal=True)
    np.testing.assert_allclose(
        got.weights[0, 0], [[0.268941, 0.731059, 0], [0.117310, 0.866813, 0.015876]], atol=6e-7
    )
    np.testing.assert_allclose(got.column_sum[0, 0], [0.386252, 1.597872, 0.015876], atol=1e-6)
    np.testing.assert_allclose(got.column_max[0, 0], [0.268941, 0.866813, 0.015876], atol=6e-7)
    np.testing.assert_allclose(got.row_max[0, 0], [0.731059, 0.866813], atol=6e-7)
    np.testing.assert_allclose(got.entropy[0, 0], [0.582203, 0.441057], atol=1e-6)


@pytest.mark.parametrize("name", readouts.CASES)
def test_against_the_map(rng: np.random.Generator, name: str) -> None:
    """torch's softmax of all scores, and reductions of it."""
    parameters = readouts.CASES[name]
    q, k, v = qkv(rng)
    got = readouts.naive(q, k, v, **parameters)
    s = torch.from_numpy(q) @ torch.from_numpy(k.repeat(2, axis=1)).mT * 6**-0.5
    cap = parameters.get("softcap")
    s = s if cap is None else cap * torch.tanh(s / cap)
    i, j = torch.arange(5)[:, None], torch.arange(7)[None]
    seen = (j <= i + 2) | torch.tensor(not parameters.get("causal"))
    seen = seen & (i >= parameters.get("first_row", 0))
    p = torch.softmax(s.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0)
    expected = {
        "weights": p,
        "column_sum": p.sum(-2),
        "column_max": p.amax(-2),
        "row_max": p.amax(-1),
        "entropy": torch.special.entr(p).sum(-1),
    }
    for field, value in expected.items():
        np.testing.assert_allclose(getattr(got, field), value, atol=1e-13, err_msg=field)
    if "first_row" not in parameters:
        o, lse = dense.naive(
            q, k, v, causal=parameters.get("causal", False), **({"softcap": cap} if cap else {})
        )
        np.testing.assert_allclose(got.o, o, atol=1e-14)
        np.testing.assert_allclose(got.lse, lse, atol=1e-14)


def test_identities(rng: np.random.Generator) -> None:
    """Rows sum to 1, so columns to the number of queries; the largest weight bounds the entropy."""
    got = readouts.naive(*qkv(rng), causal=True)
    np.testing.assert_allclose(got.column_sum.sum(axis=2), 5)
    assert (got.entropy <= np.log(np.arange(3, 8)) + 1e-12).all()
    assert (got.entropy >= -np.log(got.row_max) - 1e-12).all()
    assert (got.column_max >= got.column_sum / 5 - 1e-12).all()
