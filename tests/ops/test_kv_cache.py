"""`ak.KVCache`: what is appended is what attention sees, whatever the layout and the steps by which it came there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import AttnkitError

Randn = Callable[..., Tensor]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = [None, 16, 64, "shuffled 16", "tokens first 32"]
B, HKV, HQ, D, DV, MAX = 3, 2, 4, 24, 40, 160


def make(layout: Any, codec: str = "f32", *, batch: int = B, rng: Any = None) -> ak.KVCache:
    """An empty cache; pages of somebody else's are full of NaN, in any order, the table's unused entries -1."""
    if layout is None or isinstance(layout, int):
        return ak.KVCache(batch, HKV, D, DV, max_len=MAX, codec=codec, page_size=layout)
    words = layout.split()
    size = int(words[-1])
    columns = MAX // size
    table = torch.from_numpy((rng or np.random.default_rng(1)).permutation(batch * columns + 5)).int()
    pages = []
    for dim in (D, DV):
        shape = (len(table), size, HKV, dim) if words[0] == "tokens" else (len(table), HKV, size, dim)
        held = torch.full(shape, torch.nan, dtype=DTYPES[codec])
        pages.append(held.transpose(1, 2) if words[0] == "tokens" else held)
    table = table[: batch * columns].view(batch, columns)
    return ak.KVCache.from_pages(*pages, table, torch.zeros(batch, dtype=torch.int32))


def tokens(randn: Randn, n: int, batch: int = B) -> tuple[Tensor, Tensor]:
    return randn(batch, HKV, n, D), randn(batch, HKV, n, DV)


def state(cache: ak.KVCache) -> tuple[Tensor, ...]:
    return (cache.lengths.clone(), *cache.dequantize())


def same(a: ak.KVCache, b: ak.KVCache) -> None:
    for x, y in zip(state(a), state(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


# --- appending -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", DTYPES)
def test_one_by_one_is_all_at_once(layout: Any, codec: str, randn: Randn) -> None:
    k, v = tokens(randn, 70)
    bulk, single = make(layout, codec), make(layout, codec)
    bulk.append(k, v)
    for i in range(70):
        single.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    same(bulk, single)
    assert torch.equal(bulk.dequantize()[0], k.to(DTYPES[codec]))
    assert torch.equal(bulk.dequantize()[1], v.to(DTYPES[codec]))
    assert bulk.lengths.tolist() == [70] * B


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ragged_appends(layout: Any, randn: Randn) -> None:
    """Rows of their own lengths; what is beyond ``lens`` is not stored."""
    cache, rows = make(layout), [[torch.empty(HKV, 0, D)] for _ in range(B)]
    for lens in ([3, 0, 7], [7, 7, 7], [0, 0, 0], [1, 5, 2], [40, 33, 1]):
        k, v = tokens(randn, max(*lens, 1))
        dead = torch.arange(k.shape[2]) >= torch.tensor(lens)[:, None]
        k = k.masked_fill(dead[:, None, :, None], torch.nan)
        cache.append(k, v, torch.tensor(lens, dtype=torch.int32))
        for b, n in enumerate(lens):
            rows[b].append(k[b, :, :n])
    assert cache.lengths.tolist() == [51, 45, 17]
    held = cache.dequantize()[0]
    for b, parts in enumerate(rows):
        want = torch.cat(parts, 1)
        assert torch.equal(held[b, :, : want.shape[1]], want)
        assert not held[b, :, want.shape[1] :].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overflow_changes_nothing(layout: Any, randn: Randn) -> None:
    cache = make(layout)
    room = cache.max_len
    cache.append(*tokens(randn, room - 2), torch.tensor([room - 2, 5, 0], dtype=torch.int32))
    before = state(cache)
    for lens in (None, torch.tensor([3, 3, 3], dtype=torch.int32)):
        with pytest.raises(AttnkitError, match="AK602: the cache is full"):
            cache.append(*tokens(randn, 3), lens)
        assert all(torch.equal(x, y) for x, y in zip(state(cache), before, strict=True))
    cache.append(*tokens(randn, 3), torch.tensor([2, 3, 0], dtype=torch.int32))
    assert cache.lengths.tolist() == [room, 8, 0]


def test_a_page_that_is_not_there_changes_nothing(randn: Randn) -> None:
    cache = make("shuffled 16")
    cache.append(*tokens(randn, 16))
    table = cache.segment.page_table
    assert table is not None
    table[1, 1] = -1
    before = state(cache)
    with pytest.raises(AttnkitError, match=r"AK602(.|\n)*page_table\[1, 1\]"):
        cache.append(*tokens(randn, 1))
    assert all(torch.equal(x, y) for x, y in zip(state(cache), before, strict=True))


# --- attention -------------------------------------------------------------------------------------------


def calls(sink: Tensor, bias: Tensor) -> list[dict[str, Any]]:
    return [
        {}, {"mask": ak.causal()}, {"mask": ak.window(20, 0)}, {"normalizer": ak.softmax(sink), "mask": ak.causal()},
        {"score": lambda s, b, h, i, j: s + bias[h, j], "mask": lambda b, h, i, j: (j % 3 != b) | (j == 0)},
        {"score": ak.softcap(3.0), "scale": 0.3},
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("q_len", [1, 4, 30])
def test_attention_is_that_of_the_tokens(layout: Any, codec: str, q_len: int, randn: Randn) -> None:
    """Bit for bit, and within the reference's reach: every score, mask and sink, over rows of any lengths."""
    cache, dtype = make(layout, codec), DTYPES[codec]
    lens = torch.tensor([100, 33, q_len], dtype=torch.int32)
    k, v = (x.to(dtype) for x in tokens(randn, 100))
    cache.append(k, v, lens)
    q = randn(B, HQ, q_len, D).to(dtype)
    for call in calls(randn(HQ), randn(HQ, MAX)):
        got = ak.attention(q, cache, return_lse=True, **call)
        want = ak.attention(q, k, v, kv_lens=lens, return_lse=True, **call)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
        exact = ak.attention(q, cache, backend="reference", **call)
        assert isinstance(exact, Tensor)
        assert isinstance(got[0], Tensor)
        tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(got[0], exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_step_by_step(layout: Any, randn: Randn) -> None:
    """A prompt and then token after token: the rows of one causal attention over everything."""
    cache = make(layout, batch=1)
    k, v = tokens(randn, 60, batch=1)
    q = randn(1, HQ, 60, D)
    want = ak.attention(q, k, v, mask=ak.causal())
    assert isinstance(want, Tensor)
    at = 0
    for n in (40, 1, 1, 5, 1, 12):
        new = slice(at, at + n)
        cache.append(k[:, :, new], v[:, :, new])
        assert torch.equal(ak.quantized_kv_attention(q[:, :, new], cache), want[:, :, new])  # type: ignore[arg-type]
        at += n


def test_the_named_functions(randn: Randn) -> None:
    cache, q, sink, slopes = make(16), randn(B, HQ, 2, D), randn(HQ), randn(HQ).abs()
    k, v = tokens(randn, 50)
    cache.append(k, v)
    options: list[dict[str, Any]] = [
        {"causal": True}, {"window": (9, 0), "causal": False}, {"mask": lambda b, h, i, j: j % 2 == 0, "causal": True},
        {"score": lambda s, b, h, i, j: s * 0.5, "scale": 0.1, "causal": True, "return_lse": True},
    ]  # fmt: skip
    for option in options:
        want = ak.dense_attention(q, k, v, **option)
        assert _equal(ak.quantized_kv_attention(q, cache, **option), want)
        assert _equal(ak.dense_attention(q, cache, **option), want)
    more: dict[str, Any] = {"causal": True, "softcap": 2.0, "alibi_slopes": slopes, "sink": sink}
    assert _equal(ak.dense_attention(q, cache, **more), ak.dense_attention(q, k, v, **more))


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(map(torch.equal, a, b))


def test_autocast_casts_the_queries(randn: Randn) -> None:
    cache = make(None, "bf16")
    k, v = tokens(randn, 20)
    q = randn(B, HQ, 1, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.append(k, v)
        got = ak.attention(q, cache)
    assert isinstance(got, Tensor)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ak.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))  # type: ignore[arg-type]


