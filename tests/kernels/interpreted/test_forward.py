"""The forward kernels over the gallery of scores and masks, layouts, tails, dead rows and dead slots."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import backends, testing
from attnkit.backends.reference.philox import kept
from attnkit.ir.text import parse
from attnkit.ops.traced import Traceable
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims, qkv
from attnkit.tune import default_config

Compare = Callable[..., Any]
Gallery = Callable[[str, Dims], tuple[dict[str, Any], dict[str, Any]]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("q_len", [140, 3])
def test_gallery(
    variant: str, q_len: int, dtype: str, gallery: Gallery, compare: Compare, rng: np.random.Generator
) -> None:
    dims = Dims(1, 2, 1, q_len, 130, 16, 24)
    oracle, fields = gallery(variant, dims)
    compare(*qkv("gaussian", rng, dims, dtype), oracle=oracle, dtype=dtype, mostly_dead=q_len == 3, **fields)


def arrays(rng: np.random.Generator, *dims: int, dtype: str = "float32") -> tuple[Any, Any, Any]:
    return qkv("gaussian", rng, Dims(*dims), dtype)


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 129])
def test_tails(kv_len: int, compare: Compare, rng: np.random.Generator) -> None:
    for q_len in (1, 129):
        compare(*arrays(rng, 1, 2, 1, q_len, kv_len, 20, 33), oracle={"mask": lambda p: p.kv_idx <= p.position},
                mask=ak.causal(), mostly_dead=True)  # fmt: skip


@pytest.mark.parametrize("distribution", ["outlier", "near_tie", "huge", "tiny", "constant", "one_hot"])
def test_distributions(distribution: str, compare: Compare, rng: np.random.Generator) -> None:
    compare(*qkv(distribution, rng, Dims(1, 1, 1, 128, 192, 32, 32)), mostly_dead=distribution == "tiny")


@pytest.mark.parametrize("masked", [False, True])
def test_float16(masked: bool, compare: Compare, rng: np.random.Generator) -> None:
    masks = {"oracle": {"mask": lambda p: p.kv_idx <= p.position}, "mask": ak.causal()} if masked else {}
    compare(*arrays(rng, 1, 2, 1, 128, 160, 64, 64, dtype="float16"), dtype="float16", **masks)


def test_padded(compare: Compare, rng: np.random.Generator) -> None:
    q, k, v = arrays(rng, 4, 2, 1, 40, 150, 16, 16)
    lens = np.array([150, 0, 7, 64], np.int32)
    for b, n in enumerate(lens):
        k[b, :, n:], v[b, :, n:] = np.nan, np.inf
    oracle = {"kv_lens": lens, "mask": lambda p: p.kv_idx <= p.position}
    compare(q, k, v, oracle=oracle, mask=ak.causal(), kv_lens=torch.from_numpy(lens), mostly_dead=True)


@pytest.mark.parametrize("lists", [False, True])
def test_packed(lists: bool, compare: Compare, rng: np.random.Generator) -> None:
    q, k, v = arrays(rng, 1, 2, 1, 300, 400, 16, 16)
    cu_q = np.array([0, 0, 5, 133, 134, 300], np.int32)
    cu_kv = np.array([0, 9, 100, 100, 165, 400], np.int32)
    fields = {"cu_seqlens_q": torch.from_numpy(cu_q), "cu_seqlens_kv": torch.from_numpy(cu_kv)}
    oracle: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    mask: Any = ak.causal()
    oracle["mask"] = lambda p: p.kv_idx <= p.position
    if lists:
        mask = lambda b, h, q_idx, kv_idx: (kv_idx + b + h) % 3 != q_idx % 2  # noqa: E731
        oracle["mask"] = lambda p: (p.kv_idx + p.b + p.h) % 3 != p.q_idx % 2
    compare(q, k, v, oracle=oracle, mask=mask, mostly_dead=True, **fields)


@pytest.mark.parametrize("kind", ["plain", "causal", "score", "lists", "sink", "float16"])
def test_decode(kind: str, compare: Compare, rng: np.random.Generator) -> None:
    """Few queries: heads of a group are rows of one tile, keys are split, parts are merged."""
    dtype = "float16" if kind == "float16" else "float32"
    q, k, v = arrays(rng, 2, 6, 2, 3, 330, 32, 24, dtype=dtype)
    fields: dict[str, Any] = {}
    oracle: dict[str, Any] = {}
    if kind == "score":
        fields["score"] = lambda s, b, h, q_idx, kv_idx: s - (h + 1) * (q_idx + 327 - kv_idx).abs() * 0.01
        oracle["score"] = lambda s, p: s - (p.h + 1) * abs(p.position - p.kv_idx) * 0.01
    if kind == "lists":
        fields["mask"] = lambda b, h, q_idx, kv_idx: (kv_idx + q_idx + h) % 3 != 0
        oracle["mask"] = lambda p: (p.kv_idx + p.q_idx + p.h) % 3 != 0
    elif kind != "plain":
        fields["mask"], oracle["mask"] = ak.causal(), lambda p: p.kv_idx <= p.position
    if kind == "sink":
        sink = rng.standard_normal(6).astype(np.float32)
        fields["sink"], oracle["sink"] = torch.from_numpy(sink), sink
    compare(q, k, v, oracle=oracle, dtype=dtype, **fields)


def test_decode_of_packed_and_padded(compare: Compare, rng: np.random.Generator) -> None:
    q, k, v = arrays(rng, 3, 4, 2, 2, 200, 16, 16)
    lens = np.array([200, 0, 70], np.int32)
    compare(q, k, v, oracle={"kv_lens": lens}, kv_lens=torch.from_numpy(lens), mostly_dead=True)
    q, k, v = arrays(rng, 1, 4, 2, 30, 300, 16, 16)
    cu_q, cu_kv = np.array([0, 1, 1, 30], np.int32), np.array([0, 150, 160, 300], np.int32)
    fields = {"cu_seqlens_q": torch.from_numpy(cu_q), "cu_seqlens_kv": torch.from_numpy(cu_kv)}
    compare(q, k, v, oracle={"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}, **fields)


@pytest.mark.parametrize("q_len", [3, 70])
def test_the_least_float_is_a_score(q_len: int, compare: Compare, rng: np.random.Generator) -> None:
    """Times log2(e) it would be none: a row of nothing else is the mean of its values, in parts of any length."""
    least = float(np.finfo(np.float32).min)
    q, k, v = arrays(rng, 1, 4, 2, q_len, 150, 16, 16)
    score = lambda s, b, h, q_idx, kv_idx: torch.where((q_idx < 2) | (kv_idx % 3 == h), least, s)  # noqa: E731
    oracle = {"score": lambda s, p: np.where((p.q_idx < 2) | (p.kv_idx % 3 == p.h), least, s)}
    compare(q, k, v, score=score, oracle=oracle)
    compare(
        q, k, v, score=score, mask=ak.causal(), oracle=oracle | {"mask": lambda p: p.kv_idx <= p.position}
    )
    sink = np.array([least, 0.0, -np.inf, least / 2], np.float32)
    compare(q, k, v, score=score, sink=torch.from_numpy(sink), oracle=oracle | {"sink": sink})
    compare(q, k[:, :, :0], v[:, :, :0], sink=torch.from_numpy(sink), oracle={"sink": sink}, mostly_dead=True)


@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_scales(scale: float, compare: Compare, rng: np.random.Generator) -> None:
    """Products stand for logits where the scale makes none of them larger."""
    q, k, v = arrays(rng, 1, 2, 1, 70, 150, 16, 16)
    compare(q, k, v, scale=scale, oracle={"scale": scale})


def test_no_keys(compare: Compare, rng: np.random.Generator) -> None:
    sink = rng.standard_normal(2).astype(np.float32)
    for fields in ({}, {"sink": torch.from_numpy(sink)}):
        q, k, v = arrays(rng, 1, 2, 1, 5, 3, 16, 16)
        oracle = {"sink": sink} if fields else {}
        compare(q, k[:, :, :0], v[:, :, :0], oracle=oracle, mostly_dead=True, **fields)


def test_what_is_not_a_number_reaches_those_who_see_it(compare: Compare, rng: np.random.Generator) -> None:
    q, k, v = arrays(rng, 1, 2, 1, 130, 150, 16, 16)
    v[0, 0, 20, 3], v[0, 0, 70, 4], v[0, 0, 70, 5], k[0, 0, 100] = np.nan, np.inf, -np.inf, np.nan
    compare(q, k, v, oracle={"mask": lambda p: p.kv_idx <= p.position}, mask=ak.causal())
    table = rng.random((130, 150)) < 0.5
    tensor = torch.from_numpy(table)
    compare(q, k, v, oracle={"mask": lambda p: table}, mask=lambda b, h, q_idx, kv_idx: tensor[q_idx, kv_idx])


def test_a_load_outside_its_buffer_is_not_a_number(compare: Compare, rng: np.random.Generator) -> None:
    """No kernel can raise AK601 without waiting for it: the rows that read outside say so themselves."""
    q, k, v = arrays(rng, 1, 2, 1, 70, 150, 16, 16)
    table = rng.standard_normal(140).astype(np.float32)
    tensor = torch.from_numpy(table)
    causal = {"mask": lambda p: p.kv_idx <= p.position - 20}
    inside = lambda s, p: s + np.append(table, np.zeros(10, np.float32))[p.kv_idx]  # noqa: E731
    outside = lambda s, p: s + np.append(table, np.full(10, np.nan, np.float32))[p.kv_idx]  # noqa: E731
    score = lambda s, b, h, q_idx, kv_idx: s + tensor[kv_idx]  # noqa: E731
    mask = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 60  # noqa: E731
    compare(q, k, v, oracle=causal | {"score": inside}, score=score, mask=mask)
    compare(q, k, v, oracle={"score": outside}, score=score, mostly_dead=True)


def test_integers_beyond_32_bits(compare: Compare, rng: np.random.Generator) -> None:
    q, k, v = arrays(rng, 1, 2, 1, 70, 150, 16, 16)
    mask = lambda b, h, q_idx, kv_idx: (q_idx * 100000000 - kv_idx * 60000000) // 1000000000 % 2 == 0  # noqa: E731
    oracle = lambda p: (p.q_idx * 100000000 - p.kv_idx * 60000000) // 1000000000 % 2 == 0  # noqa: E731
    compare(q, k, v, oracle={"mask": oracle}, mask=mask)


@pytest.mark.parametrize("decode", [False, True])
def test_dropout(decode: bool, build: Callable[..., Any], rng: np.random.Generator) -> None:
    """The bits of the contract: those that the reference draws."""
    q, k, v = arrays(rng, 2, 4, 2, 3 if decode else 130, 200, 16, 16)
    seed, p = 0x1234_5678_9ABC_DEF0, 0.3
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    kernel, buffers, params = build(Traceable(None, None, dropout_p=p), tensors[0], tensors[2], {})
    o, lse = torch.full(q.shape, float("nan")), torch.full(q.shape[:3], float("nan"))
    kernel(*tensors, o, lse, buffers, params, 1, seed)
    for b in range(2):
        s = np.einsum("hid,hjd->hij", q[b].astype(float), np.repeat(k[b], 2, 0)) / 4
        weights = np.exp(s - s.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        weights *= kept(seed, b, weights.shape, p) / (1 - p)
        np.testing.assert_allclose(o[b], weights @ np.repeat(v[b], 2, 0).astype(float), atol=2e-6)


def test_wide_heads(compare: Compare, rng: np.random.Generator) -> None:
    """Tiles that came out as no number are made again by a second kernel."""
    q, k, v = arrays(rng, 1, 2, 1, 40, 50, 192, 130)
    v[0, 0, 45, 3] = np.nan
    compare(q, k, v, oracle={"mask": lambda p: p.kv_idx <= p.position}, mask=ak.causal())


@pytest.mark.parametrize(("q_len", "kv_len"), [(130, 100), (2, 200)])
def test_launches_of_a_call_are_made_again(
    q_len: int, kv_len: int, build: Any, rng: np.random.Generator
) -> None:
    """With other tensors of the same shapes, other contents of masks and other params."""
    ids = torch.zeros(kv_len, dtype=torch.int32)
    cap = ak.param("cap", 2.0)
    traced = Traceable(ak.softcap(cap), lambda b, h, q_idx, kv_idx: (ids[kv_idx] == 0) | (kv_idx % 2 == 0))
    dims = Dims(1, 4, 2, q_len, kv_len, 16, 16)
    shapes = [torch.from_numpy(x) for x in qkv("gaussian", rng, dims)]
    kernel, buffers, _ = build(traced, shapes[0], shapes[2], {})
    for step, c in enumerate((2.0, 3.0)):
        arrays = qkv("gaussian", rng, dims)
        captured = [torch.from_numpy(rng.integers(0, 2, kv_len).astype(np.int32)) for _ in buffers]
        o, lse = torch.full((1, 4, q_len, 16), float("nan")), torch.full((1, 4, q_len), float("nan"))
        kernel(*map(torch.from_numpy, arrays), o, lse, captured, [c])
        assert len(kernel._recorded) == 1
        seen = captured[0].numpy() == 0
        expected = testing.attention(
            *arrays,
            score=lambda s, p, c=c: c * np.tanh(s / c),
            mask=lambda p, seen=seen: seen[p.kv_idx] | (p.kv_idx % 2 == 0),
        )
        testing.check(o.numpy(), lse.numpy(), expected, kernel="interpreted", what=f"call {step}")


def test_tensors_that_were_one_may_be_two_the_next_time(build: Any, rng: np.random.Generator) -> None:
    tensors = [torch.from_numpy(x) for x in arrays(rng, 1, 2, 2, 70, 70, 16, 16)]
    kernel, _, _ = build(Traceable(None, None), tensors[0], tensors[2], {})
    for q, k, v in ((tensors[0],) * 3, tensors):
        o, lse = torch.full_like(q, float("nan")), torch.full((1, 2, 70), float("nan"))
        kernel(q, k, v, o, lse, [], [])
        expected = testing.attention(*(x.numpy() for x in (q, k, v)))
        testing.check(o.numpy(), lse.numpy(), expected, kernel="interpreted")
    assert len(kernel._recorded) == 1
    sequences = torch.tensor([0, 30, 70], dtype=torch.int32)  # the lengths of queries and keys, in one tensor
    traced = Traceable(None, None, cu_seqlens_q=sequences, cu_seqlens_kv=sequences.clone())
    kernel, _, _ = build(traced, tensors[0], tensors[2], {})
    for other in (sequences, torch.tensor([0, 50, 70], dtype=torch.int32)):
        o, lse = torch.full_like(tensors[0], float("nan")), torch.full((1, 2, 70), float("nan"))
        kernel(*tensors, o, lse, [sequences, other], [])
        lengths = {"cu_seqlens_q": sequences.numpy(), "cu_seqlens_kv": other.numpy()}
        expected = testing.attention(*(x.numpy() for x in tensors), **lengths)
        testing.check(o.numpy(), lse.numpy(), expected, kernel="interpreted")


@pytest.mark.parametrize("q_len", [1, 70])
def test_paged(q_len: int, compare: Compare, rng: np.random.Generator) -> None:
    """Keys in pages of any order; stale pages and the rest of the last one hold what is no number."""
    q, k, v = arrays(rng, 2, 4, 2, q_len, 240, 16, 24)
    lens, page = np.array([240, 133], np.int32), 16
    table = rng.permutation(40)[:30].reshape(2, 15).astype(np.int32)
    pages = [np.full((40, 2, page, x.shape[3]), np.nan, np.float32) for x in (k, v)]
    for b in range(2):
        for j in range(lens[b]):
            for to, x in zip(pages, (k, v), strict=True):
                to[table[b, j // page], :, j % page] = x[b, :, j]
    text = (
        "attnkit 1\nprogram (q: bhsd, k: paged[b0, b1], v: paged[b0, b1]) buffers(b0: i32[2], b1: i32[1]) {\n"
        " o, lse = attend(q, k, v, scale = default) {\n mask = kv_idx <= q_idx + (kv_len - q_len)\n"
        " normalizer = softmax\n }\n return o, lse\n}\n"
    )
    backend = backends.get("triton")
    spec = KernelSpec(parse(text), "float32", 16, 24, "cuda")
    assert backend.supports(spec) == ()
    tiles = {"tile_q": 128, "tile_kv": 64, "split_kv": 64, "decode_tile_kv": 64}
    kernel = backend.build(spec, default_config(backend.space(spec)) | tiles)
    o, lse = torch.full((2, 4, q_len, 24), float("nan")), torch.full((2, 4, q_len), float("nan"))
    tensors = [torch.from_numpy(x) for x in (q, *pages)]
    kernel(*tensors, o, lse, [torch.from_numpy(table), torch.from_numpy(lens)], [])
    expected = testing.attention(q, k, v, mask=lambda p: p.kv_idx <= p.position, kv_lens=lens)
    testing.check(o.numpy(), lse.numpy(), expected, kernel="interpreted")


IDS = torch.arange(150, dtype=torch.int32) // 37
FLAGS = torch.arange(150) % 50 < 30
MASKS: dict[str, Any] = {
    "document": lambda b, h, i, j: IDS[i] == IDS[j],
    "causal document": lambda b, h, i, j: (IDS[i] == IDS[j]) & (j <= i),
    "of heads": lambda b, h, i, j: (IDS[i] + h != IDS[j]) | (j < 5),
    "two-sided": lambda b, h, i, j: (i - j).abs() <= 40,
    "flags": lambda b, h, i, j: FLAGS[j] | (torch.maximum(i, j) < 70),
    "flags of rows": lambda b, h, i, j: ~(FLAGS[i] & (-j > IDS[i] - 100)),
    "strides": lambda b, h, i, j: (i // 64 == j // 64) | (j % 64 == 63),
    "pairs": lambda b, h, i, j: (i + 2 * j) % 3 != 0,
    "sums": lambda b, h, i, j: (IDS[j] + i) % 3 != 0,
    "minimum": lambda b, h, i, j: torch.minimum(i, j) >= 64,
    "one tile": lambda b, h, i, j: (j >= 64) & (j < 128) & (IDS[i] >= 0),
}


@pytest.mark.parametrize("streamed", ["kv_idx", "q_idx"])
@pytest.mark.parametrize("name", MASKS)
def test_lists_from_edges_are_those_from_pairs(
    name: str, streamed: str, build: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Tiles of 64 x 64 of 150 x 140 pairs: what the edges of a tile tell is what its pairs say."""
    q, k, v = (torch.from_numpy(x) for x in arrays(rng, 1, 2, 1, 150, 140, 16, 16))
    tiles = {"tile_q": 64, "tile_kv": 64, "dkv_tile_q": 64, "dkv_tile_kv": 64}
    found = []
    for of_pairs in (False, True):
        if of_pairs:
            monkeypatch.setattr("attnkit.backends.triton.blocks.tile_bounds", lambda pairs, printer: None)
        kernel, buffers, _ = build(Traceable(None, MASKS[name]), q, v, tiles)
        sizes = kernel.sizes(q, k, buffers)
        pairs = kernel.pairs(sizes, buffers, streamed)
        values = kernel.values(sizes, buffers, [], None, q=q, k=k, v=v, o=q)
        lists = kernel.lists(pairs, sizes, values, q, "" if streamed == "kv_idx" else "dkv_")
        counts = lists["counts"].tolist()
        length = lists["list_length"]
        rows = [
            (row[:some], row[length - all_ :])
            for row, (some, all_) in zip(lists["lists"].tolist(), counts, strict=True)
        ]
        found.append(rows)
    assert found[0] == found[1]
