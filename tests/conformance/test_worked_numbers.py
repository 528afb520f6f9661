"""Numbers that can be checked by hand: one channel, two queries, three keys."""

from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import testing

Q, K, V = ([[[[1.0], [2.0]]]], [[[[0.0], [1.0], [-1.0]]]], [[[[1.0], [2.0], [4.0]]]])
SINK = torch.zeros(1)
# (keywords, o of both queries, lse of both queries)
CASES: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    "bottom right": ({"mask": ak.causal()}, [1.731059, 1.914442], [1.313262, 2.142932]),
    "top left": ({"mask": ak.causal("top_left")}, [1.0, 1.880797], [0.0, 2.126928]),
    "first two keys": ({"mask": ak.prefix(2)}, [1.731059, 1.880797], [1.313262, 2.126928]),
    "last key": ({"mask": ~ak.prefix(2)}, [4.0, 4.0], [-1.0, -2.0]),
    "sink": (
        {"mask": ak.causal(), "normalizer": ak.softmax(SINK)},
        [1.364176, 1.713438],
        [1.551445, 2.253856],
    ),
}


def by_hand(name: str, backend: str) -> None:
    call, o, lse = CASES[name]
    q, k, v = (torch.tensor(x) for x in (Q, K, V))
    got, got_lse = ak.attention(q, k, v, scale=1.0, return_lse=True, backend=backend, **call)
    np.testing.assert_allclose(got.flatten(), o, atol=6e-7)
    np.testing.assert_allclose(got_lse.flatten(), lse, atol=6e-7)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_by_hand(name: str, isa: str) -> None:
    by_hand(name, "cpu")


@pytest.mark.parametrize("name", CASES)
def test_the_reference_by_hand(name: str) -> None:
    by_hand(name, "reference")


def test_two_parts_merge_to_the_whole() -> None:
    """Query 1 over keys {0, 1} and over {2}: o = sum of e^(lse_a - lse) o_a."""
    lse = np.array([2.126928, -2.0])
    weights = np.exp(lse - np.log(np.exp(lse).sum()))
    np.testing.assert_allclose(weights @ [1.880797, 4.0], 1.914442, atol=1e-6)


def test_the_oracle_by_hand() -> None:
    arrays = [np.array(x) for x in (Q, K, V)]
    expected = testing.attention(*arrays, scale=1.0, mask=lambda p: p.kv_idx <= p.position, sink=np.zeros(1))
    np.testing.assert_allclose(expected.o.flatten(), CASES["sink"][1], atol=6e-7)
    np.testing.assert_allclose(expected.lse.flatten(), CASES["sink"][2], atol=6e-7)
