"""int4 and int2 as the CPU engine lays them out (csrc/cpu/store-inl.h): read a tile at a time, written as groups of tokens leave.

Codes come in words of 32 bits. Of keys a word holds adjacent channels of one token, and the words of 16 tokens lie side by side; of
values it holds adjacent tokens of one channel. A bfloat16 scale and zero belong to `group` tokens of a channel (keys: scales of all
channels, then zeros), or to `group` channels of a token (values: for 32 tokens their scales, then their zeros). The newest tokens are
bfloat16, in a ring of rows; `coded` tokens of a row, a multiple of the group, are in front of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnkit.backends.triton.source import Arguments, render, whole

BITS = {"int4": 4, "int2": 2}
RUN, STRETCH = 16, 32  # tokens whose key words lie side by side; whose value scales do
_ELEMENTS = 1024  # that a program encodes, about

# The first bit of each element of a word.
FIELDS = """
@triton.jit
def key_fields(BITS: tl.constexpr):
    e = tl.arange(0, 32 // BITS)
    return BITS * (e // 4) + e % 4 * 8


@triton.jit
def value_fields(BITS: tl.constexpr):
    e = tl.arange(0, 32 // BITS)
    return BITS * (e // 2) + e % 2 * 16

"""
# What a tile of codes means. SHARE is a part of every group.
DECODE = (
    FIELDS
    + '''
@triton.jit
def shared_at(tokens, live, table, table_ss, outer, stride, EACH: tl.constexpr, PAGE: tl.constexpr):
    """Where that lies which EACH tokens share, in order (PAGE is 0) or in pages."""
    if PAGE == 0:
        at = (tokens // EACH).to(tl.int64) * stride
    else:
        page = tl.load(table + tokens // PAGE * table_ss, mask=live, other=0).to(tl.int64)
        at = page * outer + (tokens % PAGE // EACH).to(tl.int64) * stride
    return at


@triton.jit
def are_coded(tokens, coded, CUT: tl.constexpr):
    """Whether tokens are codes; all of them are, if not CUT."""
    if CUT:
        found = tokens < coded
    else:
        found = tl.full(tokens.shape, True, tl.int1)
    return found


@triton.jit
def keys_of_words(
    k, scales, start, coded, table, table_ss, k_sp, k_ss, scales_sp, scales_ss, dtype: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, CUT: tl.constexpr,
):
    """A tile of keys; zeros from token `coded` on, if CUT."""
    EACH: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (WIDTH + EACH - 1) // EACH
    SHARE: tl.constexpr = TILE if TILE < 32 else 32
    tokens = start + tl.arange(0, TILE)
    live = are_coded(tokens, coded, CUT)
    at = shared_at(tokens, live, table, table_ss, k_sp, k_ss, 16, PAGE) + tokens % 16
    words = tl.arange(0, PADDED // EACH)
    held = tl.load(k + at[:, None] + words[None, :] * 16, mask=live[:, None] & (words < WORDS)[None, :], other=0)
    codes = (held[:, :, None] >> key_fields(BITS)[None, None, :]) & ((1 << BITS) - 1)
    codes = tl.reshape(codes, [TILE // SHARE, SHARE, PADDED]).to(tl.float32)
    tokens = start + tl.arange(0, TILE // SHARE) * SHARE
    live = are_coded(tokens, coded, CUT)
    channels = tl.arange(0, PADDED)
    at = shared_at(tokens, live, table, table_ss, scales_sp, scales_ss, GROUP, PAGE)[:, None] + channels[None, :]
    live = live[:, None] & (channels < WIDTH)[None, :]
    scale = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
    zero = tl.load(scales + at + WORDS * EACH, mask=live, other=0.0).to(tl.float32)
    return tl.reshape(codes * scale[:, None, :] + zero[:, None, :], [TILE, PADDED]).to(dtype)


@triton.jit
def values_of_words(
    v, scales, start, coded, table, table_ss, v_sp, v_ss, scales_sp, scales_ss, dtype: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, CUT: tl.constexpr,
):
    """A tile of values; zeros from token `coded` on, if CUT."""
    EACH: tl.constexpr = 32 // BITS
    SHARE: tl.constexpr = PADDED if PADDED < 32 else 32
    tokens = start + tl.arange(0, TILE // EACH) * EACH
    live = are_coded(tokens, coded, CUT)
    channels = tl.arange(0, PADDED)
    at = shared_at(tokens, live, table, table_ss, v_sp, v_ss, EACH, PAGE)[:, None] + channels[None, :]
    held = tl.load(v + at, mask=live[:, None] & (channels < WIDTH)[None, :], other=0)
    codes = (held[:, None, :] >> value_fields(BITS)[None, :, None]) & ((1 << BITS) - 1)
    codes = tl.reshape(codes, [TILE, PADDED // SHARE, SHARE]).to(tl.float32)
    tokens = start + tl.arange(0, TILE)
    live = are_coded(tokens, coded, CUT)
    channels = tl.arange(0, PADDED // SHARE) * SHARE
    at = shared_at(tokens, live, table, table_ss, scales_sp, scales_ss, 32, PAGE) + tokens % 32
    at = at[:, None] + (channels // GROUP * 64)[None, :]
    live = live[:, None] & (channels < WIDTH)[None, :]
    scale = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
    zero = tl.load(scales + at + 32, mask=live, other=0.0).to(tl.float32)
    return tl.reshape(codes * scale[:, :, None] + zero[:, :, None], [TILE, PADDED]).to(dtype)

'''
)
# Numbers of bfloat16 by their bits: rounded by hand, which is the same for an interpreter.
BF16 = '''
@triton.jit
def bf16_bits(x):
    """The nearest number of bfloat16, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(x != x, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def of_bf16(bits):
    return (bits << 16).to(tl.float32, bitcast=True).to(tl.float64)

'''
# A group that leaves the newest; {x} is k or v.
GROUP = '''
@triton.jit
def codes_of_group(bits, counted, places, AXIS: tl.constexpr, SHIFT: tl.constexpr, TOP: tl.constexpr):
    """Codes of numbers of bfloat16 at `places` along an axis, and the bits of their scales and zeros."""
    size = bits & 0x7FFF
    order = tl.where(bits == size, size, -size)  # as the numbers are; 0 is -0
    ranks = (order << SHIFT) + places * 2 + (bits >> 15)
    least = tl.min(tl.where(counted, ranks, 0x7FFFFFFF), AXIS)  # of several the first, for the sign of 0
    low, high = least >> SHIFT, tl.max(tl.where(counted, order, -0x7FFF), AXIS)
    finite = (low > -0x7F80) & (high < 0x7F80)
    zeros = tl.where(finite, tl.abs(low) | ((least & 1) << 15), 0x7FC0)
    zero, top = of_bf16(zeros), of_bf16(tl.where(high < 0, 0x8000 - high, high))
    scales = tl.where(finite & (low < high), bf16_bits(((top - zero) / TOP).to(tl.float32)), 0)
    scale = tl.where(scales == 0, float("inf"), of_bf16(scales))
    steps = (of_bf16(bits) - tl.expand_dims(zero, AXIS)) / tl.expand_dims(scale, AXIS)
    steps = (steps + 6755399441055744.0) - 6755399441055744.0  # ties to even
    steps = tl.where(tl.expand_dims(scales == 0, AXIS), 0.0, tl.minimum(tl.maximum(steps, 0.0), TOP))
    return steps.to(tl.int32), scales.to(tl.int16), zeros.to(tl.int16)

'''
ENCODE = '''
@triton.jit
def encode_{x}(
    {arguments}
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, SHIFT: tl.constexpr, PAGE: tl.constexpr,
):
    """Writes the codes of TOKENS that leave the newest, some of which had not been among them, CHANNELS of one head."""
    EACH: tl.constexpr = 32 // BITS
    BLOCKS: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2) % BLOCKS
    first = tl.load(before + b) + tl.program_id(2) // BLOCKS * TOKENS
    if first >= tl.load(after + b):
        return
    #if paged
    outer = tl.load(table + b * table_sb + first // PAGE * table_ss).to(tl.int64)
    if (outer < 0) | (outer >= pages):
        return
    slot = (first % PAGE).to(tl.int64)
    #else
    outer = b
    slot = first.to(tl.int64)
    #end
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    channels = block * CHANNELS + columns
    here = (rows < TOKENS)[:, None] & ((columns < CHANNELS) & (channels < WIDTH))[None, :]
    new = (first + rows - tl.load(lengths + b))[:, None]
    at = b * {x}_newest_sb + head * {x}_newest_sh + channels[None, :] * {x}_newest_sd
    at += ((first + rows) % ring)[:, None] * {x}_newest_ss
    held = tl.load({x}_newest + at, mask=here & (new < 0), other=0).to(tl.int32) & 0xFFFF
    at = b * {x}_sb + head * {x}_sh + new.to(tl.int64) * {x}_ss + channels[None, :] * {x}_sd
    x = tl.load({x} + at, mask=here & (new >= 0), other=0.0).to(tl.float32)
    bits = tl.where(new < 0, held, bf16_bits(x))
    {x}_codes += outer * {x}_codes_so + head * {x}_codes_sh
    {x}_scales += outer * {x}_scales_so + head * {x}_scales_sh
    #if keys
    codes, scale, zero = codes_of_group(bits, (rows < TOKENS)[:, None], rows[:, None], 0, SHIFT, (1 << BITS) - 1)
    WORDS: tl.constexpr = (WIDTH + EACH - 1) // EACH
    codes = tl.reshape(codes, [ROWS, COLUMNS // EACH, EACH]) << key_fields(BITS)[None, None, :]
    words = block * (CHANNELS // EACH) + tl.arange(0, COLUMNS // EACH)
    at = ((slot + rows) // 16 * k_codes_ss + (slot + rows) % 16)[:, None] + words[None, :] * 16
    tl.store(k_codes + at, tl.sum(codes, 2), mask=(rows < TOKENS)[:, None] & (words < WORDS)[None, :])
    k_scales += slot // TOKENS * k_scales_sg
    tl.store(k_scales + channels, scale, mask=channels < WORDS * EACH)
    tl.store(k_scales + WORDS * EACH + channels, zero, mask=channels < WORDS * EACH)
    #else
    codes, scale, zero = codes_of_group(bits, here, columns[None, :], 1, SHIFT, (1 << BITS) - 1)
    stored = (columns < CHANNELS) & (channels < (WIDTH + 15) // 16 * 16)
    codes = tl.reshape(tl.where(here, codes, 0), [ROWS // EACH, EACH, COLUMNS]) << value_fields(BITS)[None, :, None]
    at = (slot // EACH + tl.arange(0, ROWS // EACH))[:, None] * v_codes_ss + channels[None, :]
    tl.store(v_codes + at, tl.sum(codes, 1), mask=stored[None, :])
    v_scales += slot // 32 * v_scales_sg + block * 64
    tl.store(v_scales + rows, scale)
    tl.store(v_scales + 32 + rows, zero)
    #end
'''


def source(x: str, paged: bool) -> tuple[str, Arguments]:
    """The text of the kernel ``encode_k`` or ``encode_v``, and its arguments."""
    held = [f"{x}_{name}" for name in ("newest", "codes", "scales")]
    pointers = [x, *held, "lengths", "before", "after", *["table"] * paged]
    dims = zip((x, *held), ("bhsd", "bhsd", "ohs", "ohg"), strict=True)
    strides = [f"{name}_s{d}" for name, each in dims for d in each] + ["table_sb", "table_ss"] * paged
    sizes = ["ring", *["pages"] * paged]
    arguments = (
        *((n, "pointer") for n in pointers), *((n, "stride") for n in strides), *((n, "size") for n in sizes),
    )  # fmt: skip
    on = {name for name, held in (("paged", paged), ("keys", x == "k")) if held}
    holes = {"x": x, "arguments": "".join(f"{name}, " for name, _ in arguments).rstrip()}
    return whole(FIELDS + BF16 + GROUP + render(ENCODE, on, holes)), arguments


def numbers(x: str, codec: str, group: int, width: int, page: int) -> dict[str, int]:
    """The numbers of such a kernel: groups of keys are of tokens, and their channels apart; those of values are of channels."""
    along = 1 << (group - 1).bit_length()
    tokens, rows, channels, columns = (STRETCH, STRETCH, group, along)
    if x == "k":
        tokens, rows, channels = group, along, max(RUN, _ELEMENTS // along)
        columns = channels
    return {
        "TOKENS": tokens, "ROWS": rows, "CHANNELS": channels, "COLUMNS": columns, "WIDTH": width, "BITS": BITS[codec],
        "SHIFT": along.bit_length(), "PAGE": page,
    }  # fmt: skip


def programs(group: int, count: int, constants: Mapping[str, int]) -> int:
    """How many of a row and head: so many new tokens push out no more than that many groups."""
    each = -(-constants["WIDTH"] // constants["CHANNELS"])
    return -(-count // group) * (group // constants["TOKENS"]) * each


def laid_out(codes: Any, scale: Any, zero: Any, bits: int, keys: bool) -> tuple[Any, Any]:
    """Words int32 and scales from codes ``[B, H, S, D]`` and the scale and zero of each block, S being whole groups; by numpy."""
    batch, heads, tokens = codes.shape[:3]
    each = 32 // bits
    e = np.arange(each)
    if keys:
        parts = _filled(codes, each).reshape(batch, heads, tokens // RUN, RUN, -1, each)
        found = (parts << (bits * (e // 4) + e % 4 * 8)).sum(-1).swapaxes(3, 4)
        scales = np.stack((_filled(scale, each), _filled(zero, each)), 3)
    else:
        parts = _filled(codes, RUN).reshape(batch, heads, tokens // each, each, -1)
        found = (parts << (bits * (e // 2) + e % 2 * 16)[:, None]).sum(3)
        of_runs = (
            x.reshape(batch, heads, tokens // STRETCH, STRETCH, -1).swapaxes(3, 4) for x in (scale, zero)
        )
        scales = np.stack(tuple(of_runs), 4)
    shape = (batch, heads, found.shape[2], -1)
    return found.astype(np.uint32).view(np.int32).reshape(shape), scales.reshape(*scales.shape[:3], -1)


def _filled(x: Any, to: int) -> Any:
    """Zeros behind the last channel, up to a multiple."""
    wide = x.astype(np.int64) if x.dtype.kind == "u" else x
    return np.pad(wide, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % to)))
