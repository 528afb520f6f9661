"""Caches that keep codes: which codes, what attention makes of them, and that no step or layout changes a bit."""

import copy
import itertools
import pickle  # noqa: TID251 -- what others may do to a cache, to send it to a process
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import AttnkitError
from attnkit.variants import kv_quant

Randn = Callable[..., Tensor]
EachIsa = Callable[[], Iterator[str]]
CODECS: list[Any] = ["int8", "fp8", "int4", "int2", ("int8", "int4"), ("bf16", "int2"), ("int4", "fp8")]
WITH_NEWEST = [c for c in CODECS if "int4" in c or "int2" in c]
B, HKV, HQ, D, DV, MAX, R = 3, 2, 4, 64, 96, 320, 40


def make(codec: Any, page: int | None = None, **other: Any) -> ak.KVCache:
    sizes: dict[str, Any] = {"batch": B, "max_len": MAX, "residual": R, **other}
    return ak.KVCache(num_kv_heads=HKV, head_dim=D, v_head_dim=DV, codec=codec, page_size=page, **sizes)


def tokens(randn: Randn, n: int, batch: int = B) -> tuple[Tensor, Tensor]:
    return randn(batch, HKV, n, D), randn(batch, HKV, n, DV)


def filled(codec: Any, randn: Randn, page: int | None = None) -> ak.KVCache:
    cache = make(codec, page)
    cache.append(*tokens(randn, 300), torch.tensor([300, 157, 31], dtype=torch.int32))
    return cache


def same(a: ak.KVCache, b: ak.KVCache) -> None:
    assert torch.equal(a.lengths, b.lengths)
    for x, y in zip(a.dequantize(), b.dequantize(), strict=True):
        assert torch.equal(x, y)


def shuffle(cache: ak.KVCache) -> None:
    """Another order of the pages, which are empty yet."""
    table = cache.segment.page_table
    assert table is not None
    table.copy_(torch.randperm(table.numel(), generator=torch.Generator().manual_seed(0)).view_as(table))


# --- the codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "fp8", "int4", "int2"])
def test_codes_are_those_of_the_equations(codec: str, randn: Randn) -> None:
    """Also of groups that are constant, NaN or infinite, and with a large offset."""
    group = 32
    k, v = tokens(randn, 128, batch=1)
    k[0, 0, 64:96] += 100
    k, v = (x.bfloat16().float() for x in (k, v))
    k[0, 0, :32, 3], v[0, 0, 5, :32] = 2.5, -1.5
    k[0, 1, 40, 7], v[0, 1, 70, 40] = torch.nan, torch.inf
    v[0, 0, 9], k[0, 0, 9] = 0, 0
    cache = make(codec, batch=1, residual=0)
    cache.append(k, v)
    names = {"int8": ("token", 0), "fp8": ("head", 0)}
    for keys, x, got in zip((True, False), (k, v), cache.dequantize(), strict=True):
        how = kv_quant.Codec(codec, *names.get(codec, ("channel" if keys else "token", group)))
        want = kv_quant.decode(kv_quant.quantise(x.numpy(), how), how)
        np.testing.assert_array_equal(got.numpy(), want.astype(np.float32))


def test_scales_of_fp8(randn: Randn) -> None:
    k, v = tokens(randn, 20)
    scale = torch.tensor([0.5, 3.0])
    cache = make("fp8", k_scale=scale, v_scale=100.0)
    cache.append(k * 300, v)
    want_k = (k * 300 / scale[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(cache.dequantize()[0], want_k * scale[:, None, None])
    assert torch.equal(cache.dequantize()[1], (v / 100).to(torch.float8_e4m3fn).float() * 100)


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        ("int8", 8.125),
        ("fp8", 8),
        ("int4", 5),
        ("int2", 3),
        (("int8", "int4"), 6.5625),
        (("bf16", "int2"), 9.5),
    ],
)
def test_bytes(codec: Any, bits: float) -> None:
    """Of a cache of 32k tokens; the newest tokens come on top."""
    length, heads = 32768, 2
    cache = ak.KVCache(1, heads, 128, max_len=length, codec=codec)
    elements = 2 * heads * length * 128
    names = codec if isinstance(codec, tuple) else (codec, codec)
    newest = sum(name in ("int4", "int2") for name in names) * heads * (2 * 128 + 32) * 128 * 2
    scales = sum(name == "fp8" for name in names) * heads * 4
    assert cache.nbytes == elements * bits / 8 + newest + scales


