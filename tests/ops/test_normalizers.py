"""`ak.attention` with other normalisers than softmax, against the equation in float64: outputs, gradients, sequences, errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.reference import run
from attnkit.backends.reference.backend import attend
from attnkit.ir.text import parse
from attnkit.ops.traced import Traceable, bind
from attnkit.plan.normalizers import LOWERED, lower

Randn = Callable[..., Tensor]

CASES: dict[str, Any] = {
    "sigmoid": ak.sigmoid,
    "biased": lambda: ak.sigmoid(-1.5),
    "signed": ak.signed_softmax,
    "queries": ak.softmax_over_queries,
}


def weights(name: str, z: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores ``[..., Sq, Skv]``; and the logarithm of their sums."""
    if name in ("sigmoid", "biased"):
        bias = -1.5 if name == "biased" else -np.log(z.shape[-1])
        return torch.where(seen, torch.sigmoid(z + bias), 0.0), z
    size = z.abs() if name == "signed" else z
    size = size.masked_fill(~seen, -torch.inf)
    lse = size.logsumexp(-2 if name == "queries" else -1, keepdim=True)
    found = torch.exp(size - torch.where(lse == -torch.inf, 0.0, lse))
    return found * (torch.sign(z) if name == "signed" else 1), lse.squeeze(-1)


