"""ak.block_sparse_attention: patterns, worked numbers, limits, laws and published traps, forwards and backwards."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import attnkit as ak
from attnkit.variants import block_sparse as bs

HALVES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
S, HEADS = 200, 4
MAP = np.random.default_rng(7).random((2, HEADS, 13, 25)) < 0.3
KINDS = np.array([0, -1, 1, 2], np.int32)
PATTERNS: dict[str, bs.Pattern] = {
    "strided": bs.Strided(14), "strided heads": bs.Strided(14, "alternate"), "fixed": bs.Fixed(16, 4),
    "fixed verts": bs.Fixed(16, 3, 4), "longformer": bs.Band(9, first=3), "dilated": bs.Band(5, 3),
    "map": bs.Layout(MAP, 16, 8), "bigbird": bs.Layout(bs.bigbird_layout(7, 7, HEADS, reach=1, first=1, random=1, seed=3), 32, 32),
    "heads": bs.HeadKinds(KINDS, MAP[0, :2, :, :13], sink=1, local=2, block=16),
    "subset": bs.Subset(bs.draw_subset(S, 60, 1), 2),
}  # fmt: skip


def problem(
    rng: np.random.Generator, kv_heads: int = 2, q_len: int = S, kv_len: int = S, dim: int = 24
) -> list[Any]:
    sizes = ((2, HEADS, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, 16))
    return [rng.standard_normal(size, dtype=np.float32) for size in sizes]


def as_blocks(pattern: bs.Pattern, **sizes: int) -> ak.BlockMask:
    return ak.block_mask(torched(pattern), 2, HEADS, S, S, **({"q_block": 32, "kv_block": 16} | sizes))


def torched(pattern: bs.Pattern) -> Any:
    """The pattern over tensors: it captures arrays."""
    held = {name: torch.from_numpy(x) for name, x in vars(pattern).items() if isinstance(x, np.ndarray)}
    return type(pattern)(**(vars(pattern) | held))


def oracle(pattern: bs.Pattern, q: Any, k: Any, causal: bool = False) -> dict[str, Any]:
    seen = {
        (piece.b, h): bs.visible(pattern, piece, h, causal)
        for piece in bs.sequences(q, k)
        for h in range(q.shape[1])
    }
    return {"mask": lambda pairs: seen[pairs.b, pairs.h]}


@HALVES
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, compare: Any, rng: np.random.Generator) -> None:
    q, k, v = problem(rng)
    for causal in (False, True):
        call = {
            "block_mask": as_blocks(PATTERNS[name]),
            "causal": causal,
            "function": ak.block_sparse_attention,
        }
        compare(q, k, v, oracle=oracle(PATTERNS[name], q, k, causal), what=name, **call)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_on_the_reference(name: str, compare_reference: Any, rng: np.random.Generator) -> None:
    q, k, v = problem(rng)
    compare_reference(q, k, v, oracle=oracle(PATTERNS[name], q, k), block_mask=as_blocks(PATTERNS[name]))


@pytest.mark.parametrize("name", ["fixed", "map", "bigbird", "heads", "dilated"])
@HALVES
def test_gradients(name: str, dtype: str, rng: np.random.Generator) -> None:
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_() for x in problem(rng))
    blocks = as_blocks(PATTERNS[name])
    visible = torch.from_numpy(
        np.stack([[bs.visible(PATTERNS[name], piece, h, True) for h in range(HEADS)]
                  for piece in bs.sequences(q.detach().float().numpy(), k.detach().float().numpy())])
    )  # fmt: skip
    o = ak.block_sparse_attention(q, k, v, blocks, causal=True)
    check_gradients(o, (q, k, v), visible)


def check_gradients(o: Tensor, inputs: tuple[Tensor, ...], visible: Tensor) -> None:
    """The gradients of o, beside float64's of the dense computation."""
    g = torch.randn(o.shape, generator=torch.Generator().manual_seed(5)).to(o.dtype)
    found = torch.autograd.grad(o, inputs, g)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    z = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible, float("-inf"))
    dead = ~visible.any(-1, keepdim=True)
    p = z.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)
    wanted = torch.autograd.grad(p @ v, exact, g.double())
    limit = 3e-6 if o.dtype == torch.float32 else 2e-2
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= limit * other.norm()


