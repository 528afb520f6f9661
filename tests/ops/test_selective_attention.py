"""ak.selective_attention on the engine: against the equation in float64, forwards and backwards; chunks, steps, limits; errors."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import testing
from attnkit.backends.cpu.engine import engine
from attnkit.errors import AttnkitError
from attnkit.ops.selective import selective_text
from attnkit.ops.traced import Traceable, bind
from attnkit.testing.gradients import close
from attnkit.variants import selective

pytestmark = pytest.mark.shows

# (B, Hq, Hkv, Sq, Skv, D, Dv)
SHAPES = {
    "small": (2, 2, 1, 5, 5, 4, 3),
    "tiles": (1, 4, 2, 230, 230, 16, 24),
    "a chunk": (2, 2, 2, 40, 170, 8, 8),
    "a step": (2, 4, 1, 1, 150, 16, 16),
    "a few": (1, 4, 2, 7, 130, 8, 8),
    "early queries": (1, 2, 2, 9, 4, 4, 4),
    "no queries": (1, 2, 1, 0, 3, 4, 4),
    "no keys": (1, 2, 1, 3, 0, 4, 4),
    "wide": (1, 2, 1, 50, 50, 200, 136),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def qkv(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    b, hq, hkv, sq, skv, d, dv = shape
    sizes = (b, hq, sq, d), (b, hkv, skv, d), (b, hkv, skv, dv)
    return [torch.from_numpy(rng.standard_normal(size, np.float32)).to(dtype) for size in sizes]


def equation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carry: Tensor | None = None,
    *,
    head: int = 0,
    mask: Any = None,
    changed: Any = None,
) -> tuple[Tensor, Tensor]:
    """o and the carry, with F materialised, differentiable, in any precision."""
    sq, skv, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(sq)[:, None] + skv - sq, torch.arange(skv)
    sees = (j <= i) if mask is None else (j <= i) & mask(i, j)
    logits = q @ k.mT * q.shape[3] ** -0.5
    logits = logits if changed is None else changed(logits)
    carried = torch.zeros_like(k[:, 0, :, 0]) if carry is None else carry.to(q.dtype)
    stays = carried < torch.inf
    added = torch.where(sees & (j >= 1) & (j < i) & stays[:, None], logits[:, head].relu(), 0.0)
    total = added.cumsum(1)
    f = carried[:, None] + total - added
    z = torch.where(sees & stays[:, None, None], logits - f[:, None], -torch.inf)
    weights = torch.where(sees, z.softmax(-1), 0.0).nan_to_num(0.0) if skv else z
    return weights @ v, carried + added.sum(1)


# --- forwards ---------------------------------------------------------------------------------------------


def test_worked_numbers() -> None:
    """variants.md G7: A^0 rows [.5], [2, 1], [1, 3, .2], [0, -1, 2, 1]."""
    logits = torch.tensor([[0.5, 0, 0, 0], [2, 1, 0, 0], [1, 3, 0.2, 0], [0, -1, 2, 1]])
    eye = torch.eye(4)[None, None]
    o, carry = ak.selective_attention(logits[None, None], eye, eye, scale=1.0, return_carry=True)
    assert carry.tolist() == [[0, 3, 2, 0]]
    torch.testing.assert_close(
        o[0, 0, 3], torch.tensor([0.089882, 0.001646, 0.664146, 0.244326]), rtol=0, atol=6e-7
    )
    plain = ak.dense_attention(logits[None, None], eye, eye, scale=1.0, causal=True)
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(
        plain[0, 0, 3], torch.tensor([0.087144, 0.032059, 0.643914, 0.236883]), rtol=0, atol=6e-7
    )
    torch.testing.assert_close(o[:, :, :3], plain[:, :, :3], rtol=0, atol=0)  # F is 0 there
    assert rows_of_f(logits[None, None], eye, eye, scale=1.0)[0, 3].tolist() == [0, 3, 0, 0]


def rows_of_f(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """F, a row after the other: what is carried when its query comes."""
    carry, rows = torch.zeros(q.shape[0], k.shape[2]), []
    for i in range(q.shape[2]):
        rows.append(carry)
        _, seen = ak.selective_attention(
            q[:, :, i : i + 1],
            k[:, :, : i + 1],
            v[:, :, : i + 1],
            carry=carry[:, : i + 1],
            return_carry=True,
            **how,
        )
        carry = torch.cat([seen, carry[:, i + 1 :]], 1)
    return torch.stack(rows, 1)


def test_laws_of_f(rng: np.random.Generator) -> None:
    """variants.md G7: rows 0 and 1, the first column and the diagonal are 0; it never falls; steps give what all at once does."""
    q, k, v = qkv(rng, (2, 4, 2, 60, 60, 8, 8))
    f = rows_of_f(q, k, v)
    assert not f[:, :2].any()
    assert not f[:, :, 0].any()
    assert not f.diagonal(dim1=1, dim2=2).any()
    assert (f.diff(dim=1) >= 0).all()
    want = selective.naive(*(x.numpy() for x in (q, k, v))).f
    np.testing.assert_allclose(f, np.where(np.tri(60) > 0, want, 0), rtol=1e-5, atol=1e-5)
    assert f.max() > 1


@each_shape
@pytest.mark.parametrize("start", [False, True])
def test_the_equation(rng: np.random.Generator, shape: tuple[int, ...], start: bool) -> None:
    q, k, v = qkv(rng, shape)
    before = torch.from_numpy(rng.random((shape[0], shape[4]), np.float32)) if start else None
    head = shape[1] - 1
    o, carry = ak.selective_attention(q, k, v, head=head, carry=before, return_carry=True)
    start_with = None if before is None else before.numpy()
    want = selective.naive(*(x.numpy() for x in (q, k, v)), start_with, head=head)
    naive_o, naive_carry = equation(q, k, v, before, head=head)
    close(o, naive_o, want.o, "o")
    close(carry, naive_carry, want.carry, "carry")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["tiles", "a step", "a few"])
def test_half_precision(rng: np.random.Generator, dtype: torch.dtype, shape: str) -> None:
    q, k, v = qkv(rng, SHAPES[shape], dtype)
    o, carry = ak.selective_attention(q, k, v, return_carry=True)
    want, total = equation(q.double(), k.double(), v.double())
    assert o.dtype == dtype
    assert carry.dtype == torch.float32
    naive, _ = equation(q, k, v)
    assert (o.double() - want).abs().max() <= 2 * (naive.double() - want).abs().max()
    torch.testing.assert_close(carry.double(), total, rtol=1e-5, atol=1e-4)


def test_a_mask_and_documents(rng: np.random.Generator) -> None:
    """Pairs that a mask hides carry nothing; packed sequences are the loop over them."""
    q, k, v = qkv(rng, (1, 2, 2, 120, 120, 8, 8))

    def near(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx - kv_idx < 20

    o, carry = ak.selective_attention(q, k, v, mask=near, return_carry=True)
    want, total = equation(q.double(), k.double(), v.double(), mask=lambda i, j: i - j < 20)
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(carry.double(), total, rtol=1e-5, atol=1e-5)
    ends = [0, 30, 30, 31, 120]
    cu = torch.tensor(ends, dtype=torch.int32)
    packed, sums = ak.selective_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu, return_carry=True)
    for first, end in pairwise(ends):
        part = [x[:, :, first:end] for x in (q, k, v)]
        alone, its_sums = ak.selective_attention(*part, return_carry=True)
        assert torch.equal(packed[:, :, first:end], alone)
        assert torch.equal(sums[:, first:end], its_sums)


def test_heads_with_masks_of_their_own(rng: np.random.Generator) -> None:
    """What a head does not see it does not carry; other heads that do see it lose what is there."""
    q, k, v = qkv(rng, (1, 3, 3, 60, 60, 8, 8))
    o = ak.selective_attention(q, k, v, head=1, mask=lambda b, h, q_idx, kv_idx: (h != 1) | (kv_idx < 10))
    i, j = torch.arange(60)[:, None], torch.arange(60)
    sees = (j <= i) & ((torch.arange(3)[:, None, None] != 1) | (j < 10))
    logits = q.double() @ k.double().mT * 8**-0.5
    added = torch.where(sees[1] & (j >= 1) & (j < i), logits[:, 1].relu(), 0.0)
    z = torch.where(sees, logits - (added.cumsum(1) - added)[:, None], -torch.inf)
    torch.testing.assert_close(o.double(), z.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-5)


def test_a_head_that_selects_nothing_is_dense(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, (2, 4, 2, 130, 130, 16, 16))
    q[:, 0], k[:, 0] = -q[:, 0].abs(), k[:, 0].abs()
    o, carry = ak.selective_attention(q, k, v, return_carry=True)
    assert not carry.any()
    assert torch.equal(o, ak.dense_attention(q, k, v, causal=True))


@pytest.mark.parametrize("budget", [None, 12])
def test_chunks_and_steps_are_the_whole(rng: np.random.Generator, budget: int | None) -> None:
    q, k, v = qkv(rng, (2, 4, 2, 150, 150, 8, 8))
    whole, last = ak.selective_attention(q, k, v, budget=budget, return_carry=True)
    for cuts in ([100, 150], [3, 20, 21, *range(22, 30), 150]):
        carry, start = torch.zeros(2, 0), 0
        for stop in cuts:
            carry = torch.nn.functional.pad(carry, (0, stop - start))
            o, carry = ak.selective_attention(
                q[:, :, start:stop],
                k[:, :, :stop],
                v[:, :, :stop],
                carry=carry,
                budget=budget,
                return_carry=True,
            )
            torch.testing.assert_close(o, whole[:, :, start:stop], rtol=1e-5, atol=1e-5)
            start = stop
        torch.testing.assert_close(carry, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [2, 5, 64, 1000])
@pytest.mark.parametrize("shape", ["tiles", "a chunk", "a few", "early queries"])
def test_a_budget(rng: np.random.Generator, shape: str, budget: int) -> None:
    q, k, v = qkv(rng, SHAPES[shape])
    o, carry = ak.selective_attention(q, k, v, budget=budget, return_carry=True)
    want = selective.naive(*(x.numpy() for x in (q, k, v)), budget=budget)
    assert np.array_equal(carry.isinf().numpy(), np.isinf(want.carry))
    torch.testing.assert_close(o.double(), torch.from_numpy(want.o), rtol=1e-5, atol=1e-5)
    if budget == 1000:
        assert torch.equal(o, ak.selective_attention(q, k, v))


@pytest.mark.parametrize("shape", ["a chunk", "a step", "a few"])
def test_what_is_gone_may_hold_anything(rng: np.random.Generator, shape: str) -> None:
    q, k, v = qkv(rng, SHAPES[shape])
    before = torch.rand(k.shape[0], k.shape[2])
    before[:, 5:9] = torch.inf
    want, total = ak.selective_attention(q, k, v, carry=before, return_carry=True)
    for x, junk in ((k, torch.nan), (v, torch.inf)):
        x[:, :, 5:9] = junk
    o, carry = ak.selective_attention(q, k, v, carry=before, return_carry=True)
    assert torch.equal(o, want)
    assert torch.equal(carry, total)
    assert carry[:, 5:9].isinf().all()


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("codec", ["f32", "bf16"])
def test_decoding_over_a_cache(rng: np.random.Generator, codec: str, page_size: int | None) -> None:
    """Rows of different lengths, one step and several; and a cache that forgets."""
    dtype = torch.float32 if codec == "f32" else torch.bfloat16
    lengths, steps = [37, 20], [3, 1, 1]
    q, k, v = qkv(rng, (2, 4, 2, 45, 45, 16, 16), dtype)
    cache = ak.KVCache(2, 2, 16, max_len=64, codec=codec, page_size=page_size)
    lens = torch.tensor(lengths, dtype=torch.int32)
    cache.append(k[:, :, :37], v[:, :, :37], lens)
    carry = torch.zeros(2, 64)
    for n in steps:
        at = cache.lengths.tolist()
        new = [torch.stack([x[b, :, a : a + n] for b, a in enumerate(at)]) for x in (q, k, v)]
        cache.append(new[1], new[2])
        o, after = ak.selective_attention(new[0], cache, carry=carry, return_carry=True)
        for b, a in enumerate(at):
            whole, sums = ak.selective_attention(
                new[0][b : b + 1], k[b : b + 1, :, : a + n], v[b : b + 1, :, : a + n],
                carry=carry[b : b + 1, : a + n], return_carry=True,
            )  # fmt: skip
            torch.testing.assert_close(o[b : b + 1], whole, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(after[b : b + 1, : a + n], sums, rtol=1e-5, atol=1e-5)
        carry = after
    assert carry.any()


# --- the same bits ----------------------------------------------------------------------------------------


def test_threads_batches_and_tiles_change_no_bit(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(rng, (3, 4, 2, 300, 300, 16, 16))
    torch.set_num_threads(1)
    one, carry = ak.selective_attention(q, k, v, return_carry=True)
    torch.set_num_threads(4)
    four, its_carry = ak.selective_attention(q, k, v, return_carry=True)
    assert torch.equal(one, four)
    assert torch.equal(carry, its_carry)
    alone, sums = ak.selective_attention(q[1:2], k[1:2], v[1:2], return_carry=True)
    assert torch.equal(alone, one[1:2])
    assert torch.equal(sums, carry[1:2])


def test_levels_agree(rng: np.random.Generator) -> None:
    """AVX2 and AVX-512 give the same bits, the scalar level almost."""
    q, k, v = qkv(rng, (1, 2, 2, 130, 130, 16, 16))
    best, found = engine().current_isa(), {}
    try:
        for isa in engine().isa_levels():
            engine().set_isa(isa)
            found[isa] = ak.selective_attention(q, k, v, return_carry=True)
    finally:
        engine().set_isa(best)
    for isa, (o, carry) in found.items():
        torch.testing.assert_close(o, found[best][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(carry, found[best][1], rtol=1e-5, atol=1e-5)
        if isa != "scalar":
            assert torch.equal(o, found[best][0])
            assert torch.equal(carry, found[best][1])


# --- backwards --------------------------------------------------------------------------------------------


def gradients(function: Any, inputs: list[Tensor | None], seed: int = 0, **how: Any) -> list[Tensor]:
    """Of a sum of o and the carry with random cotangents."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    o, carry = function(*leaves, **how)
    random = torch.Generator().manual_seed(seed)
    d_o, d_carry = (torch.randn(x.shape, generator=random, dtype=torch.float64) for x in (o, carry))
    d_carry = d_carry.masked_fill(carry.isinf(), 0.0)
    given = [x for x in leaves if x is not None]
    return list(torch.autograd.grad([o, carry], given, [d_o.to(o.dtype), d_carry.to(carry.dtype)]))


