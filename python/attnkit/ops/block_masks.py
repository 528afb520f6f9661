"""Block masks: a mask with its block structure at hand, built from functions, maps, BCSR or torch's own BlockMask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnkit.analysis.structure import EMPTY, FULL, PARTIAL, BlockCounts, Sizes, Structure
from attnkit.backends.cpu.backend import CpuKernel
from attnkit.errors import error
from attnkit.ir.mods import Mask, MaskFunction, Mod, all_of
from attnkit.ops.check import check_function, check_tensor, check_values_of, shape_of
from attnkit.ops.traced import Traceable, bind
from attnkit.runtime import prepare

_DEFAULT_BLOCK = 128
_MAX_ROWS = 1 << 24  # of blocks, over all heads: the structure of each takes memory


class Bcsr(NamedTuple):
    """Blocks that are not empty: ``indices[indptr[..., i]:indptr[..., i + 1]]`` are those of block row i.

    ``indptr`` is int64 ``[B, H, nq + 1]``, counting through all heads; ``indices`` int32 ``[n]``, rising in each
    row; ``full`` bool ``[n]``: the blocks that need no element mask.
    """

    indptr: Tensor
    indices: Tensor
    full: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask(Mask):
    """A mask of ``[B, H, q_len, kv_len]`` pairs that knows which of its blocks are empty, partial or full.

    It is a mask function itself, ``(b, h, q_idx, kv_idx)``, and composes with ``& | ~`` like every other. Make one
    with `block_mask`, `from_dense`, `from_bcsr` or `from_torch`. A batch or head count of 1 stands for any.

    ``mask`` is the element mask of its partial blocks, None where it has none.
    """

    function: MaskFunction
    sizes: Sizes
    mask: MaskFunction | None
    find: Callable[[], Structure]

    @cached_property
    def structure(self) -> Structure:
        """The runs of blocks, found at first use."""
        return self.find()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, H, q_len, kv_len)``."""
        return self.sizes[:4]

    @property
    def block_size(self) -> tuple[int, int]:
        """``(q_block, kv_block)``."""
        return self.sizes[4:]

    @property
    def counts(self) -> BlockCounts:
        """How many blocks are empty, full and partial, over all batch entries and heads."""
        shared = (
            self.sizes.batch * self.sizes.heads // (self.structure.sizes.batch * self.structure.sizes.heads)
        )
        return BlockCounts(*(n * shared for n in self.structure.counts))

    @property
    def density(self) -> float:
        """The share of blocks that are not empty."""
        return self.structure.density

    def to_dense(self) -> Tensor:
        """The kind of every block, uint8 ``[B, H, nq, nk]``: 0 empty, 1 partial, 2 full."""
        kinds = self.structure.to_dense()
        return torch.from_numpy(np.broadcast_to(kinds, (*self.sizes[:2], *kinds.shape[2:])).copy())

    def to_bcsr(self) -> Bcsr:
        """The blocks that are not empty, row by row."""
        kinds = self.to_dense()
        per_row = (kinds != EMPTY).sum(-1).flatten()
        ends = torch.cumsum(per_row, 0).view(*self.sizes[:2], -1)
        starts = torch.cat([ends.new_zeros(1), ends[..., -1].flatten()[:-1]]).view(*self.sizes[:2], 1)
        indices = (kinds != EMPTY).nonzero()[:, 3].int()
        return Bcsr(torch.cat([starts, ends], -1), indices, kinds[kinds != EMPTY] == FULL)

    def to_torch(self) -> Any:
        """The same mask as a ``torch.nn.attention.flex_attention.BlockMask``."""
        from attnkit.ops.flex_blocks import to_torch

        return to_torch(self)

    @classmethod
    def from_dense(
        cls, blocks: Tensor, q_len: int | None = None, kv_len: int | None = None, *,
        q_block: int = _DEFAULT_BLOCK, kv_block: int = _DEFAULT_BLOCK, mask: MaskFunction | None = None,
    ) -> BlockMask:  # fmt: skip
        """A block mask from a map of blocks.

        Args:
            blocks: bool ``[nq, nk]``, ``[H, nq, nk]`` or ``[B, H, nq, nk]``, True where a block is visible; or uint8
                as `to_dense` gives it.
            q_len: queries; None is ``nq * q_block``. At most that, and the last block must hold one.
            kv_len: keys, likewise.
            q_block: queries in a block.
            kv_block: keys in a block.
            mask: with a bool map, applied inside all visible blocks; with a uint8 map, inside partial ones, which
                need it.

        Raises:
            AttnkitError: AK402 or AK404, not such a tensor; AK403, it does not fit the lengths; AK411, partial
                blocks without a mask, or kinds other than 0, 1, 2.
        """
        check_tensor("blocks", blocks)
        check_values_of("blocks", blocks)
        if blocks.dtype not in (torch.bool, torch.uint8):
            raise error("AK404", where="blocks", given=str(blocks.dtype), allowed="torch.bool, torch.uint8")
        if not 2 <= blocks.dim() <= 4:
            raise error("AK403", where="blocks", given=shape_of(blocks), allowed="[nq, nk] to [B, H, nq, nk]")
        _check_sizes(q_block=q_block, kv_block=kv_block)
        blocks = blocks.clone().reshape((1,) * (4 - blocks.dim()) + blocks.shape)  # yours may change later
        q_len = blocks.shape[2] * q_block if q_len is None else q_len
        kv_len = blocks.shape[3] * kv_block if kv_len is None else kv_len
        if blocks.dtype == torch.bool:
            nothing = torch.zeros_like(blocks)
            full, partial = (blocks, nothing) if mask is None else (nothing, blocks)
        else:
            full, partial = blocks == FULL, blocks == PARTIAL
            if bool((blocks > FULL).any()):
                raise error("AK411", where="blocks", given=str(int(blocks.max())), allowed="kinds 0, 1, 2")
            if mask is None and bool(partial.any()):
                raise error(
                    "AK411", where="blocks", given="partial blocks and no mask=",
                    allowed="the element mask of partial blocks", hint="for whole blocks give a bool map",
                )  # fmt: skip
        return from_maps(full, partial, mask, q_len, kv_len, q_block, kv_block)

    @classmethod
    def from_bcsr(
        cls, indptr: Tensor, indices: Tensor, q_len: int, kv_len: int, *,
        q_block: int = _DEFAULT_BLOCK, kv_block: int = _DEFAULT_BLOCK, full: Tensor | None = None,
        mask: MaskFunction | None = None,
    ) -> BlockMask:  # fmt: skip
        """A block mask from lists of visible blocks.

        Args:
            indptr: ints ``[nq + 1]`` or ``[B, H, nq + 1]``: where each row's list starts and ends.
            indices: ints ``[n]``: kv blocks, in any order; one that is listed twice counts once.
            q_len: queries.
            kv_len: keys.
            q_block: queries in a block.
            kv_block: keys in a block.
            full: bool ``[n]``: blocks that ``mask`` does not apply to; None is none of them.
            mask: applied inside the listed blocks; None means that they are visible as a whole.

        Raises:
            AttnkitError: AK402, AK403 or AK404, not such tensors; AK411, lists that are no lists of blocks.
        """
        for name, t in (("indptr", indptr), ("indices", indices)):
            check_tensor(name, t)
            check_values_of(name, t)
            if t.dtype not in (torch.int32, torch.int64):
                raise error("AK404", where=name, given=str(t.dtype), allowed="torch.int32, torch.int64")
        if full is not None:
            check_tensor("full", full)
            check_values_of("full", full)
            if full.dtype != torch.bool:
                raise error("AK404", where="full", given=str(full.dtype), allowed="torch.bool")
        sizes = _sizes(batch=1, heads=1, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
        rows, columns = sizes.rows, sizes.columns
        if indptr.dim() not in (1, 3) or indptr.shape[-1] != rows + 1:
            allowed = f"[{rows + 1}] or [B, H, {rows + 1}]"
            raise error("AK403", where="indptr", given=shape_of(indptr), allowed=allowed)
        if indices.dim() != 1 or (full is not None and full.shape != indices.shape):
            given = shape_of(indices if full is None else full)
            raise error("AK403", where="indices, full", given=given, allowed="[n], one of each")
        indptr = indptr.reshape((1,) * (3 - indptr.dim()) + indptr.shape).long()
        starts, ends = indptr[..., :-1].flatten(), indptr[..., 1:].flatten()
        follows = torch.equal(starts, torch.cat([starts.new_zeros(1), ends[:-1]]))
        if not follows or int(ends[-1]) != len(indices) or bool((ends < starts).any()):
            allowed = f"offsets from 0 to {len(indices)} that do not fall, counting through all heads"
            raise error("AK411", where="indptr", given=str(indptr.flatten().tolist()[:8]), allowed=allowed)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
            given = f"{int(indices.min())}..{int(indices.max())}"
            raise error("AK411", where="indices", given=given, allowed=f"0..{columns - 1}")
        if full is None:
            full = torch.full(indices.shape, mask is None)
        listed = torch.zeros(2, len(starts), columns, dtype=torch.bool)
        row = torch.repeat_interleave(torch.arange(len(starts)), ends - starts)
        listed[full.long(), row, indices.long()] = True
        partial, whole = listed.view(2, *indptr.shape[:2], rows, columns)
        return from_maps(whole | partial if mask is None else whole, partial, mask,
                          q_len, kv_len, q_block, kv_block)  # fmt: skip

    @classmethod
    def from_torch(cls, blocks: Any) -> BlockMask:
        """A block mask from ``torch.nn.attention.flex_attention.BlockMask``: see `as_block_mask`."""
        from attnkit.ops.flex_blocks import from_torch

        return from_torch(blocks)

    def check(self, q: Tensor, k: Tensor) -> None:
        """Check that this mask was built for these queries and keys.

        Raises:
            AttnkitError: AK402, AK403, no such tensors; AK409, other lengths; AK410, another batch size or number of heads.
        """
        batch, heads, q_len, kv_len = self.shape
        for name, t in (("q", q), ("k", k)):
            check_tensor(name, t)
            if t.dim() != 4:
                raise error(
                    "AK403", where=name, given=shape_of(t), allowed="[batch, heads, length, head_dim]"
                )
        if (q_len, kv_len) != (q.shape[2], k.shape[2]):
            raise error(
                "AK409", where="block_mask", given=f"one for {q_len} queries and {kv_len} keys",
                allowed=f"one for the {q.shape[2]} queries of q and the {k.shape[2]} keys of k",
            )  # fmt: skip
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
            raise error(
                "AK410", where="block_mask", given=f"one for batch {batch} and {heads} heads",
                allowed=f"batch 1 or {q.shape[0]}, 1 or {q.shape[1]} heads",
            )  # fmt: skip

    def __repr__(self) -> str:
        batch, heads, q_len, kv_len, q_block, kv_block = self.sizes
        counts = ", ".join(f"{n} {kind}" for kind, n in self.counts._asdict().items())
        return (
            f"BlockMask(B={batch}, H={heads}, {q_len} x {kv_len}, blocks of {q_block} x {kv_block}: {counts}, "
            f"density {100 * self.density:.2f} %)"
        )

    def __str__(self) -> str:
        """The summary and a map of the first head."""
        sizes = self.structure.sizes
        which = "" if sizes.batch == sizes.heads == 1 else "batch entry 0, head 0:\n"
        return f"{self!r}\n{which}{self.structure.draw()}"


def block_mask(
    mask: MaskFunction | None, B: int | None, H: int | None, q_len: int, kv_len: int, *,
    q_block: int = _DEFAULT_BLOCK, kv_block: int = _DEFAULT_BLOCK,
) -> BlockMask:  # fmt: skip
    """The block structure of a mask, found by analysis of the function, not by evaluating its pairs.

    Args:
        mask: ``(b, h, q_idx, kv_idx) -> bool``; None sees everything.
        B: batch size; None is 1. 1 stands for any.
        H: query heads, likewise.
        q_len: queries.
        kv_len: keys.
        q_block: queries in a block.
        kv_block: keys in a block.

    Returns:
        A mask for ``ak.attention(..., mask=)`` or ``block_mask=``, which can be looked at and converted.

    Raises:
        AttnkitError: AK401 or AK402, a size is no size; AK3xx, the function cannot be traced; AK6xx, its integers or
            loads go wrong within these sizes.
    """
    if mask is not None and not callable(mask):
        raise error("AK402", where="mask", given=type(mask).__name__, allowed="a function, or None")
    sizes = _sizes(B=1 if B is None else B, H=1 if H is None else H, q_len=q_len, kv_len=kv_len,
                   q_block=q_block, kv_block=kv_block)  # fmt: skip
    if sizes.batch * sizes.heads * sizes.rows > _MAX_ROWS:
        given = f"{sizes.batch * sizes.heads * sizes.rows:,} rows of blocks"
        raise error(
            "AK401", where="q_block", given=given, allowed=f"at most {_MAX_ROWS:,}", hint="larger blocks"
        )
    found = BlockMask(mask or _everything, sizes, mask, functools.partial(_find, mask, sizes))
    _ = found.structure  # now, or what is wrong would be said later
    return found


def as_block_mask(blocks: Any) -> BlockMask:
    """Ours as it is, torch's converted.

    Raises:
        AttnkitTypeError: AK402, it is neither.
    """
    if isinstance(blocks, BlockMask):
        return blocks
    from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

    if isinstance(blocks, TorchBlockMask):
        return BlockMask.from_torch(blocks)
    allowed = "an ak.BlockMask or a torch.nn.attention.flex_attention.BlockMask"
    hint = "ak.block_mask(mask, B, H, q_len, kv_len); for a map of blocks ak.BlockMask.from_dense(map)"
    raise error("AK402", where="block_mask", given=type(blocks).__name__, allowed=allowed, hint=hint)


def from_maps(
    full: Tensor, partial: Tensor, mask: MaskFunction | None, *lengths_and_blocks: int
) -> BlockMask:
    """A block mask of ``full | (partial & mask)``, bool maps ``[B, H, nq, nk]``; without a mask, of ``full``.

    Raises:
        AttnkitError: AK402, mask is no function; AK403, the maps do not fit the lengths.
    """
    check_function("mask", mask)
    q_len, kv_len, q_block, kv_block = lengths_and_blocks
    sizes = _sizes(batch=full.shape[0], heads=full.shape[1], q_len=q_len, kv_len=kv_len,
                   q_block=q_block, kv_block=kv_block)  # fmt: skip
    if full.shape[2:] != (sizes.rows, sizes.columns):
        raise error(
            "AK403", where="blocks", given=f"{full.shape[2]} x {full.shape[3]} blocks of {q_block} x {kv_block}",
            allowed=f"{sizes.rows} x {sizes.columns} for {q_len} queries and {kv_len} keys",
        )  # fmt: skip

    alike = sizes.batch == 1, sizes.heads == 1
    function = functools.partial(_in_blocks, alike, (q_block, kv_block), full, partial, mask)
    return BlockMask(function, sizes, mask, functools.partial(_of_maps, sizes, full, partial))


def _in_blocks(
    alike: tuple[bool, bool], block_size: tuple[int, int], full: Tensor, partial: Tensor, mask: MaskFunction | None,
    b: Any, h: Any, q_idx: Any, kv_idx: Any,
) -> Any:  # fmt: skip
    """``alike``: all batch entries, and all heads."""
    block = (0 if alike[0] else b, 0 if alike[1] else h, q_idx // block_size[0], kv_idx // block_size[1])
    return full[block] if mask is None else full[block] | (partial[block] & mask(b, h, q_idx, kv_idx))


def _of_maps(sizes: Sizes, full: Tensor, partial: Tensor) -> Structure:
    kinds = torch.where(full, FULL, torch.where(partial, PARTIAL, EMPTY)).to(torch.uint8)
    return Structure.from_dense(kinds.cpu().numpy(), sizes)


def _find(mask: MaskFunction | None, sizes: Sizes) -> Structure:
    """The engine's own analysis."""
    text, buffers, params = bind(Traceable(None, mask))
    kernel = prepare(text, "float32", 1, 1, backend="cpu").kernel
    assert isinstance(kernel, CpuKernel)
    for i, buffer in enumerate(buffers):
        check_tensor(f"captured tensor b{i}", buffer)
    held = [b.detach().cpu() for b in buffers]  # kept alive while the engine reads them
    return kernel.structure(sizes, held, [p.current() for p in params])


def _everything(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx >= 0


def _sizes(**sizes: Any) -> Sizes:
    """All six sizes, checked under the names that the caller knows."""
    _check_sizes(**sizes)
    return Sizes(*sizes.values())


def _check_sizes(**sizes: Any) -> None:
    """AK402 if one is no int, AK401 if it is no size."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer, torch.SymInt)):
            raise error("AK402", where=name, given=type(size).__name__, allowed="an int")
        if not 1 <= size < 2**31:
            raise error("AK401", where=name, given=str(size), allowed=f"1..{2**31 - 1}")


def with_blocks(mask: Mod | None, block_mask: Any, q: Tensor, k: Tensor, *, common: bool) -> Mod | None:
    """``mask`` and ``block_mask``; a block mask among them must be one for these tensors.

    ``common``: all sequences have the lengths of q and k.

    Raises:
        AttnkitError: as `as_block_mask` and `BlockMask.check`; AK408, there is one, and sequences have lengths of their own.
    """
    blocks = None if block_mask is None else as_block_mask(block_mask)
    for each in (mask, blocks):
        if isinstance(each, BlockMask):
            if not common:
                raise error("AK408", where="block_mask", what="sequences of their own lengths have no common block mask",
                            given="a block mask beside lengths or a cache", allowed="one of them",
                            hint="pass a mask function")  # fmt: skip
            each.check(q, k)
    return all_of(mask, blocks)
