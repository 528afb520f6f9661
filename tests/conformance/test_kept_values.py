"""Keys and values that a thread keeps between tasks as products take them (csrc/cpu/kept-inl.h): never those of another
call, head, sequence or length."""

from collections.abc import Callable

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


QUERIES = 210  # three tasks: of one alone nothing is kept
ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_len, 64), (batch, kv_heads, kv_len, 64), (batch, kv_heads, kv_len, 64)]
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


def close(q: Tensor, k: Tensor, v: Tensor) -> None:
    error = ERRORS[q.dtype]
    torch.testing.assert_close(
        ak.attention(q, k, v, scale=SCALE).double(), exact(q, k, v), atol=error, rtol=2 * error
    )


def by_tokens(x: Tensor) -> Tensor:
    """The same, laid out [B, S, H, D], as models pass it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 64), (40, 24), (33, 65)])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, by_tokens])
def test_what_is_kept_changes_no_bit(
    dtype: torch.dtype, head_dim: int, v_head_dim: int, layout: Callable[[Tensor], Tensor]
) -> None:
    """All queries at once, and so few that one task has them."""
    q, k, v = (layout(x) for x in tensors(2, 4, 2, QUERIES, 333, dtype=dtype))
    q, k, v = q[..., :head_dim], k[..., :head_dim], torch.cat([v, v], -1)[..., :v_head_dim]
    for mask in (None, ak.document(torch.arange(333) // 70)):
        whole = ak.attention(q, k, v, scale=SCALE, mask=mask)
        if mask is None:
            torch.testing.assert_close(
                whole.double(), exact(q, k, v), atol=ERRORS[dtype], rtol=2 * ERRORS[dtype]
            )
            parts = [ak.attention(q[:, :, i : i + 70], k, v, scale=SCALE) for i in range(0, QUERIES, 70)]
            assert torch.equal(whole, torch.cat(parts, 2))
        else:
            same = ak.attention(*(x.contiguous() for x in (q, k, v)), scale=SCALE, mask=mask)
            assert torch.equal(whole, same)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        *(
            (codec, dtype)
            for codec in ("int8", "int4", "int2", "fp8")
            for dtype in (torch.float32, torch.bfloat16)
        ),
        ("f32", torch.float32),
        ("f16", torch.float16),
        ("bf16", torch.bfloat16),
        (("bf16", "int8"), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("head_dim", [64, 48])
def test_of_a_cache(codec: str, dtype: torch.dtype, page_size: int | None, head_dim: int) -> None:
    """As the tensors that it stands for, and no bit depends on what is kept."""
    q, k, v = (x[..., :head_dim] for x in tensors(2, 4, 2, QUERIES, 333, dtype=torch.float32))
    cache = ak.KVCache(2, 2, head_dim, max_len=400, codec=codec, page_size=page_size)
    cache.append(k, v)
    q = q.to(dtype)
    whole = ak.attention(q, cache, scale=SCALE)
    want = exact(q, *(x.double() for x in cache.dequantize()))
    torch.testing.assert_close(whole.double(), want, atol=ERRORS[dtype], rtol=2 * ERRORS[dtype])
    parts = [ak.attention(q[:, :, i : i + 70], cache, scale=SCALE) for i in range(0, QUERIES, 70)]
    assert torch.equal(whole, torch.cat(parts, 2))


def test_values_that_change_between_calls() -> None:
    q, k, v = tensors(1, 2, 2, QUERIES, 150)
    for factor in (1, -2, 0.5):
        v.mul_(factor)
        close(q, k, v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_and_entries_one_after_the_other(kv_heads: int) -> None:
    close(*tensors(3, 4, kv_heads, QUERIES, 230))


def test_more_keys_than_are_kept() -> None:
    """Of one head on many threads 8,192 keys of 64 channels, four mebibytes; a call with fewer comes before and after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        for kv_len in (40, 8100, 8300, 40):
            close(*tensors(1, 1, 1, QUERIES, kv_len, seed=kv_len))
    finally:
        torch.set_num_threads(threads)


def test_sequences_of_all_lengths() -> None:
    lengths = [40, 9000, 64, 130]
    q_ends, ends = (torch.tensor([0, *x]).cumsum(0).int() for x in ([QUERIES] * len(lengths), lengths))
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
