"""ak.selective_attention over caches that keep codes: what they mean, in float64; steps, roll-back, layouts, budgets; the op."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import AttnkitError
from attnkit.ops.carried_cache import attend_carried_cache
from attnkit.ops.functional import plain_text
from attnkit.ops.selective import selective_text
from attnkit.ops.traced import Traceable, bind
from attnkit.variants import selective

pytestmark = pytest.mark.shows

Randn = Callable[..., Tensor]
CODECS: list[Any] = ["int8", "fp8", "int4", "int2", ("int8", "int4"), ("bf16", "int2"), ("int4", "fp8")]
B, HKV, HQ, D, DV, MAX, R = 3, 2, 4, 64, 96, 320, 40
LENGTHS = [300, 157, 31]
LENS = torch.tensor(LENGTHS, dtype=torch.int32)
each_codec = pytest.mark.parametrize("codec", CODECS)
each_layout = pytest.mark.parametrize("page", [None, 64])


def make(codec: Any, page: int | None = None, batch: int = B) -> ak.KVCache:
    return ak.KVCache(batch, HKV, D, DV, max_len=MAX, residual=R, codec=codec, page_size=page, group_size=32)


def tokens(randn: Randn, n: int) -> tuple[Tensor, Tensor]:
    return randn(B, HKV, n, D), randn(B, HKV, n, DV)


def filled(codec: Any, page: int | None, k: Tensor, v: Tensor) -> ak.KVCache:
    """Of ragged lengths; its pages in any order."""
    cache = make(codec, page)
    if (table := cache.segment.page_table) is not None:
        table.copy_(torch.randperm(table.numel(), generator=torch.Generator().manual_seed(0)).view_as(table))
    cache.append(k, v, LENS)
    return cache


def before() -> Tensor:
    """What was carried; some keys of each row are gone."""
    carry = torch.rand(B, MAX, generator=torch.Generator().manual_seed(1))
    carry[:, 5:9] = torch.inf
    return carry


def attend(q: Tensor, cache: ak.KVCache, carry: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    o, after = ak.selective_attention(q, cache, carry=carry, return_carry=True, **how)
    return o, after


def follows_the_equation(
    q: Tensor, cache: ak.KVCache, carry: Tensor, tolerance: float, **how: Any
) -> tuple[Tensor, Tensor]:
    """Row by row, in float64, over what the codes mean."""
    o, after = attend(q, cache, carry, **how)
    k, v = (x.numpy() for x in cache.dequantize())
    for b, n in enumerate(cache.lengths.tolist()):
        given = (
            q[b : b + 1].float().numpy(),
            k[b : b + 1, :, :n],
            v[b : b + 1, :, :n],
            carry[b : b + 1, :n].numpy(),
        )
        want = selective.naive(*given, **how)
        torch.testing.assert_close(
            o[b : b + 1].double(), torch.from_numpy(want.o), rtol=tolerance, atol=tolerance
        )
        sums = torch.from_numpy(want.carry)
        torch.testing.assert_close(after[b : b + 1, :n].double(), sums, rtol=1e-5, atol=min(tolerance, 1e-3))
        assert torch.equal(after[b, n:], carry[b, n:])
    return o, after


@each_layout
@each_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_equation(codec: Any, page: int | None, dtype: torch.dtype, randn: Randn) -> None:
    """Steps, a few queries, a chunk."""
    cache = filled(codec, page, *tokens(randn, 300))
    tolerance = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for q_len in (1, 4, 30):
        follows_the_equation(randn(B, HQ, q_len, D).to(dtype), cache, before(), tolerance, head=1)


@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "fp8"])
def test_widths_and_stretches(codec: str, randn: Randn) -> None:
    """With and without products on codes; over several stretches of keys; beside a softcap."""
    for dim, v_dim, heads in ((40, 72, 2), (128, 128, 8), (544, 33, 2)):
        cache = ak.KVCache(1, 2, dim, v_dim, max_len=1500, codec=codec)
        cache.append(randn(1, 2, 1400, dim), randn(1, 2, 1400, v_dim))
        for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 4e-3)):
            q = randn(1, heads, 1, dim).to(dtype)
            follows_the_equation(q, cache, torch.rand(1, cache.max_len), tolerance)
            got = ak.attention(q, cache, score=ak.selective(score=ak.softcap(0.5)))
            k, v = (x[:, :, :1400].numpy() for x in cache.dequantize())
            want = selective.naive(q.float().numpy(), k, v, softcap=0.5).o
            assert isinstance(got, Tensor)
            torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=tolerance, atol=tolerance)


@each_layout
@each_codec
def test_steps_and_roll_back(codec: Any, page: int | None, randn: Randn) -> None:
    """Drafts that are taken back have never been: neither as tokens nor in what is carried."""
    k, v = tokens(randn, 300)
    tried, never = (filled(codec, page, k, v) for _ in range(2))
    carry = torch.zeros(B, MAX)
    for n in (1, 3, 1):
        at = tried.lengths.clone()
        drafts, q = tokens(randn, 5), randn(B, HQ, 5, D).bfloat16()
        tried.append(*drafts)
        attend(q, tried, carry)
        tried.truncate(at)
        new, q = tokens(randn, n), randn(B, HQ, n, D).bfloat16()
        for cache in (tried, never):
            cache.append(*new)
        o, after = follows_the_equation(q, never, carry, 2e-2)
        assert all(map(torch.equal, attend(q, tried, carry), (o, after)))
        carry = after
    assert carry.any()


@each_codec
def test_a_budget(codec: Any, randn: Randn) -> None:
    cache = filled(codec, None, *tokens(randn, 300))
    for q_len in (1, 4, 30):
        q = randn(B, HQ, q_len, D)
        _, after = follows_the_equation(q, cache, before(), 5e-6, budget=40)
        o, carry = attend(q, cache, before(), budget=1000)
        assert all(map(torch.equal, (o, carry), attend(q, cache, before())))
        for b, n in enumerate(LENGTHS):
            assert after[b, :n].isfinite().sum() <= 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_codec
def test_no_bit_depends_on_pages_threads_or_the_rest_of_the_batch(
    codec: Any, dtype: torch.dtype, randn: Randn
) -> None:
    k, v = tokens(randn, 300)
    caches = [filled(codec, page, k, v) for page in (None, 32, 64)]
    for q_len in (1, 3, 40):
        q = randn(B, HQ, q_len, D).to(dtype)
        want = attend(q, caches[0], before())
        for cache in caches[1:]:
            assert all(map(torch.equal, attend(q, cache, before()), want))
        for n in (1, 3):
            torch.set_num_threads(n)
            assert all(map(torch.equal, attend(q, caches[0], before()), want))
        for b in range(B):
            alone = make(codec, batch=1)
            alone.append(k[b : b + 1], v[b : b + 1], LENS[b : b + 1])
            got = attend(q[b : b + 1], alone, before()[b : b + 1])
            assert all(map(torch.equal, got, (x[b : b + 1] for x in want)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gone_may_hold_anything(dtype: torch.dtype, randn: Randn) -> None:
    k, v = tokens(randn, 300)
    clean = filled("int8", None, k, v)
    k[:, :, 5:9], v[:, :, 5:9] = torch.nan, torch.inf
    dirty = filled("int8", None, k, v)
    for q_len in (1, 4, 30):
        q = randn(B, HQ, q_len, D).to(dtype)
        want = attend(q, clean, before())
        assert all(map(torch.equal, attend(q, dirty, before()), want))
        assert want[0].isfinite().all()


# --- as an op ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_compiled_steps(codec: str, randn: Randn) -> None:
    """One graph for all lengths, the same bits; opcheck; autocast."""
    k, v = tokens(randn, 300)
    cache, eager = (filled(codec, None, k, v) for _ in range(2))

    def step(q: Tensor, k: Tensor, v: Tensor, carry: Tensor) -> Any:
        cache.append(k, v)
        return ak.selective_attention(q, cache, carry=carry, budget=50, return_carry=True)

    torch.compiler.reset()
    compiled, carry = torch.compile(step, fullgraph=True, backend="aot_eager"), before()
    for i in range(3):
        q, new = randn(B, HQ, 1, D), tokens(randn, 1)
        eager.append(*new)
        want = attend(q, eager, carry, budget=50)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(q, *new, carry)
        assert all(map(torch.equal, got, want))
        carry = want[1]
    codes = cache.segment.codes
    assert codes is not None
    layout = Traceable(None, ak.causal(), kv_lens=cache.lengths, codecs=codes.scheme.codecs)
    program, buffers, _ = bind(layout, q)
    text = selective_text(program, 0, 50, True)
    torch.library.opcheck(
        torch.ops.attnkit.attend_carried_cache.default,
        (q, codes.storage, codes.scheme.text, carry, text, buffers, []),
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(q, eager, carry)
    assert all(map(torch.equal, got, attend(q.bfloat16(), eager, carry)))


def test_errors(randn: Randn) -> None:
    cache, q = filled("int8", 64, *tokens(randn, 300)), randn(B, HQ, 1, D)
    codes = cache.segment.codes
    assert codes is not None
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("AK401", lambda: ak.selective_attention(q, cache, head=HQ)),
        ("AK403", lambda: ak.selective_attention(q[..., :8], cache)),
        ("AK403", lambda: ak.selective_attention(q, cache, carry=torch.zeros(B, MAX - 1))),
        ("AK404", lambda: ak.selective_attention(q, cache, carry=torch.zeros(B, MAX, dtype=torch.float64))),
        ("AK404", lambda: ak.selective_attention(q.double(), cache)),
        ("AK407", lambda: ak.selective_attention(q[:, :3], cache)),
        ("AK405", lambda: ak.selective_attention(q.to("meta"), cache)),
        ("AK408", lambda: ak.selective_attention(q, cache, q)),
        ("AK502", lambda: attend_carried_cache(q, codes, None, plain_text(), [], [])),
        ("AK503", lambda: ak.selective_attention(q.clone().requires_grad_(), cache)),
        ("AK503", lambda: ak.selective_attention(q, cache, carry=before().requires_grad_())),
        ("AK602", lambda: ak.selective_attention(q[:1], cache)),
    ]
    for code, call in wrong:
        with pytest.raises(AttnkitError) as caught:
            call()
        assert caught.value.code == code
    table = cache.segment.page_table
    assert table is not None
    table[1, 1] = -1
    with pytest.raises(AttnkitError, match=r"AK602(.|\n)*page_table\[1, 1\]"):
        ak.selective_attention(q, cache)


def test_the_accumulator_is_exact_where_it_can_be(randn: Randn) -> None:
    """The worked numbers of variants.md G7 through codes that hold them exactly, one step after the other."""
    logits = torch.tensor([[0.5, 0, 0, 0], [2, 1, 0, 0], [1, 3, 0.2, 0], [0, -1, 2, 1]])
    cache, eye, carry = (
        ak.KVCache(1, 1, 4, max_len=16, codec="int8"),
        torch.eye(4)[None, None],
        torch.zeros(1, 16),
    )
    for i in range(4):
        cache.append(eye[:, :, i : i + 1], eye[:, :, i : i + 1])
        o, carry = ak.selective_attention(
            logits[None, None, i : i + 1], cache, scale=1.0, carry=carry, return_carry=True
        )
    np.testing.assert_allclose(carry[0, :4], [0, 3, 2, 0], rtol=2e-3)
    np.testing.assert_allclose(o[0, 0, 0], [0.089882, 0.001646, 0.664146, 0.244326], rtol=2e-2)
