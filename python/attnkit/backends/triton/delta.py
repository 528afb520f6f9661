"""What every row of a backward needs first, from what the forward left: o . d_o."""

from __future__ import annotations

from attnkit.backends.triton.parts import TILES
from attnkit.backends.triton.source import Arguments, render, whole

DELTA = '''
@triton.jit
def delta(
    {arguments}
    TILE: tl.constexpr, V_HEAD_DIM: tl.constexpr, V_PADDED: tl.constexpr,
):
    """o . d_o less the cotangent of lse, of every query; and what the sink's logit gets from a tile of them."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    tiles = (q_total + TILE - 1) // TILE
    entry = (tile // tiles).to(tl.int64)
    places = tile % tiles * TILE + tl.arange(0, TILE)
    live = places < q_total
    rows = places.to(tl.int64)
    of_o = load_tile(o + entry * o_sb + head.to(tl.int64) * o_sh, rows * o_ss, 1, o_sd, live, V_HEAD_DIM, V_PADDED, True)
    of_d = load_tile(
        d_o + entry * d_o_sb + head.to(tl.int64) * d_o_sh, rows * d_o_ss, 1, d_o_sd, live, V_HEAD_DIM, V_PADDED, True
    )
    found = tl.sum(of_o.to(tl.float32) * of_d.to(tl.float32), 1)
    #if d_lse
    found -= tl.load(d_lse + entry * d_lse_sb + head.to(tl.int64) * d_lse_sh + rows * d_lse_ss, mask=live, other=0.0)
    #end
    at = entry * lse_sb + head.to(tl.int64) * lse_sh + rows
    tl.store(deltas + at, found, mask=live)
    #if sink
    log_sum = tl.load(lse + at, mask=live, other=float("-inf"))
    weight = tl.exp2((tl.load(sinks + head).to(tl.float32) - log_sum) * 1.4426950408889634)
    weight = tl.where(log_sum == float("-inf"), 0.0, weight)
    tl.store(sink_sums + tile.to(tl.int64) * tl.num_programs(1) + head, tl.sum(tl.where(weight == 0.0, 0.0, -weight * found), 0))
    #end
'''


def delta(d_lse: bool, sink: bool) -> tuple[str, Arguments]:
    """The text of the kernel ``delta`` and its arguments."""
    pointers = ["o", "d_o", "deltas", *["d_lse"] * d_lse, *["lse", "sinks", "sink_sums"] * sink]
    strides = [f"{x}_s{d}" for x in ("o", "d_o") for d in "bhsd"] + [f"d_lse_s{d}" for d in "bhs"] * d_lse
    arguments = (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides),
        *((n, "size") for n in ("lse_sb", "lse_sh", "q_total")),
    )  # fmt: skip
    on = {name for name, held in (("d_lse", d_lse), ("sink", sink)) if held}
    holes = {"arguments": "".join(f"{n}, " for n, _ in arguments).rstrip()}
    return whole(TILES + render(DELTA, on, holes)), arguments
