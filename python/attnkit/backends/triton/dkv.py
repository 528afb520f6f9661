"""The gradients of keys and values: a tile of them reads the tiles of queries that saw it.

Scores are computed transposed, k . qT: the transpose of a product is nowhere multiplied.
"""

from __future__ import annotations

from attnkit.backends.triton.pairs import Pairs
from attnkit.backends.triton.parts import KEYS, TILES
from attnkit.backends.triton.slopes import Sums, Sweep, filled, swept
from attnkit.backends.triton.source import Arguments, render, whole
from attnkit.plan.ranges import reads

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
        $weights
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
_SWEEP = Sweep(
    KEYS, ("dk", "dv"),
    tensors="key, value, q_of, d_o_of, lse + lse_at, deltas + lse_at, q_sh, q_ss, q_sd, d_o_sh, d_o_ss, d_o_sd, lse_sh, "
    "b, heads, kv_idx, q_len, kv_len, ",
    numbers="HEADS, TILE_Q // PARTS, TILE_KV", careful="HEADS, TILE_Q // PARTS, TILE_KV",
    log_sums="log_sum[None, :]", deltas="of_row[None, :]", row="kv_start + kv_rows", live="kv_rows < kv_len",
)  # fmt: skip
_CONSTANTS = "TILE_Q, ROWS, HEAD_DIM, V_HEAD_DIM, PADDED, V_PADDED, GROUP, PRECISION"
_STORED = ("dk", "dv", "flags", "dk_s", "dv_s")  # arguments, by how they begin, that `group` does not see


def dkv(pairs: Pairs, scale: float, found: Sums, lists: bool, mend: bool = False) -> tuple[str, Arguments]:
    """The text of the kernel ``attend_dkv`` and its arguments; flags and ``mend`` as `dq.dq` has them."""
    of_loads = found.of_columns
    on, holes, arguments = swept(_SWEEP, pairs, scale, found, of_loads, lists, mend)
    on |= {"ragged"} if on & {"packed", "lengths"} else set()
    on |= (
        {"alike"}
        if not of_loads and (pairs.attend.mask is None or not reads(pairs.attend.mask, "h"))
        else set()
    )
    if of_loads:
        holes["store_sums"] = [
            "if ONLY != 2 and not CAREFUL:",
            *(f"    {line}" for line in holes["store_sums"]),
        ]
    known = {"cu_q", "cu_kv", "sequences"} if "packed" in on else {"lengths"} if "lengths" in on else set()
    given = [name for name, _ in arguments if name not in known and not name.startswith(_STORED)]
    local = [n for n in ("q_len", "kv_len", "q_start", *["kv_start"] * bool(of_loads)) if n not in given]
    holes["group_arguments"] = "".join(f"{name}, " for name in given)
    holes["lengths"] = "".join(f"{n}, " for n in local)
    of_tile = "b, entry, kv_head, kv_rows, tile_of, row, rows, kv_live, "
    holes["group_call"] = f"{holes['group_arguments']}{of_tile}{holes['lengths']}kv_idx, {_CONSTANTS}"
    return whole(TILES + render(DKV, on, filled(on, holes, ("sweep", SWEEP)))), arguments