def test_the_worked_sets(rng: np.random.Generator) -> None:
    for pattern, expected in (
        (bs.Fixed(2, 1), [{0}, {0, 1}, {1, 2}, {1, 2, 3}]),
        (bs.Strided(2), [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}]),
    ):
        q, k = (torch.from_numpy(rng.standard_normal((1, 1, 4, 8), dtype=np.float32)) for _ in range(2))
        for dtype in (torch.float32, torch.bfloat16):
            v = torch.eye(4, dtype=dtype)[None, None].requires_grad_()
            blocks = ak.block_mask(pattern, None, None, 4, 4, q_block=2, kv_block=2)
            o = ak.block_sparse_attention(q.to(dtype), k.to(dtype), v, blocks)
            (dv,) = torch.autograd.grad(o, v, torch.eye(4, dtype=dtype)[None, None])
            for weights in (o[0, 0], dv[0, 0].mT):
                assert [set(row.nonzero().flatten().tolist()) for row in weights] == expected


def tensors(rng: np.random.Generator, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.from_numpy(x) for x in problem(rng, **sizes))
    return q, k, v


@HALVES
def test_all_ones_are_dense_attention_bit_for_bit(dtype: str, rng: np.random.Generator) -> None:
    q, k, v = (x.to(getattr(torch, dtype)).requires_grad_() for x in tensors(rng))
    """At an equal order of tiles: those of a causal mask have 96 keys in bfloat16, others of all these end where 128 do."""
    size = 96 if dtype == "bfloat16" else 128
    lower = torch.ones(-(-S // size), -(-S // size), dtype=torch.bool).tril()
    rows, columns = lower.sum(1).cumsum(0), lower.nonzero()[:, 1]
    lists = ak.BlockMask.from_bcsr(
        torch.cat([rows.new_zeros(1), rows]), columns, S, S, q_block=size, kv_block=size
    )
    ones = ak.BlockMask.from_dense(torch.ones_like(lower), S, S, q_block=size, kv_block=size)
    everything = ak.BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), S, S)
    for blocks, causal in ((everything, False), (ones, True), (lists, True)):
        found, expected = (
            (o, lse, *torch.autograd.grad(o.float().square().sum() + lse.sum(), (q, k, v)))
            for o, lse in (
                ak.block_sparse_attention(q, k, v, blocks, causal=causal, return_lse=True),
                ak.dense_attention(q, k, v, causal=causal, return_lse=True),
            )
        )
        for one, other in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(found[2:], expected[2:], strict=True):  # whose tiles are of other sizes
            torch.testing.assert_close(one, other, atol=1e-5 if dtype == "float32" else 4e-2, rtol=1e-2)


@HALVES
@pytest.mark.parametrize("pattern", [bs.Strided(1), bs.Fixed(S, 1)], ids=["stride 1", "one stretch"])
def test_limits_of_patterns_are_causal_attention(
    pattern: bs.Pattern, dtype: str, rng: np.random.Generator
) -> None:
    q, k, v = (x.to(getattr(torch, dtype)).requires_grad_() for x in tensors(rng))
    o = ak.block_sparse_attention(q, k, v, as_blocks(pattern))
    assert torch.equal(o, ak.dense_attention(q, k, v, causal=True))
    check_gradients(o, (q, k, v), torch.ones(S, S, dtype=torch.bool).tril())


