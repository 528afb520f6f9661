"""The gradient of queries: a tile of them reads again the tiles of keys that it saw."""

from __future__ import annotations

from attnkit.backends.triton.pairs import Pairs
from attnkit.backends.triton.parts import QUERIES, TILES
from attnkit.backends.triton.slopes import Sums, Sweep, filled, swept
from attnkit.backends.triton.source import Arguments, render, whole

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
    tl.store(flags + row.to(tl.int64) * tl.num_programs(1) + heads, has_nan(found).to(tl.int32))
    $store_sums
    #end
    store_tile(
        dq + entry.to(tl.int64) * dq_sb + of_head * dq_sh, rows * dq_ss, 1, dq_sd, q_live, found * {scale}, HEAD_DIM, PADDED
    )
'''
_SWEEP = Sweep(
    QUERIES, ("dq",),
    tensors="query, d_out, log_sum, of_row, k, v, k_ss, k_sd, v_ss, v_sd, b, h, q_idx, q_len, kv_len, ",
    numbers="ROWS, TILE_KV", careful="ROWS, TILE_KV // PARTS",
    deltas="of_row[:, None]", row="rows", live="q_live",
)  # fmt: skip


def dq(pairs: Pairs, scale: float, found: Sums, lists: bool, mend: bool = False) -> tuple[str, Arguments]:
    """The text of the kernel ``attend_dq`` and its arguments.

    It flags tiles that came out as no number; with ``mend`` it is the kernel that makes those again, with care.
    """
    on, holes, arguments = swept(_SWEEP, pairs, scale, found, found.of_rows, lists, mend)
    on |= {"last_first"} | ({"ragged"} if "packed" in on else set())
    return whole(TILES + render(DQ, on, filled(on, holes))), arguments
