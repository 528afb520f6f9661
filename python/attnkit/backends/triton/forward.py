"""The forward kernel: a tile of queries reads the tiles of keys that it can see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnkit.backends.triton.pairs import LOG2E, Pairs, number
from attnkit.backends.triton.parts import LOGITS, OWNER, QUERIES, TILE, TILES, VISITS
from attnkit.backends.triton.source import Arguments, part, render, whole
from attnkit.backends.triton.words import BITS, DECODE
from attnkit.ir.program import Codec, Layout, Program

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
        #end
        $read_k
        $read_v
        #if k_scaled
        $scaled_k
        #end
        #if v_scaled
        $scaled_v
        #end
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        #if k_scaled
        s *= tl.load(of_key, mask=present, other=0.0).to(tl.float32)[None, :]
        #end
        $logits
        #if unnormalized
        above = tl.zeros_like(top)  # parts are as heavy as each other
        weights = tl.where(logit == float("-inf"), 0.0, logit)
        total += 1.0
        #else
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
        #end
        #if dropout
        word, _, _, _ = tl.philox(seed, {counter})
        weights = tl.where(word >= dropped_below, weights, 0.0)
        #end
        #if not unnormalized
        acc *= shrink[:, None]
        #end
        #if v_scaled
        weights *= tl.load(of_value, mask=present, other=0.0).to(tl.float32)[None, :]
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
    #if newest
    coded = tl.minimum(tl.load(coded_of + b), kv_len)
    #end
    $visits
    q_at = heads.to(tl.int64) * q_sh + (q_start + places).to(tl.int64) * q_ss
    query = load_tile(q + entry.to(tl.int64) * q_sb, q_at, 1, q_sd, q_live, HEAD_DIM, PADDED, False)
    $base_k
    $base_v
    #if paged
    table += b.to(tl.int64) * table_sb
    #end
    #if dropout
    seed = tl.load(seed_at)
    #end
    acc = tl.zeros([ROWS, V_PADDED], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    #if mend
    PARTS: tl.constexpr = TILE_KV // 16
    acc, top, total = fold(acc, top, total, {fold_full}, {careful}, {cut}, True, PARTS, 1)
    acc, top, total = fold(acc, top, total, {fold_partial}, {careful}, True, True, PARTS, 1)
    #else
    acc, top, total = fold(acc, top, total, {fold_full}, {numbers}, {cut})
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
        acc, top, total = fold(acc, top, total, {fold_full}, {careful}, {cut}, True, PARTS, 1)
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
    #if not unnormalized
    dead = total == 0.0
    acc = tl.where(dead[:, None], 0.0, acc / tl.where(dead, 1.0, total)[:, None])
    #end
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
# Of keys or values ({x} is k or v, {one} a key or value): where those of a sequence and head begin,
BASE = """
    #if paged
    {x} += kv_head.to(tl.int64) * {x}_sh
    #else
    {x} += entry.to(tl.int64) * {x}_sb + kv_head.to(tl.int64) * {x}_sh + kv_start.to(tl.int64) * {x}_ss
    #end
    #if codes
    #if paged
    {x}_scales += kv_head.to(tl.int64) * {x}_scales_sh
    #else
    {x}_scales += entry.to(tl.int64) * {x}_scales_sb + kv_head.to(tl.int64) * {x}_scales_sh
    #if scaled
    {x}_scales += kv_start.to(tl.int64) * {x}_scales_ss
    #end
    #end
    #end
    #if words
    {x}_newest += b.to(tl.int64) * {x}_newest_sb + kv_head.to(tl.int64) * {x}_newest_sh
    #end
