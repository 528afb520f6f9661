"""What scores add to captured tensors that are indexed by both queries and keys."""

from __future__ import annotations

from attnkit.backends.triton.pairs import Pairs
from attnkit.backends.triton.parts import LOGITS, QUERIES, TILES
from attnkit.backends.triton.slopes import D_LOGIT, WEIGHTS, Sums, dropout_arguments, recomputed
from attnkit.backends.triton.source import Arguments, part, render, whole

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
        $weights
        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
        #if dropout
        word, _, _, _ = tl.philox(tl.load(seed_at), {counter})
        d_weights = tl.where(word >= dropped_below, d_weights * kept_times, 0.0)
        #end
        $d_logit
        d_logit = tl.where(exists, d_logit, 0.0)
        $sums
    to = d_buffer + {where}
    inside = q_live[:, None] & (start + lanes < kv_len_most)[None, :] & {within}
    tl.store(to, tl.load(to, mask=inside, other=0.0) + found, mask=inside)
'''


def of_pairs(pairs: Pairs, scale: float, found: Sums, which: int) -> tuple[str, Arguments]:
    """The text of the kernel ``attend_pairs`` for one load of ``found.of_pairs``, and its arguments."""
    load, slope = found.of_pairs[which]
    inner = pairs.printer()
    flags, holes = recomputed(
        pairs, inner, scale, found, ((load, slope),), lambda inner, i, value: f"found += {value}"
    )
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
        *(dropout_arguments(flags)), *captured,
    )  # fmt: skip
    holes |= {
        **QUERIES, "arguments": "".join(f"{name}, " for name, _ in arguments).rstrip(),
        "within": " & ".join(f"({i} < d_buffer_n{d})" for d, i in enumerate(index)),
        "where": " + ".join(f"{i} * d_buffer_s{d}" for d, i in enumerate(index)),
    }  # fmt: skip
    holes |= {"log_sums": "log_sum[:, None]", "deltas": "of_row[:, None]"}
    for name, template in (("logits", LOGITS), ("weights", WEIGHTS), ("d_logit", D_LOGIT)):
        holes[name] = part(template, flags, holes)
    return whole(TILES + render(PAIRS, flags, holes)), arguments
