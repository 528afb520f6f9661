"""Dropout: which weights are dropped, by every way to compute them, and what torch makes of it around the op."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import attnkit as ak
from attnkit.backends.reference import philox
from attnkit.ops import seeds
from attnkit.testing.gradients import close
from attnkit.variants import dropout as naive

SEED = 0x0123_4567_89AB_CDEF
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch) -> int:
    """The number that every call draws."""
    for module in ("functional", "sdpa"):
        monkeypatch.setattr(f"attnkit.ops.{module}.draw", lambda p, like: torch.tensor(SEED) if p else None)
    return SEED


def kept(b: int, heads: int, q_len: int, kv_len: int, p: float, seed: int = SEED) -> Tensor:
    """Which pairs of sequence ``b`` are kept, ``[heads, q_len, kv_len]``."""
    return torch.from_numpy(philox.kept(seed, b, (heads, q_len, kv_len), p).copy())


def seen(heads: int, kv_heads: int, q_len: int, kv_len: int, p: float, batch: int = 1, **how: Any) -> Tensor:
    """The same, as a call shows it: equal weights, and values that tell the keys apart."""
    dtype = how.pop("dtype", torch.float32)
    q, k = (
        torch.zeros(batch, heads, q_len, 16, dtype=dtype),
        torch.zeros(batch, kv_heads, kv_len, 16, dtype=dtype),
    )
    v = torch.eye(kv_len, dtype=dtype).expand(batch, kv_heads, kv_len, kv_len)
    return ak.attention(q, k, v, dropout_p=p, **how) != 0


# --- the bits ------------------------------------------------------------------------------------------------


def test_the_reference_has_the_naive_bits(rng: np.random.Generator) -> None:
    """Of which tests/variants/test_dropout.py has the published vectors."""
    for _ in range(50):
        key, *counter = (int(x) for x in rng.integers(0, 2**32, 5))
        key += int(rng.integers(0, 2**32)) << 32
        got = philox.philox(key, tuple(np.array(c) for c in counter))
        assert [int(x) for x in got] == list(naive.philox(tuple(counter), (key % 2**32, key >> 32)))
    for head in range(2):
        want = naive.kept(SEED, 0.3, 5, head, 9, 11)
        np.testing.assert_array_equal(philox.kept(SEED, 5, (2, 9, 11), 0.3)[head], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 3, 17, 130])
def test_every_kernel_drops_the_same(q_len: int, dtype: torch.dtype, isa: str, seed: int) -> None:
    for heads, kv_heads, kv_len in ((4, 4, 70), (4, 2, 131), (6, 1, 64), (1, 1, 1), (2, 1, 2100)):
        want = kept(0, heads, q_len, kv_len, 0.3)
        assert torch.equal(seen(heads, kv_heads, q_len, kv_len, 0.3, dtype=dtype)[0], want), (
            heads,
            kv_heads,
            kv_len,
        )


@pytest.mark.parametrize("p", [1e-12, 2.0**-32, 0.1, 0.5, 1 - 2.0**-20, 1 - 2.0**-33, 1.0])
def test_thresholds(p: float, isa: str, seed: int) -> None:
    assert torch.equal(seen(2, 2, 40, 200, p)[0], kept(0, 2, 40, 200, p))


def test_far_indices_and_every_seed(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63)):
        monkeypatch.setattr("attnkit.ops.functional.draw", lambda p, like, n=number: torch.tensor(n))
        assert torch.equal(seen(3, 1, 5, 90, 0.4)[0], kept(0, 3, 5, 90, 0.4, number)), number


def test_the_share_that_is_kept() -> None:
    torch.manual_seed(3)
    for p in (0.1, 0.5, 0.9):
        share = seen(8, 8, 256, 256, p, batch=2).double().mean().item()
        assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / (2 * 8 * 256 * 256))
    both = [seen(2, 2, 128, 128, 0.5) for _ in range(2)]
    assert abs((both[0] == both[1]).double().mean().item() - 0.5) < 5 / math.sqrt(2 * 128 * 128) / 2


def test_sequences_are_addressed_by_their_own_indices(isa: str, seed: int) -> None:
    """Packed, padded or each in a row of the batch: the pairs of a sequence are dropped alike, whatever is beside it."""
    lengths = (40, 1, 97, 64)
    cu = torch.tensor([0, 40, 41, 138, 202], dtype=torch.int32)
    total = int(cu[-1])
    how = {"mask": ak.causal(), "dtype": torch.float32}
    packed = seen(2, 1, total, total, 0.3, cu_seqlens_q=cu, cu_seqlens_kv=cu, **how)
    padded = seen(2, 1, 97, 97, 0.3, batch=4, kv_lens=torch.tensor(lengths, dtype=torch.int32))
    for b, n in enumerate(lengths):
        want, causal = kept(b, 2, n, n, 0.3), torch.ones(n, n, dtype=torch.bool).tril()
        rows = slice(int(cu[b]), int(cu[b + 1]))
        assert torch.equal(packed[0, :, rows, rows], want & causal)
        assert torch.equal(padded[b, :, :n, :n], want)


# --- what is computed with them ------------------------------------------------------------------------------


class Case(NamedTuple):
    p: float = 0.3
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 150
    kv_len: int = 150
    dim: int = 16
    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    bias: tuple[int, ...] = ()
    sink: bool = False
    lse: bool = False


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


CASES = {
    "plain": Case(),
    "causal": Case(mask=causal),
    "rarely": Case(0.01, mask=causal),
    "mostly": Case(0.9),
    "nothing left": Case(1.0, mask=causal, lse=True),
    "lse": Case(mask=causal, lse=True),
    "one query": Case(q_len=1),
    "few queries": Case(q_len=5, kv_len=2300, kv_heads=1),
    "one kv head": Case(kv_heads=1, mask=causal),
    "every head by itself": Case(kv_heads=4),
    "more queries": Case(q_len=211, kv_len=37, mask=causal),
    "odd widths": Case(dim=37),
    "wide": Case(dim=260, heads=2, q_len=50),
    "window": Case(mask=lambda b, h, i, j: (j <= i) & (i - j < 9)),
    "dead rows and keys": Case(mask=lambda b, h, i, j: (j <= i) & (i % 5 != 3) & (j % 7 != 2)),
    "softcap": Case(score=lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0), mask=causal),
    "bias": Case(score=lambda s, b, h, i, j, t: s + t[h, i, j], bias=(4, 150, 150)),
    "key bias": Case(score=lambda s, b, h, i, j, t: s + t[j], bias=(150,), mask=causal),
    "sink": Case(mask=causal, sink=True, lse=True),
}  # fmt: skip


def tensors(case: Case, randn: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor | None]:
    """q, k, v, bias, sink, and the cotangents of o and lse; rounded to ``dtype``, what is captured apart."""
    shapes = [(2, case.heads, case.q_len, case.dim), *[(2, case.kv_heads, case.kv_len, case.dim)] * 2]
    q, k, v = (randn(*shape).to(dtype) for shape in shapes)
    d_o = randn(*shapes[0]).to(dtype)
    bias, sink = randn(*case.bias) if case.bias else None, randn(case.heads) if case.sink else None
    return [q, k, v, bias, sink, d_o, randn(*d_o.shape[:3]) if case.lse else None]


def leaves(found: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [
        None if t is None else t.to(dtype or t.dtype).detach().requires_grad_(n < 5)
        for n, t in enumerate(found)
    ]


def results(o: Any, lse: Any, given: list[Any]) -> list[Tensor]:
    """o, lse and all gradients."""
    *inputs, d_o, d_lse = given
    roots = [o] if d_lse is None else [o, lse]
    wanted = [t for t in inputs if t is not None]
    found = torch.autograd.grad(roots, wanted, [d_o] if d_lse is None else [d_o, d_lse.to(lse.dtype)])
    return [o.detach(), *([] if d_lse is None else [lse.detach()]), *found]


def equation(case: Case, given: list[Any]) -> list[Tensor]:
    """Attention as it is written down, every pair materialised, in the dtype of q."""
    q, k, v, bias, sink, *_ = given
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (*q.shape[:3], k.shape[2])), indexing="ij")
    s = (q @ k.mT) * case.dim**-0.5
    if case.score is not None:
        s = case.score(s, b, h, i, j, *([] if bias is None else [bias])).to(q.dtype)
    if case.mask is not None:
        s = torch.where(case.mask(b, h, i, j), s, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    top = s.amax(-1, keepdim=True).detach()
    e = torch.exp(s - torch.where(top == -math.inf, 0.0, top))
    total = e.sum(-1, keepdim=True)
    safe = torch.where(total == 0, 1.0, total)
    keep = torch.stack([kept(n, case.heads, case.q_len, case.kv_len, case.p) for n in range(2)]).to(q.dtype)
    o = ((e / safe)[..., : k.shape[2]] * keep * (0.0 if case.p == 1 else 1 / (1 - case.p))) @ v
    return results(o, (torch.log(safe) + top).squeeze(-1), given)


def on_attnkit(case: Case, given: list[Any], **how: Any) -> list[Tensor]:
    q, k, v, bias, sink, *_ = given
    score: Any = case.score
    if bias is not None:
        score = lambda s, b, h, i, j: case.score(s, b, h, i, j, bias)  # noqa: E731
    o, lse = ak.attention(
        q, k, v, score=score, mask=case.mask, normalizer=None if sink is None else ak.softmax(sink),
        dropout_p=case.p, return_lse=True, **how,
    )  # fmt: skip
    return results(o, lse, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str, dtype: torch.dtype, randn: Any, isa: str, seed: int) -> None:
    case = CASES[name]
    given = tensors(case, randn, dtype)
    want, by_torch = equation(case, leaves(given, torch.float64)), equation(case, leaves(given))
    for n, parts in enumerate(zip(on_attnkit(case, leaves(given)), by_torch, want, strict=True)):
        got, torchs, exact = (t.double().numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in parts)
        if dtype == torch.bfloat16 and n != 1:  # numpy has no bfloat16: its unit of rounding
            assert (
                np.abs(got - exact).max() <= 3 * np.abs(torchs - exact).max() + 2**-7 * np.abs(exact).max()
            ), n
        else:
            close(got, torchs.astype(got.dtype), exact, f"{name}, result {n}")


@pytest.mark.parametrize("name", ["plain", "sink", "bias", "nothing left", "few queries"])
def test_the_reference_backend(name: str, randn: Any, seed: int) -> None:
    case = CASES[name]
    found = tensors(case, randn, torch.float32)
    given = leaves([t if t is None or n in (3, 4) else t.double() for n, t in enumerate(found)])
    for got, want in zip(on_attnkit(case, given, backend="reference"), equation(case, given), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-6, atol=1e-6 if got.dtype == torch.float32 else 1e-10, check_dtype=False
        )


def test_what_is_dropped_leaves_lse_alone(randn: Any) -> None:
    q, k, v = (randn(2, 4, 70, 16) for _ in range(3))
    _, lse = ak.attention(q, k, v, return_lse=True)
    assert torch.equal(ak.attention(q, k, v, dropout_p=0.5, return_lse=True)[1], lse)
    assert torch.equal(ak.attention(q, k, v, dropout_p=0.0), ak.attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "few queries", "key bias", "one query"])
def test_threads_change_no_bit(name: str, dtype: torch.dtype, randn: Any, isa: str, seed: int) -> None:
    given = tensors(CASES[name], randn, dtype)
    found = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        found.append(on_attnkit(CASES[name], leaves(given)))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_beside_a_sequence_changes_no_bit(
    dtype: torch.dtype, randn: Any, isa: str, seed: int
) -> None:
    """The first ones of a batch, packed or not, by themselves and among others."""
    q, k, v, d_o = (randn(4, 4, 97, 16).to(dtype) for _ in range(4))

    def of(n: int, pack: bool) -> list[Tensor]:
        given = [t[:n].transpose(0, 1).flatten(1, 2)[None] if pack else t[:n] for t in (q, k, v, d_o)]
        inputs = [t.clone().requires_grad_() for t in given[:3]]
        cu = torch.arange(n + 1, dtype=torch.int32) * 97 if pack else None
        o = ak.attention(*inputs, mask=ak.causal(), dropout_p=0.3, cu_seqlens_q=cu, cu_seqlens_kv=cu)
        found = [o.detach(), *torch.autograd.grad(o, inputs, given[3])]
        return [t[0].unflatten(1, (n, 97)).transpose(0, 1) if pack else t for t in found]

    want = of(4, pack=False)
    for n, pack in ((2, False), (1, True), (3, True), (4, True)):
        for got, whole in zip(of(n, pack), want, strict=True):
            assert torch.equal(got, whole[:n]), (n, pack)


# --- torch around it -----------------------------------------------------------------------------------------


def test_a_call_draws_one_number() -> None:
    torch.manual_seed(5)
    number = seeds.draw(0.1, torch.zeros(1))
    assert number is not None
    assert (number.dtype, number.shape) == (torch.int64, ())
    torch.manual_seed(5)
    bits = seen(2, 2, 20, 70, 0.4)
    assert torch.equal(bits[0], kept(0, 2, 20, 70, 0.4, int(number)))
    assert not torch.equal(bits, seen(2, 2, 20, 70, 0.4))
    torch.manual_seed(5)
    assert torch.equal(bits, seen(2, 2, 20, 70, 0.4))
    before = torch.get_rng_state()
    seen(2, 2, 20, 70, 0.0)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is random: nothing is drawn


WAYS: dict[str, Callable[..., Any]] = {
    "attention": lambda q, k, v: ak.attention(q, k, v, mask=ak.causal(), dropout_p=0.3),
    "dense": lambda q, k, v: ak.dense_attention(q, k, v, causal=True, dropout_p=0.3),
    "sdpa": lambda q, k, v: ak.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3),
    "drop-in": lambda q, k, v: sdpa(q, k, v, is_causal=True, dropout_p=0.3),
}


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_give_the_same(name: str, randn: Any) -> None:
    q, k, v = (randn(2, 4, 70, 16).requires_grad_() for _ in range(3))
    found = []
    with ak.installed():
        for way in (WAYS["attention"], WAYS[name]):
            torch.manual_seed(2)
            o = way(q, k, v)
            found.append([o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))])
        assert ak.installed_report().torch == {}
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_recomputation_drops_the_same(name: str, reentrant: bool, randn: Any) -> None:
    q, k, v = (randn(2, 4, 70, 16).requires_grad_() for _ in range(3))
    with ak.installed():
        found = []
        for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=reentrant)):
            torch.manual_seed(2)
            o = run(WAYS[name], q, k, v)
            torch.rand(3)  # the generator has gone on when the backward comes
            found.append(
                [o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))]
                if not reentrant
                else of_reentrant(o, q, k, v)
            )
    assert all(map(torch.equal, *found))


def of_reentrant(o: Tensor, *inputs: Tensor) -> list[Tensor]:
    for t in inputs:
        t.grad = None
    o.square().sum().backward()
    return [o.detach(), *(t.grad for t in inputs)]


def graph_draws(ways: list[Callable[..., Any]], backend: str, randn: Any) -> None:
    q, k, v = (randn(2, 4, 70, 16).requires_grad_() for _ in range(3))
    v.data = torch.ones_like(v)

    def together(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [way(q, k, v) for way in ways]

    with ak.installed():
        compiled = torch.compile(together, fullgraph=True, backend=backend)
        torch.manual_seed(2)
        first, second = compiled(q, k, v), compiled(q, k, v)
        torch.manual_seed(2)
        again = compiled(q, k, v)
        assert all(map(torch.equal, first, again))
        assert not any(map(torch.equal, first, second))
        if backend != "inductor":  # which has random numbers of its own
            torch.manual_seed(2)
            assert all(map(torch.equal, first, together(q, k, v)))
        # Of values that are all one o is the sum of what is left of a row, and so is its product with its cotangent.
        for found in (first, second):
            total = torch.stack([(n + 1) * o.sum() for n, o in enumerate(found)]).sum()
            (dv,) = torch.autograd.grad(total, v)
            torch.testing.assert_close(dv.sum(), total)
        assert ak.installed_report().torch == {}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", WAYS)
def test_compiled_graphs_draw_at_every_call(name: str, backend: str, randn: Any) -> None:
    graph_draws([WAYS[name]], backend, randn)


def test_compiled_code_draws_at_every_call(randn: Any) -> None:
    """All ways in one graph: the compiler behind it is a C++ compiler, and takes its time."""
    graph_draws(list(WAYS.values()), "inductor", randn)


def test_opcheck(randn: Any) -> None:
    text = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) {
  o, lse = attend(q, k, v, dropout = 0.3) { mask = kv_idx <= q_idx normalizer = softmax }
  return o, lse
}
"""
    q, k, v = randn(2, 4, 19, 8), randn(2, 2, 23, 8), randn(2, 2, 23, 5)
    seed = torch.tensor(SEED)
    torch.library.opcheck(torch.ops.attnkit.attend.default, (q, k, v, text, [], [], seed, True))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.attnkit.attend.default, (*leaves, text, [], [], seed, True))
    with torch.no_grad():
        o, lse = torch.ops.attnkit.attend(q, k, v, text, [], [], seed, True)
        saved = [t.detach() for t in (q, k, v, o, lse)]
        call = (torch.ones_like(o), None, *saved, text, [], [], seed, [])
        torch.library.opcheck(torch.ops.attnkit.attend_backward.default, call)


