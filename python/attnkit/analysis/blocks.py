"""Block structure of a mask: which blocks of pairs are empty, full, or partly visible."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np

from attnkit.analysis.interval import NOTHING, Box, Facts, evaluate_order
from attnkit.analysis.structure import BlockCounts
from attnkit.ir.expr import Expr, topological
from attnkit.ir.intervals import FALSE, TRUE, Interval, point
from attnkit.ir.program import Program


class Block(Enum):
    """What is known of a block: no pair is visible, every pair is, or neither could be proved."""

    EMPTY = "empty"
    FULL = "full"
    PARTIAL = "partial"


def classify(mask: Expr | None, box: Box, facts: Facts = NOTHING) -> Block:
    """Classify the pairs of a box. EMPTY and FULL are proofs; PARTIAL is what remains.

    ``box`` maps variables to intervals of ints; a mask of None is visible everywhere.
    """
    return Block.FULL if mask is None else _classify(topological([mask]), mask, box, facts)


def block_counts(
    program: Program,
    b: int,
    h: int,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    buffers: Sequence[np.ndarray[Any, Any] | None] = (),
) -> BlockCounts:
    """Count the blocks of one sequence and head by kind.

    Blocks are ``q_block`` x ``kv_block`` pairs, the last ones cut at ``q_len`` and ``kv_len``. ``buffers`` are
    the captured arrays, None where unknown. Whole regions are decided at once, and only what is undecided is
    split, so the cost follows the boundary of the mask, not its area.
    """
    rows, columns = -(-q_len // q_block), -(-kv_len // kv_block)
    counts = dict.fromkeys(Block, 0)
    mask = program.attend.mask
    if mask is None:
        return BlockCounts(0, rows * columns, 0)
    order = topological([mask])
    facts = Facts(buffers)
    fixed = {"b": point(b), "h": point(h), "q_len": point(q_len), "kv_len": point(kv_len)}
    stack = [(0, rows, 0, columns)] if rows and columns else []
    while stack:
        top, bottom, left, right = stack.pop()
        box = {
            **fixed,
            "q_idx": Interval(top * q_block, min(bottom * q_block, q_len) - 1),
            "kv_idx": Interval(left * kv_block, min(right * kv_block, kv_len) - 1),
        }
        kind = _classify(order, mask, box, facts)
        height, width = bottom - top, right - left
        if kind is not Block.PARTIAL or height == width == 1:
            counts[kind] += height * width
        elif height >= width:
            middle = top + height // 2
            stack += [(top, middle, left, right), (middle, bottom, left, right)]
        else:
            middle = left + width // 2
            stack += [(top, bottom, left, middle), (top, bottom, middle, right)]
    return BlockCounts(counts[Block.EMPTY], counts[Block.FULL], counts[Block.PARTIAL])


def _classify(order: Sequence[Expr], mask: Expr, box: Box, facts: Facts) -> Block:
    (visible,) = evaluate_order(order, [mask], box, facts)
    if visible == FALSE:
        return Block.EMPTY
    return Block.FULL if visible == TRUE else Block.PARTIAL
