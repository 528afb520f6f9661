"""Keys and values as int8 codes with a scale for each row: what they mean is never in memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import backends, testing
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.ops.traced import Traceable
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims, qkv
from attnkit.tune import default_config

Compare = Callable[..., Any]
CAUSAL: Any = {"oracle": {"mask": lambda p: p.kv_idx <= p.position}, "mask": ak.causal()}


@pytest.mark.parametrize("q_len", [140, 3])
def test_gallery(variant: str, q_len: int, gallery: Any, compare: Compare, rng: np.random.Generator) -> None:
    dims = Dims(1, 2, 1, q_len, 130, 16, 24)
    oracle, fields = gallery(variant, dims)
    compare(*qkv("gaussian", rng, dims), oracle=oracle, int8=True, mostly_dead=True, **fields)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "dims", [Dims(1, 2, 1, 129, 65, 20, 33), Dims(2, 4, 2, 1, 129, 32, 16), Dims(1, 1, 1, 40, 70, 160, 40)]
)
def test_dtypes(dtype: str, dims: Dims, compare: Compare, rng: np.random.Generator) -> None:
    compare(*qkv("gaussian", rng, dims, dtype), dtype=dtype, int8=True, mostly_dead=True, **CAUSAL)


@pytest.mark.parametrize("distribution", ["outlier", "huge", "constant", "one_hot"])
def test_distributions(distribution: str, compare: Compare, rng: np.random.Generator) -> None:
    compare(*qkv(distribution, rng, Dims(1, 1, 1, 70, 130, 32, 32)), int8=True, mostly_dead=True)


def test_padded_and_packed(compare: Compare, rng: np.random.Generator) -> None:
    q, k, v = qkv("gaussian", rng, Dims(3, 2, 1, 40, 150, 16, 16))
    lens = np.array([150, 0, 7], np.int32)
    for b, n in enumerate(lens):
        k[b, :, n:], v[b, :, n:] = np.nan, np.inf
    compare(q, k, v, oracle={"kv_lens": lens}, kv_lens=torch.from_numpy(lens), int8=True, mostly_dead=True)
    q, k, v = qkv("gaussian", rng, Dims(1, 2, 1, 100, 200, 16, 16))
    cu_q, cu_kv = np.array([0, 0, 5, 100], np.int32), np.array([0, 9, 100, 200], np.int32)
    fields = {"cu_seqlens_q": torch.from_numpy(cu_q), "cu_seqlens_kv": torch.from_numpy(cu_kv)}
    oracle = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    compare(q, k, v, oracle=oracle, int8=True, mostly_dead=True, **fields)


@pytest.mark.parametrize("q_len", [1, 40])
def test_what_is_not_a_number(q_len: int, compare: Compare, rng: np.random.Generator) -> None:
    """A row that was no number has a scale that is none: it reaches those who see it."""
    q, k, v = qkv("gaussian", rng, Dims(1, 2, 1, q_len, 150, 16, 16))
    v[0, 0, 120, 3], k[0, 0, 140, 5] = np.nan, np.nan
    mask: Any = lambda b, h, q_idx, kv_idx: (kv_idx < 90) | ((h == 1) & (kv_idx != 140))  # noqa: E731
    oracle = {"mask": lambda p: (p.kv_idx < 90) | ((p.h == 1) & (p.kv_idx != 140))}
    compare(q, k, v, oracle=oracle, mask=mask, int8=True, mostly_dead=True)
    compare(q, k, v, int8=True, mostly_dead=True)


@pytest.mark.parametrize("q_len", [1, 40])
def test_pages(q_len: int, encode: Any, rng: np.random.Generator) -> None:
    """Scales lie in pages beside their codes; what is beyond the lengths reaches nobody."""
    q, k, v = qkv("gaussian", rng, Dims(2, 4, 2, q_len, 112, 16, 16))
    lens, page = np.array([112, 37], np.int32), 16
    table = rng.permutation(20)[:14].reshape(2, 7).astype(np.int32)
    parts = [encode(x) for x in (k, v)]
    codes = [torch.full((20, 2, page, 16), 127, dtype=torch.int8) for _ in parts]
    scales = [torch.full((20, 2, page), float("nan"), dtype=torch.bfloat16) for _ in parts]
    for b in range(2):
        for j in range(lens[b]):
            for to, to_scales, (x, of_x, _) in zip(codes, scales, parts, strict=True):
                to[table[b, j // page], :, j % page] = x[b, :, j]
                to_scales[table[b, j // page], :, j % page] = of_x[b, :, j]
    text = (
        "attnkit 1\nprogram (q: bhsd, k: paged[b0, b1] int8(token, 0), v: paged[b0, b1] int8(token, 0))"
        " buffers(b0: i32[2], b1: i32[1]) {\n o, lse = attend(q, k, v, scale = default) {\n"
        " mask = kv_idx <= q_idx + (kv_len - q_len)\n normalizer = softmax\n }\n return o, lse\n}\n"
    )
    backend = backends.get("triton")
    spec = KernelSpec(parse(text), "float32", 16, 16, "cuda")
    assert backend.supports(spec) == ()
    tiles = {"tile_q": 128, "tile_kv": 64, "split_kv": 64, "decode_tile_kv": 64}
    kernel = backend.build(spec, default_config(backend.space(spec)) | tiles)
    o, lse = torch.full((2, 4, q_len, 16), float("nan")), torch.full((2, 4, q_len), float("nan"))
    buffers = [torch.from_numpy(table), torch.from_numpy(lens)]
    kernel(
        torch.from_numpy(q),
        *codes,
        o,
        lse,
        buffers,
        [],
        beside=dict(zip(("k_scales", "v_scales"), scales, strict=True)),
    )
    means = [means for _, _, means in parts]
    expected = testing.attention(q, *means, mask=lambda p: p.kv_idx <= p.position, kv_lens=lens)
    testing.check(o.numpy(), lse.numpy(), expected, kernel="interpreted")


def test_errors(build: Any, encode: Any, rng: np.random.Generator) -> None:
    """Codes come with their scales, and have no gradients."""
    q, k, v = qkv("gaussian", rng, Dims(1, 2, 1, 4, 5, 16, 16))
    query, (codes, scales, _) = torch.from_numpy(q), encode(k)
    kernel, _, _ = build(Traceable(None, None), query, torch.from_numpy(v), {}, True)
    o, lse = torch.empty_like(query), torch.empty(1, 2, 4)
    with pytest.raises(AttnkitError) as raised:
        kernel(query, codes, codes, o, lse, [], [])
    assert raised.value.code == "AK404"
    plain, _, _ = build(Traceable(None, None), query, torch.from_numpy(v), {})
    with pytest.raises(AttnkitError) as raised:
        plain(query, query, query, o, lse, [], [], beside={"k_scales": scales, "v_scales": scales})
    assert raised.value.code == "AK404"
    with pytest.raises(AttnkitError) as raised:
        kernel.backward(query, codes, codes, o, lse, [], [], o, None, query, query, query, [])
    assert raised.value.code == "AK503"
    assert "int8" in raised.value.given
