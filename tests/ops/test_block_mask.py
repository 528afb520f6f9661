"""Block masks: their structure, their forms, and what attention makes of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor

import attnkit as ak
from attnkit.ops import traced

Mod = Callable[..., Any]
EMPTY, PARTIAL, FULL = 0, 1, 2


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j <= i) & (i - j < 70 + 50 * h + 20 * b)


def pairs(mask: Mod, *sizes: int) -> Tensor:
    """Which pairs are visible, evaluated one by one: bool [B, H, q_len, kv_len]."""
    index = [torch.arange(n).view([-1 if i == at else 1 for i in range(4)]) for at, n in enumerate(sizes)]
    return mask(*index).expand(sizes)


def kinds(visible: Tensor, q_block: int, kv_block: int) -> Tensor:
    """The kind of each block by definition."""
    rows = [
        torch.stack([
            part.any(-1).any(-1).int() + part.all(-1).all(-1).int()
            for part in band.split(kv_block, -1)
        ], -1)
        for band in visible.split(q_block, -2)
    ]  # fmt: skip
    return torch.stack(rows, -2).to(torch.uint8)


@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (300, 431), (1, 200), (200, 1)])
@pytest.mark.parametrize(("q_block", "kv_block"), [(128, 128), (64, 32), (500, 7)])
def test_structure_is_that_of_the_pairs(q_len: int, kv_len: int, q_block: int, kv_block: int) -> None:
    blocks = ak.block_mask(window, 2, 3, q_len, kv_len, q_block=q_block, kv_block=kv_block)
    want = kinds(pairs(window, 2, 3, q_len, kv_len), q_block, kv_block)
    assert torch.equal(blocks.to_dense(), want)
    assert blocks.counts == tuple(int((want == kind).sum()) for kind in (EMPTY, FULL, PARTIAL))
    assert blocks.density == pytest.approx(float((want != EMPTY).double().mean()))
    assert blocks.shape == (2, 3, q_len, kv_len)


def test_none_is_one_and_one_is_any() -> None:
    assert ak.block_mask(causal, None, None, 256, 256).shape == (1, 1, 256, 256)
    many = ak.block_mask(causal, 3, 5, 256, 256)
    assert many.to_dense().shape == (3, 5, 2, 2)
    assert many.counts == (15, 15, 30)
    assert ak.block_mask(None, 2, 1, 256, 384).counts == (0, 12, 0)


@pytest.mark.parametrize("given", ["mask", "block_mask", "both", "torch", "composed"])
def test_attention_with_a_block_mask(qkv: Any, oracle: Any, given: str) -> None:
    q, k, v = qkv(2, 4, 200, kv_heads=2, kv_len=300)
    heads = ak.block_mask(window, 2, 4, 200, 300)
    late = ak.block_mask(lambda b, h, i, j: j >= 10, 1, 1, 200, 300)
    call: dict[str, Any] = {
        "mask": {"mask": heads & late}, "block_mask": {"block_mask": heads & late},
        "both": {"mask": late, "block_mask": heads}, "torch": {"mask": late, "block_mask": heads.to_torch()},
        "composed": {"mask": ~(~heads | ~late)},
    }[given]  # fmt: skip
    if given == "block_mask":
        call["block_mask"] = ak.block_mask(heads & late, 2, 4, 200, 300)
    o, lse = ak.attention(q, k, v, return_lse=True, **call)
    want_o, want_lse = oracle(q, k, v, mask=lambda b, h, i, j: window(b, h, i, j) & (j >= 10))
    torch.testing.assert_close(o.double(), want_o, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-6, rtol=1e-5)


def test_a_map_of_blocks(qkv: Any, oracle: Any) -> None:
    q, k, v = qkv(2, 2, 100, kv_len=90)
    blocks = torch.rand(2, 1, 7, 6) < 0.5
    mask = ak.BlockMask.from_dense(blocks, 100, 90, q_block=16, kv_block=16)
    o = ak.attention(q, k, v, block_mask=mask)
    want, _ = oracle(q, k, v, mask=lambda b, h, i, j: blocks[b, 0, i // 16, j // 16])
    torch.testing.assert_close(o.double(), want, atol=2e-6, rtol=1e-5)
    assert torch.equal(mask.to_dense() == FULL, blocks)
    assert torch.equal(ak.attention(q, k, v, mask=mask), o)
    assert "// 16" in ak.trace(mask).text  # an ordinary mask of an ordinary captured tensor


def test_a_map_with_an_element_mask(qkv: Any, oracle: Any) -> None:
    q, k, v = qkv(1, 1, 64)
    structure = torch.tensor([[1, 0], [2, 1]], dtype=torch.uint8)
    mask = ak.BlockMask.from_dense(
        structure, q_block=32, kv_block=32, mask=lambda b, h, i, j: (i + j) % 3 == 0
    )
    o = ak.attention(q, k, v, block_mask=mask)
    want, _ = oracle(q, k, v, mask=lambda b, h, i, j: torch.where(
        structure[i // 32, j // 32] == PARTIAL, (i + j) % 3 == 0, structure[i // 32, j // 32] == FULL
    ))  # fmt: skip
    torch.testing.assert_close(o.double(), want, atol=2e-6, rtol=1e-5)
    assert torch.equal(mask.to_dense()[0, 0], structure)
    everywhere = ak.BlockMask.from_dense(structure > 0, q_block=32, kv_block=32, mask=causal)
    assert torch.equal(everywhere.to_dense()[0, 0], (structure > 0).to(torch.uint8))


def test_lists_of_blocks_there_and_back() -> None:
    blocks = ak.block_mask(window, 2, 3, 500, 600, q_block=64, kv_block=32)
    indptr, indices, full = blocks.to_bcsr()
    assert indptr.shape == (2, 3, 9)
    dense = torch.zeros(2, 3, 8, 19, dtype=torch.uint8)
    for b in range(2):
        for h in range(3):
            for row in range(8):
                for at in range(int(indptr[b, h, row]), int(indptr[b, h, row + 1])):
                    dense[b, h, row, indices[at]] = FULL if full[at] else PARTIAL
    assert torch.equal(dense, blocks.to_dense())
    back = ak.BlockMask.from_bcsr(indptr, indices, 500, 600, q_block=64, kv_block=32, full=full, mask=window)
    assert torch.equal(back.to_dense(), blocks.to_dense())


def test_order_and_repetition_of_lists_do_not_matter(qkv: Any) -> None:
    q, k, v = qkv(1, 2, 96)
    indptr = torch.tensor([0, 2, 2, 6])
    kinds = [
        ak.BlockMask.from_bcsr(indptr, torch.tensor(indices), 96, 96, q_block=32, kv_block=32)
        for indices in ([0, 2, 0, 1, 1, 2], [2, 0, 2, 2, 1, 0])
    ]
    assert torch.equal(kinds[0].to_dense(), kinds[1].to_dense())
    o, lse = ak.attention(q, k, v, block_mask=kinds[0], return_lse=True)
    assert torch.equal(o, ak.attention(q, k, v, block_mask=kinds[1]))
    assert (o[:, :, 32:64] == 0).all()  # a row of blocks without any
    assert (lse[:, :, 32:64] == -torch.inf).all()


# --- torch's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [causal, window])
@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (300, 400)])
def test_torchs_block_mask_there_and_back(mask: Mod, q_len: int, kv_len: int) -> None:
    theirs = flex.create_block_mask(mask, 2, 3, q_len, kv_len, device="cpu", BLOCK_SIZE=128)
    ours = ak.as_block_mask(theirs)
    assert torch.equal(ours.to_dense() > 0, theirs.to_dense().bool())
    assert torch.equal(ours.to_dense(), kinds(pairs(mask, 2, 3, q_len, kv_len), 128, 128)) or q_len % 128
    back = ak.block_mask(mask, 2, 3, q_len, kv_len).to_torch()
    assert back.seq_lengths == (q_len, kv_len)
    assert back.BLOCK_SIZE == (128, 128)
    assert torch.equal(back.to_dense(), theirs.to_dense())
    index = torch.meshgrid(*map(torch.arange, (2, 3, 5, 9)), indexing="ij")
    assert torch.equal(back.mask_mod(*index), mask(*index))


def test_blocks_and_mask_mod_that_disagree(qkv: Any, oracle: Any) -> None:
    """A crafted one: full blocks that mask_mod would cut, partial blocks where it sees nothing, and missing ones."""
    q, k, v = qkv(2, 2, 96)
    partial = torch.tensor([[[[0, 1, 1], [1, 0, 1], [0, 0, 1]]]], dtype=torch.bool).expand(2, 1, 3, 3)
    full = torch.tensor([[[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]], dtype=torch.bool).expand(2, 1, 3, 3)
    lists = [
        (m.sum(-1).int(), torch.argsort(m.int(), dim=-1, descending=True, stable=True).int())
        for m in (partial, full)
    ]
    crafted = flex.BlockMask.from_kv_blocks(*lists[0], *lists[1], BLOCK_SIZE=32, mask_mod=causal)

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        block = (b, 0, i // 32, j // 32)
        return full[block] | (partial[block] & causal(b, h, i, j))

    o = ak.attention(q, k, v, block_mask=crafted)
    want, _ = oracle(q, k, v, mask=visible)
    torch.testing.assert_close(o.double(), want, atol=2e-6, rtol=1e-5)


def test_without_mask_mod_partial_blocks_are_whole(qkv: Any) -> None:
    q, k, v = qkv(1, 1, 128)
    counts, indices = torch.tensor([[[1, 2]]]).int(), torch.tensor([[[[1, 0], [0, 1]]]]).int()
    crafted = flex.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64)
    assert ak.as_block_mask(crafted).to_dense().flatten().tolist() == [EMPTY, FULL, FULL, FULL]
    o = ak.attention(q, k, v, block_mask=crafted)
    assert torch.equal(o, ak.attention(q, k, v, mask=lambda b, h, i, j: (i >= 64) | (j >= 64)))


def test_what_torch_makes_of_ours(qkv: Any) -> None:
    """FlexAttention's eager form, with masks whose functions only run on proxies."""
    q, k, v = qkv(1, 2, 256)
    ids = torch.arange(256) // 60
    mask = (ak.causal() & ak.document(ids)) | ak.prefix(3)
    theirs = ak.block_mask(mask, 1, 1, 256, 256).to_torch()
    dense = flex.create_mask(theirs.mask_mod, 1, 1, 256, 256, device="cpu")
    i, j = torch.arange(256)[:, None], torch.arange(256)
    assert torch.equal(dense[0, 0], ((j <= i) & (ids[i] == ids[j])) | (j < 3))
    again = ak.attention(q, k, v, block_mask=theirs)
    assert torch.equal(again, ak.attention(q, k, v, mask=mask))