def test_explain(randn: Randn) -> None:
    cache = make(64)
    cache.append(*tokens(randn, 50))
    report = str(ak.explain(lambda: ak.attention(randn(B, HQ, 1, D), cache, mask=ak.causal())))
    assert "paged[" in report
    assert "runs on cpu" in report


# --- going back, reordering, choosing ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roll_back_is_as_if_never_appended(layout: Any, randn: Randn) -> None:
    first, drafts, then = tokens(randn, 30), tokens(randn, 9), tokens(randn, 5)
    tried, never = make(layout), make(layout)
    for cache in (tried, never):
        cache.append(*first)
    tried.append(*drafts)
    tried.truncate(30)
    same(tried, never)
    tried.append(*drafts)
    tried.truncate(torch.tensor([31, 30, 99]))
    never.append(*drafts, torch.tensor([1, 0, 9], dtype=torch.int32))
    for cache in (tried, never):
        cache.append(*then)
    same(tried, never)
    q = randn(B, HQ, 2, D)
    assert torch.equal(ak.attention(q, tried), ak.attention(q, never))  # type: ignore[arg-type]
    tried.truncate(0)
    assert tried.lengths.tolist() == [0] * B
    assert not ak.attention(q, tried).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", [None, 16, 64])
@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2, 2, 0], [0, 0, 1]])
def test_reorder(layout: Any, index: list[int], randn: Randn) -> None:
    cache, lens = make(layout), torch.tensor([50, 3, 17], dtype=torch.int32)
    k, v = tokens(randn, 50)
    cache.append(k, v, lens)
    cache.reorder(torch.tensor(index))
    want = make(layout)
    want.append(k[index], v[index], lens[index])
    same(cache, want)
    more = tokens(randn, 20)
    for each in (cache, want):
        each.append(*more)
    same(cache, want)  # rows that were copies of each other are their own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_select(layout: Any, randn: Randn) -> None:
    k, v = tokens(randn, 40)
    for positions, rows in (
        (torch.tensor([0, 3, 20, 39]), [[0, 3, 20, 39]] * B),
        (torch.tensor([[5, 2, 2], [1, -1, -1], [-1, -1, -1]], dtype=torch.int32), [[5, 2, 2], [1], []]),
        (torch.zeros(0, dtype=torch.int64), [[]] * B),
    ):
        cache = make(layout)
        cache.append(k, v)
        cache.select(positions)
        assert cache.lengths.tolist() == [len(row) for row in rows]
        held = cache.dequantize()
        for b, row in enumerate(rows):
            assert torch.equal(held[0][b, :, : len(row)], k[b, :, row])
            assert torch.equal(held[1][b, :, : len(row)], v[b, :, row])


