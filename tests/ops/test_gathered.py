"""Queries that choose their keys one by one: gathering them changes no bit forwards, and gradients within rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.cpu.engine import engine
from attnkit.ops.traced import Traceable, bind
from attnkit.runtime import prepare

pytestmark = pytest.mark.shows
Randn = Callable[..., Tensor]
Mask = Callable[..., Any]
ZERO = torch.zeros(1, dtype=torch.int32)


def chosen(batch: int, heads: int, q_len: int, blocks: int, share: float = 0.3) -> Tensor:
    return torch.rand(batch, heads, q_len, blocks) < share


def masks(of: Tensor, block: int, visible: Mask | None = None) -> tuple[Mask, Mask]:
    """The same pairs twice: read by the query's index, and by what the engine cannot know to be that."""

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return of[b, h, i, j // block] & visible(b, h, i, j) if visible else of[b, h, i, j // block]

    def hidden(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = of[b, h, i + ZERO[0], j // block]
        return seen & visible(b, h, i, j) if visible else seen

    return mask, hidden


def chooses(mask: Mask) -> int:
    text = bind(Traceable(None, mask, None)).text
    kernel: Any = prepare(text, "float32", 16, 16, "cpu").kernel
    return int(kernel.program.chooses)


def test_which_masks_choose() -> None:
    of = chosen(1, 2, 100, 4)
    mask, hidden = masks(of, 32, ak.causal())
    assert (chooses(mask), chooses(hidden)) == (32, 0)
    assert chooses(lambda b, h, i, j: ak.causal()(b, h, i, j) & (of[0, h // 2, i, j // 64] & (i > 3))) == 64
    for other in (
        lambda b, h, i, j: of[b, h, i, j // 32] | (i == j),  # no factor
        lambda b, h, i, j: of[b, h, i // 2, j // 32],
        lambda b, h, i, j: of[b, h, i, j],
        lambda b, h, i, j: of[b, j // 64, i, j // 32],
        ak.causal(),
    ):
        assert chooses(other) == 0


CASES: dict[str, dict[str, Any]] = {
    "causal": {"lengths": (300, 300), "visible": ak.causal()},
    "few queries, groups of heads": {"lengths": (130, 500), "heads": (4, 2), "visible": ak.causal()},
    "stretches": {"lengths": (200, 2300), "heads": (1, 1)},
    "window and score": {
        "lengths": (260, 260), "visible": ak.causal() & ak.window(90, 0), "call": {"score": ak.softcap(3.0)}
    },
    "sink and dropout": {"lengths": (200, 200), "call": {"normalizer": ak.softmax(torch.ones(2)), "dropout_p": 0.4}},
    "odd channels": {"lengths": (200, 190), "channels": (33, 7), "visible": ak.causal("top_left")},
    "nearly none": {"lengths": (400, 200), "share": 0.01},
    "all": {"lengths": (150, 150), "share": 1.1, "visible": ak.causal()},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_and_gradients(case: str, dtype: torch.dtype, randn: Randn, isa: str) -> None:
    what = CASES[case]
    (q_len, kv_len), (heads, kv_heads) = what["lengths"], what.get("heads", (2, 2))
    dim, v_dim = what.get("channels", (16, 16))
    q = randn(2, heads, q_len, dim).to(dtype)
    k, v = (randn(2, kv_heads, kv_len, d).to(dtype) for d in (dim, v_dim))
    d_o, d_lse = randn(2, heads, q_len, v_dim).to(dtype), randn(2, heads, q_len)
    of = chosen(2, heads, q_len, -(-kv_len // 128), what.get("share", 0.3))
    found = []
    for mask in masks(of, 128, what.get("visible")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(1)
        o, lse = ak.attention(*leaves, mask=mask, return_lse=True, **what.get("call", {}))
        seen = torch.where(lse.isinf(), 0, d_lse)
        found.append((o, lse, torch.autograd.grad((o, lse), leaves, (d_o, seen))))
    (o, lse, gradients), (right, of_right, others) = found
    assert torch.equal(o, right)
    assert torch.equal(lse, of_right)
    for one, other in zip(gradients, others, strict=True):
        limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert (one - other).float().norm() <= limit * other.float().norm() + 1e-6


def test_a_map_lies_in_any_way(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 200, 16) for _ in range(3))
    of = chosen(1, 2, 200, 4)
    way = of.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    o = [ak.attention(q, k, v, mask=masks(x, 64)[0]) for x in (of, of.mT.contiguous().mT, way)]
    assert torch.equal(o[0], o[1])
    assert torch.equal(o[0], o[2])


def test_threads_and_batches_change_no_bit(randn: Randn) -> None:
    q, k, v, d_o = (randn(3, 4, 700, 16).requires_grad_() for _ in range(4))
    of = chosen(3, 4, 700, 11)

    def results(rows: slice, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        some = of[rows]
        o = ak.attention(q[rows], k[rows], v[rows], mask=masks(some, 64, ak.causal())[0])
        return [o, *(g[rows] for g in torch.autograd.grad(o, (q, k, v), d_o[rows]))]

    one = results(slice(None), 1)
    for threads in (2, 3):
        assert all(torch.equal(x, y) for x, y in zip(one, results(slice(None), threads), strict=True))
    for row in range(3):
        alone = results(slice(row, row + 1), 2)
        assert all(torch.equal(x[row : row + 1], y) for x, y in zip(one, alone, strict=True))


def test_packed_and_padded(randn: Randn) -> None:
    """Sequences of their own lengths, each with a map of its own."""
    lengths = [150, 20, 230]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, d_o = (randn(1, 2, 400, 16) for _ in range(4))
    of = chosen(3, 2, 230, 8)
    for call in (
        {"cu_seqlens_q": ends, "cu_seqlens_kv": ends},
        {"kv_lens": torch.tensor([150, 20, 230]).int()},
    ):
        x = [q, k, v] if "kv_lens" not in call else [t[:, :, :230].expand(3, -1, -1, -1) for t in (q, k, v)]
        found = []
        for mask in masks(of, 32, ak.causal("top_left")):
            leaves = [t.clone().requires_grad_() for t in x]
            o = ak.attention(*leaves, mask=mask, **call)
            found.append([o, *torch.autograd.grad(o, leaves, d_o[:, :, : o.shape[2]].expand_as(o))])
        assert torch.equal(found[0][0], found[1][0])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("index", ["q", "kv", "pair", "head and pair"])
def test_gradients_of_biases(index: str, randn: Randn) -> None:
    q, k, v, d_o = (randn(2, 2, 300, 16) for _ in range(4))
    shape = {"q": (300,), "kv": (300,), "pair": (300, 300), "head and pair": (2, 2, 300, 300)}[index]
    bias = randn(*shape)
    of = chosen(2, 2, 300, 5)

    def score(values: Tensor) -> Mask:
        reads: dict[str, Mask] = {
            "q": lambda s, b, h, i, j: s * values[i], "kv": lambda s, b, h, i, j: s + values[j],
            "pair": lambda s, b, h, i, j: s + values[i, j],
            "head and pair": lambda s, b, h, i, j: s + values[b, h, i, j],
        }  # fmt: skip
        return reads[index]

    found = []
    for mask in masks(of, 64, ak.causal()):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        o = ak.attention(*leaves[:3], score=score(leaves[3]), mask=mask)
        found.append(torch.autograd.grad(o, leaves, d_o))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_what_nobody_chose_is_not_read(randn: Randn) -> None:
    """NaN in keys and values that no query chose, and behind the diagonal of a block that they see."""
    q, k, v, d_o = (randn(1, 1, 256, 16) for _ in range(4))
    of = chosen(1, 1, 256, 4)
    of[..., 2] = False
    mask, _ = masks(of, 64, ak.causal())
    found: dict[bool, list[Tensor]] = {}
    for dead, fill in ((False, 0.0), (True, float("nan"))):
        keys, values = k.clone(), v.clone()
        keys[:, :, 128:192], values[:, :, 128:192] = fill, fill
        leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
        o = ak.attention(*leaves, mask=mask)
        found[dead] = [o, *torch.autograd.grad(o, leaves, d_o)]
        values[:, :, 250:] = fill
        found[dead].append(ak.attention(q, keys, values, mask=mask)[:, :, :250])
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_levels_agree(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 300, 16) for _ in range(3))
    mask, _ = masks(chosen(1, 2, 300, 5), 64, ak.causal())
    before, o = engine().current_isa(), {}
    try:
        for level in engine().isa_levels():
            engine().set_isa(level)
            o[level] = ak.attention(q, k, v, mask=mask)
    finally:
        engine().set_isa(before)
    for found in o.values():
        torch.testing.assert_close(found, o["scalar"], atol=1e-5, rtol=1e-5)


def test_explain_counts_the_tiles_that_run(randn: Randn) -> None:
    """Two queries of three chose the first block, the third of the first 96 the other."""
    q, k, v = randn(1, 2, 288, 16), randn(1, 2, 128, 16), randn(1, 2, 128, 16)
    third = torch.arange(288) % 3 == 2
    of = torch.stack([~third, third & (torch.arange(288) < 96)], -1).expand(1, 2, -1, -1)
    mask, hidden = masks(of, 64)
    (call,) = ak.explain(ak.attention, q, k, v, mask=mask).calls
    assert call.blocks == {
        "empty": 4,
        "partial": 0,
        "full": 8,
    }  # each is filled with those that chose its block
    assert call.blocks_of == "of 2 heads together, queries gathered by the blocks of 64 keys that they chose"
    (call,) = ak.explain(ak.attention, q, k, v, mask=hidden).calls
    assert call.blocks == {"empty": 4, "partial": 8, "full": 0}
    (call,) = ak.explain(ak.attention, q[:, :, :90], k, v, mask=mask).calls  # fewer than a tile has
    assert "gathered" not in call.blocks_of
    tokens = [randn(1, 1, 960, 16) for _ in range(3)]
    (call,) = ak.explain(ak.attention, *tokens, select=ak.top_k_blocks(64, 1)).calls
    # Of 96 queries some stand in one block, some in the next, and see it up to themselves.
    assert call.blocks == {"empty": 130, "partial": 20, "full": 0}