def test_a_param_for_the_probability(randn: Any) -> None:
    """One program for all of them, such as a schedule wants."""
    text = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) params(p0: f32) {
  o, lse = attend(q, k, v, dropout = p0) { normalizer = softmax }
  return o, lse
}
"""
    q, k, v = (randn(1, 2, 40, 8) for _ in range(3))
    for p in (0.0, 0.1, 0.7, 1.0):
        o, _ = torch.ops.attnkit.attend(q, k, v, text, [], [p], torch.tensor(SEED), True)
        weights = torch.softmax(q.double() @ k.double().mT * 8**-0.5, -1) * kept(0, 2, 40, 40, p)
        torch.testing.assert_close(
            o.double(), weights @ v.double() / (1 - p if p < 1 else 1), rtol=1e-5, atol=1e-6
        )


def test_multihead_attention_in_training(randn: Any) -> None:
    layer, x = torch.nn.MultiheadAttention(32, 4, dropout=0.2, batch_first=True), randn(2, 50, 32)
    with ak.installed():
        torch.manual_seed(1)
        found = [layer(x, x, x, need_weights=False)[0] for _ in range(2)]
        report = ak.installed_report()
        assert (report.attnkit, report.torch) == (2, {})
        assert not torch.equal(*found)
        layer.eval()
        assert torch.equal(*(layer(x, x, x, need_weights=False)[0] for _ in range(2)))
