"""`ak.readout`: what is read off the weights, against the whole map in float64; and as an op of torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import AttnkitError
from attnkit.ops import Readout, TopK
from attnkit.plan.readouts import WANT

Randn = Callable[..., Tensor]

TOLERANCES = {
    torch.float32: 3e-6,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}  # of weights that the same q and k have


def indices(*sizes: int) -> list[Tensor]:
    return [torch.arange(n).view([-1 if i == at else 1 for i in range(4)]) for at, n in enumerate(sizes)]


def weights(
    q: Tensor, k: Tensor, score: Any = None, mask: Any = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The map and its lse. Score and mask functions run on whole index tensors, as Python meant them."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    z = (q.shape[3] ** -0.5 if scale is None else scale) * (q @ k.mT)
    index = indices(*z.shape)
    z = z if score is None else score(z, *index).expand(z.shape)
    z = z if mask is None else z.masked_fill(~torch.as_tensor(mask(*index)).expand(z.shape), -torch.inf)
    lse = z.logsumexp(-1) if k.shape[2] else z.new_full(z.shape[:3], -torch.inf)
    return torch.exp(z - lse.masked_fill(lse == -torch.inf, 0)[..., None]), lse


def read(p: Tensor, rows: Any, topk: int) -> Readout:
    """What a map says."""
    best = p.sort(dim=-1, descending=True, stable=True)
    room = max(topk - p.shape[3], 0)
    found = torch.nn.functional.pad(best.values[..., :topk], (0, room))
    keys = torch.nn.functional.pad(best.indices[..., :topk], (0, room), value=-1)
    return Readout(
        p.sum(2), p.amax(2) if p.shape[2] else p.sum(2), p.amax(3) if p.shape[3] else p.sum(3),
        torch.special.entr(p).sum(3), TopK(found, keys.masked_fill(found == 0, -1)), p[:, :, rows],
    )  # fmt: skip


def agree(found: Any, expected: Any, tolerance: float) -> None:
    """Keys of the largest weights may be others where the weights themselves are as good as equal."""
    for name, ours, true in zip(WANT, flat(found), flat(expected), strict=True):
        assert ours.dtype == torch.float32, name
        error = (ours.double() - true).abs() / true.abs().clamp(min=1)
        assert ours.shape == true.shape
        assert torch.nan_to_num(error, nan=torch.inf).amax() <= tolerance if error.numel() else True, name


def flat(found: Any) -> list[Tensor]:
    return [found.column_sum, found.column_max, found.row_max, found.entropy, found.topk.weights, found.rows]


def check(q: Tensor, k: Tensor, *, rows: Any = (0,), topk: int = 3, dtype: torch.dtype = torch.float32, **how: Any) -> Any:  # fmt: skip
    """Everything at once, of the lse that the equation has, and of what `weights` says."""
    q, k = q.to(dtype), k.to(dtype)
    p, lse = weights(q, k, *(how.get(name) for name in ("score", "mask", "scale")))
    found = ak.readout(q, k, lse.float(), WANT, rows=list(rows), topk=topk, **how)
    expected = read(p, list(rows), topk)
    agree(found, expected, TOLERANCES[dtype])
    keys = found.topk.keys
    picked = torch.where(keys < 0, 0.0, torch.nn.functional.pad(p, (0, 1)).gather(3, keys.clamp(min=0)))
    assert torch.allclose(picked, expected.topk.weights, atol=TOLERANCES[dtype])
    return found


SHAPES = {  # batch, heads, kv heads, queries, keys, head dim
    "one": (1, 1, 1, 1, 1, 1), "odd": (2, 4, 2, 37, 61, 20), "many_keys": (1, 2, 1, 5, 1500, 16), "a_query": (2, 6, 2, 1, 300, 64),
    "many_queries": (1, 2, 2, 300, 7, 33), "tiles": (1, 1, 1, 192, 256, 64), "past_them": (1, 1, 1, 193, 257, 128),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, isa: str, randn: Randn) -> None:
    batch, heads, kv_heads, q_len, kv_len, dim = SHAPES[shape]
    q, k = randn(batch, heads, q_len, dim), randn(batch, kv_heads, kv_len, dim)
    check(q, k, rows=range(min(q_len, 2)))


@pytest.mark.parametrize(("q_len", "kv_len"), [(3, 0), (0, 3), (0, 0)])
def test_nothing_to_read(q_len: int, kv_len: int, randn: Randn) -> None:
    check(randn(1, 2, q_len, 8), randn(1, 1, kv_len, 8), rows=range(q_len))


SLOPES = torch.tensor([0.5, 0.1, 0.3, 0.2])
BIAS = torch.linspace(-2, 2, 45 * 150).view(45, 150).sin() * 3
SCORES: dict[str, Any] = {
    "softcap": lambda s, b, h, i, j: (s / 2).tanh() * 2,
    "alibi": lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(),
    "bias": lambda s, b, h, i, j: s + BIAS[i, j],
}
MASKS: dict[str, Any] = {
    "causal": lambda b, h, i, j: j <= i + 105,
    "window": lambda b, h, i, j: (j - i - 100).abs() <= 5,
    "by_head": lambda b, h, i, j: (j + h) % 3 != b,
    "none": lambda b, h, i, j: j < 0,
    "some_rows": lambda b, h, i, j: (i % 3 != 0) & (j % 5 != 2),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("score", "mask"), [(None, m) for m in MASKS] + [(s, None) for s in SCORES] + [("alibi", "causal"), ("bias", "by_head")])  # fmt: skip
def test_scores_and_masks(
    score: str | None, mask: str | None, dtype: torch.dtype, isa: str, randn: Randn
) -> None:
    q, k = randn(2, 4, 45, 16), randn(2, 2, 150, 16)
    found = check(
        q, k, dtype=dtype, rows=[44, 3, 3, 0], score=SCORES.get(score or ""), mask=MASKS.get(mask or ""), scale=0.4
    )  # fmt: skip
    if mask == "none":
        assert not any(t.any() for t in flat(found))
        assert (found.topk.keys == -1).all()


def test_each_alone_is_each_beside_others(randn: Randn) -> None:
    q, k = randn(1, 2, 130, 16), randn(1, 2, 70, 16)
    lse = weights(q, k)[1].float()
    given: dict[str, Any] = {"rows": [5, 129], "topk": 4}
    every = ak.readout(q, k, lse, WANT, **given)
    for name in WANT:
        one = ak.readout(q, k, lse, (name,), **{name: given[name]} if name in given else {})
        for field in WANT:
            value, expected = getattr(one, field), getattr(every, field)
            assert (value is None) == (field != name)
            if field == "topk" and field == name:
                assert torch.equal(value.weights, expected.weights)
                assert torch.equal(value.keys, expected.keys)
            elif field == name:
                assert torch.equal(value, expected)
    usual = ak.readout(q, k, lse)
    assert [usual.column_max, usual.topk, usual.rows] == [None] * 3
    assert torch.equal(usual.entropy, every.entropy)


def test_the_weights_that_attention_used(randn: Randn) -> None:
    """Of its own lse, rows sum to 1 and values weighed by them are its output."""
    q, k, v = randn(1, 4, 40, 16), randn(1, 2, 90, 16), randn(1, 2, 90, 8)
    o, lse = ak.attention(q, k, v, mask=ak.causal(), return_lse=True)
    found = ak.readout(
        q, k, lse, ("rows", "column_sum", "row_max", "topk"), rows=range(40), topk=1, mask=ak.causal()
    )
    assert torch.allclose(found.rows.sum(-1), torch.ones(1, 4, 40), atol=1e-5)
    assert torch.allclose(found.rows @ v.repeat_interleave(2, 1), o, atol=1e-5)
    assert torch.allclose(found.column_sum, found.rows.sum(2), atol=1e-5)
    assert torch.equal(found.topk.weights[..., 0], found.row_max)


def test_an_lse_of_more_keys(randn: Randn) -> None:
    """The weights among all keys, read a stretch at a time: shared prefixes, chunks, a ring."""
    q, k, v = randn(1, 2, 9, 16), randn(1, 2, 60, 16), randn(1, 2, 60, 16)
    _, lse = ak.attention(q, k, v, return_lse=True)
    whole = ak.readout(q, k, lse, ("column_sum", "entropy"))
    parts = [ak.readout(q, part, lse, ("column_sum", "entropy")) for part in (k[:, :, :25], k[:, :, 25:])]
    assert torch.allclose(torch.cat([p.column_sum for p in parts], 2), whole.column_sum, atol=1e-6)
    assert torch.allclose(parts[0].entropy + parts[1].entropy, whole.entropy, atol=1e-5)


def test_the_last_queries_alone(randn: Randn) -> None:
    """What a cache is compressed by (SnapKV): the weights that the last queries give."""
    q, k, v = randn(1, 4, 50, 16), randn(1, 2, 50, 16), randn(1, 2, 50, 16)
    _, lse = ak.attention(q, k, v, mask=ak.causal(), return_lse=True)
    found = ak.readout(q[:, :, -8:], k, lse[:, :, -8:], ("column_sum",), mask=ak.causal()).column_sum
    p, _ = weights(q, k, mask=lambda b, h, i, j: j <= i)
    assert torch.allclose(found.double(), p[:, :, -8:].sum(2), atol=1e-5)


def test_packed_and_padded_sequences(isa: str, randn: Randn) -> None:
    q, k = randn(1, 4, 70, 16), randn(1, 2, 110, 16)
    cu_q, cu_kv = (torch.tensor(x, dtype=torch.int32) for x in ([0, 33, 33, 70], [0, 40, 45, 110]))
    p, lse = torch.zeros(1, 4, 70, 110, dtype=torch.float64), torch.zeros(1, 4, 70)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_kv, cu_kv[1:], strict=False):
        p[:, :, a:b, c:d], lse[:, :, a:b] = weights(
            q[:, :, a:b], k[:, :, c:d], mask=lambda _b, _h, i, j, n=d - c - (b - a): j <= i + n
        )
    rows = [69, 0, 33, 32]
    how = {"mask": ak.causal(), "rows": rows, "topk": 4}
    found = ak.readout(q, k, lse, WANT, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, **how)
    agree(found, read(p, rows, 4), 3e-6)
    assert torch.allclose(p.gather(3, found.topk.keys.clamp(min=0)).float(), found.topk.weights, atol=1e-6)
    agree(ak.readout(q, k, lse, WANT, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, backend="reference", **how),
          read(p, rows, 4), 1e-6)  # fmt: skip

    k2, lens = randn(2, 2, 110, 16), torch.tensor([110, 37], dtype=torch.int32)
    k2[1, :, 37:] = torch.nan
    p, lse2 = weights(q.expand(2, -1, -1, -1), k2.nan_to_num(0), mask=lambda b, h, i, j: j < lens[b])
    found = ak.readout(q.expand(2, -1, -1, -1), k2, lse2.float(), WANT, kv_lens=lens, rows=rows, topk=4)
    agree(found, read(p, rows, 4), 3e-6)


@pytest.mark.parametrize("page_size", [None, 16])
def test_caches(page_size: int | None, randn: Randn) -> None:
    q, k, v = randn(2, 4, 3, 16), randn(2, 2, 40, 16), randn(2, 2, 40, 16)
    cache = ak.KVCache(2, 2, 16, max_len=64, codec="f32", page_size=page_size)
    cache.append(k, v, lens=torch.tensor([40, 21], dtype=torch.int32))
    _, lse = ak.attention(q, cache, mask=ak.causal(), return_lse=True)
    found = ak.readout(q, cache, lse, WANT, rows=[2], topk=2, mask=ak.causal())
    for b, n in enumerate((40, 21)):
        p, _ = weights(q[b : b + 1], k[b : b + 1, :, :n], mask=lambda _b, _h, i, j, n=n: j <= i + n - 3)
        p = torch.nn.functional.pad(p, (0, 64 - n))
        agree(
            Readout(*(
                TopK(*(t[b : b + 1] for t in x)) if isinstance(x, tuple) else x[b : b + 1] for x in found
            )), read(p, [2], 2), 3e-6,
        )  # fmt: skip
    coded = ak.KVCache(2, 2, 16, max_len=64, codec="int8")
    with pytest.raises(AttnkitError) as caught:
        ak.readout(q, coded, lse)
    assert (caught.value.code, caught.value.where) == ("AK502", "k")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e38])
def test_what_no_query_sees_reaches_nothing(poison: float, isa: str, randn: Randn) -> None:
    q, k = randn(1, 2, 50, 16), randn(1, 2, 150, 16)
    mask = lambda b, h, i, j: (j <= i) & (j != 4)  # noqa: E731
    lse = weights(q, k, mask=mask)[1].float()
    clean = ak.readout(q, k, lse, WANT, rows=[7, 49], topk=60, mask=mask)
    k[:, :, 50:], k[:, :, 4] = poison, poison
    dirty = ak.readout(q, k, lse, WANT, rows=[7, 49], topk=60, mask=mask)
    for a, b in zip([*flat(clean), clean.topk.keys], [*flat(dirty), dirty.topk.keys], strict=True):
        assert torch.equal(a, b)


def test_a_row_whose_scores_are_all_minus_infinity_has_no_weights(randn: Randn) -> None:
    q, k = randn(1, 1, 4, 8), randn(1, 1, 6, 8)
    score = lambda s, b, h, i, j: torch.where(i == 2, -torch.inf, s)  # noqa: E731
    found = check(q, k, rows=[2, 1], score=score)
    assert not found.rows[:, :, 0].any()
    assert (found.topk.keys[:, :, 2] == -1).all()


def test_equal_weights_go_to_the_first_keys(isa: str) -> None:
    q, k = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 300, 8)
    k[:, :, 290] = 2.0
    found = check(q, k, topk=5).topk
    assert found.keys.tolist() == [[[[290, 0, 1, 2, 3]] * 2]]


def test_more_of_the_largest_than_there_are(isa: str, randn: Randn) -> None:
    q, k = randn(1, 2, 20, 8), randn(1, 2, 70, 8)
    found = check(q, k, topk=100).topk
    assert found.keys[..., 70:].eq(-1).all()
    assert found.keys[..., :70].sort(-1).values.equal(torch.arange(70).expand(1, 2, 20, 70))


def test_threads_and_neighbours_change_no_bit(isa: str, randn: Randn) -> None:
    q, k = randn(3, 4, 230, 16), randn(3, 2, 1400, 16)
    lse = weights(q, k)[1].float()

    def run(at: slice, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        found = ak.readout(q[at], k[at], lse[at], WANT, rows=[0, 200], topk=9, mask=ak.window(300, 300))
        return [*flat(found), found.topk.keys]

    whole = run(slice(None), 1)
    for threads in (2, 3, 7):
        assert all(map(torch.equal, run(slice(None), threads), whole))
    assert all(map(torch.equal, run(slice(1, 2), 2), [t[1:2] for t in whole]))


def test_strides(randn: Randn) -> None:
    q, k = randn(2, 33, 4, 16).transpose(1, 2), randn(2, 2, 16, 50).mT
    lse = weights(q, k)[1].float().transpose(1, 2).contiguous().transpose(1, 2)
    ours = ak.readout(q, k, lse, WANT, rows=[1], topk=2)
    plain = ak.readout(q.contiguous(), k.contiguous(), lse.contiguous(), WANT, rows=[1], topk=2)
    assert all(map(torch.equal, flat(ours), flat(plain)))


def test_reference_backend(randn: Randn) -> None:
    q, k = randn(2, 4, 9, 8), randn(2, 2, 13, 8)
    mask, score = MASKS["some_rows"], SCORES["softcap"]
    p, lse = weights(q, k, score, mask)
    found = ak.readout(
        q.double(), k.double(), lse.float(), WANT, rows=[8, 0], topk=20, score=score, mask=mask, backend="reference"
    )  # fmt: skip
    agree(found, read(p, [8, 0], 20), 1e-6)
    more = ak.readout(q, k, lse.float() + 1, ("column_sum",), score=score, mask=mask, backend="reference")
    assert torch.allclose(more.column_sum.double(), p.sum(2) / torch.e, atol=1e-6)


# --- as an op of torch -----------------------------------------------------------------------------------


def call(q: Tensor, k: Tensor, lse: Tensor) -> list[Tensor]:
    found = ak.readout(q, k, lse, WANT, rows=torch.tensor([4, 1]), topk=2, mask=ak.causal())
    return [*flat(found), found.topk.keys]


def test_opcheck_and_graphs(randn: Randn) -> None:
    q, k = randn(2, 4, 9, 8), randn(2, 2, 13, 8)
    lse = weights(q, k, mask=lambda b, h, i, j: j <= i + 4)[1].float()
    text = ak.trace(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 4).text
    rows = torch.tensor([4, 1])
    torch.library.opcheck(torch.ops.attnkit.readout.default, (q, k, lse, text, [], [], list(WANT), rows, 2))
    torch.library.opcheck(torch.ops.attnkit.readout.default, (q, k, lse, text, [], [], ["entropy"], None, 0))
    expected = call(q, k, lse)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(q, k, lse), expected))
    for i, found in enumerate(torch.vmap(call)(*(torch.stack([x, x]) for x in (q, k, lse)))):
        assert torch.equal(found[1], expected[i])
    with torch.autocast("cpu", torch.bfloat16):
        halves = call(q, k, lse)
    assert all(map(torch.equal, halves, call(q.bfloat16(), k.bfloat16(), lse)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("score", "mask"), [(None, None), ("softcap", "causal"), ("bias", "some_rows"), ("alibi", "by_head")])  # fmt: skip
def test_gradients(score: str | None, mask: str | None, dtype: torch.dtype, randn: Randn) -> None:
    """To q, k and what the score captured, through the weights and through the lse that they are less."""
    q, k = randn(2, 4, 45, 16).to(dtype).requires_grad_(), randn(2, 2, 150, 16).to(dtype).requires_grad_()
    bias, wide_bias = BIAS.clone().requires_grad_(), BIAS.double().requires_grad_()
    captured = [lambda s, b, h, i, j, held=held: s + held[i, j] for held in (bias, wide_bias)]
    scores = captured if score == "bias" else [SCORES.get(score or "")] * 2
    how = {"score": scores[0], "mask": MASKS.get(mask or ""), "scale": 0.4}
    _, lse = ak.attention(q.float(), k.float(), k.float(), return_lse=True, **how)
    found = ak.readout(q, k, lse, ("column_sum", "entropy"), **how)
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    p, _ = weights(*wide, scores[1], how["mask"], 0.4)
    p = torch.where(p == 0, 0.0, p)
    expected = p.sum(2), -(p * torch.where(p == 0, 0.0, p.clamp(min=1e-300).log())).sum(3)
    leaves = [q, k, *([bias] if score == "bias" else [])], [*wide, *([wide_bias] if score == "bias" else [])]
    for ours, true in zip((found.column_sum, found.entropy), expected, strict=True):
        assert torch.allclose(ours.double(), true, atol=1e-5)
        cotangent = randn(*true.shape)
        given = torch.autograd.grad(ours, leaves[0], cotangent, retain_graph=True)
        exact = torch.autograd.grad(true, leaves[1], cotangent.double(), retain_graph=True)
        for a, b in zip(given, exact, strict=True):
            limit = 1e-5 if a.dtype == torch.float32 else 5e-2  # two parts are rounded, which mostly cancel
            assert ((a.double() - b).abs() / b.abs().amax().clamp(min=1e-3)).amax() < limit


def test_gradients_of_packed_sequences(randn: Randn) -> None:
    q, k = randn(1, 4, 70, 16).requires_grad_(), randn(1, 2, 110, 16).requires_grad_()
    cu_q, cu_kv = (torch.tensor(x, dtype=torch.int32) for x in ([0, 33, 33, 70], [0, 40, 45, 110]))
    how = {"mask": ak.causal(), "cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    _, lse = ak.attention(q, k, k, return_lse=True, **how)
    found = ak.readout(q, k, lse, ("column_sum", "entropy"), **how)
    with torch.no_grad():
        plain = ak.readout(q, k, lse, ("column_sum", "entropy"), **how)
    assert torch.allclose(found.column_sum, plain.column_sum, atol=1e-5)
    assert torch.allclose(found.entropy, plain.entropy, atol=1e-5)
    weigh = [randn(*t.shape) for t in (plain.column_sum, plain.entropy)]
    ours = torch.autograd.grad((found.column_sum * weigh[0]).sum() + (found.entropy * weigh[1]).sum(), (q, k))
    wide, total = [t.detach().double().requires_grad_() for t in (q, k)], torch.zeros((), dtype=torch.float64)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_kv, cu_kv[1:], strict=False):
        if a < b:
            p, _ = weights(
                wide[0][:, :, a:b],
                wide[1][:, :, c:d],
                mask=lambda _b, _h, i, j, n=d - c - (b - a): j <= i + n,
            )
            logs = torch.where(p == 0, 0.0, p.clamp(min=1e-300).log())
            total = (
                total
                + (p.sum(2) * weigh[0][:, :, c:d]).sum()
                - ((p * logs).sum(3) * weigh[1][:, :, a:b]).sum()
            )
    for x, y in zip(ours, torch.autograd.grad(total, wide), strict=True):
        assert torch.allclose(x.double(), y, atol=2e-5)


def test_no_gradient_goes_through_unseen(randn: Randn) -> None:
    q, k = randn(1, 2, 9, 8).requires_grad_(), randn(1, 2, 13, 8)
    _, lse = ak.attention(q, k, k, return_lse=True)
    with pytest.raises(AttnkitError) as caught:
        ak.readout(q, k, lse)  # of row_max
    assert caught.value.code == "AK503"
    with torch.no_grad():
        assert ak.readout(q, k, lse).entropy is not None
    assert ak.readout(q.detach(), k, lse.detach()).entropy is not None


def test_explained_and_not_run(randn: Randn) -> None:
    q, k, lse = randn(1, 2, 9, 8), randn(1, 2, 13, 8), torch.zeros(1, 2, 9)
    (found,) = ak.explain(ak.readout, q, k, lse).calls
    assert (found.backend, found.shapes["k"]) == ("cpu", [1, 2, 13, 8])


Q, K, LSE = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 6, 8), torch.zeros(1, 4, 5)
PLAIN = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) {
  o, lse = attend(q, k, v, scale = default) { normalizer = softmax }
  return o
}"""
SIGMOID = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) {
  o = attend(q, k, v, scale = default) { score = sigmoid(s)  normalizer = none }
  return o
}"""
WRONG: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "an unknown name": ("AK401", "want", lambda: ak.readout(Q, K, LSE, ("column_mean",))),
    "no name": ("AK401", "want", lambda: ak.readout(Q, K, LSE, ())),
    "want of no names": ("AK402", "want", lambda: ak.readout(Q, K, LSE, 3)),  # type: ignore[arg-type]
    "rows unasked": ("AK408", "rows", lambda: ak.readout(Q, K, LSE, rows=[1])),
    "rows not given": ("AK408", "rows", lambda: ak.readout(Q, K, LSE, ("rows",))),
    "topk not given": ("AK408", "topk", lambda: ak.readout(Q, K, LSE, ("topk",))),
    "topk of nothing": ("AK401", "topk", lambda: ak.readout(Q, K, LSE, ("topk",), topk=0)),
    "topk of no number": ("AK402", "topk", lambda: ak.readout(Q, K, LSE, ("topk",), topk=1.5)),  # type: ignore[arg-type]
    "a row too far": ("AK601", "rows", lambda: ak.readout(Q, K, LSE, ("rows",), rows=[0, 5])),
    "a row before the first": ("AK601", "rows", lambda: ak.readout(Q, K, LSE, ("rows",), rows=torch.tensor([-1]))),
    "a listed row before the first": ("AK401", "rows", lambda: ak.readout(Q, K, LSE, ("rows",), rows=[-1])),
    "rows of no numbers": ("AK402", "rows", lambda: ak.readout(Q, K, LSE, ("rows",), rows=[0.5])),  # type: ignore[list-item]
    "rows in a set": ("AK402", "rows", lambda: ak.readout(Q, K, LSE, ("rows",), rows={1})),  # type: ignore[arg-type]
    "rows of floats": ("AK404", "rows", lambda: ak.readout(Q, K, LSE, ("rows",), rows=torch.zeros(1))),
    "rows of two dimensions": ("AK403", "rows", lambda: ak.readout(Q, K, LSE, ("rows",), rows=torch.zeros(1, 1).long())),
    "an lse of other queries": ("AK403", "lse", lambda: ak.readout(Q, K, LSE[:, :, :4])),
    "an lse of float64": ("AK404", "lse", lambda: ak.readout(Q, K, LSE.double())),
    "no lse": ("AK402", "lse", lambda: ak.readout(Q, K, None)),  # type: ignore[arg-type]
    "heads that do not go together": ("AK407", "q, k", lambda: ak.readout(Q[:, :3], K, LSE[:, :3])),
    "a scale of 0": ("AK401", "scale", lambda: ak.readout(Q, K, LSE, scale=0.0)),
    "a mask that is a tensor": ("AK402", "mask", lambda: ak.readout(Q, K, LSE, mask=Q)),  # type: ignore[arg-type]
    "float64": ("AK502", "backend 'auto'", lambda: ak.readout(Q.double(), K.double(), LSE)),
    "no such backend": ("AK501", "backend", lambda: ak.readout(Q, K, LSE, backend="cuda")),
    "a backend of a GPU": ("AK502", "backend 'triton'", lambda: ak.readout(Q, K, LSE, backend="triton")),
    "lengths beside a cache": ("AK408", "kv_lens", lambda: ak.readout(Q, ak.KVCache(1, 2, 8, max_len=16, codec="f32"), LSE, kv_lens=LSE)),
    "a bias that is too short": ("AK601", "score or mask", lambda: ak.readout(Q, K, LSE, score=lambda s, b, h, i, j: s + torch.zeros(3)[j])),
    "an unknown name, of the op": ("AK401", "want", lambda: torch.ops.attnkit.readout(Q, K, LSE, PLAIN, [], [], ["entropy", "mean"], None, 0)),
    "weights that are no softmax": ("AK502", "program", lambda: torch.ops.attnkit.readout(Q, K, LSE, SIGMOID, [], [], ["entropy"], None, 0)),
    "memory that is not there": ("AK603", "topk", lambda: ak.readout(Q, K, LSE, ("topk",), topk=2**31 - 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    code, where, wrong = WRONG[name]
    with pytest.raises(AttnkitError) as caught:
        wrong()
    assert caught.value.code == code
    assert (caught.value.where or "").startswith(where)
