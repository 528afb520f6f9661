"""`ak.merge`: what the fold law says, against attention over all keys in float64 and torch's own derivatives."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak

CUTS = ([0, 23], [0, 7, 23], [0, 0, 1, 16, 23])
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def qkv(rng: np.random.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = (2, 4, 9, 16), (2, 2, 23, 16), (2, 2, 23, 24)
    return [torch.from_numpy(rng.standard_normal(size)).to(dtype) for size in sizes]


def visible(rng: np.random.Generator) -> Tensor:
    """Pairs that exist, some of the queries seeing nothing at all, some nothing of a stretch."""
    found = torch.from_numpy(rng.random((9, 23)) < 0.4)
    found[3] = False
    found[5, :16] = False
    return found


def pieces(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
    def piece(at: slice) -> Any:
        part = seen[:, at]
        mask = lambda b, h, i, j: part[i, j]  # noqa: E731
        return ak.attention(q, k[:, :, at], v[:, :, at], mask=mask, return_lse=True)

    return [piece(slice(first, end)) for first, end in pairwise(cuts)]


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    s = (q @ k.mT / 4).masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1)
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None]) @ v, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_parts_are_the_whole(rng: np.random.Generator, cuts: list[int], dtype: torch.dtype) -> None:
    q, k, v = qkv(rng, dtype)
    seen = visible(rng)
    o, lse = ak.merge(pieces(q, k, v, seen, cuts))
    of_all, lse_of_all = exact(q, k, v, seen)
    assert (o.dtype, lse.dtype, o.shape) == (dtype, torch.float32, of_all.shape)
    assert torch.allclose(o.double(), of_all, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    assert torch.allclose(lse.double(), lse_of_all, atol=DTYPES[dtype])
    assert not o[:, :, 3].any()
    assert (lse[:, :, 3] == -torch.inf).all()


def test_gradients_are_those_of_the_whole(rng: np.random.Generator) -> None:
    """Of o and of lse, through both of every part; rows that see nothing give zeros, not NaN."""
    tensors = [t.requires_grad_() for t in qkv(rng)]
    seen = visible(rng)
    d_o, d_lse = torch.randn(2, 4, 9, 24), torch.randn(2, 4, 9)
    d_lse[:, :, 3] = 0  # -inf has no slope
    found = torch.autograd.grad(ak.merge(pieces(*tensors, seen, [0, 7, 16, 23])), tensors, (d_o, d_lse))
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    o, lse = exact(*doubles, seen)
    alive = torch.tensor([i for i in range(9) if i != 3])
    total = (o[:, :, alive] * d_o.double()[:, :, alive]).sum() + (lse[:, :, alive] * d_lse[:, :, alive]).sum()
    for mine, expected in zip(found, torch.autograd.grad(total, doubles), strict=True):
        assert torch.allclose(mine.double(), expected.nan_to_num(0.0), atol=1e-5)


def test_the_order_and_the_grouping_of_parts_hardly_matter(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    a, b, c = pieces(q, k, v, visible(rng), [0, 7, 16, 23])
    flat, nested, turned = ak.merge([a, b, c]), ak.merge([ak.merge([a, b]), c]), ak.merge([c, a, b])
    for other in (nested, turned):
        assert torch.allclose(flat[0], other[0], atol=1e-6)
        assert torch.allclose(flat[1], other[1], atol=1e-6)
    alone = ak.merge([a])
    assert torch.allclose(alone[0], a[0], atol=1e-7)
    assert torch.allclose(alone[1], a[1], atol=1e-6)


def test_a_part_that_saw_nothing_counts_for_nothing(rng: np.random.Generator) -> None:
    o, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    empty = torch.full_like(o, torch.nan), torch.full_like(lse, -torch.inf)
    found = ak.merge([empty, (o, lse), empty])
    assert torch.equal(found[0], o)
    assert torch.allclose(found[1], lse)
    assert not ak.merge([empty, empty])[0].any()


def test_no_size_overflows() -> None:
    o = torch.randn(1, 1, 2, 4)
    for shift in (-3e38, -1e4, 1e4, 3e38):
        lse = torch.full((1, 1, 2), shift)
        merged, of = ak.merge([(o, lse), (-o, lse)])
        assert torch.allclose(merged, torch.zeros_like(o))
        assert torch.allclose(of, lse + np.log(2.0).item())


def test_in_a_graph(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    parts = pieces(q, k, v, visible(rng), [0, 7, 23])
    compiled = torch.compile(ak.merge, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(parts), ak.merge(parts)))


_O, _LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([], "AK401"), (None, "AK402"), (_O, "AK402"), ([_O], "AK402"), ([(_O,)], "AK402"), ([(_O, None)], "AK402"),
        ([(None, _LSE)], "AK402"), ([(_O[0], _LSE)], "AK403"), ([(_O, _LSE), (_O[:, :1], _LSE[:, :1])], "AK403"),
        ([(_O, _LSE[:, :, :1])], "AK403"), ([(_O, _LSE.double())], "AK404"), ([(_O, _LSE), (_O.half(), _LSE)], "AK404"),
        ([(_O.long(), _LSE)], "AK404"), ([(_O, _LSE), (_O.to("meta"), _LSE)], "AK405"),
    ],
)  # fmt: skip
def test_errors(parts: Any, code: str) -> None:
    with pytest.raises(ak.AttnkitError, match=code):
        ak.merge(parts)