@HALVES
def test_order_and_repetition_in_a_list_mean_nothing(dtype: str, rng: np.random.Generator) -> None:
    q, k, v = (x.to(getattr(torch, dtype)).requires_grad_() for x in tensors(rng))
    results = []
    for ends, indices in (([0, 2, 5], [0, 3, 1, 2, 3]), ([0, 4, 8], [3, 0, 0, 3, 2, 3, 1, 1])):
        blocks = ak.BlockMask.from_bcsr(
            torch.tensor(ends), torch.tensor(indices), S, S, q_block=128, kv_block=64
        )
        o = ak.block_sparse_attention(q, k, v, blocks)
        results.append((o, *torch.autograd.grad(o.sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_mask_of_each_batch_entry_in_a_graph_of_any_length(rng: np.random.Generator) -> None:
    """pytorch#186775: what a mask captured for each batch entry gave NaN once lengths were symbols."""
    ends = torch.tensor([37, 150], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ak.attention(q, k, v, mask=lambda b, h, i, j: (j <= i) & (j < ends[b]))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (64, 100, 190):
        inputs = tuple(x.requires_grad_() for x in tensors(rng, q_len=n, kv_len=n))
        o = compiled(*inputs)
        assert torch.equal(o, call(*inputs))
        j = torch.arange(n)
        check_gradients(o, inputs, (j <= j[:, None]) & (j < ends[:, None, None, None]))


@HALVES
def test_rows_without_a_block(dtype: str, rng: np.random.Generator) -> None:
    q, k, v = (x.to(getattr(torch, dtype)).requires_grad_() for x in tensors(rng))
    blocks = ak.BlockMask.from_dense(torch.tensor([[True, True], [False, False]]), S, S)
    o, lse = ak.block_sparse_attention(q, k, v, blocks, return_lse=True)
    assert not o[:, :, 128:].any()
    assert bool((lse[:, :, 128:] == float("-inf")).all())
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert not dq[:, :, 128:].any()
    assert all(bool(torch.isfinite(x).all()) for x in (dq, dk, dv))


def test_what_lies_in_empty_blocks_reaches_nothing(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)
    blocks = torch.ones(7, 13, dtype=torch.bool)
    blocks[:, 3] = False
    mask = ak.BlockMask.from_dense(blocks, S, S, q_block=32, kv_block=16)
    expected = ak.block_sparse_attention(q, k, v, mask, causal=True)
    for poison in (float("nan"), float("inf")):
        k[:, :, 48:64] = poison
        v[:, :, 48:64] = poison
        assert torch.equal(ak.block_sparse_attention(q, k, v, mask, causal=True), expected)


def test_one_key_block_of_many_queries(rng: np.random.Generator) -> None:
    """cudnn-frontend#385: what many rows choose must be added up in the backward. And rows of very different lengths."""
    q, k, v = (x.requires_grad_() for x in tensors(rng, q_len=640, kv_len=640))
    blocks = torch.zeros(20, 20, dtype=torch.bool)
    blocks[:, 7] = blocks[3] = True
    o = ak.block_sparse_attention(q, k, v, ak.BlockMask.from_dense(blocks, q_block=32, kv_block=32))
    visible = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    check_gradients(o, (q, k, v), visible)


@pytest.mark.parametrize("lengths", [(130, 257), (257, 130), (1, 300)])
def test_tails_and_queries_beside_other_numbers_of_keys(
    lengths: tuple[int, int], compare: Any, rng: np.random.Generator
) -> None:
    q, k, v = problem(rng, q_len=lengths[0], kv_len=lengths[1])
    pattern = bs.Layout(np.random.default_rng(3).random((HEADS, 5, 5)) < 0.6, 64, 64)
    blocks = ak.BlockMask.from_dense(
        torch.from_numpy(pattern.blocks)[:, : -(-lengths[0] // 64), : -(-lengths[1] // 64)],
        *lengths,
        q_block=64,
        kv_block=64,
    )
    compare(
        q,
        k,
        v,
        oracle=oracle(pattern, q, k, True),
        block_mask=blocks,
        causal=True,
        function=ak.block_sparse_attention,
    )


def test_torchs_block_masks(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)
    theirs = flex.create_block_mask(
        lambda b, h, i, j: (i - j).abs() < 40 + h, 2, HEADS, S, S, device="cpu", BLOCK_SIZE=64
    )
    o = ak.block_sparse_attention(q, k, v, theirs)
    expected = ak.attention(q, k, v, mask=lambda b, h, i, j: (i - j).abs() < 40 + h)
    torch.testing.assert_close(o, expected, atol=1e-6, rtol=1e-5)


def test_scores_scales_and_graphs(rng: np.random.Generator) -> None:
    q, k, v = tensors(rng)
    blocks, slopes = as_blocks(PATTERNS["map"]), torch.rand(HEADS)
    call = {"score": ak.alibi(slopes), "scale": 0.3}
    o = ak.block_sparse_attention(q, k, v, blocks, **call)
    torch.testing.assert_close(o, ak.attention(q, k, v, mask=torched(PATTERNS["map"]), **call))
    compiled = torch.compile(
        lambda *x: ak.block_sparse_attention(*x, blocks, causal=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), ak.block_sparse_attention(q, k, v, blocks, causal=True))


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("AK409", {"block_mask": ak.block_mask(None, 1, 1, S, S + 1)}),
        ("AK410", {"block_mask": ak.block_mask(lambda b, h, i, j: h > 1, 1, 3, S, S)}),
        ("AK402", {"block_mask": torch.ones(2, 2, dtype=torch.bool)}),
        ("AK402", {"block_mask": None}),
        ("AK402", {"causal": 1}),
        ("AK401", {"scale": -1.0}),
    ],
)
def test_errors(code: str, call: dict[str, Any], rng: np.random.Generator) -> None:
    given = {"block_mask": ak.block_mask(None, 1, 1, S, S)} | call
    with pytest.raises(ak.AttnkitError) as caught:
        ak.block_sparse_attention(*tensors(rng), **given)
    assert caught.value.code == code
