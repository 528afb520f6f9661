"""Caches as a GPU keeps them: what is appended are the codes of the CPU engine, and attention reads them where they lie."""

from typing import Any

import numpy as np
import pytest
import torch

from attnkit import KVCache, backends, testing
from attnkit.ir.text import parse
from attnkit.ops.attend_cache import Codes
from attnkit.ops.kv_append import append_on_device
from attnkit.ops.kv_codes import Scheme, allocate, parts_of
from attnkit.ops.traced import Traceable, bind
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims, qkv
from attnkit.tune import default_config

CODECS: list[Any] = ["int8", "fp8", ("int8", "fp8"), ("int8", "f32"), ("f32", "int8"), "f32", "f16"]
ROWS, HEADS, DIMS, LONGEST = 3, 2, (24, 40), 80


def caches(codec: Any, page_size: int | None) -> tuple[KVCache, KVCache]:
    """One of the CPU's, and one in the layout of a GPU."""
    scales = torch.tensor([0.25, 1.5]) if "fp8" in codec else None
    k_scale = scales if codec == "fp8" else None
    known = KVCache(
        ROWS, HEADS, *DIMS, max_len=LONGEST, codec=codec, page_size=page_size, k_scale=k_scale, v_scale=scales
    )
    scheme: Scheme = known._scheme
    table = None
    outer, inner = ROWS, LONGEST
    if page_size is not None:
        columns = LONGEST // page_size
        outer, inner = ROWS * columns, page_size
        table = torch.randperm(outer).int().view(ROWS, columns)
    storage = allocate(
        scheme, ROWS, HEADS, outer, inner, table, (k_scale, scales), torch.device("cpu"), rows=True
    )
    for part in parts_of(scheme, storage)[:2]:
        part.codes.view(torch.uint8).fill_(0x7F)  # NaN, where such a byte may be one
    mine = KVCache.__new__(KVCache)
    mine._keep(storage, torch.zeros(ROWS, dtype=torch.int32), scheme)
    return known, mine


def put(cache: KVCache, k: Any, v: Any, lens: Any = None) -> None:
    """What `KVCache.append` does on a GPU."""
    append_on_device(cache._scheme, parts_of(cache._scheme, cache._storage), cache.lengths, k, v, lens)