# --- steps and layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, 32, 64])
@pytest.mark.parametrize("codec", CODECS)
def test_one_by_one_is_all_at_once(codec: Any, page: int | None, randn: Randn) -> None:
    k, v = tokens(randn, 150)
    bulk, single, ragged = (make(codec, page) for _ in range(3))
    bulk.append(k, v)
    for i in range(150):
        single.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    for first in range(0, 150, 10):  # the rows in turn
        for b in range(B):
            lens = torch.zeros(B, dtype=torch.int32)
            lens[b] = 10
            ragged.append(k[:, :, first : first + 10], v[:, :, first : first + 10], lens)
    same(bulk, single)
    same(bulk, ragged)
    more = tokens(randn, 170)
    for each in (bulk, single):
        each.append(*more)
    same(bulk, single)
    q = randn(B, HQ, 3, D)
    assert torch.equal(ak.attention(q, bulk), ak.attention(q, single))  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", CODECS)
def test_overflow_changes_nothing(codec: Any, randn: Randn) -> None:
    cache = filled(codec, randn)
    before = (cache.lengths.clone(), *cache.dequantize())
    with pytest.raises(AttnkitError, match="AK602: the cache is full"):
        cache.append(*tokens(randn, 21))
    for x, y in zip((cache.lengths, *cache.dequantize()), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("codec", CODECS)
def test_roll_back_is_as_if_never_appended(codec: Any, randn: Randn) -> None:
    """Up to R tokens, at any length, however often."""
    for length, back in itertools.product((0, 1, 70, 72, 103, 104, 200), (1, 7, R)):
        first, then = tokens(randn, length), tokens(randn, 45)
        tried, never = make(codec), make(codec)
        for cache in (tried, never):
            cache.append(*first)
        for n in (back, back):
            tried.append(*tokens(randn, n))
            tried.truncate(length)
            same(tried, never)
        for cache in (tried, never):
            cache.append(*then)
        same(tried, never)


@pytest.mark.parametrize("codec", WITH_NEWEST)
def test_roll_back_that_loses_something(codec: Any, randn: Randn) -> None:
    cache = make(codec)
    k, v = tokens(randn, 300)
    cache.append(k, v)
    with pytest.raises(AttnkitError, match="AK401"):
        cache.truncate(100)
    with pytest.raises(AttnkitError, match="AK401"):
        cache.truncate(100, lossy=True)
    before = cache.dequantize()
    cache.truncate(96, lossy=True)
    assert cache.lengths.tolist() == [96] * B
    for x, y in zip(cache.dequantize(), before, strict=True):
        assert torch.equal(x, y[:, :, :96])
    cache.append(k[:, :, :50], v[:, :, :50])
    for x, y in zip(cache.dequantize(), before, strict=True):  # what had become codes stays what it was
        assert torch.equal(x[:, :, :96], y[:, :, :96])
    cache.truncate(100)
    cache.append(k, v, torch.tensor([200, 3, 0], dtype=torch.int32))
    assert cache.lengths.tolist() == [300, 103, 100]


@pytest.mark.parametrize("page", [None, 32])
@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 1], [2, 2, 0]])
@pytest.mark.parametrize("codec", CODECS)
def test_reorder(codec: Any, index: list[int], page: int | None, randn: Randn) -> None:
    k, v = tokens(randn, 150)
    lens = torch.tensor([150, 40, 97], dtype=torch.int32)
    cache, want = make(codec, page), make(codec, page)
    cache.append(k, v, lens)
    cache.reorder(torch.tensor(index))
    want.append(k[index], v[index], lens[index])
    same(cache, want)
    more = tokens(randn, 45)
    for each in (cache, want):
        each.append(*more)
    same(cache, want)  # rows that were copies of each other are their own


@pytest.mark.parametrize("page", [None, 32])
@pytest.mark.parametrize("codec", CODECS)
def test_select_of_the_newest(codec: Any, page: int | None, randn: Randn) -> None:
    """The branch of a tree of drafts: as if the others had never been appended."""
    first, drafts = tokens(randn, 100), tokens(randn, 12)
    cache, want = make(codec, page), make(codec, page)
    for each in (cache, want):
        each.append(*first)
    cache.append(*drafts)
    chosen = [1, 4, 10]
    cache.select(torch.cat([torch.arange(100), torch.tensor(chosen) + 100]))
    want.append(*(x[:, :, chosen] for x in drafts))
    same(cache, want)


