"""What a program must look like for a kernel of selections: one `select` of means of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from attnkit.ir.expr import Expr, var
from attnkit.ir.program import Map, Operation, Pool, Program, Return, Select
from attnkit.ir.text import parse

WHOLE = 2**31 - 1  # the size of a pool that takes the mean of a sequence


@dataclass(frozen=True)
class Selection:
    """A selection among inputs q and k, whose rows and columns are means of so many tokens.

    ``centered``: the mean of all keys is taken from each of them first.
    """

    op: Select
    row_block: int
    column_block: int
    centered: bool

    def shape(self, q: Sequence[int], k: Sequence[int]) -> tuple[int, int, int, int]:
        """``[B, heads, rows, columns]`` of what is chosen, for tensors of these shapes; heads are those of k in groups."""
        heads = k[1] if self.op.heads == "group" else q[1]
        return q[0], heads, -(-q[2] // self.row_block), -(-k[2] // self.column_block)

    def limit(self, columns: int, params: Sequence[float]) -> float:
        """The rule's number: how many of so many columns, how much of the softmax, or the score that is not enough."""
        value = number(getattr(self.op, self.op.rule), params)
        if self.op.rule == "top_fraction":
            return max(1, math.floor(value * columns))
        return min(value, columns) if self.op.rule == "top_k" else value


def number(expr: Expr, params: Sequence[float]) -> float:
    """A constant or a param."""
    return float(params[int(expr.attr)] if expr.op == "param" else expr.attr)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def selection(program: Program) -> Selection | None:
    """The selection that a program is, None if it is more or something else."""
    *made, result = program.ops
    if len(program.inputs) != 2 or not made or not isinstance(made[-1], Select):
        return None
    op, numbered = made[-1], dict(enumerate(made, start=2))
    if not isinstance(result, Return) or result.operands != (1 + len(made),):
        return None
    rows, columns = (_mean_of(numbered, value) for value in op.operands)
    centered = False
    if rows is None or columns is None:
        return None
    (q, row_block), (k, column_block) = rows, columns
    used = {op.operands[0], op.operands[1]} - {0, 1}
    if isinstance(smooth := numbered.get(k), Map):
        whole = numbered.get(smooth.operands[-1])
        if (
            smooth.operands != (1, smooth.operands[-1]) or smooth.norm != "none" or smooth.value is not _difference()
            or whole != Pool((1,), WHOLE)
        ):  # fmt: skip
            return None
        used |= {k, smooth.operands[-1]}
        k, centered = 1, True
    if (q, k) != (0, 1) or used != set(numbered) - {1 + len(made)}:
        return None
    return Selection(op, row_block, column_block, centered)


def _mean_of(numbered: dict[int, Operation], value: int) -> tuple[int, int] | None:
    """The value that this one is the mean of, and of how many tokens."""
    op = numbered.get(value)
    if not isinstance(op, Pool):
        return value, 1
    return (op.operands[0], op.size) if op.how == "mean" else None


@cache
def _difference() -> Expr:
    """``x - y`` as `map` has it, interned."""
    head = "attnkit 1\nprogram (q: bhsd, k: bhsd) {\n  m = map(q, k) { value = x - y }\n  return m\n}\n"
    op = parse(head).ops[0]
    assert isinstance(op, Map)
    return op.value


def reasons(found: Selection) -> tuple[str, ...]:
    """What of a selection kernels do not have; empty if they have all."""
    op = found.op
    lacking = {
        "a score of its own": op.score is not var("s"),
        "per = column": op.per != "row",
        "prefix": op.prefix is not None,
    }
    return tuple(f"the selection has {what}" for what, present in lacking.items() if present)