# --- any steps -------------------------------------------------------------------------------------------

Rng = np.random.Generator
Rows = list[Tensor]  # keys and values of each row, side by side
Step = tuple[Callable[[ak.KVCache], None], Rows]  # what it does to a cache, and what there is after it


def appended(rng: Rng, rows: Rows, ragged: bool) -> Step:
    room = min(MAX - row.shape[1] for row in rows)
    count = int(rng.integers(0, min(room, 40) + 1))
    new = torch.from_numpy(rng.standard_normal((B, HKV, count, D + DV), np.float32))
    lens = torch.from_numpy(rng.integers(0, count + 1, B)).int() if ragged else None
    kept = [count] * B if lens is None else lens.tolist()
    after = [torch.cat([row, new[b, :, : kept[b]]], 1) for b, row in enumerate(rows)]
    return lambda cache: cache.append(new[..., :D], new[..., D:], lens), after


def truncated(rng: Rng, rows: Rows) -> Step:
    most = torch.from_numpy(rng.integers(0, MAX, B))
    return lambda cache: cache.truncate(most), [row[:, : most[b]] for b, row in enumerate(rows)]


def selected(rng: Rng, rows: Rows) -> Step:
    counts = [int(rng.integers(0, row.shape[1] + 1)) for row in rows]
    chosen = torch.full((B, max(counts)), -1)
    for b, n in enumerate(counts):
        chosen[b, :n] = torch.from_numpy(rng.integers(0, max(rows[b].shape[1], 1), n))
    return lambda cache: cache.select(chosen), [row[:, chosen[b, : counts[b]]] for b, row in enumerate(rows)]


