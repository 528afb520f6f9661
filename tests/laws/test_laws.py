"""What must hold whatever the numbers are: the algebra of softmax attention, and layouts that say the same thing."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import _engine

LENGTHS = [(40, 40), (7, 130), (130, 65)]


def problem(
    rng: np.random.Generator, q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2
) -> tuple[Tensor, ...]:
    shapes = ((2, heads, q_len, 24), (2, kv_heads, kv_len, 24), (2, kv_heads, kv_len, 20))
    return tuple(torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in shapes)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("cut", [1, 16, 33])
def test_a_fold_over_two_parts_is_the_fold_over_the_whole(
    rng: np.random.Generator, isa: str, q_len: int, kv_len: int, cut: int
) -> None:
    cut = min(cut, kv_len - 1)
    q, k, v = problem(rng, q_len, kv_len)
    cap = ak.softcap(3.0)
    whole, whole_lse = ak.attention(q, k, v, score=cap, return_lse=True)
    parts = [
        ak.attention(q, k[:, :, part], v[:, :, part], score=cap, return_lse=True)
        for part in (slice(0, cut), slice(cut, None))
    ]
    lse = torch.stack([x.double() for _, x in parts])
    weights = torch.softmax(lse, 0)[..., None]
    close(whole.double(), sum(w * o.double() for w, (o, _) in zip(weights, parts, strict=True)))
    close(whole_lse.double(), torch.logsumexp(lse, 0))


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_the_order_of_keys_does_not_matter(
    rng: np.random.Generator, isa: str, q_len: int, kv_len: int
) -> None:
    q, k, v = problem(rng, q_len, kv_len)
    order = torch.from_numpy(rng.permutation(kv_len))
    ids = torch.arange(kv_len) % 3
    shuffled = ids[order]
    o = ak.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: ids[kv_idx] != 1)
    permuted = ak.attention(
        q, k[:, :, order], v[:, :, order], mask=lambda b, h, q_idx, kv_idx: shuffled[kv_idx] != 1
    )
    close(o, permuted)


def test_permuting_heads_permutes_the_result(rng: np.random.Generator, isa: str) -> None:
    q, k, v = problem(rng, 50, 70, heads=4, kv_heads=4)
    order = torch.tensor([2, 0, 3, 1])
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    o = ak.attention(q, k, v, score=ak.alibi(slopes))
    assert torch.equal(
        o[:, order], ak.attention(q[:, order], k[:, order], v[:, order], score=ak.alibi(slopes[order]))
    )


def test_a_constant_added_to_all_logits_moves_only_lse(rng: np.random.Generator, isa: str) -> None:
    q, k, v = problem(rng, 33, 65)
    o, lse = ak.attention(q, k, v, return_lse=True)
    shifted, shifted_lse = ak.attention(
        q, k, v, score=lambda s, b, h, q_idx, kv_idx: s + 8.0, return_lse=True
    )
    close(o, shifted)
    close(lse + 8.0, shifted_lse)


def test_constant_values_come_back(rng: np.random.Generator, isa: str) -> None:
    q, k, v = problem(rng, 33, 65)
    constant = torch.full_like(v, 1.5)
    close(ak.attention(q, k, constant, mask=ak.causal()), torch.full((2, 4, 33, 20), 1.5))


def test_a_sink_takes_its_share_of_the_mass(rng: np.random.Generator, isa: str) -> None:
    q, k, v = problem(rng, 33, 65)
    sink = torch.tensor([0.5, -1.0, float("-inf"), 30.0])
    o, lse = ak.attention(q, k, v, return_lse=True)
    with_sink, sink_lse = ak.attention(q, k, v, normalizer=ak.softmax(sink), return_lse=True)
    assert torch.equal(with_sink[:, 2], o[:, 2])
    assert torch.equal(sink_lse[:, 2], lse[:, 2])
    close(with_sink, o * torch.exp(lse - sink_lse)[..., None])
    close(sink_lse, torch.logaddexp(lse, sink[None, :, None].expand_as(lse)))
    nothing, only_sink = ak.attention(
        q, k, v, mask=lambda b, h, q_idx, kv_idx: kv_idx < 0, normalizer=ak.softmax(sink), return_lse=True
    )
    assert not nothing.any()
    assert torch.equal(only_sink, sink[None, :, None].expand_as(lse))


def test_shared_kv_heads_are_repeated_kv_heads(rng: np.random.Generator, isa: str) -> None:
    q, k, v = problem(rng, 45, 45, heads=6, kv_heads=2)
    repeated = (t.repeat_interleave(3, 1) for t in (k, v))
    assert torch.equal(ak.attention(q, k, v, mask=ak.causal()), ak.attention(q, *repeated, mask=ak.causal()))


@pytest.mark.parametrize("mods", ["causal", "document", "alibi"])
def test_packed_is_a_loop_over_segments(rng: np.random.Generator, isa: str, mods: str) -> None:
    q_lens, kv_lens = [5, 0, 33, 17, 0], [9, 4, 33, 0, 0]
    cu_q, cu_kv = (torch.tensor(np.cumsum([0, *n]), dtype=torch.int32) for n in (q_lens, kv_lens))
    q, k, v = (t[:1] for t in problem(rng, sum(q_lens), sum(kv_lens)))
    ids = torch.arange(64) // 7
    call: dict[str, Any] = {
        "causal": {"mask": ak.causal()},
        "document": {"mask": ak.document(ids)},
        "alibi": {"score": ak.alibi(torch.tensor([0.1, 0.2, 0.3, 0.4])), "mask": ak.window(6)},
    }[mods]
    o, lse = ak.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, return_lse=True, **call)
    for i in range(len(q_lens)):
        at, kv = slice(cu_q[i], cu_q[i + 1]), slice(cu_kv[i], cu_kv[i + 1])
        each, each_lse = ak.attention(q[:, :, at], k[:, :, kv], v[:, :, kv], return_lse=True, **call)
        assert torch.equal(o[:, :, at], each)
        assert torch.equal(lse[:, :, at], each_lse)


@pytest.mark.parametrize("mask", [None, ak.causal()], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_gradients_are_those_of_each_segment(
    rng: np.random.Generator, isa: str, dtype: torch.dtype, mask: Any
) -> None:
    """To the bit: lengths around those of tiles, few queries of many keys, and none that is the longest twice."""
    q_lens, kv_lens = [65, 5, 130, 16, 49, 300, 17, 3], [65, 90, 130, 100, 49, 300, 15, 3]
    cu_q, cu_kv = (torch.tensor(np.cumsum([0, *n]), dtype=torch.int32) for n in (q_lens, kv_lens))
    shapes = ((1, 4, sum(q_lens), 48), (1, 2, sum(kv_lens), 48), (1, 2, sum(kv_lens), 32))
    q, k, v = (
        torch.from_numpy(rng.standard_normal(s, dtype=np.float32)).to(dtype).requires_grad_() for s in shapes
    )
    o = ak.attention(q, k, v, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    d_o = torch.from_numpy(rng.standard_normal(o.shape, dtype=np.float32)).to(dtype)
    together = torch.autograd.grad(o, (q, k, v), d_o)
    for i in range(len(q_lens)):
        at, kv = slice(cu_q[i], cu_q[i + 1]), slice(cu_kv[i], cu_kv[i + 1])
        its = [x.detach()[:, :, s].requires_grad_() for x, s in ((q, at), (k, kv), (v, kv))]
        each = torch.autograd.grad(ak.attention(*its, mask=mask), its, d_o[:, :, at])
        for name, s, want, got in zip("qkv", (at, kv, kv), each, together, strict=True):
            assert torch.equal(got[:, :, s], want), f"d{name} of segment {i}"


@pytest.mark.parametrize("call", [ak.attention, ak.selective_attention], ids=["dense", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [17, 49, 97, 210])
def test_gradients_where_all_logits_are_far_below_zero(
    rng: np.random.Generator, isa: str, length: int, dtype: torch.dtype, call: Any
) -> None:
    """A key that only fills a tile has the score 0: beside these its weight would be infinite."""
    q, k, v = (
        torch.from_numpy(rng.uniform(*within, (1, 2, length, 32))).to(dtype).requires_grad_()
        for within in ((3, 4), (-31, -30), (-1, 1))
    )
    found = torch.autograd.grad(call(q, k, v), (q, k, v), torch.ones(1, 2, length, 32, dtype=dtype))
    leaves = [
        x.detach().double().requires_grad_() for x in (q, k, v)
    ]  # nothing is selected: no logit is above 0
    logits = leaves[0] @ leaves[1].mT * 32**-0.5
    if call is ak.selective_attention:
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    o = logits.softmax(-1) @ leaves[2]
    want = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert all(x.isfinite().all() for x in found)
    for got, exact in zip(found[1:], want[1:], strict=True):  # dq is a small difference of large sums
        assert (got.double() - exact).norm() <= 0.01 * exact.norm()


def test_padded_is_sliced(rng: np.random.Generator, isa: str) -> None:
    q, k, v = problem(rng, 30, 90)
    lens = torch.tensor([77, 0], dtype=torch.int32)
    o, lse = ak.attention(q, k, v, mask=ak.causal(), kv_lens=lens, return_lse=True)
    each, each_lse = ak.attention(q[:1], k[:1, :, :77], v[:1, :, :77], mask=ak.causal(), return_lse=True)
    assert torch.equal(o[:1], each)
    assert torch.equal(lse[:1], each_lse)
    assert not o[1].any()
    assert torch.isneginf(lse[1]).all()


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e20, 1e30])
def test_any_finite_score_is_a_score(rng: np.random.Generator, isa: str, low: float) -> None:
    """finfo.min is no mask: where all scores are equal, all weights are, however large the scores."""
    q, k, v = problem(rng, 20, 50)
    o = ak.attention(q, k, v, score=lambda s, b, h, q_idx, kv_idx: s * 0.0 + low)
    close(o, v.repeat_interleave(2, 1).mean(2, keepdim=True).expand_as(o))


def test_where_there_is_no_pair_nothing_is_evaluated(rng: np.random.Generator, isa: str) -> None:
    q, k, v = problem(rng, 9, 9)
    o, lse = ak.attention(
        q,
        k[:, :, :0],
        v[:, :, :0],
        mask=lambda b, h, q_idx, kv_idx: kv_idx // (kv_idx * 0) >= 0,
        return_lse=True,
    )
    assert not o.any()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("bounded", ["clamp", "floor"])
def test_an_int_from_a_bounded_float_is_accepted(rng: np.random.Generator, isa: str, bounded: str) -> None:
    q, k, v = problem(rng, 9, 40)
    table = torch.from_numpy(rng.uniform(0, 5, 40).astype(np.float32))

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        x = table[kv_idx].clamp(0, 3) if bounded == "clamp" else torch.floor(table[kv_idx])
        return x.int() >= 1

    close(ak.attention(q, k, v, mask=mask), ak.attention(q, k, v, mask=mask, backend="reference"))


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": ak.causal(), "normalizer": ak.softmax(torch.tensor([0.1, 0.2, 0.3, 0.4]))},
    "functions": {
        "score": lambda s, b, h, q_idx, kv_idx: (
            (3 * s.tanh() * s.sigmoid()).exp2() + (-(s * s)).exp() - s.sin()
        ),
        "mask": ak.window(30, 3),
    },
}


@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (33, 17)])
@pytest.mark.parametrize("name", CALLS)
def test_no_level_orders_a_sum_of_its_own(
    rng: np.random.Generator, isa: str, name: str, dims: tuple[int, int]
) -> None:
    """Levels with fused multiply-adds give the same bits; scalar rounds products too, and is close."""
    shapes = ((2, 4, 130, dims[0]), (2, 2, 131, dims[0]), (2, 2, 131, dims[1]))
    q, k, v = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in shapes)
    results = []
    for level in (_engine.isa_levels()[-1], isa):
        _engine.set_isa(level)
        results.append(ak.attention(q, k, v, return_lse=True, **CALLS[name]))
    for want, got in zip(*results, strict=True):
        if isa == "scalar":
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, want)