def test_select_of_any(randn: Randn) -> None:
    for codec in ("int8", "fp8"):
        cache = make(codec)
        cache.append(*tokens(randn, 90))
        held = cache.dequantize()
        cache.select(torch.tensor([80, 3, 17, 64]))
        for x, y in zip(cache.dequantize(), held, strict=True):
            assert torch.equal(x, y[:, :, [80, 3, 17, 64]])
    cache = make("int4")
    cache.append(*tokens(randn, 200))
    with pytest.raises(AttnkitError, match="AK401"):
        cache.select(torch.tensor([3, 1]))


# --- attention ----------------------------------------------------------------------------------------------


def calls(sink: Tensor, bias: Tensor) -> list[dict[str, Any]]:
    return [
        {}, {"mask": ak.causal()}, {"mask": ak.window(50, 0)}, {"normalizer": ak.softmax(sink), "mask": ak.causal()},
        {"score": lambda s, b, h, i, j: s + bias[h, j], "mask": lambda b, h, i, j: (j % 3 != b) | (j == 0)},
        {"score": ak.softcap(3.0), "scale": 0.3},
    ]  # fmt: skip


@pytest.mark.parametrize("page", [None, 64])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_that_of_what_they_mean(
    codec: Any, page: int | None, dtype: torch.dtype, randn: Randn
) -> None:
    cache = make(codec, page)
    if page is not None:
        shuffle(cache)
    cache.append(*tokens(randn, 300), torch.tensor([300, 157, 31], dtype=torch.int32))
    tolerance = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for q_len in (1, 4, 30):
        q = randn(B, HQ, q_len, D).to(dtype)
        for call in calls(randn(HQ), randn(HQ, MAX)):
            got = ak.attention(q, cache, return_lse=True, **call)
            want = ak.attention(q, cache, return_lse=True, backend="reference", **call)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dim", "v_dim", "heads"),
    [(40, 72, 2), (7, 3, 4), (128, 128, 8), (96, 32, 32), (160, 64, 10), (544, 33, 2), (32, 64, 18)],
)
@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "fp8", ("int4", "int8"), ("int8", "bf16")])
def test_dims_and_groups(
    codec: Any, dim: int, v_dim: int, heads: int, randn: Randn, each_isa: EachIsa
) -> None:
    """With and without products on codes; up to 16 heads that share keys; over several stretches of them."""
    cache = ak.KVCache(1, 2, dim, v_dim, max_len=1500, codec=codec)
    cache.append(randn(1, 2, 1400, dim), randn(1, 2, 1400, v_dim))
    for dtype, tolerance in {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}.items():
        q = randn(1, heads, 1, dim).to(dtype)
        for call in ({}, {"mask": ak.window(700, 0)}, {"score": ak.softcap(2.0)}):
            want, exact = ak.attention(q, cache, return_lse=True, backend="reference", **call)  # type: ignore[arg-type]
            for _ in each_isa():
                got, lse = ak.attention(q, cache, return_lse=True, **call)  # type: ignore[arg-type]
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(
                    lse, exact, rtol=1e-6, atol=4e-6 if dtype == torch.float32 else 4e-4
                )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-4), (torch.float32, 4e-6)])