def reordered(rng: Rng, rows: Rows) -> Step:
    index = torch.from_numpy(rng.integers(0, B, B))
    return lambda cache: cache.reorder(index), [rows[b] for b in index.tolist()]


STEPS: list[Callable[[Rng, Rows], Step]] = [
    lambda rng, rows: appended(rng, rows, ragged=False), lambda rng, rows: appended(rng, rows, ragged=True), truncated,
    selected, reordered,
]  # fmt: skip


@pytest.mark.fuzz
@pytest.mark.parametrize("external", [False, True])
def test_random_steps(external: bool, rng: Rng, randn: Randn, effort: int) -> None:
    """Several layouts beside a list of tokens for each row, through whatever can happen to a cache."""
    steps = STEPS[:-1] if external else STEPS  # pages of somebody else's are not reordered
    for _ in range(6 * effort):
        caches = [make(layout, rng=rng) for layout in ([None, *LAYOUTS[3:]] if external else LAYOUTS[:3])]
        rows = [torch.empty(HKV, 0, D + DV) for _ in range(B)]
        for _ in range(12):
            step, rows = steps[rng.integers(len(steps))](rng, rows)
            q, answers = randn(B, HQ, 2, D), []
            for cache in caches:
                step(cache)
                assert cache.lengths.tolist() == [row.shape[1] for row in rows]
                held = torch.cat(cache.dequantize(), 3)
                assert all(torch.equal(held[b, :, : row.shape[1]], row) for b, row in enumerate(rows))
                answers.append(ak.attention(q, cache, mask=ak.causal()))
            assert all(_equal(answer, answers[0]) for answer in answers)


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16)])
def test_bytes(codec: str, bits: int) -> None:
    assert ak.KVCache(2, 3, 128, max_len=320, codec=codec).nbytes == 2 * 2 * 3 * 320 * 128 * bits // 8
    paged = ak.KVCache(2, 3, 128, 64, max_len=100, codec=(codec, codec), page_size=32)
    assert paged.max_len == 128
    assert paged.page_size == 32
    assert paged.nbytes == 2 * 3 * 128 * (128 + 64) * bits // 8


def test_nothing_held() -> None:
    """No rows; rows of no tokens."""
    none = ak.KVCache(0, 2, 8, max_len=4)
    none.append(torch.zeros(0, 2, 1, 8), torch.zeros(0, 2, 1, 8))
    assert ak.attention(torch.zeros(0, 2, 1, 8, dtype=torch.bfloat16), none).shape == (0, 2, 1, 8)  # type: ignore[union-attr]
    empty = ak.KVCache(2, 2, 8, max_len=20, codec="f32", page_size=16)
    o, lse = ak.attention(torch.ones(2, 2, 1, 8), empty, return_lse=True)
    assert not o.any()
    assert lse.isneginf().all()
    assert empty.dequantize()[0].shape == (2, 2, 0, 8)
    assert "2 rows" in repr(empty)


# --- under torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, 16])
def test_compiled_step(layout: Any, randn: Randn) -> None:
    """One graph, and one compilation, for all steps."""
    cache, eager = make(layout), make(layout)
    for each in (cache, eager):
        each.append(*tokens(lambda *shape: torch.ones(shape), 10))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        cache.append(k, v)
        return ak.attention(q, cache, mask=ak.window(6, 0), score=lambda s, b, h, i, j: 3 * torch.tanh(s / 3))

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for i in range(4):
        q, (k, v) = randn(B, HQ, 1, D), tokens(randn, 1)
        eager.append(k, v)
        want = ak.attention(q, eager, mask=ak.window(6, 0), score=lambda s, b, h, i, j: 3 * torch.tanh(s / 3))
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(q, k, v)
        assert torch.equal(got, want)  # type: ignore[arg-type]
        same(cache, eager)
    cache.truncate(11)
    assert cache.lengths.tolist() == [11] * B