EXPRESSIONS: dict[str, Mod] = {
    "clamped": lambda b, h, i, j: torch.clamp(i - j, 0, 5) < 3,
    "where": lambda b, h, i, j: torch.where(i % 7 < 3, i // 4, j // 3) == j // 3,
    "float": lambda b, h, i, j: torch.tanh((i - j).float() * 0.1) > 0.2,
    "not": lambda b, h, i, j: ~((i + j) % 2 == 0) ^ (i < 9),
    "constant": lambda b, h, i, j: torch.ones((), dtype=torch.bool),
    "minimum": lambda b, h, i, j: torch.minimum(i, j * 2) >= 11,
    "cast": lambda b, h, i, j: (i.float() * 0.5).int() == j,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_masks_as_functions_of_tensors(name: str) -> None:
    mask = ak.block_mask(EXPRESSIONS[name], 1, 1, 40, 30, q_block=16, kv_block=16)
    mod = mask.to_torch().mask_mod
    index = torch.meshgrid(*map(torch.arange, (1, 1, 40, 30)), indexing="ij")
    assert torch.equal(mod(*index).expand(1, 1, 40, 30), pairs(EXPRESSIONS[name], 1, 1, 40, 30))


def test_torchs_lists_are_checked() -> None:
    counts, indices = torch.tensor([[[1]]]).int(), torch.tensor([[[[2]]]]).int()
    for lengths, code in (((32, 64), "AK411"), ((64, 96), "AK409")):
        crafted = flex.BlockMask.from_kv_blocks(
            counts, indices, BLOCK_SIZE=32, seq_lengths=lengths, compute_q_blocks=False
        )
        with pytest.raises(ak.AttnkitError, match=code):
            ak.as_block_mask(crafted)
    with pytest.raises(ak.AttnkitError, match="mask_mod"):
        ak.as_block_mask(flex.create_block_mask(causal, 2, 1, 64, 64, device="cpu")[0])


# --- all of them ------------------------------------------------------------------------------------------


def test_lengths_are_never_guessed(qkv: Any) -> None:
    """FlexAttention once gave zeros and NaN for these."""
    q, k, v = qkv(2, 2, 256)
    for wrong in ((256, 128), (128, 256), (512, 512), (255, 256)):
        for block_mask in (
            ak.block_mask(causal, 1, 1, *wrong),
            ak.block_mask(causal, 1, 1, *wrong).to_torch(),
        ):
            with pytest.raises(ak.AttnkitError, match="AK409"):
                ak.attention(q, k, v, block_mask=block_mask)
        with pytest.raises(ak.AttnkitError, match="AK409"):
            ak.attention(q, k, v, mask=ak.block_mask(causal, 1, 1, *wrong))
    for batch, heads in ((3, 1), (1, 3), (2, 4)):
        with pytest.raises(ak.AttnkitError, match="AK410"):
            ak.attention(q, k, v, block_mask=ak.block_mask(causal, batch, heads, 256, 256))


def test_padded_batches_keep_the_masks_own_meaning(qkv: Any) -> None:
    q, k, v = qkv(2, 2, 64)
    lens = torch.tensor([40, 64], dtype=torch.int32)
    blocks = ak.block_mask(ak.causal(), 1, 1, 64, 64)
    o = ak.attention(q, k, v, block_mask=blocks, kv_lens=lens)
    assert torch.equal(o, ak.attention(q, k, v, mask=ak.causal(), kv_lens=lens))


def test_it_is_drawn() -> None:
    blocks = ak.block_mask(ak.causal() & ak.window(300), 1, 2, 512, 512)
    assert repr(blocks) == (
        "BlockMask(B=1, H=2, 512 x 512, blocks of 128 x 128: 12 empty, 6 full, 14 partial, density 62.50 %)"
    )
    assert str(blocks).splitlines()[1:] == ["+...", "#+..", "+#+.", "++#+"]
    assert "batch entry 0, head 0:" in str(ak.block_mask(window, 2, 2, 512, 512))
    large = str(ak.block_mask(ak.causal(), 1, 1, 2**14, 2**15))
    assert len(large.splitlines()) == 33
    assert max(map(len, large.splitlines()[1:])) == 64


def test_a_block_mask_is_traced_once(qkv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, 1, 64)
    blocks = ak.BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), q_block=32, kv_block=32, mask=causal)
    first = ak.attention(q, k, v, block_mask=blocks, mask=blocks & ak.window(3))
    monkeypatch.setattr(traced, "_trace", None)  # would fail
    assert torch.equal(first, ak.attention(q, k, v, block_mask=blocks, mask=blocks & ak.window(3)))


def test_a_block_mask_cannot_be_changed() -> None:
    blocks = ak.block_mask(causal, 1, 1, 64, 64)
    with pytest.raises(AttributeError):
        blocks.sizes = 3  # type: ignore[misc]
    given = torch.ones(2, 2, dtype=torch.bool)
    kept = ak.BlockMask.from_dense(given)
    given[:] = False
    assert (kept.to_dense() == FULL).all()


@pytest.mark.parametrize("whose", ["ours", "torch", "map"])
def test_torch_compile(qkv: Any, whose: str) -> None:
    q, k, v = qkv(2, 2, 64)
    blocks = ak.block_mask(ak.causal() & ak.window(20), 1, 1, 64, 64, q_block=32, kv_block=32)
    given: Any = {
        "ours": blocks,
        "torch": blocks.to_torch(),
        "map": ak.BlockMask.from_dense(blocks.to_dense(), q_block=32, kv_block=32, mask=ak.window(20)),
    }[whose]
    compiled = torch.compile(
        lambda q, k, v: ak.attention(q, k, v, block_mask=given), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), ak.attention(q, k, v, block_mask=given))