def equation(
    name: str, q: Tensor, k: Tensor, v: Tensor, score: Any = None, mask: Any = None
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    z = q @ k.mT * q.shape[3] ** -0.5
    index = [torch.arange(n).view([-1 if i == at else 1 for i in range(4)]) for at, n in enumerate(z.shape)]
    z = z if score is None else score(z, *index)
    seen = torch.tensor(True) if mask is None else mask(*index)
    p, lse = weights(name, z, seen.expand(z.shape))
    return torch.where(p == 0, 0.0, p) @ v, lse


SLOPES = torch.tensor([0.5, 0.1, 0.3, 0.2])
BIAS = torch.linspace(-2, 2, 300 * 400).view(300, 400).sin() * 2
SCORES: dict[str, Any] = {
    "plain": None,
    "capped": lambda s, b, h, i, j: (s / 2).tanh() * 2,
    "bias": lambda s, b, h, i, j: s + BIAS[i, j],
}
MASKS: dict[str, Any] = {
    "all": None,
    "some": lambda b, h, i, j: (
        ((j + h) % 3 != b) & (i % 5 != 2) & (j % 7 != 3)
    ),  # rows and columns without a pair
    "band": lambda b, h, i, j: (j - i).abs() <= 20,
}
SHAPES = {  # batch, heads, kv heads, queries, keys
    "ordinary": (2, 4, 2, 61, 133), "few": (1, 4, 2, 3, 400), "many": (1, 2, 2, 300, 70), "one": (1, 1, 1, 1, 1),
}  # fmt: skip


def make(randn: Randn, shape: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, kv_heads, q_len, kv_len = SHAPES[shape]
    sizes = (batch, heads, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 20)
    return [(1.5 * randn(*size)).to(dtype) for size in sizes]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("shape", "score", "mask"), [
    *((shape, "plain", "all") for shape in SHAPES), ("ordinary", "capped", "some"), ("few", "plain", "band"), ("many", "bias", "some"),
    ("ordinary", "plain", "band"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward(
    name: str, shape: str, score: str, mask: str, dtype: torch.dtype, isa: str, randn: Randn
) -> None:
    tensors = make(randn, shape, dtype)
    how = {"score": SCORES[score], "mask": MASKS[mask]}
    o = ak.attention(*tensors, normalizer=CASES[name](), **how)
    expected, _ = equation(name, *(t.double() for t in tensors), **how)
    scale = expected.abs().amax().clamp(min=1e-3)
    assert o.dtype == dtype
    assert ((o.double() - expected) / scale).abs().amax() < (3e-6 if dtype == torch.float32 else 1.5e-2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("shape", "score", "mask"), [
    ("ordinary", "plain", "all"), ("ordinary", "capped", "some"), ("few", "bias", "band"), ("many", "plain", "some"),
])  # fmt: skip
def test_gradients(name: str, shape: str, score: str, mask: str, isa: str, randn: Randn) -> None:
    tensors = [t.requires_grad_() for t in make(randn, shape)]
    bias = BIAS.clone().requires_grad_()
    wide, wide_bias = [t.detach().double().requires_grad_() for t in tensors], BIAS.double().requires_grad_()
    scores = lambda held: lambda s, b, h, i, j: s + held[i, j]  # noqa: E731
    how = [
        {"score": scores(x) if score == "bias" else SCORES[score], "mask": MASKS[mask]}
        for x in (bias, wide_bias)
    ]
    o = ak.attention(*tensors, normalizer=CASES[name](), **how[0])
    expected, _ = equation(name, *wide, **how[1])
    cotangent = randn(*o.shape)
    leaves = (
        [*tensors, *([bias] if score == "bias" else [])],
        [*wide, *([wide_bias] if score == "bias" else [])],
    )
    found = torch.autograd.grad(o, leaves[0], cotangent)
    true = torch.autograd.grad(expected, leaves[1], cotangent.double())
    for ours, theirs in zip(found, true, strict=True):
        assert ((ours.double() - theirs).abs() / theirs.abs().amax().clamp(min=1e-3)).amax() < 1e-5


def test_gradients_of_bfloat16(isa: str, randn: Randn) -> None:
    tensors = [t.requires_grad_() for t in make(randn, "ordinary", torch.bfloat16)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    cotangent = randn(2, 4, 61, 20).bfloat16()
    found = torch.autograd.grad(ak.attention(*tensors, normalizer=ak.sigmoid()), tensors, cotangent)
    true = torch.autograd.grad(equation("sigmoid", *wide)[0], wide, cotangent.double())
    for ours, theirs in zip(found, true, strict=True):
        assert ((ours.double() - theirs).abs() / theirs.abs().amax()).amax() < 2e-2


@pytest.mark.parametrize("name", CASES)
def test_packed_and_padded_sequences(name: str, randn: Randn) -> None:
    q, k, v = randn(1, 4, 70, 16), randn(1, 2, 110, 16), randn(1, 2, 110, 8)
    cu_q, cu_kv = [0, 33, 33, 70], [0, 40, 45, 110]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = ak.attention(
        q, k, v, normalizer=CASES[name](), mask=ak.causal(),
        cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32), cu_seqlens_kv=torch.tensor(cu_kv, dtype=torch.int32),
    )  # fmt: skip
    wide, parts = [t.detach().double().requires_grad_() for t in leaves], []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_kv, cu_kv[1:], strict=False):
        if a < b:
            causal = lambda _b, _h, i, j, n=d - c - (b - a): j <= i + n  # noqa: E731
            parts.append(
                equation(name, wide[0][:, :, a:b], *(t[:, :, c:d] for t in wide[1:]), mask=causal)[0]
            )
    expected = torch.cat(parts, 2)
    assert torch.allclose(o.double(), expected, atol=1e-5)
    cotangent = randn(*o.shape)
    for ours, theirs in zip(torch.autograd.grad(o, leaves, cotangent),
                            torch.autograd.grad(expected, wide, cotangent.double()), strict=True):  # fmt: skip
        assert torch.allclose(ours.double(), theirs, atol=3e-5)

    q, k, v, lens = (
        randn(2, 4, 9, 16),
        randn(2, 2, 50, 16),
        randn(2, 2, 50, 8),
        torch.tensor([50, 17], dtype=torch.int32),
    )
    k[1, :, 17:], v[1, :, 17:] = torch.nan, torch.inf
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = ak.attention(*leaves, normalizer=CASES[name](), kv_lens=lens)
    o.sum().backward()
    for b, n in enumerate(lens.tolist()):
        one = [t.detach()[b : b + 1].double().requires_grad_() for t in (q, k[:, :, :n], v[:, :, :n])]
        expected, _ = equation(name, *one)
        assert torch.allclose(o[b : b + 1].double(), expected, atol=1e-5)
        expected.sum().backward()
        for t, ours in zip(one, leaves, strict=True):
            assert torch.allclose(ours.grad[b : b + 1, :, : t.shape[2]].double(), t.grad, atol=3e-5)
            assert not ours.grad[b, :, t.shape[2] :].any()


@pytest.mark.parametrize("name", ["signed", "biased"])
def test_dropout_of_everything_is_nothing_and_the_mean_of_many_is_the_whole(name: str, randn: Randn) -> None:
    q, k, v = randn(1, 1, 4, 8), randn(1, 1, 30, 8), randn(1, 1, 30, 8)
    normalizer = CASES[name]()
    assert not ak.attention(q, k, v, normalizer=normalizer, dropout_p=1.0).any()
    torch.manual_seed(0)
    many = torch.stack([ak.attention(q, k, v, normalizer=normalizer, dropout_p=0.3) for _ in range(400)])
    whole = ak.attention(q, k, v, normalizer=normalizer)
    assert torch.allclose(many.mean(0), whole, atol=5 * float(many.std(0).max()) / 20)


def test_lse_of_signed_softmax(randn: Randn) -> None:
    q, k, v = make(randn, "ordinary")
    mask = MASKS["some"]
    _, lse = ak.attention(q, k, v, normalizer=ak.signed_softmax(), mask=mask, return_lse=True)
    assert torch.allclose(
        lse.double(), equation("signed", q.double(), k.double(), v.double(), mask=mask)[1], atol=1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_scores_of_minus_infinity_weigh_nothing(name: str, randn: Randn) -> None:
    q, k, v = make(randn, "ordinary")
    hide = lambda s, b, h, i, j: torch.where((j % 4 == 1) | (i == 5), -torch.inf, s)  # noqa: E731
    hidden = ak.attention(q, k, v, normalizer=CASES[name](), score=hide)
    masked = ak.attention(q, k, v, normalizer=CASES[name](), mask=lambda b, h, i, j: (j % 4 != 1) & (i != 5))
    assert torch.allclose(hidden, masked, atol=1e-6)
    assert not hidden[:, :, 5].any()


@pytest.mark.parametrize("name", CASES)
def test_threads_change_no_bit_and_graphs_are_whole(name: str, randn: Randn) -> None:
    q, k, v = (t.requires_grad_() for t in make(randn, "ordinary"))

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ak.attention(q, k, v, normalizer=CASES[name](), mask=ak.window(30, 30))

    def run_on(threads: int, call: Any = both) -> list[Tensor]:
        torch.set_num_threads(threads)
        o = call(q, k, v)
        return [o, *torch.autograd.grad(o, (q, k, v), torch.ones_like(o))]

    one = run_on(1)
    for threads in (2, 3, 7):
        assert all(map(torch.equal, run_on(threads), one))
    assert all(map(torch.equal, run_on(2, torch.compile(both, fullgraph=True, backend="aot_eager")), one))


@pytest.mark.parametrize("name", CASES)
def test_reference_runs_it(name: str, randn: Randn) -> None:
    q, k, v = (t.double() for t in make(randn, "ordinary"))
    how = {"score": SCORES["capped"], "mask": MASKS["some"]}
    o = ak.attention(q, k, v, normalizer=CASES[name](), backend="reference", **how)
    assert torch.allclose(o, equation(name, q, k, v, **how)[0], atol=1e-12)


@pytest.mark.parametrize("kind", LOWERED)
@pytest.mark.parametrize("layout", ["bhsd", "packed", "padded"])
def test_the_two_attentions_mean_the_one(kind: str, layout: str, rng: np.random.Generator) -> None:
    """Programs against programs, on the reference."""
    q, k, v = (rng.standard_normal((1, 1, n, d)) for n, d in ((7, 4), (9, 4), (9, 3)))
    cu = {"cu_seqlens_q": [0, 3, 7], "cu_seqlens_kv": [0, 5, 9]} if layout == "packed" else {}
    lens = {"kv_lens": [6]} if layout == "padded" else {}
    given = {name: torch.tensor(x, dtype=torch.int32) for name, x in (cu | lens).items()}
    what = bind(Traceable(SCORES["capped"], ak.causal(), 0.7, kind, **given))
    whole, buffers = parse(what.text), [b.numpy() for b in what.buffers]
    sums, swapped, found = lower(whole)
    assert sums.attend.outputs == ("o", "lse")
    rows, columns = (k, q) if swapped else (q, k)
    _, lse = attend(sums, rows, columns, columns[..., :1], buffers)
    lse = np.where(np.isneginf(lse), 0.0, lse)
    expected, *_ = run(whole, [q, k, v], buffers)
    (o,) = run(found, [q, k, v], [*buffers, lse])
    np.testing.assert_allclose(o, expected, atol=1e-12)


def test_a_cache(randn: Randn) -> None:
    q, k, v = make(randn, "few")
    cache = ak.KVCache(1, 2, 16, 20, max_len=400, codec="f32", page_size=16)
    cache.append(k, v)
    for name in ("sigmoid", "signed"):
        o = ak.attention(q, cache, normalizer=CASES[name]())
        assert torch.allclose(o.double(), equation(name, q.double(), k.double(), v.double())[0], atol=1e-5)
    with pytest.raises(ak.AttnkitError, match="AK502"):
        ak.attention(q, cache, normalizer=ak.softmax_over_queries())
    coded = ak.KVCache(1, 2, 16, 32, max_len=64, codec="int8")
    coded.append(k[:, :, :40], randn(1, 2, 40, 32))
    for make_one in CASES.values():
        with pytest.raises(ak.AttnkitError, match="AK502"):
            ak.attention(q.bfloat16(), coded, normalizer=make_one())


@pytest.mark.parametrize("name", ["sigmoid", "queries"])
def test_no_lse_where_there_is_none(name: str) -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ak.AttnkitError, match="AK221"):
        ak.attention(q, q, q, normalizer=CASES[name](), return_lse=True)


def test_bias_of_sigmoid_is_a_number() -> None:
    with pytest.raises(ak.AttnkitError, match="AK402"):
        ak.sigmoid("0")  # type: ignore[arg-type]