@pytest.mark.parametrize("layout", [None, 16])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(layout: Any, ragged: bool, randn: Randn) -> None:
    cache = make(layout)
    cache.append(*tokens(randn, 10))
    k, v, lengths, table, _ = cache.segment
    assert k is not None
    assert v is not None
    storage = [k.contiguous(), v.contiguous(), *([] if table is None else [table])]
    lens = torch.tensor([1, 0, 3], dtype=torch.int32) if ragged else None
    arguments = (storage, lengths, *tokens(randn, 3), "f32", lens)
    torch.library.opcheck(torch.ops.attnkit.kv_append.default, arguments)


def test_the_dispatcher_sees_appends(randn: Randn, dispatched: Any) -> None:
    cache = make(None)
    with dispatched() as seen:
        cache.append(*tokens(randn, 1))
    assert "attnkit.kv_append.default" in seen


# --- what is refused -------------------------------------------------------------------------------------

ONE = torch.ones(B, HKV, 1, D), torch.ones(B, HKV, 1, DV)
INTS = torch.zeros(B, dtype=torch.int32)


def filled() -> ak.KVCache:
    cache = make(16)
    cache.append(*ONE)
    return cache


def new(**other: Any) -> Any:
    return ak.KVCache(**{"batch": 1, "num_kv_heads": 1, "head_dim": 8, "max_len": 4, **other})


def pages(**other: Any) -> Any:
    given = {
        "k_pages": torch.ones(4, 2, 16, 8), "v_pages": torch.ones(4, 2, 16, 8),
        "page_table": torch.zeros(3, 2, dtype=torch.int32), "lengths": torch.ones(3, dtype=torch.int32), **other,
    }  # fmt: skip
    return ak.KVCache.from_pages(**given)


