"""bfloat16 and float16 in memory: every bit pattern in and out, and what 16 bits make hard.

The sizes, programs and layouts of the other conformance tests are theirs; here is what only these dtypes have.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import testing
from attnkit.testing import Dims, qkv
from attnkit.testing.floats import FORMATS, rounded

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EVERY = pytest.mark.parametrize("dtype", HALVES)
INF = float("inf")


def every_pattern(dtype: str) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(HALVES[dtype])


def handed_through(got: Tensor, patterns: Tensor, isa: str) -> Tensor:
    """Where ``got`` is the pattern's value; the dot-product instruction may take subnormal numbers for zero."""
    want = patterns.to(got.dtype)
    flushes = patterns.dtype == torch.bfloat16 and isa in ("avx512bf16", "avx512amx")
    flushed = (got == 0) & (patterns.abs() < torch.finfo(patterns.dtype).tiny) & flushes
    return (got == want) | (got.isnan() & want.isnan()) | flushed


def numbers(dtype: str) -> Tensor:
    """Every finite value once, in order."""
    patterns = every_pattern(dtype)
    return patterns[patterns.isfinite()].float().unique().to(HALVES[dtype])


# --- every pattern ----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("width", "q_len"), [(1, 1), (16, 1), (64, 1), (127, 1), (64, 20), (127, 20)])
def test_a_single_key_hands_its_value_through(dtype: str, width: int, q_len: int, isa: str) -> None:
    """Widened and rounded, every pattern is itself; NaN stays NaN."""
    patterns = every_pattern(dtype)
    v = torch.nn.functional.pad(patterns, (0, -len(patterns) % width)).view(-1, 1, 1, width)
    q = torch.ones(len(v), 1, q_len, 8, dtype=v.dtype)
    o = ak.attention(q, q[:, :, :1], v)
    assert handed_through(o, v.expand_as(o), isa).all()


@EVERY
@pytest.mark.parametrize(("dim", "q_len"), [(1, 1), (15, 1), (16, 1), (32, 1), (16, 9), (15, 9)])
def test_every_pattern_as_a_query_and_as_a_key(dtype: str, dim: int, q_len: int, isa: str) -> None:
    """The lse of a single key is its score: the pattern itself, among zeros, times one."""
    patterns = every_pattern(dtype)
    one = torch.ones((), dtype=patterns.dtype).expand(len(patterns), 1, 1, dim)
    hot = torch.zeros(len(patterns), 1, 1, dim, dtype=patterns.dtype)
    hot[torch.arange(len(patterns)), 0, 0, torch.arange(len(patterns)) % dim] = patterns
    finite = patterns.isfinite()
    for q, k in ((hot, one), (one, hot)):
        lses = ak.attention(q.expand(-1, -1, q_len, -1), k, one, scale=1.0, return_lse=True)[1]
        lse = lses[:, 0, -1]
        assert torch.equal(lses.nan_to_num(7), lse[:, None, None].expand_as(lses).nan_to_num(7))
        assert handed_through(lse, patterns, isa)[finite].all()
        # exp(inf - inf); a score of -inf sees nothing
        assert torch.isnan(lse[patterns.isnan() | (patterns == INF)]).all()
        assert torch.isneginf(lse[patterns == -INF]).all()


@EVERY
def test_ties_round_to_even(dtype: str, isa: str) -> None:
    """The mean of two neighbours lies halfway between them, and is exact in float32."""
    values = numbers(dtype).float()
    low, high = values[:-1], values[1:]
    if dtype == "bfloat16":  # whose sums with float32's largest numbers would overflow, and halves underflow
        normal = (low.abs() > 1e-37) & (high.abs() > 1e-37) & (low.abs() < 1e38) & (high.abs() < 1e38)
        low, high = low[normal], high[normal]
    v = torch.stack([low, high], -1).to(HALVES[dtype]).view(1, 1, -1, 2).mT.contiguous()
    q = torch.zeros(1, 1, 3, 4, dtype=v.dtype)
    for at in range(0, v.shape[3], 4096):
        part = v[..., at : at + 4096]
        expected = (low + (high - low) / 2)[at : at + 4096].to(v.dtype)
        o = ak.attention(q, q[:, :, :2], part)
        assert torch.equal(o, expected.expand_as(o))


