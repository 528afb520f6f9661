"""Tokens go to the end of each row of a cache on the device: the codes are those that the CPU engine writes, in rows.

Codes and elements lie as ``[outer, H, tokens, D]``, outer being batch entries or pages; a row of int8 codes has a bfloat16 scale,
a head of fp8 codes a float32 one. No host waits for the device: what there is no room for is not written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from attnkit.backends.triton import launch
from attnkit.backends.triton.parts import TILES, padded
from attnkit.backends.triton.schedule import WARPS
from attnkit.backends.triton.source import Arguments, part, render, whole

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
    #if int8
    scale_at = {x}_scales + head * {x}_scales_sh + outer * {x}_scales_so + slots * {x}_scales_ss
    x = codes_int8(x, scale_at, live)
    #end
    #if fp8
    x = codes_fp8(x, tl.load({x}_scales + head))
    #end
    rows = outer * {x}_codes_so + slots * {x}_codes_ss
    store_tile({x}_codes + head * {x}_codes_sh, rows, 1, {x}_codes_sd, live, x, {X}_WIDTH, {X}_PADDED)
"""
CODES = {
    "int8": '''
@triton.jit
def codes_int8(x, scale_at, live):
    """Codes from -127 to 127, ties away from 0; the scale, in bfloat16, of a row with something that is no number is none."""
    size = tl.abs(x)
    none = tl.max((~(size < float("inf"))).to(tl.int32), 1) > 0
    size = tl.where(none[:, None], 0.0, size)
    bits = (tl.max(size, 1).to(tl.float64) / 127.0).to(tl.float32).to(tl.int32, bitcast=True)
    bits = tl.where(none, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
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
    """Where keys or values are kept: the codec's name (any other than these two is plain), codes or elements, and their scales."""

    codec: str
    codes: Any
    scales: Any | None


def source(codecs: tuple[str, str], paged: bool, ragged: bool) -> tuple[str, Arguments]:
    """The text of the kernel ``append`` for codecs of keys and values, and its arguments."""
    on = {name for name, held in (("paged", paged), ("ragged", ragged)) if held}
    pointers = ["k", "v", "lengths", "k_codes", "v_codes", *["counts"] * ragged, *["table"] * paged]
    pointers += [f"{x}_scales" for x, codec in zip("kv", codecs, strict=True) if codec in CODES]
    strides = [f"{x}_s{d}" for x in "kv" for d in "bhsd"] + [f"{x}_codes_s{d}" for x in "kv" for d in "ohsd"]
    strides += [
        f"{x}_scales_s{d}" for x, codec in zip("kv", codecs, strict=True) if codec == "int8" for d in "ohs"
    ]
    strides += ["table_sb", "table_ss"] * paged
    sizes = ["count", "room", *["pages"] * paged]
    arguments = (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides), *((n, "size") for n in sizes),
    )  # fmt: skip
    holes: dict[str, Any] = {"arguments": "".join(f"{name}, " for name, _ in arguments).rstrip()}
    for x, codec in zip("kv", codecs, strict=True):
        holes[f"put_{x}"] = part(ONE, {codec}, {"x": x, "X": x.upper()})
    helpers = "".join(text for codec, text in CODES.items() if codec in codecs)
    return whole(TILES + helpers + render(APPEND, on, holes)), arguments


_recorded: dict[Any, launch.Recording] = {}


def append(
    new: tuple[Any, Any],
    held: tuple[Held, Held],
    lengths: Any,
    counts: Any | None,
    table: Any | None,
    room: int,
) -> None:
    """Store ``new`` tokens ``[B, H, T, D]`` of keys and of values behind the ``lengths [B]`` of each row, on the current stream.

    Args:
        new: float32, bfloat16 or float16, on the device of the rest.
        held: where they go.
        lengths: int32; it is not changed.
        counts: int32 ``[B]``, how many of a row's tokens exist; None: all of them do.
        table: int32 ``[B, n]``, if there are pages.
        room: tokens that a row can hold. What is beyond, or on no page, is not written.
    """
    if new[0].numel() == 0:
        return
    inputs = {"k": new[0], "v": new[1], "lengths": lengths}
    inputs |= {"k_codes": held[0].codes, "v_codes": held[1].codes}
    if counts is not None:
        inputs["counts"] = counts
    if table is not None:
        inputs["table"] = table
    for x, each in zip("kv", held, strict=True):
        if each.codec == "int8":  # rounded to bfloat16 by hand: stored as its bits
            assert each.scales is not None
            inputs[f"{x}_scales"] = each.scales.view(launch.dtype_of(each.scales, "short"))
        elif each.codec == "fp8":
            inputs[f"{x}_scales"] = each.scales
    codecs = held[0].codec, held[1].codec
    key = (lengths.device, codecs, room, *inputs, *launch.signature(inputs.values()))
    found = _recorded.get(key)
    if found is None:
        if len(_recorded) >= _MAX_ENTRIES:
            _recorded.clear()
        found = _recorded[key] = _made(codecs, inputs, room)
    found.run(inputs)


def _made(codecs: tuple[str, str], inputs: dict[str, Any], room: int) -> launch.Recording:
    values: dict[str, Any] = dict(inputs)
    for name, tensor in inputs.items():
        dims = {"k": "bhsd", "v": "bhsd", "table": "bs"}.get(name, "ohsd")
        values |= {f"{name}_s{d}": n for d, n in zip(dims, tensor.stride(), strict=False)}
    k, codes = inputs["k"], inputs["k_codes"]
    batch, heads, count, _ = k.shape
    values |= {"count": count, "room": room, "pages": codes.shape[0]}
    text, arguments = source(codecs, "table" in inputs, "counts" in inputs)
    widths = {"K": k.shape[3], "V": inputs["v"].shape[3]}
    numbers = {"TOKENS": _TOKENS, "PAGE": codes.shape[2] if "table" in inputs else 1}
    numbers |= {f"{x}_WIDTH": n for x, n in widths.items()} | {
        f"{x}_PADDED": padded(n) for x, n in widths.items()
    }
    program = launch.Program(text, "append", arguments, tuple(numbers.items()))
    args = [values[name] for name, _ in arguments]
    grid = (batch, heads, -(-count // _TOKENS))
    target = launch.current_target(WARPS["append_"], 1)
    recording = launch.Recording(inputs, {})
    recording.add(launch.ready(program, target, grid, args), arguments, args)
    recording.finish()
    return recording
