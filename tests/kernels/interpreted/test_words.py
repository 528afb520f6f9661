"""Caches of int4 and int2 as a GPU keeps them: memory is that of the CPU engine bit for bit, and attention reads it where it lies."""

from typing import Any

import numpy as np
import pytest
import torch

from attnkit import KVCache, backends, causal, testing
from attnkit.ir.text import parse
from attnkit.ops.attend_cache import Codes
from attnkit.ops.kv_append import append_on_device
from attnkit.ops.kv_codes import allocate, parts_of
from attnkit.ops.traced import Traceable, bind
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims, qkv
from attnkit.testing.floats import rounded
from attnkit.tune import default_config

ROWS, DIMS, LONGEST = 2, (20, 40), 192


def caches(codec: Any, page_size: int | None, heads: int = 1, **other: int) -> tuple[KVCache, KVCache]:
    """One of the CPU's and one in the layout of a GPU, of the same memory, which holds no numbers; pages in any order."""
    sizes: dict[str, Any] = {
        "max_len": LONGEST,
        "codec": codec,
        "page_size": page_size,
        "residual": 5,
        **other,
    }
    known = KVCache(ROWS, heads, *DIMS, **sizes)
    table = known.segment.page_table
    if table is not None:
        table.copy_(torch.randperm(table.numel()).view_as(table))
    outer, inner = (ROWS, LONGEST) if table is None else (table.numel(), page_size)
    storage = allocate(
        known._scheme, ROWS, heads, outer, inner or 0, table, (None, None), torch.device("cpu"), rows=True
    )
    mine = KVCache.__new__(KVCache)
    mine._keep(storage, torch.zeros(ROWS, dtype=torch.int32), known._scheme)
    for cache in (known, mine):
        for part in parts_of(cache._scheme, cache._storage)[:2]:
            for t in part:
                if t is not None:
                    t.view(torch.uint8).fill_(0xFF)
    return known, mine


def put(cache: KVCache, k: Any, v: Any, lens: Any = None) -> None:
    """What `KVCache.append` does on a GPU."""
    append_on_device(cache._scheme, parts_of(cache._scheme, cache._storage), cache.lengths, k, v, lens)


