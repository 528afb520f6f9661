"""The gradients: one kernel for dq, one for dk and dv, which recompute the weights from lse; every sum has a fixed order.

The second computes its scores transposed, k . qT: the transpose of a product is nowhere multiplied. What scores add to
captured tensors comes as sums over rows (dq's kernel), over columns (dk's), or pair by pair (`PAIRS`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attnkit.analysis.canonical import fold
from attnkit.analysis.derivative import gradient
from attnkit.backends.triton.pairs import LOG2E, Pairs, number
from attnkit.backends.triton.parts import KEYS, LOGITS, OWNER, QUERIES, TILE, TILES, VISITS
from attnkit.backends.triton.source import Arguments, part, render, whole
from attnkit.ir.expr import Expr, const, topological, var
from attnkit.plan.ranges import reads
from attnkit.plan.triton import Printer

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

# In the loop of a fold: what a pair's logit gets, from its weight.
SLOPES = """
        d_logit = weights * (d_weights - {deltas})
        if PARTIAL:
            d_logit = tl.where(exists, d_logit, 0.0)
        $sums
        #if slope
        d_logit = tl.where(d_logit == 0.0, 0.0, d_logit * {slope_name})
        #end
"""

DQ = '''
@triton.jit
def fold(
    dq, {sums_in}query, d_out, log_sum, of_row, k, v, k_ss, k_sd, v_ss, v_sd, b, h, q_idx, q_len, kv_len, {captured}{dropout}
    {tiles}, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
    CAREFUL: tl.constexpr = False, PARTS: tl.constexpr = 1, STAGES: tl.constexpr = None,
):
    """Adds what `count` tiles of keys, in PARTS, give to dq."""
    lanes = tl.arange(0, TILE_KV)
    for i in tl.range(0, count * PARTS, num_stages=STAGES):
        $tile
        key = load_tile(k + start.to(tl.int64) * k_ss, lanes, k_ss, k_sd, present, HEAD_DIM, PADDED, PARTIAL)
        value = load_tile(v + start.to(tl.int64) * v_ss, lanes, v_ss, v_sd, present, V_HEAD_DIM, V_PADDED, PARTIAL)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        $logits
        #if raw
        weights = tl.exp2(logit * {scale_log2e} - log_sum[:, None])
        #else
        weights = tl.exp2((logit - log_sum[:, None]) * 1.4426950408889634)
        #end
        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        #if dropout
        word, _, _, _ = tl.philox(seed, {counter})
        d_weights = tl.where(word >= dropped_below, d_weights * kept_times, 0.0)
        #end
        $slopes
        dq = add_product(dq, d_logit.to(key.dtype), exists, key, PRECISION, CAREFUL and PARTIAL)
    return dq{sums_out}


@triton.jit
def attend_dq(
    {arguments}
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq of a tile of queries of one head."""
    $owner
    #if mend
    if tl.load(flags + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) == 0:
        return
    #end
    q_rows = tile_of * TILE_Q + tl.arange(0, TILE_Q)
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
    of_row = tl.load(deltas + lse_at)
    k += entry.to(tl.int64) * k_sb + kv_head.to(tl.int64) * k_sh + kv_start.to(tl.int64) * k_ss
    v += entry.to(tl.int64) * v_sb + kv_head.to(tl.int64) * v_sh + kv_start.to(tl.int64) * v_ss
    #if dropout
    seed = tl.load(seed_at)
    #end
    #if sums
    no_sum = tl.zeros([TILE_Q], tl.float32)
    #end
    found = tl.zeros([TILE_Q, PADDED], tl.float32)
    #if mend
    PARTS: tl.constexpr = TILE_KV // 16
    found{sums_lost} = fold(found, {sums_start}{fold_full}, {careful}, False, True, PARTS, 1)
    found{sums_lost} = fold(found, {sums_start}{fold_partial}, {careful}, True, True, PARTS, 1)
    #else
    found{sums_out} = fold(found, {sums_start}{fold_full}, {numbers}, False)
    found{sums_out} = fold(found, {sums_in}{fold_partial}, {numbers}, True)
    tl.store(flags + row.to(tl.int64) * tl.num_programs(1) + heads, has_nan(found).to(tl.int32))
    $store_sums
    #end
    store_tile(
        dq + entry.to(tl.int64) * dq_sb + of_head * dq_sh, rows * dq_ss, 1, dq_sd, q_live, found * {scale}, HEAD_DIM, PADDED
    )
