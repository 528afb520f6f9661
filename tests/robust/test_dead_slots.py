"""What no row can see reaches nothing, not even as a bit; what a row can see reaches it. Loads are checked likewise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import AttnkitError

POISONS = {"nan": float("nan"), "inf": float("inf"), "huge": 1e38}
LENGTHS = [
    (1, 1),
    (16, 16),
    (17, 15),
    (48, 64),
    (5, 129),
    (97, 127),
    (100, 128),
    (95, 200),
]  # (q_len, kv_len)
BATCH, HEADS, KV_HEADS, DIM, WIDTH = 2, 4, 2, 16, 20

Mask = Callable[..., Any]
Visible = Callable[[int, int], Tensor]  # (q_len, kv_len) -> bool [batch, q_len, kv_len]


def indices(q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    """q_idx [q_len, 1] as positions among the keys, and kv_idx [1, kv_len]."""
    return torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)[None]


def documents(length: int) -> Tensor:
    """Ids [batch, length]: another border in each batch entry."""
    return torch.stack([torch.arange(length) * (3 + b) // max(length, 1) for b in range(BATCH)]).int()


def padding(kv_len: int) -> Tensor:
    return torch.stack([torch.arange(kv_len) < kv_len * (b + 1) // 3 for b in range(BATCH)])


def mask_of(name: str, q_len: int, kv_len: int) -> Mask:
    keep = padding(kv_len)
    masks: dict[str, Callable[[], Mask]] = {
        "causal": ak.causal,
        "window": lambda: ak.window(7, 2),
        "document": lambda: ak.document(documents(q_len), documents(kv_len)),
        "prefix | causal": lambda: ak.prefix(kv_len // 3) | ak.causal(),
        "padding": lambda: lambda b, h, q_idx, kv_idx: keep[b, kv_idx],
        "every third": lambda: lambda b, h, q_idx, kv_idx: (kv_idx - q_idx) % 3 == 0,
    }
    return masks[name]()


def visible_of(name: str, q_len: int, kv_len: int) -> Tensor:
    """The same masks, written once more, on whole tensors: bool [batch, q_len, kv_len]."""
    i, j = indices(q_len, kv_len)
    grids: dict[str, Callable[[], Tensor]] = {
        "causal": lambda: j <= i,
        "window": lambda: (j >= i - 7) & (j <= i + 2),
        "document": lambda: documents(q_len)[:, :, None] == documents(kv_len)[:, None],
        "prefix | causal": lambda: (j < kv_len // 3) | (j <= i),
        "padding": lambda: padding(kv_len)[:, None],
        "every third": lambda: (j - (i - kv_len + q_len)) % 3 == 0,
    }
    return grids[name]().expand(BATCH, q_len, kv_len)


MASKS = ["causal", "window", "document", "prefix | causal", "padding", "every third"]


def make(
    rng: np.random.Generator, q_len: int, kv_len: int, batch: int = BATCH
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, HEADS, q_len, DIM), (batch, KV_HEADS, kv_len, DIM), (batch, KV_HEADS, kv_len, WIDTH)
    q, k, v = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    return q, k, v


def planted(x: Tensor, keys: Tensor, value: float) -> Tensor:
    """``x [batch, heads, kv_len, dim]`` with ``value`` in every channel of ``keys [batch, kv_len]``."""
    return x.masked_fill(keys[:, None, :, None], value)


def equal(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def run(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    o, lse = ak.attention(q, k, v, return_lse=True, **keywords)
    return o, lse


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(AttnkitError) as raised:
        call()
    return raised.value.code


# --- dead slots ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", MASKS)
def test_keys_that_nobody_sees(name: str, poison: str, isa: str, rng: np.random.Generator) -> None:
    """Beyond the mask itself a quarter of the keys is masked, and those hold the poison."""
    for q_len, kv_len in LENGTHS:
        q, k, v = make(rng, q_len, kv_len)
        dead = torch.from_numpy(rng.random((BATCH, kv_len)) < 0.25)
        inner = mask_of(name, q_len, kv_len)

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, inner: Mask = inner, dead: Tensor = dead) -> Any:
            return inner(b, h, q_idx, kv_idx) & ~dead[b, kv_idx]

        clean = run(q, planted(k, dead, 0), planted(v, dead, 0), mask=mask)
        equal(run(q, planted(k, dead, POISONS[poison]), planted(v, dead, POISONS[poison]), mask=mask), clean)
        assert torch.isfinite(clean[0]).all()
        seen = (visible_of(name, q_len, kv_len) & ~dead[:, None]).any(-1)
        assert torch.equal(clean[1].isneginf(), ~seen[:, None].expand_as(clean[1]))
        assert not clean[0][clean[1].isneginf()].any()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", MASKS)
def test_reaches_the_rows_that_see_it_and_no_others(
    name: str, poison: str, isa: str, rng: np.random.Generator
) -> None:
    for q_len, kv_len in LENGTHS:
        q, k, v = make(rng, q_len, kv_len)
        bad = torch.zeros(BATCH, kv_len, dtype=torch.bool)
        bad[:, int(rng.integers(kv_len))] = True
        blind = ~(visible_of(name, q_len, kv_len) & bad[:, None]).any(-1)[:, None].expand(BATCH, HEADS, q_len)
        mask = mask_of(name, q_len, kv_len)
        clean = run(q, planted(k, bad, 0), planted(v, bad, 0), mask=mask)
        for where in ("k", "v"):
            held = planted(k, bad, POISONS[poison] if where == "k" else 0)
            values = planted(v, bad, POISONS[poison] if where == "v" else 0)
            o, lse = run(q, held, values, mask=mask)
            if (
                poison != "huge" or where == "v"
            ):  # 1e38 times a query overflows float32, not the reference's float64
                want_o, want_lse = run(q, held, values, mask=mask, backend="reference")
                assert torch.equal(o.isnan(), want_o.isnan())
                assert torch.equal(lse.isnan(), want_lse.isnan())
            if poison == "nan" and where == "v":
                assert torch.equal(o.isnan().all(-1), ~blind)
            equal((o[blind], lse[blind]), (clean[0][blind], clean[1][blind]))


@pytest.mark.parametrize("poison", POISONS)
def test_keys_beyond_their_length(poison: str, isa: str, rng: np.random.Generator) -> None:
    for q_len, kv_len in LENGTHS:
        lens = torch.tensor([kv_len // 2, kv_len], dtype=torch.int32)
        q, k, v = make(rng, q_len, kv_len)
        dead = torch.arange(kv_len) >= lens[:, None]
        for mask in (None, ak.causal(), ak.window(3, 1)):
            want = run(q, planted(k, dead, 0), planted(v, dead, 0), mask=mask, kv_lens=lens)
            got = run(
                q,
                planted(k, dead, POISONS[poison]),
                planted(v, dead, POISONS[poison]),
                mask=mask,
                kv_lens=lens,
            )
            equal(got, want)


@pytest.mark.parametrize("poison", POISONS)
def test_other_segments(poison: str, isa: str, rng: np.random.Generator) -> None:
    """Packed: what one segment holds, in queries, keys and values, changes no bit of the others."""
    lengths = [0, 16, 33, 0, 1, 97, 12]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = make(rng, int(cu[-1]), int(cu[-1]), batch=1)
    for mask in (None, ak.causal(), ak.window(5, 5)):
        clean = run(q, k, v, mask=mask, cu_seqlens_q=cu, cu_seqlens_kv=cu)
        for n in (1, 2, 4, 5):
            mine = torch.zeros(int(cu[-1]), dtype=torch.bool)
            mine[cu[n] : cu[n + 1]] = True
            q2, k2, v2 = (x.masked_fill(mine[:, None], POISONS[poison]) for x in (q, k, v))
            o, lse = run(q2, k2, v2, mask=mask, cu_seqlens_q=cu, cu_seqlens_kv=cu)
            equal((o[:, :, ~mine], lse[..., ~mine]), (clean[0][:, :, ~mine], clean[1][..., ~mine]))
            if poison != "huge":
                assert o[:, :, mine].isnan().all()


@pytest.mark.parametrize("sink", [None, 0.5], ids=["no sink", "sink"])
def test_rows_that_see_nothing(sink: float | None, isa: str, rng: np.random.Generator) -> None:
    """No pair, or only scores of -inf: o is exactly 0, lse is -inf (the sink's logit where there is a sink)."""
    normalizer = None if sink is None else ak.softmax(torch.full((HEADS,), sink))
    for q_len, kv_len in [(1, 1), (33, 16), (97, 128), (20, 300)]:
        q, k, v = make(rng, q_len, kv_len)
        v[..., 0] = float("nan")
        lens = torch.zeros(BATCH, dtype=torch.int32)
        calls: list[dict[str, Any]] = [
            {"mask": lambda b, h, i, j: j < 0},
            {"mask": lambda b, h, i, j: (i * j) % 2 == 2},  # not known before it is evaluated
            {"kv_lens": lens},
        ]
        for keywords in calls:
            o, lse = run(q, k, v, normalizer=normalizer, **keywords)
            assert torch.equal(o, torch.zeros_like(o))
            assert torch.equal(lse, torch.full_like(lse, -torch.inf if sink is None else sink))
        o, lse = run(
            q, k, v.nan_to_num(), normalizer=normalizer, score=lambda s, b, h, i, j: s * 0 - float("inf")
        )
        assert torch.equal(o, torch.zeros_like(o))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf if sink is None else sink))