@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
def test_scores_of_rounded_queries(
    codec: str, dtype: torch.dtype, tolerance: float, randn: Randn, isa: str
) -> None:
    """Queries that are rounded to integers: large beside small elements, and of any size."""
    cache = ak.KVCache(1, 1, 64, max_len=400, codec=codec)
    cache.append(randn(1, 1, 400, 64), randn(1, 1, 400, 64))
    for size in (1e-38, 1e-20, 1e-3, 1.0, 30.0):
        q = randn(1, 4, 1, 64) * size
        q[0, 1] *= torch.logspace(-6, 0, 64)
        q[0, 2] = 0
        q = q.to(dtype)
        _, lse = ak.attention(q, cache, return_lse=True)
        _, want = ak.attention(q, cache, return_lse=True, backend="reference")
        torch.testing.assert_close(lse, want, rtol=1e-6, atol=tolerance * max(1.0, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_no_bit_depends_on_pages_threads_or_the_rest_of_the_batch(
    codec: Any, dtype: torch.dtype, randn: Randn
) -> None:
    k, v = tokens(randn, 300)
    lens = torch.tensor([300, 157, 31], dtype=torch.int32)
    caches = [make(codec, page) for page in (None, 32, 64)]
    for cache in caches[1:]:
        shuffle(cache)
    for cache in caches:
        cache.append(k, v, lens)
    for q_len in (1, 3, 40):
        q = randn(B, HQ, q_len, D).to(dtype)
        want = ak.attention(q, caches[0], mask=ak.causal(), return_lse=True)
        for cache in caches[1:]:
            got = ak.attention(q, cache, mask=ak.causal(), return_lse=True)
            assert all(map(torch.equal, got, want))
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = ak.attention(q, caches[0], mask=ak.causal(), return_lse=True)
            assert all(map(torch.equal, got, want))
        for b in range(B):
            alone = make(codec, batch=1)
            alone.append(k[b : b + 1], v[b : b + 1], lens[b : b + 1])
            got = ak.attention(q[b : b + 1], alone, mask=ak.causal(), return_lse=True)
            assert torch.equal(got[0], want[0][b : b + 1])
            assert torch.equal(got[1], want[1][b : b + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_dead_slots_reach_nothing(codec: Any, dtype: torch.dtype, randn: Randn) -> None:
    """Whatever lies behind a row's end: NaN as scales and tokens, any bits as codes."""
    k, v = tokens(randn, 150)
    lens = torch.tensor([150, 97, 1], dtype=torch.int32)
    clean, dirty = make(codec), make(codec)
    clean_storage, storage = clean._storage, dirty._storage
    for t in (*clean_storage, *storage):
        if t.is_floating_point() and t.dim() > 1:
            t.fill_(0 if any(t is x for x in clean_storage) else torch.nan)
        elif t.dim() > 2:
            t.fill_(0 if any(t is x for x in clean_storage) else -1)
    for cache in (clean, dirty):
        cache.append(k, v, lens)
    for q_len in (1, 4, 30):
        q = randn(B, HQ, q_len, D).to(dtype)
        for mask in (None, ak.causal(), ak.window(20, 0)):
            got = ak.attention(q, dirty, mask=mask, return_lse=True)
            assert all(map(torch.equal, got, ak.attention(q, clean, mask=mask, return_lse=True)))
            assert torch.isfinite(got[0]).all()


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_who_sees_it(codec: str, dtype: torch.dtype, randn: Randn, isa: str) -> None:
    k, v = tokens(randn, 300, batch=1)
    v[0, 0, 70, 5] = torch.nan
    cache = make(codec, batch=1)
    cache.append(k, v)
    for q_len, mask in ((1, None), (4, ak.causal()), (1, ak.window(90, 0)), (250, ak.causal())):
        q = randn(1, HQ, q_len, D).to(dtype)
        got = ak.attention(q, cache, mask=mask)
        want = ak.attention(q, cache, mask=mask, backend="reference")
        assert torch.equal(torch.isnan(got), torch.isnan(want))  # type: ignore[arg-type]


# --- laws (variants.md H7) -----------------------------------------------------------------------------------


def test_worked_codes() -> None:
    """Two bits of [0, 1, 2.2, 3]: zero 0, scale 1, codes 0 1 2 3."""
    numbers = torch.tensor([0.0, 1.0, 2.2, 3.0])
    cache = ak.KVCache(1, 1, 16, 32, max_len=32, codec="int2", residual=0)
    cache.append(
        numbers.repeat(8)[None, None, :, None].expand(1, 1, 32, 16), numbers.repeat(8).expand(1, 1, 32, 32)
    )
    k, v = cache.dequantize()
    assert k[0, 0, :4, 3].tolist() == v[0, 0, 3, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_within_half_a_scale(bits: int, randn: Randn) -> None:
    """Of every element, by scales that are bfloat16; of keys for each channel of a group, of the others for a token."""
    cache = make(f"int{bits}", batch=1, residual=0)
    given = [x.bfloat16().float() for x in (randn(1, HKV, 128, D) + 3, randn(1, HKV, 128, DV) - 5)]
    cache.append(*given)
    for x, got, keys in zip(given, cache.dequantize(), (True, False), strict=True):
        if bits == 8:
            groups, error = x.abs()[..., None, :], (got[:, :, :128] - x)[..., None, :]
            span = groups.amax(-1, keepdim=True) / 127
        else:
            blocks = (lambda t: t.unflatten(2, (-1, 32)).mT) if keys else (lambda t: t.unflatten(3, (-1, 32)))
            groups, error = blocks(x), blocks(got[:, :, :128] - x)
            span = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)
        assert (error.abs() <= span / 2 * (1 + 2**-7)).all()
        assert (error.abs().amax(-1, keepdim=True) > span / 4).float().mean() > 0.5  # and no finer


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_rotations(codec: str, randn: Randn) -> None:
    """A Hadamard matrix on q, k and v, taken off again: nothing changes; an outlier then costs the codes less."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < D:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    r = hadamard / D**0.5
    q, k, v = randn(1, HQ, 1, D), randn(1, HKV, 200, D), randn(1, HKV, 200, D)
    k[..., 5] *= 30
    q[..., 5] /= 30
    want = ak.attention(q, k, v)
    found = []
    for map_by in (torch.eye(D), r):
        cache = ak.KVCache(1, HKV, D, max_len=200, codec=codec)
        cache.append(k @ map_by, v @ map_by)
        found.append(ak.attention(q @ map_by, cache) @ map_by.mT)  # type: ignore[operator]
    if codec == "f32":
        torch.testing.assert_close(found[1], want, rtol=1e-5, atol=1e-5)
    else:
        plain, rotated = ((x - want).abs().max() for x in found)
        assert rotated < plain / 2


def test_keys_less_their_mean(randn: Randn) -> None:
    """lse falls by scale q . mean, and nothing else changes."""
    q, k, v = randn(1, HQ, 3, D), randn(1, HKV, 200, D) + 2, randn(1, HKV, 200, D)
    mean = k.mean(2, keepdim=True)
    found = []
    for keys in (k, k - mean):
        cache = ak.KVCache(1, HKV, D, max_len=200, codec="f32")
        cache.append(keys, v)
        found.append(ak.attention(q, cache, return_lse=True))
    (o, lse), (other, less) = found
    torch.testing.assert_close(other, o, rtol=1e-5, atol=1e-5)
    moved = D**-0.5 * (q * mean.repeat_interleave(HQ // HKV, 1)).sum(-1)
    torch.testing.assert_close(less + moved, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", [*WITH_NEWEST, "bf16"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])  # noqa: S301
def test_a_copy_grows_alone(codec: Any, copied: Callable[[ak.KVCache], ak.KVCache], randn: Randn) -> None:
    """pickle gives every view memory of its own, also where two are of one tensor."""
    cache, more, q = filled(codec, randn), tokens(randn, 17), randn(B, HQ, 2, D).bfloat16()
    before = ak.attention(q, cache)
    copies = copied(cache), copied(cache)
    copies[0].append(*more)
    assert torch.equal(ak.attention(q, cache), before)
    assert torch.equal(ak.attention(q, copies[1]), before)
    cache.append(*more)
    same(copies[0], cache)
    assert torch.equal(ak.attention(q, copies[0]), ak.attention(q, cache))


# --- under torch.compile, and as ops -------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_compiled_step(codec: str, randn: Randn) -> None:
    cache, eager = make(codec), make(codec)
    first = tokens(randn, 90)
    for each in (cache, eager):
        each.append(*first)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        cache.append(k, v)
        return ak.attention(
            q, cache, mask=ak.window(60, 0), score=lambda s, b, h, i, j: 3 * torch.tanh(s / 3)
        )

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for i in range(4):
        q, (k, v) = randn(B, HQ, 1, D), tokens(randn, 1)
        eager.append(k, v)
        want = ak.attention(
            q, eager, mask=ak.window(60, 0), score=lambda s, b, h, i, j: 3 * torch.tanh(s / 3)
        )
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(q, k, v)
        assert torch.equal(got, want)  # type: ignore[arg-type]
        same(cache, eager)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_opcheck(codec: str, randn: Randn) -> None:
    cache = filled(codec, randn)
    codes = cache.segment.codes
    assert codes is not None
    text = codes.scheme.text
    torch.library.opcheck(
        torch.ops.attnkit.kv_append.default, (codes.storage, cache.lengths, *tokens(randn, 3), text)
    )
    program = (
        "attnkit 1\nprogram (q: bhsd, k: padded[b0] {}, v: padded[b0] {}) buffers(b0: i32[1]) {{\n"
        "o, lse = attend(q, k, v, scale = default) {{\nnormalizer = softmax\n}}\nreturn o, lse\n}}\n"
    ).format(*codes.scheme.codecs)
    for need_lse in (False, True):
        arguments = (randn(B, HQ, 2, D), codes.storage, text, program, [cache.lengths], [], None, need_lse)
        torch.library.opcheck(torch.ops.attnkit.attend_cache.default, arguments)


def test_autocast_and_explain(randn: Randn) -> None:
    cache = filled("int8", randn)
    q = randn(B, HQ, 1, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ak.attention(q, cache)
    assert torch.equal(got, ak.attention(q.bfloat16(), cache))  # type: ignore[arg-type]
    report = str(ak.explain(lambda: ak.attention(q, cache)))
    assert "int8(token, 0)" in report
    assert "runs on cpu" in report
    assert "int8" in repr(cache)


# --- what is refused ------------------------------------------------------------------------------------------

Q1 = torch.ones(B, HQ, 1, D)
REFUSED: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "group of 24": ("AK401", "group_size", lambda: make("int4", group_size=24)),
    "pages smaller than groups": ("AK401", "page_size", lambda: make("int4", 32, group_size=64)),
    "a scale beside int8": ("AK408", "k_scale", lambda: make("int8", k_scale=1.0)),
    "a scale of zero": ("AK401", "v_scale", lambda: make("fp8", v_scale=0.0)),
    "a scale of no number": ("AK402", "k_scale", lambda: make("fp8", k_scale="1")),
    "scales of float64": ("AK404", "k_scale", lambda: make("fp8", k_scale=torch.ones(HKV).double())),
    "scales of other heads": ("AK403", "k_scale", lambda: make("fp8", k_scale=torch.ones(3))),
    "append other heads": ("AK403", "v", lambda: make("int8").append(torch.ones(B, HKV, 1, D), torch.ones(B, 1, 1, DV))),
    "append of another width": ("AK403", "k", lambda: make("int4").append(torch.ones(B, HKV, 1, 8), torch.ones(B, HKV, 1, DV))),
    "a storage of too few": ("AK402", "storage", lambda: torch.ops.attnkit.kv_append([Q1], torch.zeros(B, dtype=torch.int32), Q1, Q1, "int8 int8 64 96 32 40")),
    "truncate by a float": ("AK402", "n", lambda: make("int4").truncate(1.0)),  # type: ignore[arg-type]
    "truncate below zero": ("AK401", "n", lambda: make("int4").truncate(-1)),
    "q of another width": ("AK403", "q", lambda: ak.attention(Q1[..., :8], make("int8"))),
    "q of float64": ("AK404", "q", lambda: ak.attention(Q1.double(), make("int8"))),
    "q of other heads": ("AK407", "q", lambda: ak.attention(Q1[:, :3], make("int8"))),
    "q of another batch": ("AK602", "kv_lens", lambda: ak.attention(Q1[:1], make("int8"))),
    "q elsewhere": ("AK405", "q", lambda: ak.attention(Q1.to("meta"), make("int8"))),
    "q with gradients": ("AK503", "q", lambda: ak.attention(Q1.clone().requires_grad_(), make("int8"))),
    "tokens with gradients": ("AK503", "append", lambda: make("int8").append(torch.ones(B, HKV, 1, D, requires_grad=True), torch.ones(B, HKV, 1, DV))),
    "another backend": ("AK502", "backend", lambda: ak.attention(Q1, make("int8"), backend="triton")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    code, where, call = REFUSED[name]
    with pytest.raises(AttnkitError) as refused:
        call()
    assert refused.value.code == code
    assert where in str(refused.value)


def test_a_page_that_is_not_there(randn: Randn) -> None:
    cache = filled("int4", randn, page=32)
    table = cache.segment.page_table
    assert table is not None
    table[1, 4] = -1
    with pytest.raises(AttnkitError, match=r"AK602(.|\n)*page_table\[1, 4\]"):
        ak.attention(Q1, cache)
    with pytest.raises(AttnkitError, match=r"AK602(.|\n)*page_table\[1, 4\]"):
        cache.append(*tokens(randn, 1))