Q1 = torch.ones(B, HQ, 1, D)
REFUSED: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "batch a float": ("AK402", "batch", lambda: new(batch=1.0)),
    "no heads": ("AK401", "num_kv_heads", lambda: new(num_kv_heads=0)),
    "no room": ("AK401", "max_len", lambda: new(max_len=0)),
    "page_size 24": ("AK401", "page_size", lambda: new(page_size=24)),
    "page_size 8": ("AK401", "page_size", lambda: new(page_size=8)),
    "page_size a bool": ("AK401", "page_size", lambda: new(page_size=True)),
    "device": ("AK504", "device", lambda: new(device="meta")),
    "codec of no name": ("AK401", "codec", lambda: new(codec="f8")),
    "codec a number": ("AK401", "codec", lambda: new(codec=8)),
    "codec of no name, of v": ("AK401", "int2", lambda: new(codec=("bf16", "int3"))),
    "codecs differ": ("AK504", "codec", lambda: new(codec=("bf16", "f32"))),
    "pages a list": ("AK402", "k_pages", lambda: pages(k_pages=[1])),
    "pages of three dimensions": ("AK403", "v_pages", lambda: pages(v_pages=torch.ones(4, 16, 8))),
    "pages of 24 tokens": ("AK403", "power of two", lambda: pages(k_pages=torch.ones(4, 2, 24, 8), v_pages=torch.ones(4, 2, 24, 8))),
    "pages of float64": ("AK404", "k_pages", lambda: pages(k_pages=torch.ones(4, 2, 16, 8).double())),
    "pages of two dtypes": ("AK404", "v_pages", lambda: pages(v_pages=torch.ones(4, 2, 16, 8).half())),
    "pages differ": ("AK403", "k_pages, v_pages", lambda: pages(v_pages=torch.ones(3, 2, 16, 8))),
    "table int64": ("AK404", "page_table", lambda: pages(page_table=torch.zeros(3, 2, dtype=torch.int64))),
    "table of one dimension": ("AK403", "page_table", lambda: pages(page_table=torch.zeros(3, dtype=torch.int32))),
    "table of other rows": ("AK602", "page_table", lambda: pages(page_table=torch.zeros(2, 2, dtype=torch.int32))),
    "lengths beyond the table": ("AK602", "lengths", lambda: pages(lengths=torch.full((3,), 33, dtype=torch.int32))),
    "lengths below zero": ("AK602", "lengths", lambda: pages(lengths=torch.full((3,), -1, dtype=torch.int32))),
    "append a list": ("AK402", "k", lambda: filled().append([1], ONE[1])),  # type: ignore[arg-type]
    "append of three dimensions": ("AK403", "k", lambda: filled().append(ONE[0][0], ONE[1])),
    "append other heads": ("AK403", "v", lambda: filled().append(ONE[0], ONE[1][:, :1])),
    "append other lengths": ("AK403", "v", lambda: filled().append(ONE[0], torch.ones(B, HKV, 2, DV))),
    "append ints": ("AK404", "k", lambda: filled().append(ONE[0].int(), ONE[1])),
    "append elsewhere": ("AK405", "k", lambda: filled().append(ONE[0].to("meta"), ONE[1])),
    "append lens of int64": ("AK404", "lens", lambda: filled().append(*ONE, INTS.long())),
    "append lens of two": ("AK403", "lens", lambda: filled().append(*ONE, INTS[:2])),
    "append lens too long": ("AK602", "lens", lambda: filled().append(*ONE, INTS + 2)),
    "append lens below zero": ("AK602", "lens", lambda: filled().append(*ONE, INTS - 1)),
    "append with gradients": ("AK503", "append", lambda: filled().append(ONE[0].clone().requires_grad_(), ONE[1])),
    "append an unknown codec": ("AK504", "codec", lambda: torch.ops.attnkit.kv_append([ONE[0], ONE[1]], INTS, *ONE, "int8")),
    "append another codec": ("AK404", "storage", lambda: torch.ops.attnkit.kv_append([ONE[0], ONE[1]], INTS, *ONE, "f16")),
    "append to one tensor": ("AK402", "storage", lambda: torch.ops.attnkit.kv_append([ONE[0]], INTS, *ONE, "f32")),
    "truncate below zero": ("AK401", "n", lambda: filled().truncate(-1)),
    "truncate rows below zero": ("AK401", "n", lambda: filled().truncate(INTS - 1)),
    "truncate by a float": ("AK402", "n", lambda: filled().truncate(1.0)),  # type: ignore[arg-type]
    "truncate floats": ("AK404", "n", lambda: filled().truncate(torch.ones(B))),
    "truncate two rows": ("AK403", "n", lambda: filled().truncate(INTS[:2])),
    "reorder to nowhere": ("AK401", "batch_index", lambda: filled().reorder(INTS + B)),
    "reorder two rows": ("AK403", "batch_index", lambda: filled().reorder(INTS[:2])),
    "reorder a list": ("AK402", "batch_index", lambda: filled().reorder([0, 1, 2])),  # type: ignore[arg-type]
    "reorder pages of others": ("AK504", "reorder", lambda: pages().reorder(INTS)),
    "select beyond": ("AK401", "positions", lambda: filled().select(torch.tensor([0, 1]))),
    "select a hole": ("AK401", "positions", lambda: filled().select(torch.tensor([-1, 0]))),
    "select floats": ("AK404", "positions", lambda: filled().select(torch.zeros(1))),
    "select other rows": ("AK403", "positions", lambda: filled().select(torch.zeros(2, 1, dtype=torch.int64))),
    "v beside a cache": ("AK408", "v", lambda: ak.attention(Q1, filled(), ONE[1])),
    "kv_lens beside a cache": ("AK408", "kv_lens", lambda: ak.attention(Q1, filled(), kv_lens=INTS)),
    "a block mask": ("AK408", "block_mask", lambda: ak.attention(Q1, filled(), block_mask=ak.block_mask(ak.causal(), 1, 1, 1, 1))),
    "a block mask as a mask": ("AK408", "block_mask", lambda: ak.attention(Q1, filled(), mask=ak.block_mask(ak.causal(), 1, 1, 1, 1))),
    "q of another dtype": ("AK404", "k", lambda: ak.attention(Q1.half(), filled())),
    "q of another batch": ("AK602", "page_table", lambda: ak.attention(Q1[:1], filled())),
    "q of another width": ("AK403", "q, k", lambda: ak.attention(Q1[..., :8], filled())),
    "q of other heads": ("AK407", "q, k", lambda: ak.attention(Q1[:, :3], filled())),
    "q with gradients": ("AK503", "q", lambda: ak.attention(Q1.clone().requires_grad_(), filled())),
    "no cache": ("AK402", "cache", lambda: ak.quantized_kv_attention(Q1, ONE[0])),  # type: ignore[arg-type]
    "no v": ("AK402", "v", lambda: ak.attention(Q1, ONE[0])),
    "no q": ("AK402", "q", lambda: ak.attention([1], filled())),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    code, where, call = REFUSED[name]
    with pytest.raises(AttnkitError) as refused:
        call()
    assert refused.value.code == code
    assert where in str(refused.value)
    with torch.no_grad():
        assert filled().lengths.tolist() == [1] * B  # and the next call is none the worse for it