'''

SWEEP = """
        of_head = heads.to(tl.int64)
        q_of = q + entry.to(tl.int64) * q_sb + of_head * q_sh + q_start.to(tl.int64) * q_ss
        d_o_of = d_o + entry.to(tl.int64) * d_o_sb + of_head * d_o_sh + q_start.to(tl.int64) * d_o_ss
        lse_at = entry.to(tl.int64) * lse_sb + of_head * lse_sh + q_start
        #if sums
        no_sum = tl.zeros([TILE_KV], tl.float32)
        #end
        found_k, found_v{sums_out} = fold(found_k, found_v, {sums_start}{fold_full}, {numbers}, False, ONLY, CAREFUL, PARTS, STAGES)
        found_k, found_v{sums_out} = fold(found_k, found_v, {sums_in}{fold_partial}, {numbers}, True, ONLY, CAREFUL, PARTS, STAGES)
        $store_sums
"""

DKV = '''
@triton.jit
def fold(
    dk, dv, {sums_in}key, value, q, d_o, lse, deltas, q_sh, q_ss, q_sd, d_o_sh, d_o_ss, d_o_sd, lse_sh, b, heads, kv_idx,
    q_len, kv_len, {captured}{dropout}{tiles}, HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, V_PADDED: tl.constexpr, PRECISION: tl.constexpr, PARTIAL: tl.constexpr, ONLY: tl.constexpr,
    CAREFUL: tl.constexpr = False, PARTS: tl.constexpr = 1, STAGES: tl.constexpr = None,
):
    """Adds what `count` tiles of queries, in PARTS, give to dk and dv, if ONLY is 1 or 2 to the one or the other.

    Pairs lie as [keys, queries].
    """
    lanes = tl.arange(0, TILE_Q)
    for j in tl.range(0, HEADS * count * PARTS, num_stages=STAGES):
        i = j % (count * PARTS)
        g = (heads * 0 + j // (count * PARTS)).to(tl.int64)
        h = (heads + g).to({int})
        $tile
        q_at = q + g * q_sh + start.to(tl.int64) * q_ss
        d_o_at = d_o + g * d_o_sh + start.to(tl.int64) * d_o_ss
        query = load_tile(q_at, lanes, q_ss, q_sd, present, HEAD_DIM, PADDED, PARTIAL)
        d_out = load_tile(d_o_at, lanes, d_o_ss, d_o_sd, present, V_HEAD_DIM, V_PADDED, PARTIAL)
        row_at = g * lse_sh + start + lanes
        log_sum = tl.load(lse + row_at, mask=present, other=float("inf"))
        log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum{to_raw})  # no weight in a dead row
        of_row = tl.load(deltas + row_at, mask=present, other=0.0)
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        $logits
        #if raw
        weights = tl.exp2(logit * {scale_log2e} - log_sum[None, :])
        #else
        weights = tl.exp2((logit - log_sum[None, :]) * 1.4426950408889634)
        #end
        if PARTIAL:
            weights = tl.where(exists, weights, 0.0)  # lse may be no number, and is not that of keys nobody sees
        d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        #if dropout
        word, _, _, _ = tl.philox(seed, {counter})
        d_weights = tl.where(word >= dropped_below, d_weights * kept_times, 0.0)
        kept = tl.where(word >= dropped_below, weights * kept_times, 0.0).to(d_out.dtype)
        #else
        kept = weights.to(d_out.dtype)
        #end
        if ONLY != 1:
            dv = add_product(dv, kept, exists, d_out, PRECISION, CAREFUL and PARTIAL)
        $slopes
        if ONLY != 2:
            dk = add_product(dk, d_logit.to(query.dtype), exists, query, PRECISION, CAREFUL and PARTIAL)
    return dk, dv{sums_out}


