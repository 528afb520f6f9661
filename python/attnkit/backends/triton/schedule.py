"""How kernels are laid out on a GPU: tiles, warps and stages by architecture, element size and head dim.

Found by compiling (docs/design/triton.md): the largest tiles that spill nothing and fit shared memory. Not timed.
"""

from __future__ import annotations

from typing import NamedTuple


class Schedule(NamedTuple):
    """Rows and columns of a tile of pairs, warps of a program, tiles of keys (queries) in flight."""

    tile_q: int
    tile_kv: int
    warps: int
    stages: int


# (architecture, element bytes) -> by width of the widest head: up to 64, 128, 256.
Table = dict[tuple[int, int], tuple[Schedule, Schedule, Schedule]]
# Exact products of float32 are made without tensor cores, from operands in registers: small tiles.
_SINGLE = ((80, 4), (90, 4), (100, 4))
FORWARD: Table = {
    (80, 2): (Schedule(128, 64, 8, 2), Schedule(128, 32, 8, 2), Schedule(64, 32, 8, 2)),
    (90, 2): (Schedule(128, 128, 8, 2), Schedule(128, 64, 8, 2), Schedule(64, 64, 8, 2)),
    (100, 2): (Schedule(128, 64, 8, 2), Schedule(128, 64, 8, 2), Schedule(64, 32, 8, 2)),
    **dict.fromkeys(_SINGLE, (Schedule(32, 32, 8, 1), Schedule(16, 32, 8, 1), Schedule(16, 16, 8, 2))),
}
DECODE: Table = {
    (80, 2): (Schedule(16, 64, 8, 2), Schedule(16, 32, 8, 2), Schedule(16, 64, 8, 2)),
    (90, 2): (Schedule(16, 64, 8, 2), Schedule(16, 32, 8, 2), Schedule(16, 32, 4, 2)),
    (100, 2): (Schedule(16, 64, 8, 2), Schedule(16, 32, 8, 2), Schedule(16, 32, 4, 2)),
    (80, 4): (Schedule(16, 16, 8, 2), Schedule(16, 16, 8, 1), Schedule(16, 16, 8, 2)),
    **dict.fromkeys(_SINGLE[1:], (Schedule(16, 16, 8, 2), Schedule(16, 32, 8, 1), Schedule(16, 16, 8, 2))),
}
DQ: Table = {
    (80, 2): (Schedule(128, 64, 8, 2), Schedule(64, 64, 8, 2), Schedule(32, 32, 8, 2)),
    (90, 2): (Schedule(128, 64, 8, 2), Schedule(128, 64, 8, 2), Schedule(64, 32, 8, 2)),
    (100, 2): (Schedule(128, 64, 8, 2), Schedule(128, 64, 8, 2), Schedule(64, 32, 8, 2)),
    **dict.fromkeys(_SINGLE, (Schedule(32, 32, 8, 2), Schedule(16, 16, 8, 2), Schedule(16, 16, 8, 1))),
}
DKV: Table = {
    (80, 2): (Schedule(64, 64, 8, 2), Schedule(64, 64, 8, 2), Schedule(32, 32, 8, 2)),
    (90, 2): (Schedule(64, 128, 8, 2), Schedule(64, 64, 8, 2), Schedule(32, 64, 8, 2)),
    (100, 2): (Schedule(64, 128, 8, 2), Schedule(64, 64, 8, 2), Schedule(32, 64, 8, 2)),
    **dict.fromkeys(_SINGLE, (Schedule(16, 32, 8, 2), Schedule(16, 16, 8, 2), Schedule(16, 16, 8, 1))),
}
PAIRS: Table = {
    **dict.fromkeys(
        ((80, 2), (90, 2), (100, 2)), (Schedule(64, 32, 8, 1), Schedule(64, 32, 8, 1), Schedule(32, 32, 8, 1))
    ),
    **dict.fromkeys(_SINGLE, (Schedule(16, 32, 8, 1), Schedule(16, 16, 8, 1), Schedule(16, 16, 8, 1))),
}
# By what stands before the names of their fields.
SCHEDULES = {"": FORWARD, "decode_": DECODE, "dq_": DQ, "dkv_": DKV, "pairs_": PAIRS}
WARPS = {"blocks_": 8, "delta_": 8, "merge_": 4, "append_": 4}  # of kernels that have nothing to choose
ARCHITECTURES = (80, 90, 100)


def with_room(
    found: Schedule,
    kind: str,
    arch: int,
    *,
    dropout: bool,
    lists: bool,
    wide_codes: str = "",
    words: bool = False,
) -> Schedule:
    """A schedule with narrower tiles where a program needs more registers: for random numbers, masks of any shape, codes.

    ``wide_codes``: the codec of keys wider than 128 channels; of both codecs that which needs more. ``words``: int4 or int2, q of 16 bits.
    """
    if words and kind == "decode_" and found.warps == 8 and found.tile_kv <= 32:
        return found._replace(warps=2)  # of 4 or 8 ptxas spills, with half of the registers free
    if wide_codes and kind == "" and family(arch) == 90:
        return found._replace(tile_kv=found.tile_kv // 2)
    if kind == "decode_" and (wide_codes, family(arch)) in (("int8", 100), ("fp8", 100), ("fp8", 90)):
        return found._replace(warps=8)
    if kind == "" and (dropout or (lists and family(arch) != 90)):
        if found.tile_kv > 32:
            return found._replace(tile_kv=found.tile_kv // 2)
        return found._replace(tile_q=min(found.tile_q, 64))
    if kind == "decode_" and dropout and family(arch) == 80:
        return found._replace(warps=4)
    if kind == "dkv_" and dropout and found.tile_q > 32:
        return found._replace(tile_q=found.tile_q // 2)
    return found


def family(arch: int) -> int:
    """The architecture whose numbers an architecture takes: its own, or those of Ampere, which fit 99 KiB of memory too."""
    return 90 if arch == 90 else 100 if 100 <= arch < 110 else 80


def schedule(table: Table, arch: int, size: int, width: int) -> Schedule:
    """The row of a table for an architecture, an element size in bytes, and the wider of the head dims."""
    return table[family(arch), size][0 if width <= 64 else 1 if width <= 128 else 2]
