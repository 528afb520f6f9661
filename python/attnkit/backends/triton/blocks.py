"""Lists of the tiles that a mask leaves, made on the device in the call that uses them: for masks that are no stretches.

A row of a list holds the numbers of its partial tiles from the left, those of its full tiles from the right; between them
it is unset. Tiles whose edges tell (`tile_bounds`) cost no more than those; of others every pair is looked at. Nothing is
repeated for heads and sequences that the mask does not read.
"""

from __future__ import annotations

from attnkit.backends.triton.pairs import Pairs
from attnkit.backends.triton.parts import KEYS, OWNER, QUERIES
from attnkit.backends.triton.source import Arguments, part, render, whole
from attnkit.backends.triton.tile_bounds import tile_bounds
from attnkit.plan.ranges import reads

BLOCKS = '''
@triton.jit
def blocks(
    {arguments}
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):
    """The tiles of one row: how many are partial, how many full, and which."""
    $owner
    h = tl.program_id(1)
    {own}_idx = tl.minimum({own}_rows, {own}_len - 1).to({int}){own_shape}
    #if packed
    list_row = row + h * list_sh
    #else
    list_row = b * list_sb + h * list_sh + tile_of
    #end
    tiles = lists + list_row.to(tl.int64) * list_length
    partial, full = list_row * 0, list_row * 0
    lanes = tl.arange(0, {OTHER})
    $before
    for tile in tl.range(0, ({other}_len + {OTHER} - 1) // {OTHER}):
        {other}_rows = tile * {OTHER} + lanes
        {other}_idx = {other}_rows.to({int}){other_shape}
        live = ({other}_rows < {other}_len){other_shape}
        #if bounds
        $inside
        some = {some}
        all = ({all}) & ((tile + 1) * {OTHER} <= {other}_len)
        if some & ~all:  # its edges do not tell
            $look
        #else
        $look
        #end
        tl.store(tiles + tl.where(all, list_length - 1 - full, partial), tile, mask=some)
        full += all.to(tl.int32)
        partial += (some & ~all).to(tl.int32)
    tl.store(counts + 2 * list_row, partial)
    tl.store(counts + 2 * list_row + 1, full)
'''

# All pairs of a tile.
LOOK = """
        $mask
        exists = tl.broadcast_to({exists}, [TILE_Q, TILE_KV]).to(tl.int32)
        known = tl.broadcast_to({known}, [TILE_Q, TILE_KV]).to(tl.int32)
        some, all = tl.max(exists) > 0, tl.min(known) > 0
"""


def blocks(pairs: Pairs) -> tuple[str, Arguments]:
    """The text of the kernel ``blocks`` for a mask, and its arguments. Rows are what ``pairs`` does not stream."""
    kv = pairs.program.inputs[pairs.attend.k]
    assert pairs.attend.mask is not None
    printer = pairs.printer()
    told = tile_bounds(pairs, printer)
    printer = pairs.printer() if told is None else printer  # names of lines that are not there
    lines, exists, known = pairs.maybe(printer)
    packed, lengths = kv.kind == "packed", kv.kind in ("padded", "paged")
    on = {
        name
        for name, held in (("packed", packed), ("lengths", lengths), ("bounds", told is not None))
        if held
    }
    names = QUERIES if pairs.streamed == "kv_idx" else KEYS
    on |= {"ragged"} if packed or (lengths and names is KEYS) else set()
    shapes = {"q": "[:, None]", "kv": "[None, :]"}
    captured = pairs.captured([pairs.attend.mask])
    pointers = ["lists", "counts", *["cu_q", "cu_kv"] * packed, *["lengths"] * lengths]
    sizes = ["list_length", "list_sb", "list_sh"]
    sizes += ["sequences"] if packed else [f"{names['own']}_tiles", "q_len", *["kv_len"] * (not lengths)]
    arguments = (*((n, "pointer") for n in pointers), *((n, "size") for n in sizes), *captured)
    holes: dict[str, list[str] | str] = {
        **names, "own_shape": shapes[names["own"]], "other_shape": shapes[names["other"]], "times": "",
        "int": "tl.int64" if pairs.wide else "tl.int32", "mask": lines, "exists": exists, "known": known,
        "arguments": "".join(f"{name}, " for name, _ in arguments).rstrip(),
    }  # fmt: skip
    if told is not None:
        holes |= told._asdict()
    else:
        holes["before"] = []
    holes |= {"owner": part(OWNER, on, holes), "look": part(LOOK, on, holes)}
    return whole(render(BLOCKS, on, holes)), arguments


def varies(pairs: Pairs) -> tuple[bool, bool]:
    """Whether lists differ by sequence, and by head."""
    mask = pairs.attend.mask
    assert mask is not None
    ragged = pairs.program.inputs[pairs.attend.k].lengths is not None
    return ragged or reads(mask, "b"), reads(mask, "h")