def test_float16_beyond_its_largest(isa: str) -> None:
    """A mean never overflows, however many keys it sums; infinity comes from values alone."""
    most = torch.finfo(torch.float16).max
    q = torch.zeros(1, 1, 5, 8, dtype=torch.float16)
    v = torch.full((1, 1, 1000, 3), most, dtype=torch.float16)
    v[..., 1] = -most
    v[0, 0, 500, 2] = INF
    o = ak.attention(q, torch.zeros(1, 1, 1000, 8, dtype=torch.float16), v)
    assert torch.equal(o, torch.tensor([most, -most, INF], dtype=torch.float16).expand_as(o))


def test_subnormal_float16(isa: str, rng: np.random.Generator) -> None:
    """Values, queries and keys below 2^-14 count in full, and o rounds to multiples of 2^-24."""
    q, k, v = qkv("gaussian", rng, Dims(1, 4, 2, 40, 70, 16, 24))
    arrays = [rounded(x * s, "float16") for x, s in ((q, 1e-5), (k, 1e-5), (v, 1e-5))]
    assert all(np.mean(np.abs(x) < 2.0**-14) > 0.9 and np.any(x) for x in arrays)
    o, lse = attend(arrays, "float16", scale=1e9)
    expected = testing.attention(*arrays, scale=1e9, dtype="float16")
    testing.check(o, lse, expected)
    assert np.ptp(expected.lse) > 0.1
    assert len(np.unique(o)) > 10


def attend(arrays: Any, dtype: str, **call: Any) -> tuple[Any, Any]:
    tensors = (torch.from_numpy(np.ascontiguousarray(x)).to(HALVES[dtype]) for x in arrays)
    o, lse = ak.attention(*tensors, return_lse=True, **call)
    assert (o.dtype, lse.dtype) == (HALVES[dtype], torch.float32)
    return o.float().numpy(), lse.numpy()


# --- hard inputs ------------------------------------------------------------------------------------------

DIMS = {
    "square": Dims(2, 4, 2, 64, 64, 64, 64),
    "odd": Dims(2, 2, 1, 33, 131, 33, 47),
    "decode": Dims(6, 8, 2, 1, 257, 80, 80),
}