def ours(q: Tensor, k: Tensor, v: Tensor, carry: Tensor | None = None, **how: Any) -> Any:
    return ak.selective_attention(q, k, v, carry=carry, return_carry=True, **how)


@each_shape
@pytest.mark.parametrize("start", [False, True])
def test_gradients(rng: np.random.Generator, shape: tuple[int, ...], start: bool) -> None:
    """Of q, k, v and the carry, with cotangents of o and of the carry."""
    inputs: list[Tensor | None] = [*qkv(rng, shape)]
    if start:
        before = torch.from_numpy(rng.random((shape[0], shape[4]), np.float32))
        before[:, 3:4] = torch.inf if shape[3] <= shape[4] else 0.0
        inputs.append(before)
    got = gradients(ours, inputs, head=shape[1] - 1)
    naive = gradients(equation, inputs, head=shape[1] - 1)
    want = gradients(equation, [None if x is None else x.double() for x in inputs], head=shape[1] - 1)
    for name, *found in zip(("q", "k", "v"), got, naive, want, strict=False):
        close(*found, name)
    if start:
        close(*(x[3].masked_fill(before.isinf(), 0.0) for x in (got, naive, want)), "carry")


def test_gradients_by_differences(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, (1, 2, 1, 6, 7, 3, 3))
    before = torch.rand(1, 7)
    cotangents = [rng.standard_normal((1, 2, 6, 3)), rng.standard_normal((1, 7))]

    def results(*x: Any) -> list[Any]:
        found = selective.naive(*x)
        return [found.o, found.carry]

    want = testing.differences(results, [x.double().numpy() for x in (q, k, v, before)], cotangents)
    leaves = [x.requires_grad_() for x in (q, k, v, before)]
    got = torch.autograd.grad(ours(*leaves), leaves, [torch.from_numpy(x).float() for x in cotangents])
    for name, a, b in zip(("q", "k", "v", "carry"), got, want, strict=True):
        testing.agree(a, b, 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(rng: np.random.Generator, dtype: torch.dtype) -> None:
    inputs: list[Tensor | None] = [*qkv(rng, SHAPES["tiles"], dtype)]
    want = gradients(equation, [None if x is None else x.double() for x in inputs])
    for found, naive, exact in zip(gradients(ours, inputs), gradients(equation, inputs), want, strict=True):
        errors = [(x.double() - exact).abs().max() for x in (found, naive)]
        assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("dims", [(32, 48), (64, 64), (33, 17)])
def test_gradients_of_bfloat16_at_each_level(
    rng: np.random.Generator, isa: str, dims: tuple[int, int], remembers: bool
) -> None:
    """What rounds weights and slopes once is within a few such roundings of float64; packed, to the bit the same."""
    ends = [0, 17, 117, 120, 250]
    q, k, v = qkv(rng, (1, 4, 2, ends[-1], ends[-1], *dims), torch.bfloat16)
    if remembers:
        q[:, 0], k[:, 0] = -q[:, 0].abs(), k[:, 0].abs()
    cu = torch.tensor(ends, dtype=torch.int32)
    packed = gradients(ours, [q, k, v], cu_seqlens_q=cu, cu_seqlens_kv=cu)

    def apart(*x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [equation(*(t[:, :, a:b] for t in x)) for a, b in pairwise(ends)]
        return torch.cat([o for o, _ in parts], 2), torch.cat([c for _, c in parts], 1)

    want = gradients(apart, [x.double() for x in (q, k, v)])
    for name, a, b in zip("qkv", packed, want, strict=True):
        assert (a.double() - b).norm() <= 0.01 * b.norm(), f"d{name}"
    for first, end in pairwise(ends):
        part = [x[:, :, first:end].detach().requires_grad_() for x in (q, k, v)]
        each = torch.autograd.grad(ak.selective_attention(*part).float().square().sum(), part)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = ak.selective_attention(*leaves, cu_seqlens_q=cu, cu_seqlens_kv=cu)
        both = torch.autograd.grad(o[:, :, first:end].float().square().sum(), leaves)
        for a, b in zip(both, each, strict=True):
            assert torch.equal(a[:, :, first:end], b)


@pytest.mark.parametrize("budget", [3, 40])
def test_gradients_with_a_budget(rng: np.random.Generator, budget: int) -> None:
    """The choice has no gradient: as if what is forgotten were hidden by a mask."""
    q, k, v = qkv(rng, (1, 2, 2, 100, 100, 8, 8))
    f = selective.naive(*(x.numpy() for x in (q, k, v)), budget=budget).f[0]
    stays = torch.from_numpy(np.isfinite(f))
    got = gradients(ours, [q, k, v], budget=budget)
    gone = torch.from_numpy(np.isinf(selective.naive(*(x.numpy() for x in (q, k, v)), budget=budget).carry))

    def masked(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, carry = equation(*x, mask=lambda i, j: stays)
        return o, carry.masked_fill(gone, torch.inf)

    want = gradients(masked, [x.double() for x in (q, k, v)])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_gradients_of_packed_sequences_and_threads(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, (1, 4, 2, 250, 250, 8, 8))
    ends = [0, 100, 101, 250]
    cu = torch.tensor(ends, dtype=torch.int32)
    torch.set_num_threads(1)
    one = gradients(ours, [q, k, v], cu_seqlens_q=cu, cu_seqlens_kv=cu)
    torch.set_num_threads(4)
    four = gradients(ours, [q, k, v], cu_seqlens_q=cu, cu_seqlens_kv=cu)
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a, b)

    def apart(*x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        parts = [equation(*(t[:, :, a:b] for t in x)) for a, b in pairwise(ends)]
        return torch.cat([o for o, _ in parts], 2), torch.cat([c for _, c in parts], 1)

    for a, b in zip(one, gradients(apart, [x.double() for x in (q, k, v)]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def causal_text() -> str:
    return bind(Traceable(None, ak.causal())).text


# --- as an op ---------------------------------------------------------------------------------------------


def test_the_op(rng: np.random.Generator) -> None:
    """opcheck; one graph, the same bits compiled; autocast."""
    q, k, v = (x.requires_grad_() for x in qkv(rng, SHAPES["small"]))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ak.selective_attention(q, k, v, budget=3, return_carry=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), call(q, k, v), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v)[0].sum(), (q, k, v)),
        torch.autograd.grad(call(q, k, v)[0].sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.equal(a, b)
    text = selective_text(causal_text(), 0, 3, True)
    carry = torch.rand(2, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.attnkit.attend_carried.default, (q, k, v, carry, text, [], []))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(q, k, v)[0].dtype == torch.bfloat16


def test_no_second_derivatives(rng: np.random.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(rng, SHAPES["small"]))
    (dq,) = torch.autograd.grad(ak.selective_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises((AttnkitError, RuntimeError), match="AK503"):
        dq.sum().backward()


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_memory(rng: np.random.Generator, tau: float) -> None:
    """Of every query, and its gradients, against F materialised."""
    q, k, v = qkv(rng, (2, 4, 2, 110, 110, 8, 8))
    f = selective.naive(*(x.numpy() for x in (q, k, v)), head=2).f
    want = np.sum(1 - np.minimum(f, tau) / tau, axis=2)
    leaves = [x.requires_grad_() for x in (q, k)]
    memory = ak.selective_memory(*leaves, tau=tau, head=2)
    np.testing.assert_allclose(memory.detach(), want, rtol=1e-5)
    loss = (memory.amax(-1) / 110).mean()
    np.testing.assert_allclose(float(loss.detach()), selective.memory_loss(f, tau).mean(), rtol=1e-5)

    def exact(q: Tensor, k: Tensor) -> Tensor:
        i, j = torch.arange(110)[:, None], torch.arange(110)
        logits = q[:, 2] @ k[:, 1].mT * 8**-0.5
        added = torch.where((j >= 1) & (j < i), logits.relu(), 0.0)
        return torch.where(j <= i, 1 - (added.cumsum(1) - added).clamp(max=tau) / tau, 0.0).sum(-1)

    cotangent = torch.from_numpy(rng.standard_normal((2, 110)))
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    for a, b in zip(
        torch.autograd.grad(memory, leaves, cotangent.float()),
        torch.autograd.grad(exact(*wide), wide, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(AttnkitError, match="AK401"):
            ak.selective_memory(q, k, tau=bad)


# --- errors -----------------------------------------------------------------------------------------------


def test_errors(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, SHAPES["small"])
    cache = ak.KVCache(2, 1, 4, max_len=8, codec="f32")
    wrong: list[tuple[str, Any]] = [
        ("AK401", lambda: ak.selective_attention(q, k, v, head=2)),
        ("AK401", lambda: ak.selective_attention(q, k, v, head=-1)),
        ("AK402", lambda: ak.selective_attention(q, k, v, head=0.5)),  # type: ignore[arg-type]
        ("AK401", lambda: ak.selective_attention(q, k, v, budget=1)),
        ("AK402", lambda: ak.selective_attention(q, k, v, budget=True)),
        ("AK402", lambda: ak.selective_attention(q, k, v, return_carry=1)),  # type: ignore[call-overload]
        ("AK402", lambda: ak.selective_attention(q, k)),
        ("AK403", lambda: ak.selective_attention(q, k, v, carry=torch.zeros(2, 4))),
        ("AK404", lambda: ak.selective_attention(q, k, v, carry=torch.zeros(2, 5, dtype=torch.float64))),
        ("AK402", lambda: ak.selective_attention(q, k, v, carry=1.0)),  # type: ignore[arg-type]
        ("AK401", lambda: ak.selective_attention(q, k, v, scale=-1.0)),
        ("AK402", lambda: ak.selective_attention(q, k, v, mask=1)),  # type: ignore[arg-type]
        ("AK408", lambda: ak.selective_attention(q, cache, v)),
        ("AK407", lambda: ak.selective_attention(q[:, :1], k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1))),
        ("AK408", lambda: ak.selective_attention(q, k, v, cu_seqlens_q=torch.zeros(2, dtype=torch.int32))),
    ]
    for code, call in wrong:
        with pytest.raises(AttnkitError) as caught:
            call()
        assert caught.value.code == code


# --- as a score -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [None, "softcap", "bias"])
def test_as_a_score(change: str | None, rng: np.random.Generator) -> None:
    """ak.selective beside what changes the logits first: the selection reads the changed ones."""
    q, k, v = (t.requires_grad_() for t in qkv(rng, (2, 4, 2, 90, 90, 16, 8)))
    bias = torch.from_numpy(rng.standard_normal((4, 90, 90), np.float32))
    inputs = [q, k, v]
    score = {None: None, "softcap": ak.softcap(1.5), "bias": ak.bias(bias)}[change]

    def changed(s: Tensor) -> Tensor:
        return s + bias.double() if change == "bias" else 1.5 * (s / 1.5).tanh() if change == "softcap" else s

    o, lse = ak.attention(q, k, v, score=ak.selective(head=1, score=score), return_lse=True)
    want, _ = equation(q.double(), k.double(), v.double(), head=1, changed=changed)
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)
    assert lse.shape == o.shape[:3]
    cotangent = torch.randn_like(o)
    got = torch.autograd.grad(o, inputs, cotangent)
    exact = torch.autograd.grad(want, inputs, cotangent.double())
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-4, atol=1e-4)
    if change is None:
        assert torch.equal(o, ak.selective_attention(q, k, v, head=1))  # type: ignore[arg-type]


def test_what_does_not_go_with_it(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, (1, 2, 2, 5, 5, 4, 4))
    for other in ({"dropout_p": 0.1}, {"normalizer": ak.softmax(torch.zeros(2))}, {"backend": "reference"}):
        with pytest.raises(AttnkitError, match=f"AK408(.|\n)*{next(iter(other))}"):
            ak.attention(q, k, v, score=ak.selective(), **other)  # type: ignore[arg-type]
    with pytest.raises(AttnkitError, match="AK401"):
        ak.attention(q, k, v, score=ak.selective(head=2))


# --- what is forgotten ------------------------------------------------------------------------------------


def forgetful(rng: np.random.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits so large that most weights are exactly 0 before long: whole tiles of them."""
    q, k, v = qkv(rng, (2, 4, 2, 500, 500, 16, 16), dtype)
    return [4 * q, k, v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_forgotten_is_left_out(rng: np.random.Generator, dtype: torch.dtype) -> None:
    """Tiles without a weight need not be computed: results and gradients are those of the equation."""
    inputs: list[Tensor | None] = [
        *forgetful(rng, dtype),
        50 * torch.from_numpy(rng.random((2, 500), np.float32)),
    ]
    o, carry = ours(*inputs)  # type: ignore[arg-type]
    want, total = equation(*(x.double() for x in inputs if x is not None))
    naive, _ = equation(*(x for x in inputs if x is not None))
    assert (o.double() - want).abs().max() <= 2 * (naive.double() - want).abs().max()
    torch.testing.assert_close(carry.double(), total, rtol=1e-5, atol=1e-3)
    exact = gradients(equation, [None if x is None else x.double() for x in inputs])
    for found, plain, right in zip(gradients(ours, inputs), gradients(equation, inputs), exact, strict=True):
        assert (found.double() - right).abs().max() <= 3 * (plain.double() - right).abs().max()


def test_a_weight_of_zero_still_meets_what_is_not_finite(rng: np.random.Generator) -> None:
    """0 times NaN is NaN, whether the tile could have been left out or not."""
    for which, heads, rows in (
        (0, slice(1, 2), slice(3, 4)),
        (1, slice(2, 4), slice(3, None)),
        (2, slice(2, 4), slice(3, None)),
    ):
        given, want = forgetful(rng), torch.zeros(2, 4, 500, 16, dtype=torch.bool)
        given[which][0, 1, 3, 5] = torch.nan
        want[0, heads, rows, 5 if which == 2 else slice(None)] = True
        o = ak.selective_attention(*given)
        assert isinstance(o, Tensor)
        assert torch.equal(o.isnan(), want)