@triton.jit
def group(
    {group_arguments}b, entry, kv_head, kv_rows, tile_of, row, rows, kv_live, {lengths}kv_idx,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, ONLY: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """dk and dv of a tile of keys, from all query heads that share them."""
    found_k = tl.zeros([TILE_KV, PADDED], tl.float32)
    found_v = tl.zeros([TILE_KV, V_PADDED], tl.float32)
    PARTS: tl.constexpr = TILE_Q // 16 if CAREFUL else 1
    STAGES: tl.constexpr = 1 if CAREFUL else None
    #if dropout
    seed = tl.load(seed_at)
    #end
    key = load_tile(k, rows * k_ss, 1, k_sd, kv_live, HEAD_DIM, PADDED, False)
    value = load_tile(v, rows * v_ss, 1, v_sd, kv_live, V_HEAD_DIM, V_PADDED, False)
    #if alike
    HEADS: tl.constexpr = GROUP  # all of them visit the same tiles: one loop
    heads = kv_head * GROUP
    $visits
    $sweep
    #else
    HEADS: tl.constexpr = 1
    for g in tl.range(0, GROUP):
        heads = kv_head * GROUP + g
        h = heads.to({int})
        $visits
        $sweep
    #end
    return found_k, found_v


@triton.jit
def attend_dkv(
    {arguments}
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, ONLY: tl.constexpr,
):
    """dk and dv of a tile of keys of one kv head; if ONLY is 1 or 2, the one or the other."""
    $owner
    #if mend
    if tl.load(flags + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) == 0:
        return
    #end
    kv_rows = tile_of * TILE_KV + tl.arange(0, TILE_KV)
    kv_head = tl.program_id(1)
    kv_live = kv_rows < kv_len
    places = tl.minimum(kv_rows, kv_len - 1)  # what is beyond the last key is the last key again
    kv_idx = places.to({int})[:, None]
    rows = (kv_start + places).to(tl.int64)
    of_head = kv_head.to(tl.int64)
    k += entry.to(tl.int64) * k_sb + of_head * k_sh
    v += entry.to(tl.int64) * v_sb + of_head * v_sh
    #if mend
    found_k, found_v = group({group_call}, ONLY, True)
    #else
    found_k, found_v = group({group_call}, ONLY, False)
    #end
    lost = row * 0
    if ONLY != 2:
        lost += has_nan(found_k).to(tl.int32)
        store_tile(
            dk + entry.to(tl.int64) * dk_sb + of_head * dk_sh, rows * dk_ss, 1, dk_sd, kv_live, found_k * {scale},
            HEAD_DIM, PADDED
        )
    if ONLY != 1:
        lost += has_nan(found_v).to(tl.int32)
        store_tile(
            dv + entry.to(tl.int64) * dv_sb + of_head * dv_sh, rows * dv_ss, 1, dv_sd, kv_live, found_v, V_HEAD_DIM, V_PADDED
        )
    #if not mend
    tl.store(flags + row.to(tl.int64) * tl.num_programs(1) + kv_head, lost)
    #end
'''

PAIRS = '''
@triton.jit
def attend_pairs(
    {arguments}
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):
    """What a tile of pairs adds to a captured tensor that is indexed by both, summed over the heads and sequences it has not."""
    PARTIAL: tl.constexpr = True
    kv_tiles = (kv_len_most + TILE_KV - 1) // TILE_KV
    tile_q, start = tl.program_id(0) // kv_tiles, tl.program_id(0) % kv_tiles * TILE_KV
    q_rows = tile_q * TILE_Q + tl.arange(0, TILE_Q)
    q_live = q_rows < q_len
    places = tl.minimum(q_rows, q_len - 1)
    q_idx = places.to({int})[:, None]
    lanes = tl.arange(0, TILE_KV)
    rows = places.to(tl.int64)
    found = tl.zeros([TILE_Q, TILE_KV], tl.float32)
    for at in tl.range(0, sequences_in * heads_in, num_stages=1):
        b = tl.program_id(2) * sequences_in + at // heads_in
        heads = tl.program_id(1) * heads_in + at % heads_in
        kv_head = (heads // GROUP).to(tl.int64)
        entry = b.to(tl.int64)
        h = heads.to({int})
        of_head = heads.to(tl.int64)
        #if lengths
        kv_len = tl.load(lengths + b)
        #else
        kv_len = kv_len_most
        #end
        present = start + lanes < kv_len
        query = load_tile(q + entry * q_sb + of_head * q_sh, rows * q_ss, 1, q_sd, q_live, HEAD_DIM, PADDED, False)
        d_out = load_tile(d_o + entry * d_o_sb + of_head * d_o_sh, rows * d_o_ss, 1, d_o_sd, q_live, V_HEAD_DIM, V_PADDED, False)
        log_sum = tl.load(lse + entry * lse_sb + of_head * lse_sh + rows)
        log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum{to_raw})
        of_row = tl.load(deltas + entry * lse_sb + of_head * lse_sh + rows)
        k_at = k + entry * k_sb + kv_head * k_sh + start.to(tl.int64) * k_ss
        v_at = v + entry * v_sb + kv_head * v_sh + start.to(tl.int64) * v_ss
        key = load_tile(k_at, lanes, k_ss, k_sd, present, HEAD_DIM, PADDED, True)
        value = load_tile(v_at, lanes, v_ss, v_sd, present, V_HEAD_DIM, V_PADDED, True)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        $logits
        #if raw
        weights = tl.exp2(logit * {scale_log2e} - log_sum[:, None])
        #else
        weights = tl.exp2((logit - log_sum[:, None]) * 1.4426950408889634)
        #end
        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        #if dropout
        word, _, _, _ = tl.philox(tl.load(seed_at), {counter})
        d_weights = tl.where(word >= dropped_below, d_weights * kept_times, 0.0)
        #end
        d_logit = tl.where(exists, weights * (d_weights - of_row[:, None]), 0.0)
        $sums
    to = d_buffer + {where}
    inside = q_live[:, None] & (start + lanes < kv_len_most)[None, :] & {within}
    tl.store(to, tl.load(to, mask=inside, other=0.0) + found, mask=inside)
'''
_DROPOUT = "seed, dropped_below, kept_times, "


@dataclass(frozen=True)
class Sums:
    """The derivative of the score by the logit, and by loads that are summed over rows, over columns, or pair by pair.

    ``of_rows``, ``of_columns`` and ``of_pairs`` hold the loads with the derivative by each.
    """

    slope: Expr
    of_rows: tuple[tuple[Expr, Expr], ...] = ()
    of_columns: tuple[tuple[Expr, Expr], ...] = ()
    of_pairs: tuple[tuple[Expr, Expr], ...] = field(default=())


def sums(pairs: Pairs, wanted: frozenset[int]) -> Sums:
    """The derivatives of a score, with those by its loads from ``wanted`` buffers."""
    score = pairs.attend.score
    loads = [n for n in topological([score]) if n.op == "load" and n.dtype == "float" and n.attr in wanted]
    slope, *of_loads = (fold(root) for root in gradient(score, [var("s"), *loads]))
    kinds: dict[str, list[tuple[Expr, Expr]]] = {"rows": [], "columns": [], "pairs": []}
    for load, slope_of_load in zip(loads, of_loads, strict=True):
        read = {str(arg.attr) for arg in load.args if arg.op == "var"}
        kind = "rows" if "kv_idx" not in read else "pairs" if "q_idx" in read else "columns"
        kinds[kind].append((load, slope_of_load))
    return Sums(slope, *(tuple(found) for found in kinds.values()))


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


def backward(
    kind: str, pairs: Pairs, scale: float, found: Sums, lists: bool, mend: bool = False
) -> tuple[str, Arguments]:
    """The text of the kernel ``attend_dq`` or ``attend_dkv`` (``kind`` is "dq" or "dkv") and its arguments.

    The kernel flags tiles that came out as no number; ``mend`` is the one that makes those again, with care.
    """
    own = QUERIES if kind == "dq" else KEYS
    of_loads = found.of_rows if kind == "dq" else found.of_columns
    inner, outer = pairs.printer(), pairs.printer()
    flags, holes = _common(pairs, inner, scale, found, of_loads)
    alike = not of_loads and (pairs.attend.mask is None or not reads(pairs.attend.mask, "h"))
    packed, lengths = "packed" in flags, "lengths" in flags
    flags |= {
        name
        for name, held in (
            ("lists", lists),
            ("mend", mend),
            ("alike", alike),
            ("sums", bool(of_loads)),
            ("last_first", kind == "dq"),
        )
        if held
    }
    if packed or (lengths and kind == "dkv"):
        flags.add("ragged")
    if not lists and pairs.stretch is None:
        flags.add("unknown")
    roots = [
        root
        for root in (pairs.attend.score, pairs.attend.mask, found.slope, *(g for _, g in of_loads))
        if root
    ]
    captured = pairs.captured(roots)
    names = "".join(f"{name}, " for name, _ in captured)
    dropout = _DROPOUT if "dropout" in flags else ""
    full = "tiles + list_length - 1, -1, full" if lists else "full, whole_first, full, 0"
    partial = "tiles, 1, partial" if lists else "partial, first, whole_first - first, full"
    tensors = {
        "dq": "query, d_out, log_sum, of_row, k, v, k_ss, k_sd, v_ss, v_sd, b, h, q_idx, q_len, kv_len, ",
        "dkv": "key, value, q_of, d_o_of, lse + lse_at, deltas + lse_at, q_sh, q_ss, q_sd, d_o_sh, d_o_ss, d_o_sd, lse_sh, "
        "b, heads, kv_idx, q_len, kv_len, ",
    }[kind]
    narrow = {
        "dq": ("TILE_Q, TILE_KV", "TILE_Q, TILE_KV // PARTS"),
        "dkv": ("HEADS, TILE_Q // PARTS, TILE_KV",) * 2,
    }[kind]
    widths = ", HEAD_DIM, V_HEAD_DIM, PADDED, V_PADDED, PRECISION"
    arguments = _arguments(kind, flags, captured, len(of_loads))
    count = range(len(of_loads))
    sums_names = [f"sum{i}" for i in count]
    axis = {"dq": ("heads", "rows", "q_live"), "dkv": ("heads", "kv_start + kv_rows", "kv_rows < kv_len")}[
        kind
    ]
    store = [
        f"tl.store(sums{i} + entry.to(tl.int64) * sums_sb + {axis[0]}.to(tl.int64) * sums_sh + {axis[1]}, sum{i}, mask={axis[2]})"
        for i in count
    ]
    if kind == "dkv" and store:
        store = ["if ONLY != 2 and not CAREFUL:", *(f"    {line}" for line in store)]
    given = [
        name
        for name, _ in arguments
        if name not in ("dk", "dv", "flags") and not name.startswith(("dk_s", "dv_s"))
    ]
    if packed:
        given = [name for name in given if name not in ("cu_q", "cu_kv", "sequences")]
    elif lengths:
        given.remove("lengths")
    local = [n for n in ("q_len", "kv_len", "q_start", *["kv_start"] * bool(of_loads)) if n not in given]
    holes |= {
        **own, "head": "heads", "times": "", "captured": names, "dropout": dropout,
        "tiles": "tiles, step, count" if lists else "count, first, before, between",
        "fold_full": tensors + names + dropout + full, "fold_partial": tensors + names + dropout + partial,
        "numbers": narrow[0] + widths, "careful": narrow[1] + widths,
        "arguments": "".join(f"{name}, " for name, _ in arguments).rstrip(),
        "sums_in": "".join(f"{n}, " for n in sums_names), "sums_out": "".join(f", {n}" for n in sums_names),
        "sums_start": "no_sum, " * len(of_loads), "sums_lost": ", _" * len(of_loads), "store_sums": store,
        "bounds": [] if lists else pairs.bounds(outer), "deltas": "of_row[:, None]" if kind == "dq" else "of_row[None, :]",
        "group_arguments": "".join(f"{name}, " for name in given), "lengths": "".join(f"{n}, " for n in local),
    }  # fmt: skip
    constants = "TILE_Q, TILE_KV, HEAD_DIM, V_HEAD_DIM, PADDED, V_PADDED, GROUP, PRECISION"
    holes["group_call"] = (
        "".join(f"{name}, " for name in given)
        + f"b, entry, kv_head, kv_rows, tile_of, row, rows, kv_live, {holes['lengths']}kv_idx, {constants}"
    )
    pieces = (
        ("owner", OWNER),
        ("visits", VISITS),
        ("tile", TILE),
        ("logits", LOGITS),
        ("slopes", SLOPES),
        ("sweep", SWEEP),
    )
    holes |= {name: part(template, flags, holes) for name, template in pieces}
    return whole(TILES + render(DQ if kind == "dq" else DKV, flags, holes)), arguments


def of_pairs(pairs: Pairs, scale: float, found: Sums, which: int) -> tuple[str, Arguments]:
    """The text of the kernel ``attend_pairs`` for one load of ``found.of_pairs``, and its arguments."""
    load, slope = found.of_pairs[which]
    inner = pairs.printer()
    flags, holes = _common(pairs, inner, scale, found, ((load, slope),))
    captured = pairs.captured(
        [root for root in (pairs.attend.score, pairs.attend.mask, slope) if root is not None]
    )
    names = {
        "q_idx": "rows[:, None]",
        "kv_idx": "(start + lanes)[None, :]",
        "h": "tl.program_id(1)",
        "b": "tl.program_id(2)",
    }
    index = [str(arg.attr) if arg.op == "const" else names[str(arg.attr)] for arg in load.args]
    pointers = ["q", "k", "v", "d_o", "lse", "deltas", "d_buffer", *["lengths"] * ("lengths" in flags)]
    pointers += ["seed_at"] * ("dropout" in flags)
    strides = [f"{x}_s{d}" for x in ("q", "k", "v", "d_o") for d in "bhsd"] + [
        f"d_buffer_s{d}" for d in range(len(index))
    ]
    sizes = ["lse_sb", "lse_sh", "q_len", "kv_len_most", "heads_in", "sequences_in"]
    sizes += [f"d_buffer_n{d}" for d in range(len(index))]
    arguments = (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides), *((n, "size") for n in sizes),
        *(_dropout_arguments(flags)), *captured,
    )  # fmt: skip
    holes |= {
        **QUERIES, "arguments": "".join(f"{name}, " for name, _ in arguments).rstrip(),
        "within": " & ".join(f"({i} < d_buffer_n{d})" for d, i in enumerate(index)),
        "where": " + ".join(f"{i} * d_buffer_s{d}" for d, i in enumerate(index)),
    }  # fmt: skip
    holes["sums"] = [
        line.replace("tl.sum(", "(").replace(", 1)", ")").replace("sum0", "found") for line in holes["sums"]
    ]
    holes["logits"] = part(LOGITS, flags, holes)
    return whole(TILES + render(PAIRS, flags, holes)), arguments


Holes = dict[str, list[str] | str]


def _common(
    pairs: Pairs, inner: Printer, scale: float, found: Sums, of_loads: tuple[tuple[Expr, Expr], ...]
) -> tuple[set[str], Holes]:
    """The flags and holes of everything that recomputes weights."""
    kv = pairs.program.inputs[pairs.attend.k]
    score, score_name = pairs.score(inner)
    score += inner.lines([found.slope, *(root for _, root in of_loads)])
    lines: list[str] = []
    for i, (_, root) in enumerate(of_loads):
        value = (
            "d_logit"
            if root is const(1.0)
            else f"tl.where(d_logit == 0.0, 0.0, d_logit * {inner.name(root)})"
        )
        lines.append(f"sum{i} += tl.sum({value}, 1)")
    has_slope = found.slope is not const(1.0)
    mask, exists, poison = pairs.mask(inner)
    raw = pairs.raw(scale)
    flags = {
        "score": pairs.has_score, "raw": raw, "indices": pairs.reads_indices, "slope": has_slope, "packed": kv.kind == "packed",
        "lengths": kv.kind == "padded", "dropout": pairs.attend.dropout is not None,
    }  # fmt: skip
    holes: Holes = {
        "counter": pairs.counter, "int": "tl.int64" if pairs.wide else "tl.int32", "score": score, "score_name": score_name, "mask": mask,
        "exists": exists, "poison": poison, "scale": number(scale), "scale_log2e": number(scale * LOG2E),
        "to_raw": f" * {LOG2E}" if raw else "", "slope_name": inner.name(found.slope) if has_slope else "", "sums": lines,
    }  # fmt: skip
    return {name for name, held in flags.items() if held}, holes


def _arguments(kind: str, on: set[str], captured: Arguments, sums: int) -> Arguments:
    results = ["dq"] if kind == "dq" else ["dk", "dv"]
    pointers = ["q", "k", "v", "d_o", "lse", "deltas", "flags", *results, *(f"sums{i}" for i in range(sums))]
    pointers += (
        ["cu_q", "cu_kv"] * ("packed" in on)
        + ["lengths"] * ("lengths" in on)
        + ["lists", "counts"] * ("lists" in on)
    )
    pointers += ["seed_at"] * ("dropout" in on)
    strides = [f"{x}_s{d}" for x in ("q", "k", "v", "d_o", *results) for d in "bhsd"]
    sizes = ["lse_sb", "lse_sh"] + ["sums_sb", "sums_sh"] * bool(sums)
    sizes += ["list_length", "list_sb", "list_sh"] * ("lists" in on)
    own = "q" if kind == "dq" else "kv"
    sizes += (
        ["sequences"] if "packed" in on else [f"{own}_tiles", "q_len", *["kv_len"] * ("lengths" not in on)]
    )
    return (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides), *((n, "size") for n in sizes),
        *_dropout_arguments(on), *captured,
    )  # fmt: skip


def _dropout_arguments(on: set[str]) -> Arguments:
    return (("dropped_below", "size"), ("kept_times", "float")) if "dropout" in on else ()