def test_no_keys_at_all(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, 17, 0)
    slopes = torch.ones(HEADS)
    o, lse = run(q, k, v, score=lambda s, b, h, i, j: s * slopes[h], mask=ak.causal())
    assert torch.equal(o, torch.zeros_like(o))
    assert lse.isneginf().all()


# --- loads -----------------------------------------------------------------------------------------------

Q_LEN, KV_LEN, SHORT = 33, 130, 20

# rank: (index of a load from a tensor of SHORT elements, its largest value over all pairs)
RANKS: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "scalar": (
        lambda b, h, i, j: b * 19 + 1,
        lambda i, j: torch.tensor(1),
    ),  # batch entry 0 alone stays inside
    "per query": (lambda b, h, i, j: i, lambda i, j: i),
    "per key": (lambda b, h, i, j: j, lambda i, j: j),
    "tile": (lambda b, h, i, j: j - i, lambda i, j: j - i),
}


def live_pairs(rank: str, b: Any, h: Any, i: Any, j: Any) -> Any:
    """The pairs at which the load of this rank is inside its buffer."""
    index = RANKS[rank][0](b, h, i, j)
    return (index >= 0) & (index < SHORT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_checked_loads(rank: str, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
    """Out of range at a pair that exists: AK601. At none that exists: as if the buffer went on for ever."""
    q, k, v = make(rng, Q_LEN, KV_LEN)
    short = torch.from_numpy(rng.integers(0, 2, SHORT)).to(dtype)
    longer = torch.zeros(400, dtype=dtype)
    longer[200 : 200 + SHORT] = short
    index = RANKS[rank][0]

    def score(s: Any, *at: Any) -> Any:
        return s + short[index(*at)].float()

    def score_inside(s: Any, *at: Any) -> Any:
        return s + longer[index(*at) + 200].float()

    def mask(*at: Any) -> Any:
        return live_pairs(rank, *at)

    def mask_that_loads(*at: Any) -> Any:
        return live_pairs(rank, *at) & (short[index(*at)] == short[index(*at)])

    want = run(q, k, v, score=score_inside, mask=mask)
    assert torch.isfinite(want[0]).all()
    assert want[0].any()
    equal(run(q, k, v, score=score, mask=mask), want)
    equal(run(q, k, v, score=score_inside, mask=mask_that_loads), want)
    assert code_of(lambda: run(q, k, v, score=score)) == "AK601"
    assert code_of(lambda: run(q, k, v, mask=lambda *at: short[index(*at)] == short[index(*at)])) == "AK601"
    assert code_of(lambda: run(q, k, v, score=score, mask=ak.causal())) == "AK601"


@pytest.mark.parametrize("rank", ["per query", "per key", "tile"])
@pytest.mark.parametrize("end", ["below", "above"])
def test_one_pair_out_of_range(rank: str, end: str, isa: str, rng: np.random.Generator) -> None:
    """The last pair of a problem, alone, is found out; without it the same call is fine."""
    q, k, v = make(rng, Q_LEN, KV_LEN)
    at = RANKS[rank][1](*[torch.arange(n).view(shape) for n, shape in ((Q_LEN, (-1, 1)), (KV_LEN, (1, -1)))])
    low, size = int(at.min()), int(at.max() - at.min() + 1)
    shift = low + 1 if end == "below" else low
    short = torch.ones(size - 1)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + short[RANKS[rank][0](b, h, i, j) - shift]

    def all_but_that(b: Any, h: Any, i: Any, j: Any) -> Any:
        index = RANKS[rank][0](b, h, i, j) - shift
        return (index >= 0) & (index < size - 1)

    assert code_of(lambda: run(q, k, v, score=score)) == "AK601"
    o, lse = run(q, k, v, score=score, mask=all_but_that)
    want = run(q, k, v, score=lambda s, b, h, i, j: s + 1.0, mask=all_but_that)
    equal((o, lse), want)


def test_integers_that_may_leave_32_bits(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, 17, 33)
    big = torch.tensor([2**31 - 1, 1], dtype=torch.int32)
    wide = torch.tensor([2**31, 1], dtype=torch.int64)
    calls: list[dict[str, Any]] = [
        {"score": lambda s, b, h, i, j: s + (j + (2**31 - 1)).float()},
        {"score": lambda s, b, h, i, j: s + (big[b] * (i + 1)).float()},
        {"score": lambda s, b, h, i, j: s + (-(j * 2**27) - (2**31 - 1)).float()},
        {"mask": lambda b, h, i, j: wide[b] > i},
        {"mask": lambda b, h, i, j: (i + 1) * 65536 * ((j + 1) * 65536) > 0},
        {"score": lambda s, b, h, i, j: s + s.int()},
    ]
    for keywords in calls:
        assert code_of(lambda keywords=keywords: run(q, k, v, **keywords)) == "AK604"
    assert (
        run(q, k, v, mask=lambda b, h, i, j: j + (2**31 - 33) > i)[1].isfinite().all()
    )  # the largest: exactly 2^31 - 1


def test_divisors_that_may_be_zero(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, 17, 33)
    some = torch.tensor([1, 0], dtype=torch.int32)
    calls: list[Callable[..., Any]] = [
        lambda b, h, i, j: i // j >= 0,
        lambda b, h, i, j: i % (j - 32) >= 0,
        lambda b, h, i, j: i // some[b] >= 0,
        lambda b, h, i, j: i % (h - b) >= 0,
    ]
    for mask in calls:
        assert code_of(lambda mask=mask: run(q, k, v, mask=mask)) == "AK605"
    assert run(q, k, v, mask=lambda b, h, i, j: i // (j + 1) >= 0)[1].isfinite().all()
    assert run(q, k, v, mask=lambda b, h, i, j: i % (j - 33) <= 0)[1].isfinite().all()


@pytest.mark.parametrize("q_len", [1, 4, 17, 97])
def test_a_sequence_without_keys_beside_longer_ones(q_len: int, isa: str, rng: np.random.Generator) -> None:
    """Its lengths prove nothing for the others, and its queries index nothing."""
    lens = torch.tensor([0, 130, 0, 7], dtype=torch.int32)
    q, k, v = make(rng, q_len, 130, batch=len(lens))
    per_query = torch.from_numpy(rng.standard_normal(q_len, dtype=np.float32))
    position = torch.from_numpy(rng.standard_normal(130, dtype=np.float32))
    per_length = torch.ones(130)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + per_query[i] + position[j]

    dead = torch.arange(130) >= lens[:, None]
    for keywords in ({}, {"mask": ak.causal()}, {"mask": lambda b, h, i, j: per_length[j] > 0}):
        o, lse = run(
            q,
            planted(k, dead, float("nan")),
            planted(v, dead, float("nan")),
            score=score,
            kv_lens=lens,
            **keywords,
        )
        assert not o[lens == 0].any()
        assert lse[lens == 0].isneginf().all()
        for b in (1, 3):
            alone = run(
                q[b : b + 1], k[b : b + 1], v[b : b + 1], score=score, kv_lens=lens[b : b + 1], **keywords
            )
            equal((o[b : b + 1], lse[b : b + 1]), alone)


def test_lengths_in_an_index(isa: str, rng: np.random.Generator) -> None:
    """An index made from kv_len is inside only where there are keys: a sequence of none must not use it."""
    lens = torch.tensor([0, 40], dtype=torch.int32)
    q, k, v = make(rng, 5, 40)
    table = torch.from_numpy(rng.standard_normal(40, dtype=np.float32))

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + table[i.context.variable("kv_len") - 1 - i]

    o, lse = run(q, k, v, score=score, kv_lens=lens)
    want, want_lse = run(q, k, v, score=score, kv_lens=lens, backend="reference")
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
