"""The forward kernel: a tile of queries reads the tiles of keys that it can see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnkit.backends.triton.pairs import LOG2E, Pairs, number
from attnkit.backends.triton.parts import LOGITS, OWNER, QUERIES, TILE, TILES, VISITS
from attnkit.backends.triton.source import Arguments, part, render, whole
from attnkit.ir.program import Layout, Program

FORWARD = '''
@triton.jit
def fold(
    acc, top, total, query, k, v, k_ss, k_sd, v_ss, v_sd, b, h, q_idx, q_len, kv_len, {captured}{storage}{dropout}
    {tiles}, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
    CAREFUL: tl.constexpr = False, PARTS: tl.constexpr = 1, STAGES: tl.constexpr = None,
):
    """Folds `count` tiles of keys, in PARTS, into a tile of queries: weighted sums, largest logits, sums of weights."""
    lanes = tl.arange(0, TILE_KV)
    for i in tl.range(0, count * PARTS, num_stages=STAGES):
        $tile
        #if paged
        page = tl.load(table + (start + lanes) // PAGE * table_ss, mask=present, other=0).to(tl.int64)
        slots = (start + lanes) % PAGE
        key = load_tile(k, page * k_sp + slots * k_ss, 1, k_sd, present, HEAD_DIM, PADDED, PARTIAL)
        value = load_tile(v, page * v_sp + slots * v_ss, 1, v_sd, present, V_HEAD_DIM, V_PADDED, PARTIAL)
        #else
        key = load_tile(k + start.to(tl.int64) * k_ss, lanes, k_ss, k_sd, present, HEAD_DIM, PADDED, PARTIAL)
        value = load_tile(v + start.to(tl.int64) * v_ss, lanes, v_ss, v_sd, present, V_HEAD_DIM, V_PADDED, PARTIAL)
        #end
        #if encoded
        #if fp8
        key, value = number(key, query.dtype), number(value, query.dtype)
        #else
        key, value = key.to(query.dtype), value.to(query.dtype)  # small integers: exact
        #end
        #if paged
        of_keys = k_scales + page * k_scales_sp + slots * k_scales_ss
        of_values = v_scales + page * v_scales_sp + slots * v_scales_ss
        #else
        of_keys = k_scales + (start + lanes).to(tl.int64) * k_scales_ss
        of_values = v_scales + (start + lanes).to(tl.int64) * v_scales_ss
        #end
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        s *= tl.load(of_keys, mask=present, other=0.0).to(tl.float32)[None, :]
        #else
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        #end
        $logits
        #if raw
        above = tl.maximum(top, tl.max(logit, 1) * {scale_log2e})  # base 2, until all is folded
        pivot = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(logit * {scale_log2e} - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        #else
        above = tl.maximum(top, tl.max(logit, 1))
        pivot = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2((logit - pivot[:, None]) * 1.4426950408889634)
        shrink = tl.exp2((top - pivot) * 1.4426950408889634)
        #end
        total = total * shrink + tl.sum(weights, 1)
        #if dropout
        word, _, _, _ = tl.philox(seed, {counter})
        weights = tl.where(word >= dropped_below, weights, 0.0)
        #end
        acc *= shrink[:, None]
        #if encoded
        weights *= tl.load(of_values, mask=present, other=0.0).to(tl.float32)[None, :]
        if PARTIAL:
            weights = tl.where(exists, weights, 0.0)  # a scale may be no number: codes are numbers
        #end
        weights = weights.to(value.dtype)
        acc = add_product(acc, weights, exists, value, PRECISION, CAREFUL and PARTIAL)
        top = above
    return acc, top, total


@triton.jit
def attend(
    {arguments}
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, V_PADDED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,{constants}
):
    """o and lse of a tile of queries of one head."""
    $owner
    #if mend
    if tl.load(flags + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) == 0:
        return
    #end
    #if grouped
    kv_head = tl.program_id(1)
    q_live = q_rows < q_len * GROUP
    heads = kv_head * GROUP + q_rows % GROUP
    places = tl.minimum(q_rows // GROUP, q_len - 1)  # what is beyond the last query is the last query again
    h = heads.to({int})[:, None]
    #else
    heads = tl.program_id(1)
    kv_head = heads // GROUP
    q_live = q_rows < q_len
    places = tl.minimum(q_rows, q_len - 1)  # what is beyond the last query is the last query again
    h = heads.to({int})
    #end
    q_idx = places.to({int})[:, None]
    $visits
    q_at = heads.to(tl.int64) * q_sh + (q_start + places).to(tl.int64) * q_ss
    query = load_tile(q + entry.to(tl.int64) * q_sb, q_at, 1, q_sd, q_live, HEAD_DIM, PADDED, False)
    #if paged
    k += kv_head.to(tl.int64) * k_sh
    v += kv_head.to(tl.int64) * v_sh
    #if encoded
    k_scales += kv_head.to(tl.int64) * k_scales_sh
    v_scales += kv_head.to(tl.int64) * v_scales_sh
    #end
    table += b.to(tl.int64) * table_sb
    #else
    k += entry.to(tl.int64) * k_sb + kv_head.to(tl.int64) * k_sh + kv_start.to(tl.int64) * k_ss
    v += entry.to(tl.int64) * v_sb + kv_head.to(tl.int64) * v_sh + kv_start.to(tl.int64) * v_ss
    #if encoded
    k_scales += entry.to(tl.int64) * k_scales_sb + kv_head.to(tl.int64) * k_scales_sh
    v_scales += entry.to(tl.int64) * v_scales_sb + kv_head.to(tl.int64) * v_scales_sh
    k_scales += kv_start.to(tl.int64) * k_scales_ss
    v_scales += kv_start.to(tl.int64) * v_scales_ss
    #end
    #end
    #if dropout
    seed = tl.load(seed_at)
    #end
    acc = tl.zeros([ROWS, V_PADDED], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    #if mend
    PARTS: tl.constexpr = TILE_KV // 16
    acc, top, total = fold(acc, top, total, {fold_full}, {careful}, False, True, PARTS, 1)
    acc, top, total = fold(acc, top, total, {fold_partial}, {careful}, True, True, PARTS, 1)
    #else
    acc, top, total = fold(acc, top, total, {fold_full}, {numbers}, False)
    acc, top, total = fold(acc, top, total, {fold_partial}, {numbers}, True)
    #if flag
    tl.store(flags + row.to(tl.int64) * tl.num_programs(1) + heads, has_nan(acc).to(tl.int32))
    #else
    #if not numbers
    if has_nan(acc):  # rare: again, in narrow tiles, with care where there are pairs that do not exist
        PARTS: tl.constexpr = TILE_KV // 16
        acc = tl.zeros([ROWS, V_PADDED], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc, top, total = fold(acc, top, total, {fold_full}, {careful}, False, True, PARTS, 1)
        acc, top, total = fold(acc, top, total, {fold_partial}, {careful}, True, True, PARTS, 1)
    #end
    #end
    #end
    #if raw
    top *= 0.6931471805599453
    #end
    #if sink
    sink = tl.load(sinks + heads).to(tl.float32)
    above = tl.maximum(top, sink)
    pivot = tl.where(above == float("-inf"), 0.0, above)
    shrink = tl.exp2((top - pivot) * 1.4426950408889634)
    total = total * shrink + tl.exp2((sink - pivot) * 1.4426950408889634)
    acc *= shrink[:, None]
    top = above
    #end
    #if dropout
    acc *= kept_times
    #end
    #if split
    o += tl.program_id(2).to(tl.int64) * o_split
    #else
    dead = total == 0.0
    acc = tl.where(dead[:, None], 0.0, acc / tl.where(dead, 1.0, total)[:, None])
    #end
    o_at = heads.to(tl.int64) * o_sh + (q_start + places).to(tl.int64) * o_ss
    store_tile(o + entry.to(tl.int64) * o_sb, o_at, 1, o_sd, q_live, acc, V_HEAD_DIM, V_PADDED)
    #if lse
    lse_at = entry.to(tl.int64) * lse_sb + heads.to(tl.int64) * lse_sh + (q_start + places)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    tl.store(lse + lse_at, pivot + tl.log(total), mask=q_live)
    #end
    #if split
    row_at = tl.program_id(2).to(tl.int64) * row_split + entry.to(tl.int64) * row_sb + heads.to(tl.int64) * row_sh
    tl.store(tops + row_at + (q_start + places), top, mask=q_live)
    tl.store(totals + row_at + (q_start + places), total, mask=q_live)
    #end
'''
# Codes as numbers, but for their scale; bytes are e4m3.
NUMBER = '''
@triton.jit
def number(codes, dtype: tl.constexpr):
    """What codes mean: exact in 16 bits."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # the bias of exponents is 8 more in float16
        found = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    else:
        found = codes.to(dtype)
    return found

