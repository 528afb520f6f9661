"""ak.aaren_attention and ak.additive_attention: against their equations in float64, forwards and backwards; states; errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import AttnkitError
from attnkit.variants import aaren, additive

pytestmark = pytest.mark.shows


def tokens(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 75, size, generator=generator) for size in sizes]


def prefixes(query: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """All weights at once, in any precision."""
    scale = k.shape[3] ** -0.5 if scale is None else scale
    logits = scale * (k * query[:, None]).sum(-1)
    lower = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()
    return logits[:, :, None, :].masked_fill(~lower, -torch.inf).softmax(-1) @ v


def products(q: Tensor, k: Tensor, v: Tensor, w: Tensor, causal: bool) -> Tensor:
    if causal:
        return k * prefixes(w, q, q) * v
    weights = (q.shape[3] ** -0.5 * (q * w[:, None]).sum(-1)).softmax(-1)
    return k * (weights[:, :, None] @ q) * v


def same(found: Any, expected: Any, given: list[Tensor]) -> None:
    """Results and gradients, in float32 and in float64."""
    results = []
    for function, dtype in ((found, torch.float32), (expected, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        o = function(*leaves)
        cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, cotangent)])
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(
            mine.double(), true, rtol=1e-4, atol=1e-5 * max(1.0, float(true.abs().max()))
        )


@pytest.mark.parametrize("far", [1.0, 60.0], ids=["near", "far apart"])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_every_prefix_has_its_softmax(scale: float | None, far: float) -> None:
    k, v = tokens(16, 24)
    query = far * torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    same(lambda *x: ak.aaren_attention(*x, scale=scale), lambda *x: prefixes(*x, scale), [query, k, v])
    o, (last, lse) = ak.aaren_attention(query, k, v, scale=scale, return_state=True)
    named: Any = {} if scale is None else {"scale": scale}
    exact, exact_lse = map(torch.from_numpy, aaren.naive(query.numpy(), k.numpy(), v.numpy(), **named))
    torch.testing.assert_close(o.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.double(), exact[:, :, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse[:, :, -1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cut", [0, 1, 32, 74])
def test_a_state_carries_the_sequence_on(cut: int) -> None:
    k, v = tokens(16, 24)
    query = 3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(2))

    def in_two(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, state = ak.aaren_attention(query, k[:, :, :cut], v[:, :, :cut], return_state=True)
        rest, (last, lse) = ak.aaren_attention(
            query, k[:, :, cut:], v[:, :, cut:], initial_state=state, return_state=True
        )
        return torch.cat([first, rest, last[:, :, None] * lse[:, :, None, None]], 2)

    def whole(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = prefixes(query, k, v)
        lse = (k.shape[3] ** -0.5 * (k * query[:, None]).sum(-1)).logsumexp(-1)
        return torch.cat([o, o[:, :, -1:] * lse[:, :, None, None]], 2)

    same(in_two, whole, [query, k, v])


def test_tokens_without_weight() -> None:
    k, v = tokens(16, 24)
    query = torch.ones(3, 16)
    k[:, :, :5] = -torch.inf
    o = ak.aaren_attention(query, k, v)
    assert torch.equal(o[:, :, :5], torch.zeros(2, 3, 5, 24))
    torch.testing.assert_close(o[:, :, 5:], ak.aaren_attention(query, k[:, :, 5:], v[:, :, 5:]))
    k[:, :, 40] = torch.nan
    assert torch.equal(ak.aaren_attention(query, k, v)[:, :, :40], o[:, :, :40])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_one_vector_for_all_tokens(causal: bool) -> None:
    q, k, v = tokens(16, 16, 16)
    w = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    same(lambda *x: ak.additive_attention(*x, causal=causal), lambda *x: products(*x, causal), [q, k, v, w])
    exact = additive.naive(*(t.numpy() for t in (q, k, v, w)), causal=causal)
    found = ak.additive_attention(q, k, v, w, causal=causal)
    torch.testing.assert_close(found.double(), torch.from_numpy(exact), rtol=1e-4, atol=1e-5)


def test_short_floats_are_summed_in_float32() -> None:
    k, v = (t.bfloat16() for t in tokens(16, 24))
    query = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    found = ak.aaren_attention(query, k, v)
    assert torch.equal(found, ak.aaren_attention(query, k.float(), v.float()).bfloat16())


def test_no_graph_breaks() -> None:
    k, v = tokens(16, 16)
    w = torch.ones(3, 16)
    for causal in (False, True):
        whole = torch.compile(ak.additive_attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            whole(k, v, v, w, causal=causal), ak.additive_attention(k, v, v, w, causal=causal)
        )


@pytest.mark.parametrize(
    ("code", "argument", "change"),
    [
        ("AK403", "query", {"query": torch.ones(2, 16)}),
        ("AK403", "k", {"k": torch.ones(3, 75, 16)}),
        ("AK403", "v", {"v": torch.ones(2, 3, 74, 24)}),
        ("AK401", "scale", {"scale": 0.0}),
        ("AK402", "return_state", {"return_state": 1}),
        ("AK402", "initial_state", {"initial_state": torch.ones(2)}),
        ("AK403", "initial_state", {"initial_state": (torch.ones(2, 3, 24), torch.ones(2, 3, 1))}),
    ],
)
def test_errors_name_the_argument(code: str, argument: str, change: dict[str, Any]) -> None:
    k, v = tokens(16, 24)
    with pytest.raises(AttnkitError, match=argument) as caught:
        ak.aaren_attention(**({"query": torch.ones(3, 16), "k": k, "v": v} | change))
    assert caught.value.code == code


def test_products_need_equal_shapes() -> None:
    q, k = tokens(16, 8)
    with pytest.raises(AttnkitError, match=r"where: k\n"):
        ak.additive_attention(q, k, q, torch.ones(3, 16))
