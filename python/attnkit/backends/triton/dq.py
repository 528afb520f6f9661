"""The gradient of queries: a tile of them reads again the tiles of keys that it saw.

And what captured tensors get that are read at computed indices. Many pairs may add to one element there, in any order: they
add integers, multiples of a unit that the sum of all their sizes decides, so that none overflows.
"""

from __future__ import annotations

from dataclasses import replace

from attnkit.backends.triton.pairs import Pairs
from attnkit.backends.triton.parts import QUERIES, TILES
from attnkit.backends.triton.slopes import Sums, Sweep, filled, over_rows, swept
from attnkit.backends.triton.source import Arguments, render, whole
from attnkit.plan.ranges import reads
from attnkit.plan.triton import Printer

DQ = '''
@triton.jit
def fold(
    dq, {sums_in}query, d_out, log_sum, of_row, k, v, k_ss, k_sd, v_ss, v_sd, b, h, q_idx, q_len, kv_len, {captured}{dropout}
    {tiles}, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
    CAREFUL: tl.constexpr = False, PARTS: tl.constexpr = 1, STAGES: tl.constexpr = None,
):
    """Adds what `count` tiles of keys, in PARTS, give to {given_to}."""
    lanes = tl.arange(0, TILE_KV)
    for i in tl.range(0, count * PARTS, num_stages=STAGES):
        $tile
        key = load_tile(k + start.to(tl.int64) * k_ss, lanes, k_ss, k_sd, present, HEAD_DIM, PADDED, PARTIAL)
        value = load_tile(v + start.to(tl.int64) * v_ss, lanes, v_ss, v_sd, present, V_HEAD_DIM, V_PADDED, PARTIAL)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        $logits
        $weights
        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        #if dropout
        word, _, _, _ = tl.philox(seed, {counter})
        d_weights = tl.where(word >= dropped_below, d_weights * kept_times, 0.0)
        #end
        $slopes
        #if not scatter
        dq = add_product(dq, d_logit.to(key.dtype), exists, key, PRECISION, CAREFUL and PARTIAL)
        #end
    return dq{sums_out}


@triton.jit
def attend_{name}(
    {arguments}
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):
    """{About} of a tile of queries of one head."""
    $owner
    #if mend
    if tl.load(flags + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) == 0:
        return
    #end
    heads = tl.program_id(1)
    kv_head = heads // GROUP
    q_live = q_rows < q_len
    places = tl.minimum(q_rows, q_len - 1)  # what is beyond the last query is the last query again
    h = heads.to({int})
    q_idx = places.to({int})[:, None]
    $visits
    rows = (q_start + places).to(tl.int64)
    of_head = heads.to(tl.int64)
    q += entry.to(tl.int64) * q_sb + of_head * q_sh
    d_o += entry.to(tl.int64) * d_o_sb + of_head * d_o_sh
    query = load_tile(q, rows * q_ss, 1, q_sd, q_live, HEAD_DIM, PADDED, False)
    d_out = load_tile(d_o, rows * d_o_ss, 1, d_o_sd, q_live, V_HEAD_DIM, V_PADDED, False)
    lse_at = entry.to(tl.int64) * lse_sb + of_head * lse_sh + rows
    log_sum = tl.load(lse + lse_at)
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum{to_raw})  # no weight in a dead row
    #if scatter
    log_sum = tl.where(q_live, log_sum, float("inf"))  # and none in the last query, again
    #end
    of_row = tl.load(deltas + lse_at)
    k += entry.to(tl.int64) * k_sb + kv_head.to(tl.int64) * k_sh + kv_start.to(tl.int64) * k_ss
    v += entry.to(tl.int64) * v_sb + kv_head.to(tl.int64) * v_sh + kv_start.to(tl.int64) * v_ss
    #if dropout
    seed = tl.load(seed_at)
    #end
    #if sums
    no_sum = tl.zeros([ROWS], tl.float32)
    #end
    found = tl.zeros([ROWS, PADDED], tl.float32)
    #if mend
    PARTS: tl.constexpr = TILE_KV // 16
    found{sums_lost} = fold(found, {sums_start}{fold_full}, {careful}, False, True, PARTS, 1)
    found{sums_lost} = fold(found, {sums_start}{fold_partial}, {careful}, True, True, PARTS, 1)
    #else
    found{sums_out} = fold(found, {sums_start}{fold_full}, {numbers}, False)
    found{sums_out} = fold(found, {sums_in}{fold_partial}, {numbers}, True)
    #if not scatter
    tl.store(flags + row.to(tl.int64) * tl.num_programs(1) + heads, has_nan(found).to(tl.int32))
    #end
    $store_sums
    #end
    #if not scatter
    store_tile(
        dq + entry.to(tl.int64) * dq_sb + of_head * dq_sh, rows * dq_ss, 1, dq_sd, q_live, found * {scale}, HEAD_DIM, PADDED
    )
    #end
'''
# The sums of sizes that decide the unit of `ADD_AT`.
SIZES = '''
@triton.jit
def sizes(values):
    """The sum of the sizes of the numbers in each row."""
    found = tl.abs(values)
    return tl.sum(tl.where(found < float("inf"), found, 0.0), 1)

'''
ADD_AT = '''
@triton.jit
def add_at(totals, lost, per_one, at, values, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Adds values, `per_one` units each, to integers: the same sum in every order. What is no number is stored in `lost`.

    Places vary with the row, with the column, with both or with none.
    """
    none = ~(tl.abs(values) < float("inf"))
    if tl.max(none.to(tl.int32)) > 0:
        tl.store(lost + (at + tl.zeros(values.shape, tl.int32)), float("nan"), mask=none)
    units = (tl.where(none, 0.0, values).to(tl.float64) * per_one).to(tl.int64)
    if BY_ROW and BY_COLUMN:
        place = tl.min(at)
        if place == tl.max(at):  # one place for all of a tile, as far distances have it
            total = tl.sum(units)
            tl.atomic_add(totals + place, total, mask=total != 0, sem="relaxed")
        else:
            tl.atomic_add(totals + at, units, mask=units != 0, sem="relaxed")
    else:
        if BY_ROW:
            total = tl.sum(units, 1, keep_dims=True)
        elif BY_COLUMN:
            total = tl.sum(units, 0, keep_dims=True)
        else:
            total = tl.sum(units)
        tl.atomic_add(totals + at, total, mask=total != 0, sem="relaxed")

'''
_SWEEP = Sweep(
    QUERIES, ("dq",),
    tensors="query, d_out, log_sum, of_row, k, v, k_ss, k_sd, v_ss, v_sd, b, h, q_idx, q_len, kv_len, ",
    numbers="ROWS, TILE_KV", careful="ROWS, TILE_KV // PARTS",
    log_sums="log_sum[:, None]", deltas="of_row[:, None]", row="rows", live="q_live",
)  # fmt: skip


