"""Masks of draft trees: against the definition, against causal attention, and against decoding one token at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak

pytestmark = pytest.mark.shows

TREES = {
    "one node": [-1],
    "chain": [-1, 0, 1, 2, 3, 4],
    "star": [-1, 0, 0, 0, 0],
    "drafts": [-1, 0, 1, 1, 3, 3, 0],
    "several roots": [-1, -1, 0, 1, 2, 3, -1],
    "children first": [3, 0, 3, 4, -1, 2],
}


def lineage(parents: list[int], node: int) -> list[int]:
    """A node and its ancestors, from the root down."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def by_definition(trees: list[list[int]], q_len: int, kv_len: int) -> Tensor:
    visible = torch.zeros(len(trees), 1, q_len, kv_len, dtype=torch.bool)
    visible[..., : kv_len - q_len] = True
    for b, parents in enumerate(trees):
        for node in range(q_len):
            for ancestor in lineage(parents, node):
                visible[b, 0, node, kv_len - q_len + ancestor] = True
    return visible


@pytest.mark.parametrize("cache", [0, 9])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8])
@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_its_definition(name: str, dtype: torch.dtype, cache: int, qkv: Any, oracle: Any) -> None:
    parents = TREES[name]
    n = len(parents)
    q, k, v = qkv(length=n, kv_len=n + cache, kv_heads=2)
    visible = by_definition([parents], n, n + cache)
    o, lse = ak.attention(q, k, v, mask=ak.tree(torch.tensor(parents, dtype=dtype)), return_lse=True)
    expected, its_lse = oracle(q, k, v, mask=lambda b, h, i, j: visible)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(lse.double(), its_lse, rtol=1e-5, atol=3e-6)


def test_random_trees_of_each_batch_entry(qkv: Any, oracle: Any, rng: np.random.Generator) -> None:
    trees = [[int(rng.integers(-1, i)) if i else -1 for i in range(12)] for _ in range(3)]
    visible = by_definition(trees, 12, 20)
    q, k, v = qkv(3, length=12, kv_len=20)
    mask = ak.tree(torch.tensor(trees))
    expected, _ = oracle(q, k, v, mask=lambda b, h, i, j: visible)
    torch.testing.assert_close(ak.attention(q, k, v, mask=mask).double(), expected, rtol=1e-5, atol=3e-6)
    q, k, v = q[:, :, :5], k[:, :, :13], v[:, :, :13]  # the nodes behind the fifth are not used
    expected, _ = oracle(q, k, v, mask=lambda b, h, i, j: by_definition(trees, 5, 13))
    torch.testing.assert_close(ak.attention(q, k, v, mask=mask).double(), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("cache", [0, 9])
def test_a_chain_is_causal(cache: int, qkv: Any) -> None:
    q, k, v = qkv(length=8, kv_len=8 + cache)
    chain = ak.attention(q, k, v, mask=ak.tree(torch.arange(8) - 1), return_lse=True)
    assert all(map(torch.equal, chain, ak.attention(q, k, v, mask=ak.causal(), return_lse=True)))


@pytest.mark.parametrize("name", TREES)
def test_a_path_is_decoded_as_if_one_token_followed_the_other(name: str, qkv: Any) -> None:
    parents, cache = TREES[name], 6
    n = len(parents)
    q, k, v = qkv(length=n, kv_len=cache + n)
    together = ak.attention(q, k, v, mask=ak.tree(torch.tensor(parents)))
    for leaf in sorted(set(range(n)) - set(parents)):
        path = lineage(parents, leaf)
        for depth, node in enumerate(path):
            seen = [*range(cache), *(cache + ancestor for ancestor in path[: depth + 1])]
            alone = ak.attention(q[:, :, node : node + 1], k[:, :, seen], v[:, :, seen])
            torch.testing.assert_close(together[:, :, node : node + 1], alone, rtol=1e-5, atol=2e-6)


def test_composed_padded_and_compiled(qkv: Any, oracle: Any) -> None:
    parents = torch.tensor(TREES["drafts"])
    q, k, v = qkv(length=7, kv_len=16)
    lens = torch.tensor([16, 11], dtype=torch.int32)
    mask = ak.tree(parents) & (lambda b, h, i, j: j != 2)

    def visible(b: Any, h: Any, i: Any, j: Any) -> Tensor:
        rows = [by_definition([TREES["drafts"]], 7, n) for n in lens.tolist()]
        return torch.cat([torch.nn.functional.pad(x, (0, 16 - x.shape[3])) for x in rows]) & (j != 2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ak.attention(q, k, v, mask=mask, kv_lens=lens)

    expected, _ = oracle(q, k, v, mask=visible)
    torch.testing.assert_close(call(q, k, v).double(), expected, rtol=1e-5, atol=3e-6)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(q, k, v), call(q, k, v))


def test_a_tree_too_small_is_refused(qkv: Any) -> None:
    with pytest.raises(ak.AttnkitValueError, match="AK601"):
        ak.attention(*qkv(length=5), mask=ak.tree(torch.tensor([-1, 0, 1, 2])))


@pytest.mark.parametrize(
    ("parents", "code", "given"),
    [
        ([-1, 2, 1], "AK414", "below a cycle"),
        ([0], "AK414", "node 0 below a cycle"),
        ([-1, 0, 3], "AK414", "parent 3 in a tree of 3 nodes"),
        ([-2, 0], "AK414", "parent -2"),
        ([[-1, 0], [1, 0]], "AK414", "below a cycle"),
        ([[[-1]]], "AK403", "[1, 1, 1]"),
        ([-1.0, 0.0], "AK404", "float32"),
        ([True], "AK404", "bool"),
    ],
)
def test_what_is_no_tree(parents: Any, code: str, given: str) -> None:
    with pytest.raises(ak.AttnkitError) as caught:
        ak.tree(torch.tensor(parents))
    assert (caught.value.code, caught.value.where) == (code, "parents")
    assert given in caught.value.given


def test_a_list_is_no_tensor() -> None:
    with pytest.raises(ak.AttnkitTypeError, match="AK402"):
        ak.tree([-1, 0])  # type: ignore[arg-type]
