"""Every size, head grouping, layout and kind of input: where tiles end, vectors end and tensors are not contiguous."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import testing
from attnkit.testing import DISTRIBUTIONS, Dims, Pairs, qkv

# Around the ends of vectors (4, 16), query tiles (16, 48, 96) and key tiles (16, 64, 128).
EDGES = (1, 2, 3, 4, 5, 15, 16, 17, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129)
ALL = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
DOTS = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # float16 is computed as float32 is
CAUSAL: dict[str, Any] = {"mask": lambda p: p.kv_idx <= p.position}


@DOTS
@pytest.mark.parametrize("q_len", EDGES)
def test_lengths(q_len: int, isa: str, rng: np.random.Generator, compare: Any) -> None:
    for kv_len in EDGES:
        tensors = qkv("gaussian", rng, Dims(1, 2, 1, q_len, kv_len, 8, 12))
        what = f"{q_len} x {kv_len}"
        compare(*tensors, what=what)
        mostly_dead = q_len > 5 * kv_len
        compare(*tensors, oracle=CAUSAL, mask=ak.causal(), what=f"{what} causal", mostly_dead=mostly_dead)


def test_all_lengths_up_to_129(isa: str, rng: np.random.Generator, compare: Any) -> None:
    for length in range(1, 130):
        compare(*qkv("gaussian", rng, Dims(1, 1, 1, 3, length, 4, 5)), what=f"3 x {length}")
        compare(*qkv("gaussian", rng, Dims(1, 1, 1, length, 7, 5, 4)), what=f"{length} x 7")


# Ends of vectors (4, 8, 16), of micro-tiles (16, 24, 64) and of stretches of channels (128), and what models have.
HEAD_DIMS = (1, 3, 16, 17, 32, 33, 48, 64, 65, 80, 96, 112, 127, 128, 129, 160, 192, 224, 255, 256)


# Scores see one dimension and outputs the other: three partners for each are as good as all pairs.
@DOTS
@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"),
    [
        *((HEAD_DIMS[i - shift], dim) for shift in (0, 3, 11) for i, dim in enumerate(HEAD_DIMS)),
        *((192, 128), (576, 512), (4096, 1), (1, 4096)),
    ],
)
def test_head_dims(head_dim: int, v_head_dim: int, isa: str, rng: np.random.Generator, compare: Any) -> None:
    tensors = qkv("gaussian", rng, Dims(1, 2, 2, 37, 70, head_dim, v_head_dim))
    compare(*tensors, oracle=CAUSAL, mask=ak.causal())


@DOTS
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_latent_attention(q_len: int, isa: str, rng: np.random.Generator, compare: Any) -> None:
    """MLA as DeepSeek decodes: all heads share 576 channels a key, of which the first 512 are also its value."""
    q, k, _ = qkv("gaussian", rng, Dims(2, 8, 1, q_len, 150, 576, 1))
    v = k[..., :512]
    assert torch.from_numpy(v).data_ptr() == torch.from_numpy(k).data_ptr()
    compare(q, k, v, oracle={**CAUSAL, "scale": 192**-0.5}, mask=ak.causal(), scale=192**-0.5)
    lens = np.array([150, 63], np.int32)
    compare(q, k, v, oracle={"kv_lens": lens}, kv_lens=torch.from_numpy(lens))


@ALL
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1), (5, 1), (32, 2)])
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_head_groups(
    q_heads: int, kv_heads: int, q_len: int, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    """Few queries of many heads share a tile: each must keep its own head's score, mask and sink."""
    slopes = rng.uniform(0.01, 0.5, q_heads).astype(np.float32)
    sink = rng.standard_normal(q_heads).astype(np.float32)
    tensors = qkv("gaussian", rng, Dims(3, q_heads, kv_heads, q_len, 90, 16, 24))
    compare(*tensors, oracle=CAUSAL, mask=ak.causal())

    def oracle(s: Any, p: Pairs) -> Any:
        return s - slopes[p.h] * abs(p.position - p.kv_idx).astype(s.dtype)

    compare(
        *tensors,
        oracle={"score": oracle, "mask": lambda p: (p.kv_idx + p.h) % 3 != p.b, "sink": sink},
        score=ak.alibi(torch.from_numpy(slopes)),
        mask=lambda b, h, q_idx, kv_idx: (kv_idx + h) % 3 != b,
        normalizer=ak.softmax(torch.from_numpy(sink)),
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "dims",
    [
        Dims(4, 4, 2, 64, 64, 64, 64),
        Dims(2, 4, 4, 33, 200, 128, 48),
        Dims(4, 4, 1, 130, 31, 16, 80),
        Dims(12, 8, 2, 1, 257, 64, 64),
    ],
    ids=["square", "long_kv", "long_q", "decode"],
)
def test_distributions(
    distribution: str, dims: Dims, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    tensors = qkv(distribution, rng, dims)
    compare(*tensors)
    compare(*tensors, oracle=CAUSAL, mask=ak.causal(), what="causal")
    cap = {"score": lambda s, p: 20 * np.tanh(s / 20)}
    compare(*tensors, oracle=cap, score=ak.softcap(20.0), what="softcap")


@pytest.mark.parametrize("kv_len", [1000, 4096, 16384])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_long_sums_keep_their_bits(
    kv_len: int, mean: float, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    """Errors must not grow with the number of keys as they do in one long sum."""
    q, k, v = qkv("gaussian", rng, Dims(1, 1, 1, 32, kv_len, 64, 32))
    compare(q, k, v + np.float32(mean))


@pytest.mark.parametrize(
    ("q_len", "kv_len", "batch"), [(0, 5, 2), (5, 0, 2), (0, 0, 1), (5, 5, 0), (300, 0, 1)]
)
def test_no_queries_no_keys_no_batch(
    q_len: int, kv_len: int, batch: int, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    q, k, v = map(torch.from_numpy, qkv("gaussian", rng, Dims(batch, 2, 1, q_len, kv_len, 8, 12)))
    table = torch.ones(1)
    sink = torch.tensor([0.5, -2.0])
    calls: list[dict[str, Any]] = [
        {},
        {"mask": ak.causal()},
        {"mask": ~ak.window(3)},
        # Nothing is evaluated where nothing is seen: no index is out of range, no divisor zero.
        {"score": lambda s, b, h, q_idx, kv_idx: s + table[q_idx]},
        {"mask": lambda b, h, q_idx, kv_idx: kv_idx % q_idx.context.variable("kv_len") == 0},
        {"kv_lens": torch.zeros(batch, dtype=torch.int32), "mask": ak.causal()},
    ]
    for call in calls:
        o, lse = ak.attention(q, k, v, return_lse=True, **call)
        assert o.shape == (batch, 2, q_len, 12)
        assert lse.shape == (batch, 2, q_len)
        if kv_len == 0 or q_len == 0 or batch == 0:
            assert not o.any()
            assert torch.isneginf(lse).all()
            o, lse = ak.attention(q, k, v, return_lse=True, normalizer=ak.softmax(sink), **call)
            assert not o.any()
            assert torch.equal(lse, sink[None, :, None].expand_as(lse))
    compare(*qkv("gaussian", rng, Dims(1, 2, 1, 20, 30, 8, 12)), what="an ordinary call after them")


# --- layouts ----------------------------------------------------------------------------------------------


def transposed(x: Any) -> Tensor:
    """[B, S, H, D] in memory, as models have it."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 2, 1, 3))).transpose(1, 2)


def heads_last(x: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 2, 1))).permute(0, 3, 2, 1)


def channels_before_tokens(x: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 1, 3, 2))).transpose(2, 3)


def sliced(x: Any) -> Tensor:
    """Every second token of a larger tensor, beginning at an odd address; the rest is NaN."""
    b, h, s, d = x.shape
    large = torch.full((b, h, 2 * s + 1, d + 3), float("nan"))
    view = large[:, :, 1 : 2 * s : 2, 1 : d + 1]
    view.copy_(torch.from_numpy(x))
    return view


def every_third_channel(x: Any) -> Tensor:
    large = torch.full((*x.shape[:3], 3 * x.shape[3]), float("nan"))
    large[..., ::3] = torch.from_numpy(x)
    return large[..., ::3]


LAYOUTS = [transposed, heads_last, channels_before_tokens, sliced, every_third_channel]


@pytest.mark.parametrize("dims", [(16, 16), (33, 20)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(
    layout: Callable[[Any], Tensor], dims: tuple[int, int], isa: str, rng: np.random.Generator
) -> None:
    arrays = qkv("gaussian", rng, Dims(2, 4, 2, 70, 99, *dims))
    expected = testing.attention(*arrays, **CAUSAL)
    plain = ak.attention(*map(torch.from_numpy, arrays), mask=ak.causal(), return_lse=True)
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        tensors = [layout(x) if i in which else torch.from_numpy(x) for i, x in enumerate(arrays)]
        o, lse = ak.attention(*tensors, mask=ak.causal(), return_lse=True)
        testing.check(o.numpy(), lse.numpy(), expected, what=f"{layout.__name__} {which}")
        assert torch.equal(o, plain[0])
        assert torch.equal(lse, plain[1])


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_expanded(dimension: int, isa: str, rng: np.random.Generator) -> None:
    """A stride of 0 reads one element for all: batch, heads, tokens or channels."""
    arrays = [x.copy() for x in qkv("gaussian", rng, Dims(2, 3, 3, 40, 40, 16, 16))]
    first = (slice(None),) * dimension + (slice(0, 1),)
    for i in range(3):
        shape, full = arrays[i].shape, list(arrays)
        full[i] = np.ascontiguousarray(np.broadcast_to(arrays[i][first], shape))
        tensors = [torch.from_numpy(x) for x in arrays]
        tensors[i] = tensors[i][first].expand(shape)
        assert 0 in tensors[i].stride()
        o, lse = ak.attention(*tensors, mask=ak.causal(), return_lse=True)
        testing.check(o.numpy(), lse.numpy(), testing.attention(*full, **CAUSAL), what=f"tensor {i}")


def test_captured_tensors_of_any_strides(isa: str, rng: np.random.Generator, compare: Any) -> None:
    tensors = qkv("gaussian", rng, Dims(2, 4, 2, 50, 60, 16, 16))
    table = rng.standard_normal((60, 4, 50)).astype(np.float32)
    keep = rng.random((60, 2)) < 0.5
    kept = torch.from_numpy(keep).T
    compare(
        *tensors,
        oracle={"score": lambda s, p: s + table[:, p.h].T, "mask": lambda p: keep.T[p.b][None]},
        score=ak.bias(torch.from_numpy(table).permute(1, 2, 0)),
        mask=lambda b, h, q_idx, kv_idx: kept[b, kv_idx],
    )


IN_ORDER = {
    "keys adjacent": lambda x: x,
    "queries adjacent": lambda x: x.mT.contiguous().mT,
    "heads adjacent": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every second key": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "one row for all queries": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int32", "int64", "bool"])
@pytest.mark.parametrize("order", IN_ORDER)
def test_captured_tensors_in_every_order(
    order: str, kind: str, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    """Elements that are adjacent along keys, queries or neither are read by different code; so are few queries."""
    for q_len in (1, 3, 37):
        tensors = qkv("gaussian", rng, Dims(2, 4, 2, q_len, 83, 16, 16))
        drawn = torch.from_numpy(rng.integers(-2, 3, (2, 4, q_len, 83))).to(getattr(torch, kind))
        table = IN_ORDER[order](drawn)
        held = table.double().numpy()
        compare(
            *tensors,
            oracle={"score": lambda s, p, held=held: s + held[p.b, p.h]},
            score=lambda s, b, h, q_idx, kv_idx, table=table: s + table[b, h, q_idx, kv_idx] * 1.0,
        )


# --- several sequences in one call ------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("kv_lens", [[90, 1, 64], [0, 37, 90], [65, 0, 0], [0, 0, 0]])
def test_padded(kv_lens: list[int], isa: str, rng: np.random.Generator, compare: Any) -> None:
    q, k, v = qkv("gaussian", rng, Dims(3, 4, 2, 33, 90, 16, 24))
    lens = np.array(kv_lens, np.int32)
    for b, n in enumerate(kv_lens):  # beyond its length there may be anything
        k[b, :, n:], v[b, :, n:] = np.nan, np.inf
    slopes = rng.uniform(0.01, 0.5, 4).astype(np.float32)
    score, mask = ak.alibi(torch.from_numpy(slopes)), ak.window(25, 3)

    def oracle(s: Any, p: Pairs) -> Any:
        return s - slopes[p.h] * abs(p.position - p.kv_idx).astype(s.dtype)

    visible = {"mask": lambda p: (p.kv_idx >= p.position - 25) & (p.kv_idx <= p.position + 3)}
    tensor = torch.from_numpy(lens)
    compare(q, k, v, oracle={"kv_lens": lens}, kv_lens=tensor, mostly_dead=not any(kv_lens))
    compare(
        q, k, v, oracle={"kv_lens": lens, "score": oracle, **visible}, kv_lens=tensor, score=score, mask=mask,
        mostly_dead=sum(kv_lens) < 70,
    )  # fmt: skip


PACKED = {
    "equal": ([33, 0, 65, 1, 128], [33, 0, 65, 1, 128]),
    "different": ([1, 48, 0, 17, 30], [70, 16, 5, 0, 97]),
    "empty_ends": ([0, 0, 20, 0], [0, 3, 20, 0]),
    "one": ([50], [60]),
}


@ALL
@pytest.mark.parametrize("name", PACKED)
def test_packed(name: str, isa: str, rng: np.random.Generator, compare: Any) -> None:
    q_lens, kv_lens = PACKED[name]
    q, k, v = qkv("gaussian", rng, Dims(1, 4, 2, sum(q_lens), sum(kv_lens), 16, 24))
    cu = {
        f"cu_seqlens_{side}": np.cumsum([0, *lens]).astype(np.int32)
        for side, lens in (("q", q_lens), ("kv", kv_lens))
    }
    lengths = {side: torch.from_numpy(x) for side, x in cu.items()}
    slopes = rng.uniform(0.01, 0.5, (len(q_lens), 4)).astype(np.float32)
    sink = rng.standard_normal(4).astype(np.float32)

    def oracle(s: Any, p: Pairs) -> Any:
        return s - slopes[p.b, p.h] * abs(p.position - p.kv_idx).astype(s.dtype)

    compare(q, k, v, oracle=cu, **lengths)
    compare(
        q, k, v,
        oracle={**cu, **CAUSAL, "score": oracle, "sink": sink},
        mask=ak.causal(), score=ak.alibi(torch.from_numpy(slopes)), normalizer=ak.softmax(torch.from_numpy(sink)),
        **lengths,
    )  # fmt: skip
    compare(
        q, k, v,
        oracle={**cu, "mask": lambda p: p.kv_idx % (p.b + 1) <= p.q_idx},
        mask=lambda b, h, q_idx, kv_idx: kv_idx % (b + 1) <= q_idx,
        **lengths,
    )  # fmt: skip


def test_packed_segments_of_no_tokens(isa: str, rng: np.random.Generator, compare: Any) -> None:
    """Every way in which three segments may lack queries, keys or both."""
    for segments in itertools.product([(0, 0), (0, 9), (5, 0), (5, 9)], repeat=3):
        q_lens, kv_lens = zip(*segments, strict=True)
        tensors = qkv("gaussian", rng, Dims(1, 2, 1, sum(q_lens), sum(kv_lens), 8, 12))
        cu = {
            f"cu_seqlens_{side}": np.cumsum([0, *lens]).astype(np.int32)
            for side, lens in (("q", q_lens), ("kv", kv_lens))
        }
        compare(
            *tensors,
            oracle={**cu, **CAUSAL},
            mask=ak.causal(),
            mostly_dead=(5, 0) in segments or (5, 9) not in segments,
            what=str(segments),
            **{side: torch.from_numpy(x) for side, x in cu.items()},
        )