def dq(pairs: Pairs, scale: float, found: Sums, lists: bool, mend: bool = False) -> tuple[str, Arguments]:
    """The text of the kernel ``attend_dq`` and its arguments.

    It flags tiles that came out as no number; with ``mend`` it is the kernel that makes those again, with care.
    """
    of_loads = (*found.of_rows, *found.scattered)

    def add(inner: Printer, i: int, value: str) -> str:
        return over_rows(inner, i, value) if i < len(found.of_rows) else f"sum{i} += sizes({value})"

    on, holes, arguments = swept(_SWEEP, pairs, scale, found, of_loads, lists, mend, add)
    on |= {"last_first"} | ({"ragged"} if "packed" in on else set())
    holes |= {"name": "dq", "given_to": "dq", "About": "dq"}
    return whole(TILES + SIZES * bool(found.scattered) + render(DQ, on, filled(on, holes))), arguments


def scatter(pairs: Pairs, scale: float, found: Sums, lists: bool) -> tuple[str, Arguments]:
    """The text of the kernel ``attend_scatter``, which adds what the loads of ``found.scattered`` get, and its arguments."""
    loads = [load for load, _ in found.scattered]
    targets: list[tuple[str, str]] = []
    for slot in sorted({int(load.attr or 0) for load in loads}):
        targets += [(f"{name}{slot}", "pointer") for name in ("totals", "per_one", "d_b")]
        targets += [(f"d_b{slot}_s{d}", "stride") for d in range(pairs.program.buffers[slot].rank)]

    def add(inner: Printer, i: int, value: str) -> str:
        slot, outside = loads[i].attr, inner.outside([loads[i]])
        at = " + ".join(f"{inner.name(index)} * d_b{slot}_s{d}" for d, index in enumerate(loads[i].args))
        value = f"tl.where({outside}, 0.0, {value})" if outside else value
        varies = ", ".join(str(any(reads(x, name) for x in loads[i].args)) for name in ("q_idx", "kv_idx"))
        return f"add_at(totals{slot}, d_b{slot}, tl.load(per_one{slot}), {at}, {value}, {varies})"

    sweep = replace(_SWEEP, results=())
    on, holes, arguments = swept(
        sweep, pairs, scale, found, found.scattered, lists, mend=False, add=add, targets=tuple(targets)
    )
    on = (on | {"last_first", "scatter"} | ({"ragged"} if "packed" in on else set())) - {"slope"}
    holes |= {"name": "scatter", "given_to": "captured tensors", "About": "What captured tensors get"}
    return whole(TILES + ADD_AT + render(DQ, on, filled(on, holes))), arguments
