"""Gradients on the engine against torch's autograd of the equation in float64: everything that a call can read."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.testing.gradients import FACTOR, close

S = 150  # two blocks of queries and of keys, the second one not full


class Case(NamedTuple):
    """A program as functions of indices and captured tensors; torch runs the same functions on whole tensors."""

    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    captured: tuple[tuple[int, ...], ...] = ()  # shapes of what score captures
    heads: int = 2
    kv_heads: int = 2
    batch: int = 2
    q_len: int = S
    kv_len: int = S
    dim: int = 16
    v_dim: int = 16
    sink: bool = False
    lse: bool = False


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


CASES = {
    "plain": Case(),
    "causal": Case(mask=causal),
    "grouped": Case(mask=causal, heads=6, kv_heads=2),
    "one kv head": Case(mask=causal, heads=4, kv_heads=1),
    "lengths differ": Case(mask=causal, q_len=37, kv_len=211),
    "more queries": Case(mask=causal, q_len=211, kv_len=37),
    "one query": Case(q_len=1),
    "two keys": Case(kv_len=2),
    "widths differ": Case(mask=causal, dim=20, v_dim=9),
    "wide": Case(dim=192, v_dim=136, batch=1),
    "window": Case(mask=lambda b, h, i, j: (j <= i) & (i - j < 9)),
    "both ways": Case(mask=lambda b, h, i, j: abs(i - j) < 12),
    "by head": Case(mask=lambda b, h, i, j: (j <= i) | (h == 1)),
    "by batch": Case(mask=lambda b, h, i, j: (j <= i) | (b == 1)),
    "dead rows": Case(mask=lambda b, h, i, j: (j <= i) & (i % 5 != 3)),
    "dead keys": Case(mask=lambda b, h, i, j: (j <= i) & (j % 5 != 3)),
    "nothing seen": Case(mask=lambda b, h, i, j: i < 0),
    "softcap": Case(score=lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0), mask=causal),
    "distance": Case(score=lambda s, b, h, i, j: s - 0.125 * abs(i - j)),
    "square": Case(score=lambda s, b, h, i, j: s * s),
    "corner": Case(score=lambda s, b, h, i, j: torch.where(s > 0, s, 0.1 * s)),
    "constant": Case(score=lambda s, b, h, i, j: 0.0 * s - 0.125 * abs(i - j)),
    "far": Case(score=lambda s, b, h, i, j: torch.where(j <= i, s, -math.inf)),
    "sink": Case(mask=causal, sink=True),
    "sink of dead rows": Case(mask=lambda b, h, i, j: (j <= i) & (i % 5 != 3), sink=True),
    "lse": Case(mask=causal, lse=True),
    "lse and sink": Case(mask=lambda b, h, i, j: (j <= i) & (i % 5 != 3), lse=True, sink=True),
    "slopes": Case(lambda s, b, h, i, j, m: s - m[h] * abs(i - j), causal, ((2,),)),
    "scalar": Case(lambda s, b, h, i, j, m: s * m[0], causal, ((1,),)),
    "temperature": Case(lambda s, b, h, i, j, t: s * t[b, h, i], causal, ((2, 2, S),)),
    "temperature of all heads": Case(lambda s, b, h, i, j, t: s * t[i], causal, ((S,),)),
    "key bias": Case(lambda s, b, h, i, j, t: s + t[b, j], causal, ((2, S),)),
    "bias": Case(lambda s, b, h, i, j, t: s + t[b, h, i, j], causal, ((2, 2, S, S),)),
    "bias of all": Case(lambda s, b, h, i, j, t: s + t[i, j], causal, ((S, S),)),
    "bias of a group": Case(lambda s, b, h, i, j, t: s + t[h // 2, i, j], causal, ((2, S, S),), heads=4),
    "transposed bias": Case(lambda s, b, h, i, j, t: s + t[h, j, i], causal, ((2, S, S),)),
    "table": Case(lambda s, b, h, i, j, t: s + t[h, i - j + S], causal, ((2, 2 * S + 1),)),
    "two tables": Case(lambda s, b, h, i, j, t, u: (s + t[i // 8]) * u[j // 8], causal, ((S // 8 + 1,), (S // 8 + 1,))),
    "a table twice": Case(lambda s, b, h, i, j, t: s * t[i] + t[j], causal, ((S,),)),
    "inside": Case(lambda s, b, h, i, j, t: torch.tanh(s + t[h, i, j]) * t[h, 0, 0], causal, ((2, S, S),)),
}  # fmt: skip


class Problem(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    captured: tuple[Tensor, ...]
    sink: Tensor | None
    d_o: Tensor
    d_lse: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.captured, *([] if self.sink is None else [self.sink])]

    def to(self, dtype: torch.dtype, captured: torch.dtype = torch.float32) -> "Problem":
        """The same numbers as leaves; of other tensors than q, k, v and d_o the dtype is ``captured``."""
        of_q = [t.to(dtype).requires_grad_() for t in (self.q, self.k, self.v)]
        others = tuple(t.to(captured).requires_grad_() for t in self.captured)
        sink = None if self.sink is None else self.sink.to(captured).requires_grad_()
        return Problem(*of_q, others, sink, self.d_o.to(dtype), self.d_lse)


def problem(case: Case, randn: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Problem:
    q = randn(case.batch, case.heads, case.q_len, case.dim)
    k = randn(case.batch, case.kv_heads, case.kv_len, case.dim)
    v = randn(case.batch, case.kv_heads, case.kv_len, case.v_dim)
    d_o, d_lse = randn(*q.shape[:3], case.v_dim), randn(*q.shape[:3]) if case.lse else None
    q, k, v, d_o = (t.to(dtype).float() for t in (q, k, v, d_o))
    return Problem(
        q, k, v, tuple(randn(*s) for s in case.captured), randn(case.heads) if case.sink else None, d_o, d_lse
    )


def equation(case: Case, p: Problem) -> tuple[Tensor, Tensor]:
    """Attention as it is written down, every pair materialised, in the dtype of ``p.q``."""
    group = case.heads // case.kv_heads
    k, v = (t.repeat_interleave(group, 1) for t in (p.k, p.v))
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (*p.q.shape[:3], k.shape[2])), indexing="ij")
    s = (p.q @ k.mT) * case.dim**-0.5
    if case.score is not None:
        s = case.score(s, b, h, i, j, *p.captured).to(p.q.dtype)
    if case.mask is not None:
        s = torch.where(case.mask(b, h, i, j), s, -math.inf)
    if p.sink is not None:
        s = torch.cat([s, p.sink.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    top = s.amax(-1, keepdim=True).detach()
    e = torch.exp(s - torch.where(top == -math.inf, 0.0, top))
    total = e.sum(-1, keepdim=True)
    dead = total == 0
    safe = torch.where(dead, 1.0, total)
    o = (e / safe)[..., : k.shape[2]] @ v
    return o, torch.where(dead, 0.0, torch.log(safe) + top).squeeze(-1)


def of_equation(case: Case, p: Problem) -> list[Tensor]:
    o, lse = equation(case, p)
    loss = (o * p.d_o).sum()
    if p.d_lse is not None:
        loss = loss + (lse * p.d_lse).sum()
    return gradients(loss, p)


def of_attnkit(case: Case, p: Problem, **keywords: Any) -> list[Tensor]:
    score = None
    if case.score is not None:
        function = case.score
        score = lambda s, b, h, i, j: function(s, b, h, i, j, *p.captured)  # noqa: E731
    normalizer = None if p.sink is None else ak.softmax(p.sink)
    o, lse = ak.attention(
        p.q, p.k, p.v, score=score, mask=case.mask, normalizer=normalizer, return_lse=True, **keywords
    )
    loss = (o * p.d_o).sum()
    if p.d_lse is not None:
        loss = loss + (torch.where(lse == -math.inf, 0.0, lse) * p.d_lse).sum()
    return gradients(loss, p)


def gradients(loss: Tensor, p: Problem) -> list[Tensor]:
    found = torch.autograd.grad(loss, p.leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(p.leaves, found, strict=True)]


def names(p: Problem) -> list[str]:
    return ["q", "k", "v", *(f"captured {i}" for i in range(len(p.captured))), "sink"]


@pytest.mark.parametrize("name", CASES)
def test_against_the_equation(name: str, randn: Any) -> None:
    case = CASES[name]
    p = problem(case, randn)
    want, naive = (
        of_equation(case, p.to(torch.float64, torch.float64)),
        of_equation(case, p.to(torch.float32)),
    )
    got = of_attnkit(case, p.to(torch.float32))
    for what, *three in zip(names(p), got, naive, want, strict=False):
        close(*(t.detach().numpy() for t in three), f"{name}: gradient of {what}")
    assert name in ("nothing seen", "constant") or all(g.count_nonzero() > 0 for g in want)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_agrees(name: str, randn: Any) -> None:
    case = CASES[name]._replace(dim=4, v_dim=3)
    p = problem(case, randn)
    want = of_equation(case, p.to(torch.float64, torch.float64))
    got = of_attnkit(case, p.to(torch.float64), backend="reference")
    for what, g, w in zip(names(p), got, want, strict=False):
        error = float((g.double() - w).abs().max()) / max(1.0, float(w.abs().max()))
        assert error <= (1e-12 if g.dtype == torch.float64 else 1e-7), (what, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grouped", "bias of all", "table", "a table twice", "temperature", "far"])
def test_the_same_bits_on_any_number_of_threads(name: str, dtype: torch.dtype, randn: Any, isa: str) -> None:
    case = CASES[name]
    p = problem(case, randn).to(dtype)
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append(of_attnkit(case, p))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "grouped",
        "widths differ",
        "softcap",
        "sink of dead rows",
        "lse",
        "bias of all",
        "slopes",
        "causal",
        "lengths differ",
        "more queries",
        "one query",
        "wide",
        "dead keys",
    ],
)
def test_16_bit_floats(name: str, dtype: torch.dtype, randn: Any, isa: str) -> None:
    """All sums are float32, and what they multiply is rounded at most once: closer than the equation in the dtype itself comes."""
    case = CASES[name]
    p = problem(case, randn, dtype)
    want, naive = of_equation(case, p.to(torch.float64, torch.float64)), of_equation(case, p.to(dtype))
    got = of_attnkit(case, p.to(dtype))
    for what, *three in zip(names(p), got, naive, want, strict=False):
        assert three[0].dtype == three[1].dtype
        g, n, w = (t.detach().double().numpy() for t in three)
        size = float(abs(w).max())
        error, allowed = float(abs(g - w).max()), FACTOR * float(abs(n - w).max())
        assert error <= allowed + size * torch.finfo(dtype).eps, f"{name}, {what}: {error} of {allowed}"


def test_gradients_of_16_bit_captured_tensors(randn: Any) -> None:
    case = CASES["bias of all"]
    p = problem(case, randn)
    halved = p.to(torch.float32)._replace(captured=(p.captured[0].bfloat16().requires_grad_(),))
    same = p.to(torch.float32)._replace(captured=(p.captured[0].bfloat16().float().requires_grad_(),))
    *got, bias = of_attnkit(case, halved)
    *want, expected = of_attnkit(case, same)
    assert all(map(torch.equal, got, want))
    assert torch.equal(bias, expected.bfloat16())