@EVERY
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("distribution", [name for name in testing.DISTRIBUTIONS if name != "tiny"])
def test_distributions(
    distribution: str, dims: str, dtype: str, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    tensors = qkv(distribution, rng, DIMS[dims], dtype)
    compare(*tensors)
    compare(*tensors, oracle={"mask": lambda p: p.kv_idx <= p.position}, mask=ak.causal(), what="causal")


@pytest.mark.parametrize("dtype", ["float16"])  # bfloat16 is in test_shapes
@pytest.mark.parametrize("dims", [(1, 3), (3, 1), (17, 33), (65, 127), (96, 80), (129, 255)])
def test_head_dims(
    dims: tuple[int, int], dtype: str, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    compare(*qkv("gaussian", rng, Dims(1, 2, 2, 37, 70, *dims), dtype))


@EVERY
@pytest.mark.parametrize("kv_len", [1000, 4096])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_long_sums_keep_their_bits(
    mean: float, kv_len: int, dtype: str, isa: str, rng: np.random.Generator, compare: Any
) -> None:
    q, k, v = qkv("gaussian", rng, Dims(1, 1, 1, 32, kv_len, 64, 32))
    compare(q, k, v + np.float32(mean))


@EVERY
@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
@pytest.mark.parametrize("lengths", [(17, 15), (48, 64), (5, 129), (95, 200)])
def test_dead_slots(
    lengths: tuple[int, int], poison: float, dtype: str, isa: str, rng: np.random.Generator
) -> None:
    """What no query may see changes no bit; what some may see reaches those alone."""
    q, k, v = (
        torch.from_numpy(x).to(HALVES[dtype]) for x in qkv("gaussian", rng, Dims(2, 4, 2, *lengths, 16, 20))
    )
    kv_len = lengths[1]
    dead = torch.from_numpy(rng.random((2, kv_len)) < 0.3)

    def alive(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ~dead[b, kv_idx]

    clean = ak.attention(q, k, v, mask=alive, return_lse=True)
    bad = [t.masked_fill(dead[:, None, :, None], poison) for t in (k, v)]
    assert all(map(torch.equal, ak.attention(q, *bad, mask=alive, return_lse=True), clean))
    lens = torch.tensor([kv_len // 2, 0], dtype=torch.int32)
    bad = [t.clone() for t in (k, v)]
    for t in bad:
        t[0, :, kv_len // 2 :] = t[1] = poison
    o, lse = ak.attention(q, *bad, kv_lens=lens, return_lse=True)
    assert all(map(torch.equal, (o, lse), ak.attention(q, k, v, kv_lens=lens, return_lse=True)))
    assert not o[1].any()
    assert torch.isneginf(lse[1]).all()
    # The last key is seen by the last query alone.
    last = v.clone()
    last[:, :, -1] = poison
    o, clean_o = (ak.attention(q, k, x, mask=ak.causal()) for x in (last, v))
    assert torch.equal(o[:, :, :-1], clean_o[:, :, :-1])
    assert not o[:, :, -1].isfinite().any()


@EVERY
@pytest.mark.parametrize("poison", [float("nan"), INF])
@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("width", [20, 96, 160])
def test_no_number_in_a_channel(
    width: int, q_len: int, poison: float, dtype: str, isa: str, rng: np.random.Generator
) -> None:
    """It reaches its own channel, and of its neighbours, with which it may be multiplied, no bit."""
    q, k, v = (
        torch.from_numpy(x).to(HALVES[dtype])
        for x in qkv("gaussian", rng, Dims(2, 8, 2, q_len, 150, 32, width))
    )
    place = (0, 1, int(rng.integers(150)), int(rng.integers(width)))
    v[place] = 0
    clean = ak.attention(q, k, v)
    v[place] = poison
    o = ak.attention(q, k, v)
    hit = torch.zeros(o.shape, dtype=torch.bool)
    hit[0, 4:, :, place[-1]] = True
    assert not o[hit].isfinite().any()
    assert torch.equal(o[~hit], clean[~hit])


# --- the same values, otherwise stored --------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same elements with other strides; what lies between them is NaN."""
    b, h, s, d = x.shape
    large = x.new_full((b, h, 2 * s + 1, 2 * d + 3), float("nan"))
    views = {
        "tokens first": large.new_empty(b, s, h, d).transpose(1, 2),
        "heads last": large.new_empty(b, d, s, h).permute(0, 3, 2, 1),
        "channels before tokens": large.new_empty(b, h, d, s).mT,
        "odd address": large[:, :, 1 : 2 * s : 2, 1 : d + 1],
        "every second channel": large.clone()[:, :, :s, : 2 * d : 2],
    }
    for view in views.values():
        view.copy_(x)
    return views


@EVERY
@pytest.mark.parametrize("dims", [(16, 16), (33, 20), (15, 1)])
def test_strides(dims: tuple[int, int], dtype: str, isa: str, rng: np.random.Generator) -> None:
    tensors = [
        torch.from_numpy(x).to(HALVES[dtype]) for x in qkv("gaussian", rng, Dims(2, 4, 2, 35, 71, *dims))
    ]
    plain = ak.attention(*tensors, mask=ak.causal(), return_lse=True)
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        for name in layouts(tensors[0]):
            moved = [layouts(t)[name] if i in which else t for i, t in enumerate(tensors)]
            assert all(map(torch.equal, moved, tensors))
            got = ak.attention(*moved, mask=ak.causal(), return_lse=True)
            assert all(map(torch.equal, got, plain)), f"{name} {which}"


@EVERY
@pytest.mark.parametrize("qkv_dtype", [*HALVES, "float32"])
def test_captured_tensors(qkv_dtype: str, dtype: str, isa: str, rng: np.random.Generator) -> None:
    """A captured 16-bit tensor is read as the float32 values that it has, whatever q, k, v are."""
    tensors = [
        torch.from_numpy(x).to(getattr(torch, qkv_dtype))
        for x in qkv("gaussian", rng, Dims(2, 4, 2, 50, 60, 16, 16))
    ]
    table = torch.from_numpy(rng.standard_normal((60, 4, 50), np.float32)).to(HALVES[dtype])
    slopes = torch.from_numpy(rng.uniform(0.01, 0.5, 4).astype(np.float32)).to(HALVES[dtype])
    limits = torch.from_numpy(rng.uniform(-40, 40, 50).astype(np.float32)).to(HALVES[dtype])
    o = []
    for convert in (lambda t: t, Tensor.float):
        bias, slope, limit = convert(table).permute(1, 2, 0), convert(slopes), convert(limits)

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, limit: Tensor = limit) -> Any:
            return kv_idx.float() - q_idx > limit[q_idx]

        o.append(
            ak.dense_attention(*tensors, score=ak.bias(bias), alibi_slopes=slope, mask=mask, return_lse=True)
        )
    assert all(map(torch.equal, *o))
    assert (o[0][0] == 0).all(3).any()
    assert (o[0][0] != 0).any()


@EVERY
def test_every_pattern_of_a_captured_tensor(dtype: str, isa: str) -> None:
    patterns = every_pattern(dtype)
    finite = patterns[patterns.isfinite()]
    q = torch.zeros(1, 1, len(finite), 1)
    lse = ak.attention(
        q, q[:, :, :1], q[:, :, :1], score=lambda s, b, h, q_idx, kv_idx: s + finite[q_idx], return_lse=True
    )[1]
    assert torch.equal(lse.flatten(), finite.float())


# --- against torch's own -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("causal", [False, True])
def test_at_most_twice_the_error_of_torchs_eager_computation(
    causal: bool, dtype: str, isa: str, rng: np.random.Generator
) -> None:
    """FlashAttention's rule in torch's words: matrix products and softmax in the dtype itself."""
    arrays = qkv("gaussian", rng, Dims(2, 4, 4, 90, 90, 64, 64), dtype)
    q, k, v = (torch.from_numpy(x).to(HALVES[dtype]) for x in arrays)
    hidden = torch.ones(90, 90).tril().logical_not() if causal else torch.zeros(90, 90).bool()

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q / 8 @ k.mT).masked_fill(hidden, -INF).softmax(-1) @ v

    exact = eager(*(t.double() for t in (q, k, v)))
    ours = ak.attention(q, k, v, mask=ak.causal() if causal else None)
    torchs = eager(q, k, v)
    assert torchs.dtype == ours.dtype
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()
    # The oracle's naive computation is as wrong as torch's, not more: its gate is no wider.
    naive = testing.attention(
        *arrays, mask=lambda p: (p.kv_idx <= p.q_idx) | (not causal), dtype=dtype
    ).naive_o
    assert np.abs(naive - exact.numpy()).max() <= 1.5 * (torchs - exact).abs().max().item()


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_is_torchs(dtype: str, rng: np.random.Generator) -> None:
    """The tests' own rounding, on random bits, ties and every exponent."""
    x = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    x = np.concatenate([x, x & 0xFFFF8000, x & 0xFFFFF000, [0, 1, 2**31]]).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        ours = torch.from_numpy(rounded(x, dtype))
    expected = torch.from_numpy(x).to(getattr(torch, dtype)).float()
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(7), expected.nan_to_num(7))
    assert FORMATS[dtype].unit_roundoff == torch.finfo(getattr(torch, dtype)).eps / 2
    assert FORMATS[dtype].smallest_normal == torch.finfo(getattr(torch, dtype)).tiny
    for at in (0.0, 1e-40, 0.75, 1.0, 3.0):
        here = torch.tensor(at, dtype=getattr(torch, dtype))
        assert FORMATS[dtype].spacing(here.item()) == torch.nextafter(here, here + 9).double() - here.double()