'''


@dataclass(frozen=True)
class Shape:
    """What of a call decides which lines a forward kernel has.

    ``grouped``: the query heads that share a kv head are rows of one tile; ``split``: the keys are split between programs,
    which leave weighted sums, largest logits and sums of weights to merge; ``lists``: the tiles to visit stand in lists. What came out as no number is made again with
    care: by the kernel itself (``care`` is ``""``), or it says so (``"flag"``) to a second one (``"mend"``).
    """

    need_lse: bool = True
    grouped: bool = False
    split: bool = False
    lists: bool = False
    care: Literal["", "flag", "mend"] = ""


def forward(pairs: Pairs, scale: float, shape: Shape) -> tuple[str, Arguments]:
    """The text of the forward kernel ``attend`` and its arguments."""
    attend = pairs.attend
    kv: Layout = pairs.program.inputs[attend.k]
    codecs = codecs_of(pairs.program)
    fp8 = "fp8" in codecs
    roots = [root for root in (attend.score, attend.mask) if root is not None]
    captured = pairs.captured(roots)
    flags = {
        "lse": shape.need_lse, "grouped": shape.grouped, "split": shape.split, "lists": shape.lists,
        "score": pairs.has_score, "raw": pairs.raw(scale), "indices": pairs.reads_indices, "sink": attend.normalizer.sink is not None,
        "dropout": attend.dropout is not None, "packed": kv.kind == "packed", "paged": kv.kind == "paged",
        "encoded": any(codecs), "fp8": fp8, "numbers": are_numbers(codecs), "lengths": kv.kind in ("padded", "paged"),
    }  # fmt: skip
    flags["sink"] &= not shape.split
    flags["ragged"] = flags["packed"]
    flags["last_first"] = True
    flags["unknown"] = not shape.lists and pairs.stretch is None
    on = {name for name, held in flags.items() if held} | {shape.care}
    inner, outer = pairs.printer(), pairs.printer()
    score, score_name = pairs.score(inner)
    mask, exists, poison = pairs.mask(inner)
    paged, encoded = "paged" in on, "encoded" in on
    storage = ["table", "table_ss", "k_sp", "v_sp"] * paged
    storage += ["k_scales", "v_scales", "k_scales_ss", "v_scales_ss"] * encoded
    storage += ["k_scales_sp", "v_scales_sp"] * (paged and encoded) + ["PAGE"] * paged
    dropout = "seed, dropped_below, " if "dropout" in on else ""
    names = "".join(f"{name}, " for name, _ in captured)
    tiles = "tiles, step, count" if shape.lists else "count, first, before, between"
    full = "tiles + list_length - 1, -1, full" if shape.lists else "full, whole_first, full, 0"
    partial = "tiles, 1, partial" if shape.lists else "partial, first, whole_first - first, full"
    common = f"query, k, v, k_ss, k_sd, v_ss, v_sd, b, h, q_idx, q_len, kv_len, {names}"
    common += "".join(f"{name}, " for name in storage) + dropout
    numbers = "ROWS, {}, HEAD_DIM, V_HEAD_DIM, PADDED, V_PADDED, PRECISION"
    arguments = _arguments(on, captured)
    constants = [f" {name}: tl.constexpr," for name in ("SPLIT_KV",) * shape.split + ("PAGE",) * paged]
    holes: dict[str, list[str] | str] = {
        "counter": pairs.counter,
        "int": "tl.int64" if pairs.wide else "tl.int32",
        "captured": names, "dropout": dropout, "tiles": tiles,
        "storage": "".join(f"{name}, " for name in storage).replace("PAGE", "PAGE: tl.constexpr"),
        "score": score, "score_name": score_name, "mask": [*mask], "exists": exists, "poison": poison,
        "scale": number(scale), "scale_log2e": number(scale * LOG2E),
        "fold_full": common + full, "fold_partial": common + partial,
        "numbers": numbers.format("TILE_KV"), "careful": numbers.format("TILE_KV // PARTS"),
        "arguments": "".join(f"{name}, " for name, _ in arguments).rstrip(), "constants": "".join(constants),
        "bounds": [] if shape.lists else pairs.bounds(outer), **QUERIES, "head": "heads", "times": " * GROUP" if shape.grouped else "",
    }  # fmt: skip
    pieces = (("owner", OWNER), ("visits", VISITS), ("tile", TILE), ("logits", LOGITS))
    holes |= {name: part(template, on, holes) for name, template in pieces}
    return whole(TILES + NUMBER * fp8 + render(FORWARD, on, holes)), arguments


def codecs_of(program: Program) -> tuple[str, str]:
    """The names of the codecs of keys and of values; empty of those that are no codes."""
    k, v = (program.inputs[i].codec for i in (program.attend.k, program.attend.v))
    return "" if k is None else k.name, "" if v is None else v.name


def are_numbers(codecs: tuple[str, str]) -> bool:
    """Whether keys and values are numbers whatever is in memory."""
    return codecs == ("int8", "int8")


def _arguments(on: set[str], captured: Arguments) -> Arguments:
    pointers = ["q", "k", "v", "o", *["lse"] * ("lse" in on), *["sinks"] * ("sink" in on)]
    pointers += (
        ["k_scales", "v_scales"] * ("encoded" in on)
        + ["tops", "totals"] * ("split" in on)
        + ["seed_at"] * ("dropout" in on)
    )
    pointers += (
        ["cu_q", "cu_kv"] * ("packed" in on) + ["lengths"] * ("lengths" in on) + ["table"] * ("paged" in on)
    )
    pointers += ["lists", "counts"] * ("lists" in on) + ["flags"] * bool(on & {"flag", "mend"})
    kv = "ph" if "paged" in on else "bh"
    strides = [
        f"{x}_s{d}"
        for x, dims in (("q", "bhsd"), ("k", kv + "sd"), ("v", kv + "sd"), ("o", "bhsd"))
        for d in dims
    ]
    strides += [f"{x}_scales_s{d}" for x in "kv" for d in kv + "s"] * ("encoded" in on)
    sizes = ["lse_sb", "lse_sh"] * ("lse" in on) + ["o_split", "row_split", "row_sb", "row_sh"] * (
        "split" in on
    )
    strides += ["table_sb", "table_ss"] * ("paged" in on)
    sizes += ["list_length", "list_sb", "list_sh"] * ("lists" in on)
    sizes += ["sequences"] if "packed" in on else ["q_tiles", "q_len"]
    sizes += [] if on & {"packed", "lengths"} else ["kv_len"]
    sizes += ["dropped_below"] * ("dropout" in on)
    found = [(name, "pointer") for name in pointers] + [(name, "stride") for name in strides]
    found += [(name, "size") for name in sizes] + [("kept_times", "float")] * ("dropout" in on)
    return (*found, *captured)