def tokens(rng: np.random.Generator, count: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Of every size, some no numbers and some the edges of a code."""
    found = [
        rng.standard_normal((ROWS, HEADS, count, d)) * np.exp2(rng.integers(-12, 9, (ROWS, HEADS, count, 1)))
        for d in DIMS
    ]
    for x in found:
        x[0, 0, ::5, 3], x[1, 1, 1::7, 2], x[2, 0, 2::7] = np.nan, np.inf, 0.0
        x[2, 1, ::3, :8] = [127.0, 0.5, -1.5, 2.5, -126.5, 0.49999997, 1.0, -0.0]
        x[2, 1, ::3, 8:] = 0.0
        x[2, 1, 1::3, :8] = [448.0, 464.0, -1e30, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 17.0, -19.0]
    return [torch.from_numpy(x).to(dtype) for x in found]


def same(mine: KVCache, known: KVCache) -> None:
    """Lengths, what codes mean, and their scales, bit for bit."""
    assert torch.equal(mine.lengths, known.lengths)
    for x, y in zip(mine.dequantize(), known.dequantize(), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x.numpy(), y.numpy())


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codes_are_those_of_the_cpu(codec: Any, page_size: int | None, rng: np.random.Generator) -> None:
    """Many at once, one by one, and another number for each row."""
    known, mine = caches(codec, page_size)
    lens = torch.tensor([20, 0, 7], dtype=torch.int32)
    for count, lengths in ((33, None), (1, None), (1, None), (20, lens)):
        new = tokens(rng, count, torch.float16 if codec == "f16" else torch.float32)
        new = [x.nan_to_num(2.0, 3.0, -3.0) for x in new] if codec in ("f32", "f16") else new
        known.append(*new, lens=lengths)
        put(mine, *new, lengths)
    same(mine, known)
    wanted = torch.tensor([[3, 1, 30], [5, 6, -1], [0, 34, 2]])
    for cache in (known, mine):
        cache.reorder(torch.tensor([2, 0, 0]))
        cache.truncate(torch.tensor([34, 31, 40], dtype=torch.int32))
        cache.select(wanted)
    same(mine, known)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_of_other_dtypes(codec: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    known, mine = caches(codec, None)
    new = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(rng, 40, dtype)]
    known.append(*new)
    put(mine, *new)
    same(mine, known)


@pytest.mark.parametrize("page_size", [None, 16])
def test_what_there_is_no_room_for_is_not_written(page_size: int | None, rng: np.random.Generator) -> None:
    """No host waits to raise AK602; what belongs to others stays as it is."""
    _, mine = caches("f32", page_size)
    k, _, *table = mine._storage
    if table:
        table[0][1, 1] = 99  # no such page
    k.fill_(7.0)
    mine.lengths.copy_(torch.tensor([70, 10, -3], dtype=torch.int32))
    new = [torch.ones(ROWS, HEADS, 20, d) for d in DIMS]
    put(mine, *new, torch.tensor([20, 30, 2], dtype=torch.int32))
    assert mine.lengths.tolist() == [80, 30, -1]
    written = (k == 1.0).sum().item() // (HEADS * DIMS[0])
    assert written == 10 + (6 if table else 20)  # of the second row the rest of its first page
    assert ((k == 1.0) | (k == 7.0)).all()


CAUSAL = "kv_idx <= q_idx + (kv_len - q_len)"


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("codec", CODECS[:5], ids=str)
def test_attention_to_codes(codec: Any, page_size: int | None, q_len: int, rng: np.random.Generator) -> None:
    """Prefill and decoding; rows of other lengths, and no numbers behind their ends and in tokens that nobody sees."""
    _, mine = caches(codec, page_size)
    q, k, v = qkv("gaussian", rng, Dims(ROWS, 4, HEADS, q_len, 75, *DIMS))
    v[1, :, 40], k[1, :, 41] = np.nan, np.nan
    lens = torch.tensor([75, 60, 0], dtype=torch.int32)
    put(mine, torch.from_numpy(k), torch.from_numpy(v), lens)
    codes = Codes.of(mine._storage, mine._scheme)
    unseen: Any = lambda b, h, q_idx, kv_idx: (kv_idx < 40) | (kv_idx > 41)  # noqa: E731
    what = Traceable(None, unseen, kv_lens=mine.lengths, page_table=codes.table, codecs=mine._scheme.codecs)
    text, buffers, _ = bind(what, torch.from_numpy(q))
    backend = backends.get("triton")
    spec = KernelSpec(parse(text), "float32", *DIMS, "cuda")
    assert backend.supports(spec) == ()
    tiles = {"tile_q": 128, "tile_kv": 64, "split_kv": 64, "decode_tile_kv": 64}
    kernel = backend.build(spec, default_config(backend.space(spec)) | tiles)
    o, lse = torch.full((ROWS, 4, q_len, DIMS[1]), float("nan")), torch.full((ROWS, 4, q_len), float("nan"))
    means = [np.zeros((ROWS, HEADS, 75, d), np.float32) for d in DIMS]
    for to, x in zip(means, mine.dequantize(), strict=True):
        to[:, :, : x.shape[2]] = x.numpy()
    expected = testing.attention(
        q, *means, mask=lambda p: (p.kv_idx < 40) | (p.kv_idx > 41), kv_lens=lens.numpy()
    )
    for _ in range(2):  # found, and found again
        codes_k, codes_v, beside = codes.on_device
        kernel(torch.from_numpy(q), codes_k, codes_v, o, lse, list(buffers), [], 1, None, beside)
        testing.check(o.numpy(), lse.numpy(), expected, kernel="interpreted", mostly_dead=True)
    assert len(kernel._recorded) == 1  # type: ignore[attr-defined]
