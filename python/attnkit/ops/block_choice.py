"""Blocks of keys chosen by the queries themselves (MoBA, NSA), as masks: a selection first, then attention over its map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import MaskFunction, causal as causal_mask
from attnkit.ir.text import parse
from attnkit.ops.block_means import BlockMeans
from attnkit.ops.check import check_count, check_flag, check_qkv, check_tensor
from attnkit.ops.select import select
from attnkit.ops.tracing import kept


@dataclass(frozen=True)
class Operands:
    """What a choice is made from: the queries, the keys, how many keys there are of each batch entry, and who runs it.

    ``kv_lens`` None: all keys of the tensor.
    """

    q: Tensor
    k: Tensor
    scale: float | None
    kv_lens: Tensor | None
    backend: str


class Choice(Protocol):
    """What ``ak.attention(select=)`` takes."""

    def over(self, operands: Operands) -> MaskFunction:
        """The pairs that it leaves, as a mask. No gradient passes through it.

        What attends to them in a way of its own says so: ``approximation``, see `attnkit.ops.traced.Traceable`.
        """


@dataclass(frozen=True)
class TopKBlocks:
    """See `top_k_blocks`."""

    block: int
    k: int
    q_block: int
    causal: bool
    first: int
    last: int
    shared: bool
    means: BlockMeans | None = None

    def given(self, means: BlockMeans) -> TopKBlocks:
        """The same choice among blocks whose means are at hand: the keys, which may then lie in any way, are not read.

        Raises:
            AttnkitError: AK402, they are none; AK401, they are of blocks of another size, or the choice is not causal.
        """
        if not isinstance(means, BlockMeans):
            raise error("AK402", where="means", given=type(means).__name__, allowed="a BlockMeans")
        if means.block != self.block or not self.causal:
            given = f"means of {means.block} keys for a choice of {self.block}, causal={self.causal}"
            raise error("AK401", where="means", given=given, allowed="one size, and causal=True")
        return replace(self, means=means)

    def over(self, operands: Operands) -> MaskFunction:
        """See `Choice`.

        Raises:
            AttnkitError: AK408, padded keys and a choice that is not causal: the mean of a block would hold what is no key.
        """
        q, k, lens, size = operands.q, operands.k, operands.kv_lens, self.block
        if self.means is not None:
            q, k, lens, size = q.float(), self.means.means(), self.means.lengths, 1
        if lens is not None and not self.causal:
            given = "keys of their own lengths, and causal=False"
            raise error("AK408", where="select", given=given, allowed="ak.top_k_blocks(..., causal=True)")
        text = program_text(
            size,
            self.block,
            self.k,
            self.q_block,
            self.causal,
            self.first,
            self.last,
            self.shared,
            operands.scale,
        )
        past = (q.new_full((q.shape[0],), k.shape[2], dtype=torch.int32) if lens is None else lens) - q.shape[
            2
        ]
        chosen = choose(q, k, text, [past.int()] if self.causal else [], operands.backend)
        return self.mask(chosen, q.shape[1] // k.shape[1])

    def mask(self, chosen: Tensor, group: int) -> MaskFunction:
        """The mask of what was chosen, bool ``[B, heads, rows, columns]``; so many query heads share a kv head."""
        block, q_block, heads = self.block, self.q_block, group if self.shared else 1
        visible = causal_mask() if self.causal else None
        of_column = chosen.mT.contiguous()  # the queries of a tile are read one after the other

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            row = q_idx if q_block == 1 else q_idx // q_block
            seen = of_column[b, h if heads == 1 else h // heads, kv_idx // block, row]
            return seen if visible is None else seen & visible(b, h, q_idx, kv_idx)

        return mask


def top_k_blocks(
    block: int, k: int, *, q_block: int = 1, causal: bool = True, first: int = 0, last: int = 1, shared: bool = False
) -> TopKBlocks:  # fmt: skip
    """For ``ak.attention(select=)``: each query sees k blocks of keys, its own and those whose mean key fits it best.

    With ``p = q_idx + kv_len - q_len``, where a query stands among the keys, its own block is ``p // block``, which it sees up
    to itself. Before it are the candidates, of which it sees the ``k - 1`` with the largest product of the query and the
    block's mean key: mixture of block attention (arXiv 2502.13189). ``k = 1`` is the own block alone. Ties go to the
    first block, NaN comes last; more blocks than there are is all of them. No gradient passes through the choice.

    Args:
        block: keys in a block; the last may have fewer.
        k: how many blocks, the own among them.
        q_block: so many queries choose together, by their mean. All blocks that one of them stands in are their own.
        causal: False: there is no own block; the k best of all blocks, each of which is seen as a whole.
        first: so many blocks at the beginning are seen in any case, besides the k.
        last: so many blocks up to the own are seen in any case; of those before the own all are candidates too.
        shared: query heads that share a kv head choose together, by the mean of their softmax over the candidates (native
            sparse attention, arXiv 2502.11089).

    Raises:
        AttnkitError: AK401 or AK402, a number is none of what is allowed; AK408, last without causal.
    """
    least = {"block": 1, "k": 1, "q_block": 1, "first": 0, "last": 1}
    for (name, low), value in zip(least.items(), (block, k, q_block, first, last), strict=True):
        check_count(name, value, low, 2**31 - 1)
    check_flag("causal", causal)
    check_flag("shared", shared)
    if last != 1 and not causal:
        raise error(
            "AK408", where="last", given=str(last), allowed="1 with causal=False: there is no own block"
        )
    return TopKBlocks(block, k, q_block, causal, first, last, shared)


def chosen_by(select: Any, operands: Operands, apart: dict[str, Any]) -> MaskFunction:
    """The pairs that a choice leaves; ``apart`` says how else the keys may lie, None where they do not.

    Raises:
        AttnkitError: AK402, it is no choice; AK408, keys lie so that there is no choice among them.
    """
    if not hasattr(select, "over"):
        raise error(
            "AK402",
            where="select",
            given=type(select).__name__,
            allowed="ak.top_k_blocks(...), ak.sparge(...)",
        )
    for how, given in apart.items():
        if given is not None and (how == "packed" or getattr(select, "means", None) is None):
            raise error("AK408", where="select", given=f"keys that are {how}", allowed="plain or padded keys",
                        hint="of a cache, keep the blocks' means: attnkit.ops.block_means")  # fmt: skip
    mask: MaskFunction = select.over(operands)
    return mask


@kept
def program_text(
    pooled: int, block: int, k: int, q_block: int, causal: bool, first: int, last: int, shared: bool, scale: float | None
) -> str:  # fmt: skip
    """The canonical text of a choice: the keys that one of k is the mean of, `TopKBlocks`' numbers, and the scale."""
    rule = f"top_k = {k - 1 if causal else k}" + (", heads = group" if shared else "")
    forced = f"(kv_idx < {first})"
    body = f"force = {forced}" if first else ""
    if causal:
        start = f"(q_idx * {q_block} + b0[b])"
        own, end = f"{start} // {block}", f"({start} + {q_block - 1}) // {block}"
        near = f"(kv_idx > {own} - {last}) & (kv_idx <= {end})"
        body = (
            f"mask = kv_idx < {own}\nforce = {forced} | ({near})"
            if first
            else f"mask = kv_idx < {own}\nforce = {near}"
        )
    return parse(
        f"""attnkit 1
program (q: bhsd, k: bhsd) {"buffers(b0: i32[1])" if causal else ""} {{
  rows = pool(q, size = {q_block}, how = mean)
  columns = pool(k, size = {pooled}, how = mean)
  chosen = select(rows, columns, scale = {"default" if scale is None else repr(scale)}, {rule}) {{
    {body}
  }}
  return chosen
}}"""
    ).text


def choose(
    q: Tensor, k: Tensor, text: str, buffers: list[Tensor], backend: str, params: Sequence[float] = ()
) -> Tensor:
    """What a selection of q and k keeps, on a backend: bool ``[B, heads, rows, columns]``.

    Raises:
        AttnkitError: AK4xx, q and k do not go together; AK502, the backend has no kernel for them.
    """
    for name, t in (("q", q), ("k", k)):
        check_tensor(name, t)
    check_qkv(q, k, k)
    if backend == "reference":
        from attnkit.backends.reference import run

        found = run(
            parse(text),
            [t.detach().double().cpu().numpy() for t in (q, k)],
            [b.numpy() for b in buffers],
            params,
        )
        return torch.from_numpy(found[0][:, :, 0].copy())
    if q.device.type != "cpu" or backend not in ("auto", "cpu"):
        given = f"tensors on {q.device}, backend {backend!r}"
        raise error(
            "AK502",
            where="select",
            given=given,
            allowed="tensors on the CPU, backend 'auto', 'cpu' or 'reference'",
        )
    return select(q, k, text, buffers, list(params))
