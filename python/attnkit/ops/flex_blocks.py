"""Block masks from and to ``torch.nn.attention.flex_attention.BlockMask``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from attnkit.analysis.structure import FULL, PARTIAL
from attnkit.errors import error
from attnkit.ir.expr import Expr, topological
from attnkit.ir.mods import MaskFunction
from attnkit.ir.optable import OPS
from attnkit.ir.text import parse
from attnkit.ops.block_masks import BlockMask, from_maps
from attnkit.ops.traced import Traceable, bind

_sliced: Any = getattr(flex, "_sliced_mask_mod_error", None)


def from_torch(blocks: Any) -> BlockMask:
    """What FlexAttention computes with ``blocks``: full blocks, and the pairs of partial ones that mask_mod lets through.

    Raises:
        AttnkitError: AK402, no such mask; AK401, a slice that has lost its mask_mod; AK409, one whose rows are not those of its
            lengths; AK411, lists that are no lists of blocks.
    """
    if not isinstance(blocks, TorchBlockMask):
        allowed = "torch.nn.attention.flex_attention.BlockMask"
        raise error("AK402", where="blocks", given=type(blocks).__name__, allowed=allowed)
    q_len, kv_len = blocks.seq_lengths
    q_block, kv_block = blocks.BLOCK_SIZE
    if _sliced is not None and blocks.mask_mod is _sliced:
        raise error("AK401", where="block_mask.mask_mod", given="a sliced BlockMask, which has lost it",
                    hint="assign block_mask.mask_mod")  # fmt: skip
    rows, columns = -(-q_len // q_block), -(-kv_len // kv_block)
    partial = _to_map(blocks.kv_num_blocks, blocks.kv_indices, rows, columns)
    full = torch.zeros_like(partial)
    if blocks.full_kv_num_blocks is not None:
        full = _to_map(blocks.full_kv_num_blocks, blocks.full_kv_indices, rows, columns)
    mask: MaskFunction | None = blocks.mask_mod
    if mask is flex.noop_mask:
        mask, full = None, full | partial
    return from_maps(full, partial, mask, q_len, kv_len, q_block, kv_block)


def _to_map(counts: Tensor, indices: Any, rows: int, columns: int) -> Tensor:
    """Lists of blocks, each followed by what does not count, as a bool map ``[B, H, rows, columns]``."""
    counts = counts.reshape((1,) * (3 - counts.dim()) + counts.shape)
    indices = indices.reshape((1,) * (4 - indices.dim()) + indices.shape).long()
    if counts.shape[2] != rows:
        raise error("AK409", where="block_mask", given=f"{counts.shape[2]} rows of blocks",
                    allowed=f"{rows}, for the lengths that it names")  # fmt: skip
    listed = torch.arange(indices.shape[3], device=counts.device) < counts[..., None]
    if not torch.compiler.is_compiling():  # there a wrong index is the scatter's error
        wrong = listed & ((indices < 0) | (indices >= columns))
        if bool(wrong.any()) or bool((counts > indices.shape[3]).any()):
            raise error("AK411", where="block_mask", given="an index or count that is too large or negative",
                        allowed=f"kv blocks 0..{columns - 1}")  # fmt: skip
    spare = torch.where(listed, indices, columns)
    found = counts.new_zeros((*counts.shape, columns + 1), dtype=torch.bool)
    return found.scatter_(3, spare, True)[..., :columns]


def to_torch(blocks: BlockMask) -> TorchBlockMask:
    """The same blocks and the same mask as torch's own. See `BlockMask.to_torch`."""
    kinds = blocks.to_dense()
    lists = [_to_lists(kinds == kind) for kind in (PARTIAL, FULL)]
    return TorchBlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=blocks.block_size, seq_lengths=blocks.shape[2:],
        mask_mod=None if blocks.mask is None else as_torch_mask(blocks.mask, *blocks.shape[2:]),
    )  # fmt: skip


def _to_lists(found: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(found.int(), dim=-1, descending=True, stable=True)
    return found.sum(-1, dtype=torch.int32), order.int()


def as_torch_mask(mask: MaskFunction, q_len: int, kv_len: int) -> MaskFunction:
    """A mask as a function of torch tensors alone, which FlexAttention can run: its traced expression, op by op."""
    text, buffers, params = bind(Traceable(None, mask))
    root = parse(text).attend.mask
    if root is None:
        return flex.noop_mask
    known: dict[Expr, Any] = {}  # the numbers, once: torch's compiler must not meet numpy
    rest: list[Expr] = []
    for node in topological([root]):
        if node.op == "const":
            known[node] = node.attr
        elif node.op == "param":
            known[node] = params[int(node.attr or 0)].current()
        elif node.op == "var" and node.attr in ("q_len", "kv_len"):
            known[node] = q_len if node.attr == "q_len" else kv_len
        elif node.op in OPS and all(arg in known for arg in node.args):
            known[node] = OPS[node.op].numpy(*[known[arg] for arg in node.args]).item()
        else:
            rest.append(node)

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        index = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        values = dict(known)
        for node in rest:
            args = [values[arg] for arg in node.args]
            if node.op == "var":
                values[node] = index[str(node.attr)]
            elif node.op == "load":
                values[node] = buffers[int(node.attr or 0)][tuple(args)]
            else:
                values[node] = _apply(node, args)
        visible = values[root]
        if isinstance(visible, bool):
            return q_idx >= 0 if visible else q_idx < 0
        return visible

    return mask_mod


_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge, "&": operator.and_, "|": operator.or_, "^": operator.xor,
}  # fmt: skip
_CASTS = {"float": torch.float32, "int": torch.int64}


def _apply(node: Expr, args: list[Any]) -> Any:
    """One operator on tensors (or proxies of ours) and Python numbers."""
    row = OPS[node.op]
    like = next(a for a in args if not isinstance(a, (bool, int, float)))
    if row.arity == 2 and row.precedence > 0:
        return _OPERATORS[row.symbol](*args)
    if node.op in _CASTS:
        return like.to(_CASTS[node.op])
    if isinstance(like, Tensor):
        args = [a if isinstance(a, Tensor) else torch.full_like(like, a, dtype=_dtype(a)) for a in args]
    return getattr(torch, row.torch[0])(*args)


def _dtype(value: bool | int | float) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float32
