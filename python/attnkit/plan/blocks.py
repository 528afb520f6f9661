"""The blocks in which a mask changes: tiles that end where they end are seen as a whole, or not at all."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from attnkit.ir.expr import Expr, topological

_LEAST, _STEP = 32, 16  # lanes: a tile of fewer does not pay; they come in whole vectors


@lru_cache(maxsize=1024)
def block_of(mask: Expr | None, index: str) -> int | None:
    """How many queries (``index`` is "q_idx") or keys ("kv_idx") share what the mask divides by: ``q_idx // 128``.

    Of several the greatest common divisor; None where there is nothing, or nothing large enough for a tile.
    """
    found = 0
    for node in topological([] if mask is None else [mask]):
        if node.op == "floordiv" and node.args[1].op == "const":
            names = {leaf.attr for leaf in topological([node.args[0]]) if leaf.op == "var"}
            if index in names and not names & ({"q_idx", "kv_idx"} - {index}):
                found = gcd(found, int(node.args[1].attr or 0))
    return found if found >= _LEAST else None


def tile_for(block: int | None, usual: int, most: int) -> int:
    """The largest tile of at most ``most`` that divides blocks of this size; the usual one where there is none."""
    fitting = range(most // _STEP * _STEP, _LEAST - 1, -_STEP)
    return usual if block is None else next((n for n in fitting if block % n == 0), usual)
