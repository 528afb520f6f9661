"""ak.top_k_blocks: MoBA and what is near it, beside the definitions, forwards and backwards; limits, decoding, traps."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.reference import gradients
from attnkit.ir.text import parse
from attnkit.ops.block_means import BlockMeans
from attnkit.ops.nsa import nsa_attention
from attnkit.variants import block_select as bsel

HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def tensors(
    rng: np.random.Generator, q_len: int = 70, kv_len: int = 70, heads: int = 4, kv_heads: int = 2
) -> list[Tensor]:
    sizes = ((2, heads, q_len, 16), (2, kv_heads, kv_len, 16), (2, kv_heads, kv_len, 8))
    return [torch.from_numpy(rng.standard_normal(size, dtype=np.float32)) for size in sizes]


def close(found: Tensor, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    limit = 3e-6 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(found.detach().double().numpy(), expected, atol=limit, rtol=limit)


@HALVES
@pytest.mark.parametrize("top_k", [1, 2, 4, 100])
@pytest.mark.parametrize("lengths", [(70, 70), (1, 70), (9, 70), (70, 9)])
def test_moba(dtype: torch.dtype, top_k: int, lengths: tuple[int, int], rng: np.random.Generator) -> None:
    q, k, v = (x.to(dtype) for x in tensors(rng, *lengths))
    o, lse = ak.attention(q, k, v, select=ak.top_k_blocks(16, top_k), return_lse=True)
    expected = bsel.moba_naive(*(x.double().numpy() for x in (q, k, v)), block=16, top_k=top_k)
    close(o, expected[0], dtype)
    close(lse, expected[1], dtype)
    o = ak.attention(
        q.double(), k.double(), v.double(), select=ak.top_k_blocks(16, top_k), backend="reference"
    )
    np.testing.assert_allclose(o, expected[0], atol=1e-12)


@HALVES
def test_k_1_is_the_own_block_alone_and_many_are_causal_attention(
    dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """The trap: flash-linear-attention's topk=1 is causal attention."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(rng))
    g = torch.randn(2, 4, 70, 8).to(dtype)
    of_blocks = ak.attention(q, k, v, mask=lambda b, h, i, j: (j <= i) & (i // 16 == j // 16))
    causal = ak.dense_attention(q, k, v, causal=True)
    assert not torch.allclose(of_blocks, causal)
    for count, expected in ((1, of_blocks), (5, causal)):
        o = ak.attention(q, k, v, select=ak.top_k_blocks(16, count))
        close(o, expected.detach().double().numpy(), dtype)
        alike(*(torch.autograd.grad(x, (q, k, v), g, retain_graph=True) for x in (o, expected)))


def alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Gradients, but for rounding."""
    for one, other in zip(found, expected, strict=True):
        limit = 1e-6 if other.dtype == torch.float32 else 1e-2
        assert (one - other).norm() <= limit * other.norm()


def chosen_pairs(
    q: Tensor, k: Tensor, block: int, count: int, *, q_block: int = 1, first: int = 0, last: int = 1
) -> Tensor:
    """By the definition: bool ``[B, Hq, Sq, Skv]``."""
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    seen = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    past = kv_len - q_len
    for b, h, start in np.ndindex(batch, heads, -(-q_len // q_block)):
        rows = slice(start * q_block, min((start + 1) * q_block, q_len))
        low, high = (rows.start + past) // block, (rows.stop - 1 + past) // block
        query, keys = (
            x.detach().double() for x in (q[b, h, rows].double().mean(0), k[b, h * k.shape[1] // heads])
        )
        scores = [float(query @ keys[n * block : (n + 1) * block].mean(0)) for n in range(low)]
        kept = {*bsel.best(scores, count - 1), *range(low - last + 1, high + 1), *range(first)}
        for n in kept:
            seen[b, h, rows, max(n, 0) * block : max(n + 1, 0) * block] = True
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    return seen & (j <= i + past)


@pytest.mark.parametrize(
    "numbers", [{"q_block": 32}, {"q_block": 8, "first": 1}, {"last": 3}, {"first": 2, "last": 2}]
)
@pytest.mark.parametrize("q_len", [70, 20])
def test_numbers(numbers: dict[str, int], q_len: int, rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, q_len)
    seen = chosen_pairs(q, k, 16, 2, **numbers)
    o = ak.attention(q, k, v, select=ak.top_k_blocks(16, 2, **numbers))
    torch.testing.assert_close(
        o, ak.attention(q, k, v, mask=lambda b, h, i, j: seen[b, h, i, j]), atol=2e-6, rtol=1e-5
    )


def test_all_blocks_are_candidates_where_nothing_is_causal(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)
    means = torch.stack([part.mean(2) for part in k.split(16, dim=2)], 2).repeat_interleave(2, 1)
    seen = torch.zeros(2, 4, 70, 5, dtype=torch.bool).scatter(3, (q @ means.mT).topk(2).indices, True)
    o = ak.attention(q, k, v, select=ak.top_k_blocks(16, 2, causal=False))
    expected = ak.attention(q, k, v, mask=lambda b, h, i, j: seen[b, h, i, j // 16])
    torch.testing.assert_close(o, expected, atol=2e-6, rtol=1e-5)


@HALVES
def test_gradients_are_those_of_attention_over_what_was_chosen(
    dtype: torch.dtype, rng: np.random.Generator
) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(rng))
    g = torch.randn(2, 4, 70, 8).to(dtype)
    seen = chosen_pairs(q, k, 16, 2)
    o = ak.attention(q, k, v, select=ak.top_k_blocks(16, 2), score=ak.softcap(5.0))
    found = torch.autograd.grad(o, (q, k, v), g)
    expected = torch.autograd.grad(
        ak.attention(q, k, v, mask=lambda b, h, i, j: seen[b, h, i, j], score=ak.softcap(5.0)), (q, k, v), g
    )
    alike(found, expected)


def test_heads_that_choose_together(rng: np.random.Generator) -> None:
    """NSA's choice: the mean softmax of a group's heads; the first block, the own and the one before in any case."""
    q, k, v = tensors(rng)
    zero, one = torch.zeros(2, 4, 70), torch.ones(2, 4, 70)
    o = ak.attention(q, k, v, select=ak.top_k_blocks(16, 2, first=1, last=2, shared=True))
    arrays = [x.double().numpy() for x in (q, k, v, zero, one, zero)]
    expected = bsel.nsa_naive(*arrays, block=16, top_k=1, left=0)
    # Where a query ends its block, NSA has the own block among the candidates too.
    rows = [i for i in range(70) if i % 16 != 15]
    close(o[:, :, rows], expected[:, :, rows])


def test_it_composes(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)
    seen = chosen_pairs(q, k, 16, 3)
    ids = torch.arange(70) // 30
    call: dict[str, Any] = {
        "score": ak.alibi(torch.rand(4)),
        "normalizer": ak.softmax(torch.rand(4)),
        "scale": 0.4,
    }
    near = ak.document(ids) & ak.window(40, 0)
    o, lse = ak.attention(q, k, v, select=ak.top_k_blocks(16, 3), mask=near, return_lse=True, **call)
    both = near & (lambda b, h, i, j: seen[b, h, i, j])
    expected = ak.attention(q, k, v, mask=both, return_lse=True, **call)
    torch.testing.assert_close((o, lse), expected, atol=2e-6, rtol=1e-5)
    blocks = ak.block_mask(ak.document(ids), None, None, 70, 70)
    with_blocks = ak.attention(
        q, k, v, select=ak.top_k_blocks(16, 3), block_mask=blocks, mask=ak.window(40, 0), **call
    )
    torch.testing.assert_close(with_blocks, o, atol=2e-6, rtol=1e-5)


def test_padded_keys_and_caches(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, 3)
    lens = torch.tensor([70, 41], dtype=torch.int32)
    select = ak.top_k_blocks(16, 2)
    expected = [
        ak.attention(*(x[b : b + 1, :, :n] for x, n in ((q, 3), (k, m), (v, m))), select=select)
        for b, m in ((0, 70), (1, 41))
    ]
    k[1, :, 41:] = v[1, :, 41:] = float("nan")
    torch.testing.assert_close(ak.attention(q, k, v, select=select, kv_lens=lens), torch.cat(expected))
    cache = ak.KVCache(2, 2, 16, 8, max_len=96, codec="f32")
    cache.append(k, v, lens)
    torch.testing.assert_close(ak.attention(q, cache, select=select), torch.cat(expected))


def test_decoding_is_the_last_row(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)
    whole = ak.attention(q, k, v, select=ak.top_k_blocks(16, 2))
    for n in (1, 16, 17, 33, 70):
        step = ak.attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], select=ak.top_k_blocks(16, 2))
        torch.testing.assert_close(step, whole[:, :, n - 1 : n], atol=2e-6, rtol=1e-5)


def test_nan_in_a_gate_comes_last(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)
    k[:, :, 3] = float("nan")
    o = ak.attention(q, k, v, select=ak.top_k_blocks(16, 3))
    assert bool(o[:, :, :16].isnan().any())
    assert not o[:, :, 48:].isnan().any()  # three blocks and more before: two others are better


def test_graphs_and_threads(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ak.attention(q, k, v, select=ak.top_k_blocks(16, 2), mask=ak.window(50, 0))

    expected = call(q, k, v)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), expected)
    for n in (1, 3):
        torch.set_num_threads(n)
        assert torch.equal(call(q, k, v), expected)
        assert torch.equal(call(q[1:], k[1:], v[1:]), expected[1:])


LENS = torch.tensor([0, 70], dtype=torch.int32)


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("AK401", lambda q, k, v: ak.top_k_blocks(0, 1)),
        ("AK401", lambda q, k, v: ak.top_k_blocks(16, 0)),
        ("AK402", lambda q, k, v: ak.top_k_blocks(16, 1.0)),  # type: ignore[arg-type]
        ("AK402", lambda q, k, v: ak.top_k_blocks(16, 1, shared=1)),  # type: ignore[arg-type]
        ("AK408", lambda q, k, v: ak.top_k_blocks(16, 1, causal=False, last=2)),
        ("AK402", lambda q, k, v: ak.attention(q, k, v, select="top_k")),
        ("AK408", lambda q, k, v: ak.attention(q[:1], k[:1], v[:1], select=ak.top_k_blocks(16, 1), cu_seqlens_q=LENS, cu_seqlens_kv=LENS)),
        ("AK408", lambda q, k, v: ak.attention(q, k, v, select=ak.top_k_blocks(16, 1, causal=False), kv_lens=LENS)),
        ("AK408", lambda q, k, v: ak.attention(q, ak.KVCache(2, 2, 16, 8, max_len=96, page_size=16, codec="f32"),
                                               select=ak.top_k_blocks(16, 1))),
        ("AK502", lambda q, k, v: ak.attention(q.double(), k.double(), v.double(), select=ak.top_k_blocks(16, 1))),
        ("AK502", lambda q, k, v: ak.attention(q, k, v, select=ak.top_k_blocks(16, 1), backend="triton")),
    ],
)  # fmt: skip
def test_errors(code: str, make: Any, rng: np.random.Generator) -> None:
    with pytest.raises(ak.AttnkitError) as caught:
        make(*tensors(rng))
    assert caught.value.code == code


@pytest.mark.parametrize("cache", [{"codec": "f32"}, {"codec": "bf16", "page_size": 16}, {"codec": "int8"}])
def test_decoding_with_running_means(cache: dict[str, Any], rng: np.random.Generator) -> None:
    """Beside the whole, token by token, in rows of two lengths: the keys that a step does not see are not read."""
    q, k, v = tensors(rng, heads=4)
    held = ak.KVCache(2, 2, 16, 8, max_len=96, **cache)
    if cache["codec"] == "bf16":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    means = BlockMeans(2, 2, 16, block=16, max_len=96)
    select = ak.top_k_blocks(16, 2).given(means)
    lens = torch.tensor([37, 5], dtype=torch.int32)
    held.append(k[:, :, :37], v[:, :, :37], lens)
    means.append(k[:, :, :37], lens)
    for _ in range(14):
        new = [torch.stack([x[b, :, n : n + 1] for b, n in enumerate(lens.tolist())]) for x in (k, v, q)]
        held.append(new[0], new[1])
        means.append(new[0])
        lens = lens + 1
        o = ak.attention(new[2], held, select=select)
        for b, n in enumerate(lens.tolist()):
            expected = bsel.moba_naive(
                *(x.double().numpy() for x in (new[2][b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])),
                block=16,
                top_k=2,
            )[0]
            limit = 3e-6 if cache["codec"] == "f32" else 3e-2
            np.testing.assert_allclose(o[b : b + 1].double().numpy(), expected, atol=limit, rtol=limit)
    torch.testing.assert_close(means.means()[1, :, 0], k[1, :, :16].float().mean(1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("AK401", lambda m: BlockMeans(1, 1, 4, block=0, max_len=8)),
        ("AK402", lambda m: BlockMeans(1, 1, 4, block=2.0, max_len=8)),  # type: ignore[arg-type]
        ("AK403", lambda m: m.append(torch.ones(1, 2, 3, 4))),
        ("AK402", lambda m: m.append(None)),
        ("AK602", lambda m: m.append(torch.ones(1, 1, 9, 4))),
        ("AK602", lambda m: m.append(torch.ones(1, 1, 2, 4), torch.tensor([3]))),
        ("AK402", lambda m: ak.top_k_blocks(4, 1).given(None)),  # type: ignore[arg-type]
        ("AK401", lambda m: ak.top_k_blocks(8, 1).given(m)),
        ("AK401", lambda m: ak.top_k_blocks(4, 1, causal=False).given(m)),
    ],
)
def test_errors_of_means(code: str, make: Any) -> None:
    means = BlockMeans(1, 1, 4, block=4, max_len=8)
    with pytest.raises(ak.AttnkitError) as caught:
        make(means)
    assert caught.value.code == code
    assert int(means.lengths) == 0
    assert not means.sums.any()


@HALVES
@pytest.mark.parametrize("lengths", [(70, 70), (5, 70), (7, 7)])
def test_native_sparse_attention(
    dtype: torch.dtype, lengths: tuple[int, int], rng: np.random.Generator
) -> None:
    q, k, v = (x.to(dtype) for x in tensors(rng, *lengths))
    gates = [torch.rand(2, 4, lengths[0]) for _ in range(3)]
    o = nsa_attention(q, k, v, *gates, block=16, top_k=1, left=5)
    arrays = [x.double().numpy() for x in (q, k, v, *gates)]
    close(o, bsel.nsa_naive(*arrays, block=16, top_k=1, left=5), dtype)


@HALVES
def test_native_sparse_attention_whose_gates_leave_the_chosen(
    dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Gates (0, 1, 0) and as many blocks as there are: causal attention."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(rng))
    zero, one, g = torch.zeros(2, 4, 70), torch.ones(2, 4, 70), torch.randn(2, 4, 70, 8).to(dtype)
    o = nsa_attention(q, k, v, zero, one, zero, block=16, top_k=9, left=3)
    causal = ak.dense_attention(q, k, v, causal=True)
    close(o, causal.detach().double().numpy(), dtype)
    alike(*(torch.autograd.grad(x, (q, k, v), g) for x in (o, causal)))


def test_gradients_of_native_sparse_attention(rng: np.random.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(rng))
    gates = [torch.rand(2, 4, 70, requires_grad=True) for _ in range(3)]
    found = torch.autograd.grad(
        nsa_attention(q, k, v, *gates, block=16, top_k=1, left=5).sum(), (q, k, v, *gates)
    )
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in found)
    program, buffers = bsel.nsa_program(block=16, top_k=1, left=5)
    expected = gradients(
        parse(program),
        [x.detach().double().numpy() for x in (q, k, v, *gates)],
        [np.ones((2, 4, 70, 8))],
        buffers,
    )
    for one_, other in zip(found, expected.inputs, strict=True):
        np.testing.assert_allclose(one_.double().numpy(), other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("AK401", {"block": 0}),
        ("AK402", {"top_k": 1.0}),
        ("AK401", {"left": -1}),
        ("AK403", {"g_cmp": torch.ones(1)}),
    ],
)
def test_errors_of_native_sparse_attention(
    code: str, change: dict[str, Any], rng: np.random.Generator
) -> None:
    q, k, v = tensors(rng)
    gates = {name: torch.ones(2, 4, 70) for name in ("g_cmp", "g_slc", "g_swa")}
    with pytest.raises(ak.AttnkitError) as caught:
        nsa_attention(q, k, v, **({**gates, "block": 16, "top_k": 1, "left": 3} | change))
    assert caught.value.code == code
