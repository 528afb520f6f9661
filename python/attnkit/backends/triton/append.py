"""Tokens go to the end of each row of a cache on the device: the codes are those that the CPU engine writes, in rows.

Codes and elements lie as ``[outer, H, tokens, D]``, outer being batch entries or pages; a row of int8 codes has a bfloat16 scale,
a head of fp8 codes a float32 one. int4 and int2 keep the newest tokens, from which groups leave as codes (`words`). No host waits
for the device: what there is no room for is not written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from attnkit.backends.triton import launch, words
from attnkit.backends.triton.parts import TILES, padded
from attnkit.backends.triton.schedule import WARPS
from attnkit.backends.triton.source import Arguments, part, render, whole
from attnkit.backends.triton.words import BF16, BITS, RUN

APPEND = '''
@triton.jit
def append(
    {arguments}
    TOKENS: tl.constexpr, K_WIDTH: tl.constexpr, K_PADDED: tl.constexpr, V_WIDTH: tl.constexpr, V_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Puts a tile of new tokens of one row and head behind those that the row has."""
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    new = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    #if ragged
    count = tl.minimum(count, tl.load(counts + b))
    #end
    place = tl.load(lengths + b) + new
    live = (new < count) & (place >= 0) & (place < room)
    #if paged
    outer = tl.load(table + b * table_sb + place // PAGE * table_ss, mask=live, other=0).to(tl.int64)
    live &= (outer >= 0) & (outer < pages)
    slots = (place % PAGE).to(tl.int64)
    #else
    outer = b
    slots = place.to(tl.int64)
    #end
    $put_k
    $put_v
'''
# What of keys (x is k), or of values.
ONE = """
    {x} += b * {x}_sb + head * {x}_sh
    x = load_tile({x}, new.to(tl.int64) * {x}_ss, 1, {x}_sd, live, {X}_WIDTH, {X}_PADDED, True).to(tl.float32)
    #if words
    last = tl.minimum(count, room - tl.load(lengths + b))
    rows = b * {x}_newest_sb + (place % ring).to(tl.int64) * {x}_newest_ss
    kept = live & (new >= last - ring)
    store_tile({x}_newest + head * {x}_newest_sh, rows, 1, {x}_newest_sd, kept, bf16_bits(x), {X}_WIDTH, {X}_PADDED)
    #else
    #if int8
    scale_at = {x}_scales + head * {x}_scales_sh + outer * {x}_scales_so + slots * {x}_scales_ss
    x = codes_int8(x, scale_at, live)
    #end
    #if fp8
    x = codes_fp8(x, tl.load({x}_scales + head))
    #end
    rows = outer * {x}_codes_so + slots * {x}_codes_ss
    store_tile({x}_codes + head * {x}_codes_sh, rows, 1, {x}_codes_sd, live, x, {X}_WIDTH, {X}_PADDED)
    #end
"""
CODES = {
    "int8": '''
@triton.jit
def codes_int8(x, scale_at, live):
    """Codes from -127 to 127, ties away from 0; the scale, in bfloat16, of a row with something that is no number is none."""
    size = tl.abs(x)
    none = tl.max((~(size < float("inf"))).to(tl.int32), 1) > 0
    size = tl.where(none[:, None], 0.0, size)
    bits = tl.where(none, 0x7FC0, bf16_bits((tl.max(size, 1).to(tl.float64) / 127.0).to(tl.float32)))
    tl.store(scale_at, bits.to(tl.int16), mask=live)
    scale = tl.where(none | (bits == 0), float("inf"), (bits << 16).to(tl.float32, bitcast=True))
    codes = tl.minimum((size.to(tl.float64) / scale.to(tl.float64)[:, None] + 0.5).to(tl.int32), 127)
    return tl.where(x < 0.0, -codes, codes)

''',
    "fp8": '''
@triton.jit
def codes_fp8(x, scale):
    """Bytes of e4m3, ties to even; what is beyond 448 becomes 448."""
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    codes = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # the bias of exponents is 120 less than float32's
    tiny = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # in steps of 2**-9
    codes = tl.where(size < 0.015625, tiny, codes) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return tl.where(x != x, 0x7F, codes)

''',
}
_TOKENS = 16  # of a program
_MAX_ENTRIES = 4096


class Held(NamedTuple):
    """Where keys or values are kept: the codec's name (of none is plain), codes or elements, their scales, the newest tokens."""

    codec: str
    codes: Any
    scales: Any | None
    newest: Any | None


class Leaving(NamedTuple):
    """How many tokens of each row are codes ``before`` and ``after``, int32 ``[B]``: whole groups."""

    before: Any
    after: Any
    group: int


def source(codecs: tuple[str, str], paged: bool, ragged: bool) -> tuple[str, Arguments]:
    """The text of the kernel ``append`` for codecs of keys and values, and its arguments."""
    on = {name for name, held in (("paged", paged), ("ragged", ragged)) if held}
    each = dict(zip("kv", codecs, strict=True))
    newest = [x for x, codec in each.items() if codec in BITS]
    put = [f"{x}_newest" if x in newest else f"{x}_codes" for x in "kv"]
    pointers = ["k", "v", "lengths", *put, *["counts"] * ragged, *["table"] * paged]
    pointers += [f"{x}_scales" for x, codec in each.items() if codec in CODES]
    strides = [f"{x}_s{d}" for x in "kv" for d in "bhsd"]
    strides += [f"{name}_s{d}" for name in put for d in ("bhsd" if name.endswith("newest") else "ohsd")]
    strides += [f"{x}_scales_s{d}" for x, codec in each.items() if codec == "int8" for d in "ohs"]
    strides += ["table_sb", "table_ss"] * paged
    sizes = ["count", "room", *["ring"] * bool(newest), *["pages"] * paged]
    arguments = (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides), *((n, "size") for n in sizes),
    )  # fmt: skip
    holes: dict[str, Any] = {"arguments": "".join(f"{name}, " for name, _ in arguments).rstrip()}
    for x, codec in each.items():
        holes[f"put_{x}"] = part(ONE, {codec, "words"} if x in newest else {codec}, {"x": x, "X": x.upper()})
    helpers = BF16 * ("int8" in codecs or bool(newest))
    helpers += "".join(text for codec, text in CODES.items() if codec in codecs)
    return whole(TILES + helpers + render(APPEND, on, holes)), arguments


_recorded: dict[Any, launch.Recording] = {}


def append(
    new: tuple[Any, Any],
    held: tuple[Held, Held],
    lengths: Any,
    counts: Any | None,
    table: Any | None,
    room: int,
    leaving: Leaving | None = None,
) -> None:
    """Store ``new`` tokens ``[B, H, T, D]`` of keys and of values behind the ``lengths [B]`` of each row, on the current stream.

    Args:
        new: float32, bfloat16 or float16, on the device of the rest.
        held: where they go.
        lengths: int32; it is not changed.
        counts: int32 ``[B]``, how many of a row's tokens exist; None: all of them do.
        table: int32 ``[B, n]``, if there are pages.
        room: tokens that a row can hold. What is beyond, or on no page, is not written.
        leaving: what becomes codes, where the newest tokens are kept.
    """
    if new[0].numel() == 0:
        return
    inputs = {"k": new[0], "v": new[1], "lengths": lengths}
    if counts is not None:
        inputs["counts"] = counts
    if table is not None:
        inputs["table"] = table
    if leaving is not None:
        inputs |= {"before": leaving.before, "after": leaving.after}
    for x, each in zip("kv", held, strict=True):
        inputs[f"{x}_codes"] = each.codes
        if each.scales is not None:  # bfloat16 is rounded by hand, and stored as its bits
            scaled = each.codec != "fp8"
            inputs[f"{x}_scales"] = _bits(each.scales) if scaled else each.scales
        if each.newest is not None:
            inputs[f"{x}_newest"] = _bits(each.newest)
    codecs = held[0].codec, held[1].codec
    group = 0 if leaving is None else leaving.group
    key = (lengths.device, codecs, room, group, *inputs, *launch.signature(inputs.values()))
    found = _recorded.get(key)
    if found is None:
        if len(_recorded) >= _MAX_ENTRIES:
            _recorded.clear()
        found = _recorded[key] = _made(codecs, inputs, room, group)
    found.run(inputs)


def _bits(x: Any) -> Any:
    return x.view(launch.dtype_of(x, "short"))


def _made(codecs: tuple[str, str], inputs: dict[str, Any], room: int, group: int) -> launch.Recording:
    """The launches: groups leave before what follows takes their place."""
    values: dict[str, Any] = dict(inputs)
    known = {"k": "bhsd", "v": "bhsd", "table": "bs", "k_newest": "bhsd", "v_newest": "bhsd"}
    for x, codec in zip("kv", codecs, strict=True):
        known[f"{x}_scales"] = "ohg" if codec in BITS else "ohs"
    for name, tensor in inputs.items():
        values |= {f"{name}_s{d}": n for d, n in zip(known.get(name, "ohsd"), tensor.stride(), strict=False)}
    batch, heads, count, _ = inputs["k"].shape
    codes = inputs["k_codes"]
    page = codes.shape[2] * (RUN if codecs[0] in BITS else 1) if "table" in inputs else 1
    values |= {"count": count, "room": room, "pages": codes.shape[0]}
    widths = {x: inputs[x].shape[3] for x in "kv"}
    steps = []
    for x, codec in zip("kv", codecs, strict=True):
        if codec in BITS:
            values["ring"] = inputs[f"{x}_newest"].shape[2]
            numbers = words.numbers(x, codec, group, widths[x], page)
            made = words.source(x, "table" in inputs)
            steps.append((f"encode_{x}", *made, numbers, words.programs(group, count, numbers)))
    numbers = {"TOKENS": _TOKENS, "PAGE": page}
    numbers |= {f"{x.upper()}_WIDTH": n for x, n in widths.items()}
    numbers |= {f"{x.upper()}_PADDED": padded(n) for x, n in widths.items()}
    made = source(codecs, "table" in inputs, "counts" in inputs)
    steps.append(("append", *made, numbers, -(-count // _TOKENS)))
    target, recording = launch.current_target(WARPS["append_"], 1), launch.Recording(inputs, {})
    for entry, text, arguments, numbers, programs in steps:
        program = launch.Program(text, entry, arguments, tuple(numbers.items()))
        args = [values[name] for name, _ in arguments]
        recording.add(launch.ready(program, target, (batch, heads, programs), args), arguments, args)
    recording.finish()
    return recording