"""
# a tile of them,
READ = """
    #if words
    {one} = {one}s_of_words({x}, {x}_scales, start, coded, {pages}, query.dtype, {bits}, {group}, TILE_KV, {WIDTH}, {PADDED}, {page}, PARTIAL)
    if PARTIAL:
        newest = present & (start + lanes >= coded)
        held = load_tile({x}_newest, (start + lanes) % ring * {x}_newest_ss, 1, {x}_newest_sd, newest, {WIDTH}, {PADDED}, True)
        {one} = tl.where(newest[:, None], held.to(query.dtype), {one})
    #else
    #if paged
    {one} = load_tile({x}, page * {x}_sp + slots * {x}_ss, 1, {x}_sd, present, {WIDTH}, {PADDED}, PARTIAL)
    #else
    {one} = load_tile({x} + start.to(tl.int64) * {x}_ss, lanes, {x}_ss, {x}_sd, present, {WIDTH}, {PADDED}, PARTIAL)
    #end
    #end
"""
# and the factors of codes that have one for each row.
SCALED = """
    #if fp8
    {one} = number({one}, query.dtype)
    #else
    {one} = {one}.to(query.dtype)  # small integers: exact
    #end
    #if paged
    of_{one} = {x}_scales + page * {x}_scales_sp + slots * {x}_scales_ss
    #else
    of_{one} = {x}_scales + (start + lanes).to(tl.int64) * {x}_scales_ss
    #end
