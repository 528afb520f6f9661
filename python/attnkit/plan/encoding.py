"""What a program must look like for a kernel that multiplies queries and keys as int8, or leaves tiles of keys out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from attnkit.ir.expr import Expr
from attnkit.ir.program import Attend, Codec, Encode, Program, Return

TILE = 64  # keys that are left out together


class Encoding(NamedTuple):
    """How many queries, and keys, share a scale; and whether the mean key is taken from keys first, and given back."""

    q_tile: int
    kv_tile: int
    centered: bool


def number(expr: Expr, params: Sequence[float]) -> float:
    """A constant or a param."""
    return float(params[int(expr.attr)] if expr.op == "param" else expr.attr)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def is_approximate(program: Program) -> bool:
    """Whether a program is plain attention but for encoded queries and keys, or for what it skips."""
    *encodes, attend, result = program.ops
    if not isinstance(attend, Attend) or not isinstance(result, Return) or len(program.inputs) != 3:
        return False
    if attend.skip is None and not encodes:
        return False
    plain = replace(attend, operands=(0, 1, 2), skip=None)
    if not plain.plain or plain.outputs != plain.usual_outputs:
        return False
    if not encodes:
        return attend.operands == (0, 1, 2)
    return encoding(program) is not None and attend.operands == (*sorted(program.encoded), 2)


@lru_cache(maxsize=1024)
def encoding(program: Program) -> Encoding | None:
    """How the first two inputs of a program are encoded, q before k; None if nothing is, or otherwise."""
    match [op for op in program.ops if isinstance(op, Encode)]:
        case [
            Encode((0,), Codec("int8", "tile", q_tile), "none"),
            Encode((1,), Codec("int8", "tile", kv_tile), center),
        ]:
            return Encoding(q_tile, kv_tile, center == "mean")
        case _:
            return None
