"""Attention within lists of tokens: against float64 and torch's own gradients, patterns over grids, bits, dead slots."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.variants import vision

pytestmark = pytest.mark.shows
Randn = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def listed(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, mask: Any = None) -> Tensor:
    """The definition, in the dtype of the tensors: each group by itself, then the mean of a token's groups."""
    o, count = [], torch.zeros(q.shape[:3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            of_q, of_k = (x[b % x.shape[0], h * x.shape[1] // q.shape[1]] for x in (queries, keys))
            total = torch.zeros(q.shape[2], v.shape[3], dtype=q.dtype)
            for own, seen in zip(of_q, of_k, strict=True):
                i, j = own[own >= 0].long(), seen[seen >= 0].long()
                count[b, h, i] += 1
                if len(i) == 0 or len(j) == 0:
                    continue
                g = h * k.shape[1] // q.shape[1]
                z = q[b, h, i] @ k[b, g, j].mT * q.shape[3] ** -0.5
                alive = torch.ones_like(z, dtype=torch.bool) if mask is None else mask(i[:, None], j[None])
                weights = torch.where(alive, z, -torch.inf).softmax(-1)
                weights = torch.where(alive.any(1, keepdim=True), weights, 0)
                total = total.index_add(0, i, weights @ v[b, g, j])
            o.append(total)
    return torch.stack(o).view(*q.shape[:3], v.shape[3]) / count.clamp(min=1)[..., None]


def near(found: Tensor, exact: Tensor, naive: Tensor, factor: float = 2) -> None:
    """FlashAttention's rule: no more than `factor` times the naive computation's error."""
    unit = torch.finfo(found.dtype).eps * exact.abs().max()
    allowed = factor * (naive.double() - exact).abs().max() + 2 * unit
    assert (found.double() - exact).abs().max() <= allowed


def lists(heads: int, n: int, groups: int, most: int, rng: np.random.Generator) -> Tensor:
    """Random groups of at most so many tokens; a token may be in several, or in none."""
    found = torch.full((1, heads, groups, most), -1, dtype=torch.int32)
    for h in range(heads):
        for g in range(groups):
            size = int(rng.integers(0, most + 1))
            found[0, h, g, :size] = torch.from_numpy(np.sort(rng.choice(n, size, replace=False)))
    return found


def causal(i: Tensor, j: Tensor) -> Tensor:
    return j <= i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (7, 33), (64, 64)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_random_lists(
    dtype: torch.dtype, dims: tuple[int, int], masked: bool, rng: np.random.Generator, randn: Randn
) -> None:
    """Both directions: lists of each head, shared tokens, empty groups, strides."""
    n, heads = 150, 2
    q, k = (randn(1, n, heads, dims[0]).transpose(1, 2).to(dtype).requires_grad_() for _ in range(2))
    v = randn(1, heads, n, dims[1]).to(dtype).requires_grad_()
    queries, keys = lists(heads, n, 5, 120, rng), lists(heads, n, 5, 130, rng)
    mask = ak.causal() if masked else None
    o = ak.attention(q, k, v, select=ak.groups(queries, keys), mask=mask)
    exact, naive = ([x.detach().to(d).requires_grad_() for x in (q, k, v)] for d in (torch.float64, dtype))
    results = [listed(*x, queries, keys, causal if masked else None) for x in (exact, naive)]
    near(o, *results)
    d_o = randn(*o.shape).to(dtype)
    found, *others = (
        torch.autograd.grad(x, leaves, d_o.to(x.dtype))
        for x, leaves in ((o, (q, k, v)), (results[0], exact), (results[1], naive))
    )
    for one, right, plain in zip(found, *others, strict=True):
        near(one, right, plain, 3)


def test_shared_heads_and_groups_of_heads(rng: np.random.Generator, randn: Randn) -> None:
    """One list for all heads, and one for each kv head with two query heads."""
    q, k, v = randn(2, 4, 60, 8), randn(2, 2, 60, 8), randn(2, 2, 60, 8)
    for heads in (1, 2):
        queries, keys = lists(heads, 60, 3, 40, rng), lists(heads, 60, 3, 50, rng)
        o = ak.attention(q, k, v, select=ak.groups(queries, keys))
        expected = listed(*(x.double() for x in (q, k, v)), queries, keys)
        assert torch.allclose(o.double(), expected, atol=1e-6)
    again = ak.groups(keys[:, :1].contiguous(), queries[:, :1].contiguous())
    assert torch.isfinite(ak.attention(q, k, v, select=again)).all()


def test_score_sees_true_indices(randn: Randn) -> None:
    """A bias by index, and its gradient, are those of dense attention with a mask."""
    n = 40
    q, k, v = (randn(1, 2, n, 8) for _ in range(3))
    bias = randn(n, n).requires_grad_()
    side = torch.arange(n) % 3
    members = torch.stack(
        [
            torch.nn.functional.pad(torch.where(side == g)[0], (0, 14 - int((side == g).sum())), value=-1)
            for g in range(3)
        ]
    )
    select = ak.groups(members.int())
    score = lambda s, b, h, i, j: s + bias[i, j]  # noqa: E731
    mask = lambda b, h, i, j: (i % 3) == (j % 3)  # noqa: E731
    d_o = randn(1, 2, n, 8)
    results = [
        ak.attention(q, k, v, score=score, select=select),
        ak.attention(q, k, v, score=score, mask=mask),
    ]
    assert torch.allclose(*results, atol=1e-6)
    gradients = [torch.autograd.grad(o, bias, d_o)[0] for o in results]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_of_all_is_dense_to_the_bit(dtype: torch.dtype, randn: Randn) -> None:
    n = 200
    q, k, v = (randn(1, 2, n, 32).to(dtype).requires_grad_() for _ in range(3))
    everything = torch.arange(n, dtype=torch.int32)[None]
    for mask in (None, ak.causal()):
        found, lse = ak.attention(q, k, v, select=ak.groups(everything), mask=mask, return_lse=True)
        o, of_dense = ak.attention(q, k, v, mask=mask, return_lse=True)
        assert torch.equal(found, o)
        assert torch.equal(lse, of_dense)
        rtol = 1e-5 if dtype == torch.float32 else 1e-2  # dq is summed in another place
        for one, other in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (found, o)), strict=True):
            assert torch.allclose(one, other, rtol=rtol, atol=1e-6)


def test_bits_do_not_depend_on_threads_or_batch(rng: np.random.Generator, randn: Randn) -> None:
    n = 300
    queries, keys = lists(3, n, 6, 150, rng), lists(3, n, 6, 150, rng)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (randn(2, 3, n, 32).to(dtype).requires_grad_() for _ in range(3))
        select = ak.groups(queries, keys)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            o = ak.attention(q, k, v, select=select)
            found.append((o, *torch.autograd.grad(o.float().square().sum(), (q, k, v))))
        alone = [x[1:].detach().requires_grad_() for x in (q, k, v)]
        o = ak.attention(*alone, select=select)
        by_itself = (o, *torch.autograd.grad(o.float().square().sum(), alone))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        assert all(torch.equal(a[1:], b) for a, b in zip(found[0], by_itself, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype, rng: np.random.Generator, randn: Randn) -> None:
    queries, keys = lists(2, 70, 4, 50, rng), lists(2, 70, 4, 60, rng)
    q, k, v = (randn(1, 2, 70, 20).to(dtype).requires_grad_() for _ in range(3))
    o = ak.attention(q, k, v, select=ak.groups(queries, keys), mask=ak.causal())
    found = torch.autograd.grad(o.float().sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = listed(*exact, queries, keys, causal)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert (o.double() - expected).abs().max() < tolerance
    for one, other in zip(found, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (one.double() - other).abs().max() < 4 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_else_is_read(dtype: torch.dtype, randn: Randn) -> None:
    """NaN in tokens of no group reaches nothing; in a token that a mask hides, nothing that must not see it."""
    n = 90
    q, k, v = (randn(1, 1, n, 32).to(dtype) for _ in range(3))
    even = torch.arange(0, n, 2, dtype=torch.int32)[None]
    select = ak.groups(even)
    clean = ak.attention(q, k, v, select=select, mask=ak.causal())
    for x in (q, k, v):
        x[:, :, 1::2] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    o = ak.attention(q, k, v, select=select, mask=ak.causal())
    assert torch.equal(o, clean)
    assert (o[:, :, 1::2] == 0).all()
    gradients = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert all(d.isfinite().all() and (d[:, :, 1::2] == 0).all() for d in gradients)
    with torch.no_grad():
        k[:, :, 60], v[:, :, 60] = torch.nan, torch.nan
    o = ak.attention(q, k, v, select=select, mask=ak.causal())
    assert torch.equal(o[:, :, :60], clean[:, :, :60])
    assert o[:, :, 60:].isnan().any()
    (dq,) = torch.autograd.grad(o, q, torch.ones_like(o))
    assert torch.allclose(dq[:, :, :60], gradients[0][:, :, :60], rtol=1e-2, atol=1e-2)


def test_no_groups_and_no_tokens(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 5, 4).requires_grad_() for _ in range(3))
    for nobody in (
        torch.full((2, 3), -1, dtype=torch.int32),
        torch.empty(0, 3, dtype=torch.int32),
        torch.empty(3, 0, dtype=torch.int32),
    ):
        o, lse = ak.attention(q, k, v, select=ak.groups(nobody), return_lse=True)
        assert (o == 0).all()
        assert (lse == -torch.inf).all()
        assert all((d == 0).all() for d in torch.autograd.grad(o.sum(), (q, k, v)))
    empty = torch.empty(1, 2, 0, 4)
    assert (
        ak.attention(empty, empty, empty, select=ak.groups(torch.empty(1, 0, dtype=torch.int32))).shape
        == empty.shape
    )


# --- patterns over grids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vision.CASES)
def test_patterns_are_their_masks(name: str, randn: Randn) -> None:
    """As groups and as a mask: results, lse, and gradients by everything, the table of biases among it."""
    pattern = vision.CASES[name]
    n = prod(pattern.shape)
    q, k, v = (randn(1, 2, n, 4).requires_grad_() for _ in range(3))
    table = randn(2, *(2 * size - 1 for size in pattern.shape)).requires_grad_()
    score = vision.relative_bias(table, pattern.shape)
    found, lse = ak.attention(q, k, v, select=pattern, score=score, return_lse=True)
    o, expected = vision.naive(
        *(x.detach().numpy() for x in (q, k, v)), pattern, table=table.detach().numpy()
    )
    assert np.abs(found.detach().numpy() - o).max() < 2e-6
    assert np.abs(lse.detach().numpy() - expected).max() < 2e-6
    masked = ak.attention(q, k, v, mask=pattern, score=score)
    d_o = randn(*found.shape)
    for one, other in zip(
        *(torch.autograd.grad(x, (q, k, v, table), d_o) for x in (found, masked)), strict=True
    ):
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize(
    "windows", [p for p in vision.CASES.values() if isinstance(p, vision.Windows)], ids=repr
)
def test_bias_by_place_is_bias_by_offset(windows: vision.Windows, randn: Randn) -> None:
    """Also of windows that the border cuts off: results and the gradient of the table."""
    n = prod(windows.shape)
    q, k, v = (randn(1, 2, n, 4) for _ in range(3))
    table = randn(2, *(2 * w - 1 for w in windows.window)).requires_grad_()
    scores = ak.window_bias(table, windows), vision.relative_bias(table, windows.shape)
    results = [ak.attention(q, k, v, select=windows, score=score) for score in scores]
    assert torch.allclose(*results, atol=1e-6)
    d_o = randn(*results[0].shape)
    assert torch.allclose(*(torch.autograd.grad(o, table, d_o)[0] for o in results), atol=1e-5)


def test_every_part_of_an_axis() -> None:
    """Parts cover each query once, and hold every key that one of their queries sees; exact ones no other."""
    for length in range(1, 20):
        for n in range(1, min(length, 7) + 1):
            patterns: list[vision.GridPattern] = [vision.Windows((length,), (n,), (s,)) for s in range(n)]
            patterns += [vision.Neighbourhood((length,), (n,), step) for step in range(1, length // n + 1)]
            patterns += [
                vision.Sampled((length,), n),
                vision.Grid((length,), (n,)),
                vision.Halo((length,), (n,), 2),
            ]
            for pattern in patterns:
                queries, keys, exact = pattern.groups()
                assert sorted(queries[queries >= 0]) == list(range(length))
                for own, seen in zip(queries, keys, strict=True):
                    for i in own[own >= 0]:
                        wanted = set(pattern.keys(vision.Query(0, 0, int(i), length, length)))
                        assert (
                            wanted == set(seen[seen >= 0].tolist()) if exact else wanted <= set(seen.tolist())
                        )


# --- the op -------------------------------------------------------------------------------------------------


def arguments(shared: bool, need_lse: bool) -> Any:
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    select = ak.groups(torch.tensor([[0, 3, 5, 7], [1, 2, 5 if shared else 6, -1]], dtype=torch.int32))
    text = ak.trace(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).text
    return q, k, v, select.queries, select.keys, shared, text, [], [], need_lse


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    call = arguments(shared, True)
    o, lse, rows = torch.ops.attnkit.attend_groups(*call)
    kept = rows if shared else o
    torch.library.opcheck(
        torch.ops.attnkit.attend_groups_backward.default,
        (torch.ones_like(o), None, *call[:3], kept, lse, *call[3:7], [], [], []),
    )
    for t in call[:3]:
        t.requires_grad_()
    torch.library.opcheck(torch.ops.attnkit.attend_groups.default, call)


def test_compiles_into_one_graph(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 24, 8).requires_grad_() for _ in range(3))
    select = vision.Windows((4, 6), (2, 3), (1, 0))
    ak.attention(q, k, v, select=select)  # lists are made outside of graphs

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ak.attention(q, k, v, select=select, mask=ak.causal())

    compiled, plain = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v)
    assert torch.equal(compiled, plain)
    for one, other in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (compiled, plain)), strict=True):
        assert torch.equal(one, other)


def test_autocast_and_second_derivatives(randn: Randn) -> None:
    q, k, v = (randn(1, 1, 6, 4).requires_grad_() for _ in range(3))
    select = ak.groups(torch.arange(6, dtype=torch.int32)[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert ak.attention(q, k, v, select=select).dtype == torch.bfloat16
    (dq,) = torch.autograd.grad(ak.attention(q, k, v, select=select).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="AK503"):
        dq.sum().backward()


def test_explain_says_groups() -> None:
    q = torch.randn(1, 1, 24, 8)
    report = ak.explain(ak.attention, q, q, q, select=vision.Windows((4, 6), (2, 3), (0, 0)))
    assert report.calls[0].notes == ("within 4 groups of at most 6 queries and 6 keys",)
    assert not report.calls[0].blocks
