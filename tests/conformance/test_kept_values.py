"""Values that a thread keeps transposed between tasks (csrc/cpu/kernel_amx-inl.h): never those of another call, head,
sequence or length. What holds of them holds at every level."""

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.cpu.engine import engine

SCALE = 0.125
INF = float("inf")


@pytest.fixture(params=engine().isa_levels(), autouse=True)
def _level(request: pytest.FixtureRequest) -> object:
    before = engine().current_isa()
    engine().set_isa(request.param)
    yield
    engine().set_isa(before)


def tensors(batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_len, 64), (batch, kv_heads, kv_len, 64), (batch, kv_heads, kv_len, 64)]
    return [torch.randn(shape, generator=random).bfloat16() for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


def close(q: Tensor, k: Tensor, v: Tensor) -> None:
    torch.testing.assert_close(
        ak.attention(q, k, v, scale=SCALE).double(), exact(q, k, v), atol=8e-3, rtol=1e-2
    )


def test_values_that_change_between_calls() -> None:
    q, k, v = tensors(1, 2, 2, 100, 150)
    for factor in (1, -2, 0.5):
        v.mul_(factor)
        close(q, k, v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_and_entries_one_after_the_other(kv_heads: int) -> None:
    close(*tensors(3, 4, kv_heads, 50, 230))


def test_more_keys_than_are_kept() -> None:
    """8,192 keys of 64 channels fill a mebibyte; a call with fewer comes before and after."""
    for kv_len in (40, 8192, 8200, 40):
        close(*tensors(1, 1, 1, 33, kv_len, seed=kv_len))


def test_sequences_of_all_lengths() -> None:
    lengths = [40, 9000, 64, 130]
    q_ends, ends = (torch.tensor([0, *x]).cumsum(0).int() for x in ([33] * len(lengths), lengths))
    q, k, v = tensors(1, 2, 1, int(q_ends[-1]), int(ends[-1]))
    o = ak.attention(q, k, v, scale=SCALE, cu_seqlens_q=q_ends, cu_seqlens_kv=ends)
    for i in range(len(lengths)):
        at, keys = (slice(int(x[i]), int(x[i + 1])) for x in (q_ends, ends))
        want = exact(q[:, :, at], k[:, :, keys], v[:, :, keys])
        torch.testing.assert_close(o[:, :, at].double(), want, atol=8e-3, rtol=1e-2)


@pytest.mark.parametrize("worst", [INF, -INF, float("nan")])
def test_values_that_are_no_numbers_change_nothing_beside_them(worst: float) -> None:
    """Of queries that all see them, and of queries of which some do."""
    q, k, v = tensors(1, 2, 2, 200, 300)
    for mask, first in ((None, 0), (ak.causal(), 44)):  # whose first query sees 101 keys
        clean, spoilt = v.clone(), v.clone()
        clean[0, 0, 144, 3], spoilt[0, 0, 144, 3] = 0, worst
        one, other = (ak.attention(q, k, x, mask=mask, scale=SCALE) for x in (clean, spoilt))
        reached = torch.zeros_like(one, dtype=torch.bool)
        reached[0, 0, first:, 3] = True
        assert torch.equal(one[~reached], other[~reached])
        assert not other[reached].isfinite().any()