"""
# Codes as numbers, but for their scale: bytes of e4m3.
NUMBER = '''
@triton.jit
def number(codes, dtype: tl.constexpr):
    """What codes mean: exact in 16 bits."""
    bits = codes.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # the bias of exponents is 8 more in float16
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float16, bitcast=True) * 256.0).to(dtype)

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
    codecs = {x: pairs.program.inputs[i].codec for x, i in (("k", attend.k), ("v", attend.v))}
    kinds = {x: kinds_of(codec) for x, codec in codecs.items()}
    roots = [root for root in (attend.score, attend.mask) if root is not None]
    captured = pairs.captured(roots)
    flags = {
        "lse": shape.need_lse, "grouped": shape.grouped, "split": shape.split, "lists": shape.lists,
        "score": pairs.has_score, "raw": pairs.raw(scale), "unnormalized": attend.unnormalized, "indices": pairs.reads_indices, "sink": attend.normalizer.sink is not None,
        "dropout": attend.dropout is not None, "packed": kv.kind == "packed", "paged": kv.kind == "paged",
        "numbers": are_numbers(codecs_of(pairs.program)), "newest": "words" in kinds["k"] | kinds["v"], "lengths": kv.kind in ("padded", "paged"),
    }  # fmt: skip
    flags["sink"] &= not shape.split
    flags["ragged"] = flags["packed"]
    flags["last_first"] = True
    flags["unknown"] = not shape.lists and pairs.stretch is None
    on = {name for name, held in flags.items() if held} | {shape.care}
    on |= {f"{x}_{kind}" for x, found in kinds.items() for kind in found}
    inner, outer = pairs.printer(), pairs.printer()
    score, score_name = pairs.score(inner)
    mask, exists, poison = pairs.mask(inner)
    paged = "paged" in on
    storage = ["table", "table_ss", "k_sp", "v_sp"] * paged
    for x, found in kinds.items():
        each = "g" if "words" in found else "s"
        storage += [f"{x}_scales", f"{x}_scales_s{each}", *[f"{x}_scales_sp"] * paged] * ("codes" in found)
        storage += [f"{x}_newest", f"{x}_newest_ss", f"{x}_newest_sd"] * ("words" in found)
    storage += ["coded", "ring"] * ("newest" in on) + ["PAGE"] * paged
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
        "cut": str(shape.lists and "newest" in on),  # a list does not tell full tiles of codes
        "bounds": [] if shape.lists else pairs.bounds(outer), **QUERIES, "head": "heads", "times": " * GROUP" if shape.grouped else "",
    }  # fmt: skip
    for x, codec in codecs.items():
        of_side = _names(x, codec, paged)
        for name, template in (("base", BASE), ("read", READ), ("scaled", SCALED)):
            holes[f"{name}_{x}"] = part(template, kinds[x] | on & {"paged"}, of_side)
    pieces = (("owner", OWNER), ("visits", VISITS), ("tile", TILE), ("logits", LOGITS))
    holes |= {name: part(template, on, holes) for name, template in pieces}
    helpers = TILES + NUMBER * ("fp8" in kinds["k"] | kinds["v"]) + DECODE * ("newest" in on)
    return whole(helpers + render(FORWARD, on, holes)), arguments


def _names(x: str, codec: Codec | None, paged: bool) -> dict[str, str]:
    """What fills the lines of keys, or of values."""
    names = ("key", "HEAD_DIM", "PADDED") if x == "k" else ("value", "V_HEAD_DIM", "V_PADDED")
    found = {"x": x} | dict(zip(("one", "WIDTH", "PADDED"), names, strict=True))
    if codec is not None and codec.name in BITS:
        table, of_scales, page = (
            (f"table, table_ss, {x}_sp", f"{x}_scales_sp", "PAGE") if paged else ("None, 0, 0", "0", "0")
        )
        found |= {"bits": str(BITS[codec.name]), "group": str(codec.group), "page": page}
        found["pages"] = f"{table}, {x}_ss, {of_scales}, {x}_scales_sg"
    return found


def kinds_of(codec: Codec | None) -> set[str]:
    """What lines a codec of keys or values needs: ``codes`` are bytes with a factor for each row, or words beside newest tokens."""
    if codec is None:
        return set()
    return {"codes", "words"} if codec.name in BITS else {"codes", "scaled", codec.name}


def beside(program: Program) -> frozenset[str]:
    """The names of the tensors that belong to codes."""
    names = []
    for x, i in (("k", program.attend.k), ("v", program.attend.v)):
        found = kinds_of(program.inputs[i].codec)
        names += [f"{x}_scales"] * ("codes" in found) + [f"{x}_newest", "coded_of"] * ("words" in found)
    return frozenset(names)


def codecs_of(program: Program) -> tuple[str, str]:
    """The names of the codecs of keys and of values; empty of those that are no codes."""
    k, v = (program.inputs[i].codec for i in (program.attend.k, program.attend.v))
    return "" if k is None else k.name, "" if v is None else v.name


def are_numbers(codecs: tuple[str, str]) -> bool:
    """Whether keys and values are numbers whatever is in memory."""
    return codecs == ("int8", "int8")


def _arguments(on: set[str], captured: Arguments) -> Arguments:
    pointers = ["q", "k", "v", "o", *["lse"] * ("lse" in on), *["sinks"] * ("sink" in on)]
    codes = [x for x in "kv" if f"{x}_codes" in on]
    words = [x for x in codes if f"{x}_words" in on]
    pointers += [f"{x}_scales" for x in codes] + [f"{x}_newest" for x in words]
    pointers += ["coded_of"] * ("newest" in on) + ["tops", "totals"] * ("split" in on)
    pointers += ["seed_at"] * ("dropout" in on)
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
    strides += [f"{x}_scales_s{d}" for x in codes for d in kv + ("g" if x in words else "s")]
    strides += [f"{x}_newest_s{d}" for x in words for d in "bhsd"]
    sizes = ["lse_sb", "lse_sh"] * ("lse" in on) + ["o_split", "row_split", "row_sb", "row_sh"] * (
        "split" in on
    )
    strides += ["table_sb", "table_ss"] * ("paged" in on)
    sizes += ["ring"] * ("newest" in on)
    sizes += ["list_length", "list_sb", "list_sh"] * ("lists" in on)
    sizes += ["sequences"] if "packed" in on else ["q_tiles", "q_len"]
    sizes += [] if on & {"packed", "lengths"} else ["kv_len"]
    sizes += ["dropped_below"] * ("dropout" in on)
    found = [(name, "pointer") for name in pointers] + [(name, "stride") for name in strides]
    found += [(name, "size") for name in sizes] + [("kept_times", "float")] * ("dropout" in on)
    return (*found, *captured)