def tokens(rng: np.random.Generator, count: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Of every size; some no numbers, constant, zeros of both signs, offsets, and what is next to nothing or to infinity."""
    found = [
        rng.standard_normal((ROWS, 1, count, d)) * np.exp2(rng.integers(-12, 9, (ROWS, 1, count, 1)))
        for d in DIMS
    ]
    for x in found:
        x[1, 0, ::37, 3], x[1, 0, 1::41, 4], x[1, 0, 2::7] = np.nan, np.inf, 0.0
        x[0, 0, :, 5], x[0, 0, :, 6], x[0, 0, :, 7:10] = -0.0, 3.3, rng.choice([-0.0, 0.0], (count, 3))
        x[0, 0, :, 10] += 100
        x[0, 0, :, 11] *= 1e-41
        x[0, 0, ::9, 12] = 3e38
        x[0, 0, 3::5] = rng.choice([-0.0, 0.0, 1.0, -1.0, 0.5], x[0, 0, 3::5].shape)
    return [torch.from_numpy(x).to(dtype) for x in found]


def same(mine: KVCache, known: KVCache) -> None:
    """Every bit of memory, but where the GPU has a layout of its own: there what codes mean."""
    held = [[c.lengths, *c._storage] for c in (mine, known)]
    for x, y in zip(*held, strict=True):
        if x.dtype == y.dtype:
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    for x, y in zip(mine.dequantize(), known.dequantize(), strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy())


@pytest.mark.parametrize(
    ("codec", "page_size", "group"),
    [("int4", None, 96), ("int2", 64, 64), (("int8", "int2"), 32, 32)],
    ids=str,
)
def test_memory_is_that_of_the_cpu(
    codec: Any, page_size: int | None, group: int, rng: np.random.Generator
) -> None:
    """Many at once, one by one, another number for each row, more than the newest have room for; and after going back."""
    known, mine = caches(codec, page_size, group_size=group)
    for count, lens in ((known._scheme.slots + 4, None), (1, None), (1, None), (45, [45, 0])):
        lengths = None if lens is None else torch.tensor(lens, dtype=torch.int32)
        new = tokens(rng, count)
        known.append(*new, lens=lengths)
        put(mine, *new, lengths)
        same(mine, known)
    for cache in (known, mine):
        cache.truncate(cache.lengths - 4)
        cache.reorder(torch.tensor([1, 0]))
    new = tokens(rng, 20)
    known.append(*new)
    put(mine, *new)
    same(mine, known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_of_other_dtypes(dtype: torch.dtype, rng: np.random.Generator) -> None:
    known, mine = caches("int4", None)
    new = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(rng, 40, dtype)]
    for x in new:
        x[..., 11] = 1.0  # of bfloat16 the interpreter takes subnormal numbers for 0
    known.append(*new)
    put(mine, *new)
    same(mine, known)


def test_what_there_is_no_room_for_is_not_written(rng: np.random.Generator) -> None:
    """Nor what has no page: no host waits to raise AK602."""
    known, mine = caches("int4", 32)
    table, new = mine.segment.page_table, tokens(rng, 75)
    assert table is not None
    known.append(*new)
    missing = int(table[0, 1])
    table[0, 1] = 99
    put(mine, *new)
    others = torch.arange(table.numel()) != missing
    for x, y in zip(mine._storage[:2], known._storage[:2], strict=True):
        assert torch.equal(x[others].view(torch.uint8), y[others].view(torch.uint8))
        assert (x[missing].view(torch.uint8) == 0xFF).all()
    put(mine, *tokens(rng, 120))
    assert mine.lengths.tolist() == [LONGEST] * ROWS


UNSEEN: Any = lambda b, h, q_idx, kv_idx: (kv_idx < 32) | (kv_idx >= 64)  # noqa: E731
MASKS: Any = {
    "causal": (causal(), lambda p: p.kv_idx <= p.position),
    "unseen": (UNSEEN, lambda p: (p.kv_idx < 32) | (p.kv_idx >= 64)),
}


@pytest.mark.parametrize(
    ("codec", "page_size", "q_len", "mask", "group", "dtype"),
    [
        ("int4", None, 1, "causal", 32, "float32"), ("int2", 32, 1, "causal", 32, "float16"),
        ("int2", None, 40, "causal", 96, "float16"), ("int4", 64, 40, "causal", 64, "float32"),
        ("int4", 32, 1, "unseen", 32, "float32"), ("int2", None, 40, "unseen", 32, "float32"),
        (("int8", "int4"), 32, 40, "causal", 32, "float32"), (("int2", "f32"), None, 1, "unseen", 32, "float32"),
    ],
    ids=str,
)  # fmt: skip
def test_attention(
    codec: Any, page_size: int | None, q_len: int, mask: str, group: int, dtype: str, rng: np.random.Generator
) -> None:
    """Prefill and decoding, of tiles that hold codes and newest tokens; no numbers behind the rows' ends, in a group of keys and in values that nobody sees."""
    _, mine = caches(codec, page_size, group_size=group)
    q, k, v = qkv("gaussian", rng, Dims(ROWS, 2, 1, q_len, 130, *DIMS), dtype)
    if mask == "unseen":
        v[0, :, 40], k[0, :, 50] = np.nan, np.nan
    lens = torch.tensor([130, 53], dtype=torch.int32)
    fill = put if "int8" in codec else KVCache.append  # another layout, or that of the engine
    fill(mine, torch.from_numpy(k), torch.from_numpy(v), lens)
    codes = Codes.of(mine._storage, mine._scheme)
    query = torch.from_numpy(q).to(getattr(torch, dtype))
    what = Traceable(
        None, MASKS[mask][0], kv_lens=mine.lengths, page_table=codes.table, codecs=mine._scheme.codecs
    )
    text, buffers, _ = bind(what, query)
    backend = backends.get("triton")
    spec = KernelSpec(parse(text), dtype, *DIMS, "cuda")
    assert backend.supports(spec) == ()
    tiles = {"tile_q": 128, "tile_kv": 64, "split_kv": 64, "decode_tile_kv": 64}
    kernel: Any = backend.build(spec, default_config(backend.space(spec)) | tiles)
    o = torch.full((ROWS, 2, q_len, DIMS[1]), float("nan"), dtype=query.dtype)
    lse = torch.full((ROWS, 2, q_len), float("nan"))
    means = [rounded(x.numpy(), dtype) for x in mine.dequantize()]  # as elements of q's dtype
    expected = testing.attention(
        query.float().numpy(), *means, mask=MASKS[mask][1], kv_lens=lens.numpy(), dtype=dtype
    )
    codes_k, codes_v, beside = codes.on_device
    kernel(query, codes_k, codes_v, o, lse, list(buffers), [], 1, None, beside)
    testing.check(o.float().numpy(), lse.numpy(), expected, kernel="interpreted", mostly_dead=True)