def test_gradients_are_refused_of_a_contiguous_cache_too(randn: Randn) -> None:
    cache, q = make(None), randn(B, HQ, 1, D).requires_grad_()
    cache.append(*tokens(randn, 5))
    with pytest.raises(AttnkitError, match="AK503"):
        ak.attention(q, cache)
    bias = torch.zeros(HQ, requires_grad=True)
    with pytest.raises(AttnkitError, match="AK503"):
        ak.attention(q.detach(), cache, score=lambda s, b, h, i, j: s + bias[h])
    with torch.no_grad():
        assert torch.isfinite(ak.attention(q, cache)).all()  # type: ignore[arg-type]


def test_a_host_that_counts_along() -> None:
    """Of a cache on a GPU it looks at lengths only where a row may be full, and raises what the CPU would have."""
    cache = ak.KVCache(2, 1, 16, max_len=32, codec="f32")
    cache.lengths = torch.tensor([0, 0], dtype=torch.int32)
    cache._count_along(20, None)
    cache._count_along(12, None)
    cache.lengths.copy_(torch.tensor([20, 5], dtype=torch.int32))
    cache._count_along(20, torch.tensor([2, 20], dtype=torch.int32))  # looks: 25 at most
    assert cache._most == 25
    cache.lengths.copy_(torch.tensor([22, 25], dtype=torch.int32))
    with pytest.raises(AttnkitError) as raised:
        cache._count_along(8, None)
    assert raised.value.code == "AK602"
    cache.truncate(10)
    cache._count_along(22, None)
    assert cache._most == 32


@pytest.mark.parametrize("codec", ["f32", "int8", "int4"])
@pytest.mark.parametrize("length", [-1, 65, 2**31 - 1])
def test_lengths_that_cannot_be(codec: str, length: int, randn: Any) -> None:
    """Others may write to them: nothing is read beyond the cache, and nothing is lost."""
    cache = ak.KVCache(2, 1, 16, max_len=64, codec=codec)
    cache.append(randn(2, 1, 40, 16), randn(2, 1, 40, 16))
    before = [x.clone() for x in cache.dequantize()]
    cache.lengths[1] = length
    for call in (
        cache.dequantize,
        lambda: cache.reorder(torch.tensor([1, 1])),
        lambda: cache.select(torch.tensor([0])),
        lambda: ak.attention(torch.ones(2, 1, 1, 16), cache),
    ):
        with pytest.raises(AttnkitError, match=r"AK602(.|\n)*len(gth)?s\n(.|\n)*0\.\.64"):
            call()
    cache.lengths[1] = 40
    for found, kept in zip(cache.dequantize(), before, strict=True):
        assert torch.equal(found, kept)
