"""Attention over a quantised KV cache: what is stored is codes and scales, what is meant is what they decode to.

A codec cuts the tokens ``[S, D]`` of a head into blocks that share a scale (and a zero point), see `block`::

    int8         scale = max |x| / 127                     code = round(x / scale)            x^ = code * scale
    int4, int2   zero = min x, scale = (max x - zero) / (2^b - 1)
                                                           code = round((x - zero) / scale)   x^ = zero + code * scale
    fp8          scale = 1, or as calibrated               code = e4m3(x / scale), saturating at 448

Codes are rounded to nearest, ties to even (int8: away from zero). Scales and zeros are stored in bfloat16: a scale is
rounded to nearest, a zero *down* (before the scale is computed), so that every x lies within reach and ``|x - x^| <=
scale / 2`` holds for what is stored. A constant block of int4 or int2 (of int8: of zeros) has code 0 and scale 0. NaN
or infinity destroys its own block and no other.

A cache holds whole groups of ``g`` tokens as codes, then the newest ``r`` tokens in full precision, ``R <= r < R + g``
as soon as there are R: a group is quantised when it leaves. Queries are the last tokens. Attention runs over segments
that follow each other: quantised | residual | new.

Parameters: one pair of codecs (k, v) for each segment, None for tokens as they are; ``causal`` bool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attnkit.ir.program import Codec
from attnkit.variants import dense
from attnkit.variants.sequences import CAUSAL, Array, Float64, write

INT8 = Codec("int8", "token", 0)
FP8 = Codec("fp8", "head", 0)
# K per channel over groups of tokens, V per token over groups of channels.
KIVI4 = (Codec("int4", "channel", 32), Codec("int4", "token", 32))
KIVI2 = (Codec("int2", "channel", 32), Codec("int2", "token", 32))
BITS = {"int8": 8, "fp8": 8, "int4": 4, "int2": 2}
# Of an element of a cache, scales and zeros among them, at 128 channels and groups of 32.
CACHE_BITS = {"int8": 8.125, "fp8": 8.0, "int4": 5.0, "int2": 3.0}


def has_zero(codec: Codec) -> bool:
    """Whether its blocks have a zero point."""
    return BITS[codec.name] < 8


def block(codec: Codec, tokens: int, channels: int) -> tuple[int, int]:
    """What shares a scale in ``[tokens, channels]``: the shape of a block, of which the last may be smaller."""
    group = codec.group
    shapes = {"token": (1, group or channels), "channel": (group or tokens, 1)}
    return shapes.get(codec.axis, (group or tokens, channels))


def bits_per_element(codec: Codec, tokens: int, channels: int) -> float:
    """Of codes, and of scales and zeros of 16 bits."""
    rows, columns = block(codec, tokens, channels)
    return BITS[codec.name] + 16 * (1 + has_zero(codec)) / (rows * columns)


class Encoded(NamedTuple):
    """Codes ``[B, H, S, D]`` (int8; uint8 where there is a zero point or an e4m3 byte), scale and zero per block.

    ``scale`` and ``zero`` are float64 ``[B, H, ceil(S / rows), ceil(D / columns)]`` of `block`.
    """

    codes: Array
    scale: Float64
    zero: Float64 | None


def program(
    segments: Sequence[tuple[Codec | None, Codec | None]], causal: bool = True
) -> tuple[str, list[Any]]:
    """Inputs q, k, v, k1, v1, …, a pair for each segment; results o, lse."""
    names = [(f"k{n or ''}", f"v{n or ''}") for n in range(len(segments))]
    inputs = ["q: bhsd"]
    for pair, codecs in zip(names, segments, strict=True):
        inputs += [
            f"{name}: bhsd {written(codec)}".rstrip() for name, codec in zip(pair, codecs, strict=True)
        ]
    operands = ", ".join(name for pair in names for name in pair)
    lines = [
        f"o, lse = attend(q, {operands}, scale = default) {{",
        *([f"mask = {CAUSAL}"] if causal else []),
        "normalizer = softmax",
        "}",
        "return o, lse",
    ]
    return write(inputs, lines), []


def written(codec: Codec | None) -> str:
    """A codec in the language of programs."""
    return "" if codec is None else f"{codec.name}({codec.axis}, {codec.group})"


# --- as equations -----------------------------------------------------------------------------------------


def naive(
    q: Array, segments: Sequence[tuple[Array, Array]], *, scale: float | None = None, causal: bool = True
) -> tuple[Float64, Float64]:
    """Attention over segments that are decoded already; results as `dense.naive`."""
    k, v = (np.concatenate([pair[i] for pair in segments], axis=2) for i in (0, 1))
    return dense.naive(q, k, v, scale=scale, causal=causal)


def quantise(x: Array, codec: Codec, scale: Array | None = None) -> Encoded:
    """Encode tokens ``[B, H, S, D]``, block by block.

    ``scale`` (fp8 alone; default 1) is a number or ``[H]``: it is not computed from the tokens.
    """
    x = x.astype(np.float64)
    rows, columns = block(codec, *x.shape[2:])
    blocks = (*x.shape[:2], -(-x.shape[2] // max(rows, 1)), -(-x.shape[3] // max(columns, 1)))
    codes = np.zeros(x.shape, np.int8 if codec.name == "int8" else np.uint8)
    scales, zeros = np.ones(blocks), np.zeros(blocks)
    if scale is not None:
        scales *= np.reshape(scale, (-1, 1, 1))
    for at in np.ndindex(blocks):
        b, h, i, j = at
        part = (b, h, slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        if codec.name == "fp8":
            codes[part] = e4m3_bytes(x[part] / scales[at])
        else:
            codes[part], scales[at], zeros[at] = _quantise_block(x[part], codec)
    return Encoded(codes, scales, zeros if has_zero(codec) else None)


def decode(encoded: Encoded, codec: Codec) -> Float64:
    """What the codes mean, ``[B, H, S, D]``."""
    tokens, channels = encoded.codes.shape[2:]
    rows, columns = block(codec, tokens, channels)

    def spread(per_block: Array) -> Array:
        return per_block.repeat(rows, axis=2).repeat(columns, axis=3)[:, :, :tokens, :channels]

    values = E4M3[encoded.codes] if codec.name == "fp8" else encoded.codes.astype(np.float64)
    with np.errstate(invalid="ignore"):
        values = values * spread(encoded.scale)
    return values if encoded.zero is None else values + spread(encoded.zero)


def _quantise_block(x: Array, codec: Codec) -> tuple[Array, float, float]:
    if not has_zero(codec):
        scale = float(to_bfloat16(np.abs(x).max() / 127))
        return _codes(x, 0.0, scale, 127, _half_away), scale, 0.0
    top = 2 ** BITS[codec.name] - 1
    zero = rounded_down_to_bfloat16(x.min())
    scale = 0.0 if x.min() == x.max() else float(to_bfloat16((x.max() - zero) / top))
    return _codes(x, zero, scale, top, np.rint), scale, zero


def _codes(x: Array, zero: float, scale: float, top: int, round_: Any) -> Array:
    if scale == 0 or not np.isfinite(scale):
        return np.zeros(x.shape)
    codes: Array = np.clip(round_((x - zero) / scale), -top, top)
    return codes


def _half_away(x: Array) -> Array:
    away: Array = np.sign(x) * np.floor(np.abs(x) + 0.5)
    return away


# --- numbers ----------------------------------------------------------------------------------------------


def _on_grid(x: Array, mantissa: int, lowest: int) -> tuple[Float64, Float64]:
    """``x`` in units of the last place of a format with ``mantissa`` bits and ``2 ** lowest`` as least normal number."""
    exponent = np.maximum(np.frexp(x)[1] - 1, lowest)
    unit = np.ldexp(1.0, exponent - mantissa)
    return np.asarray(x / unit, np.float64), unit


def to_bfloat16(x: Any) -> Float64:
    """The nearest bfloat16 number, ties to even."""
    x = np.asarray(x, np.float64)
    units, unit = _on_grid(np.where(np.isfinite(x), x, 0), 7, -126)
    return np.where(np.isfinite(x), np.rint(units) * unit, x)


def rounded_down_to_bfloat16(x: float) -> float:
    """The largest bfloat16 number that is not above ``x``."""
    if not np.isfinite(x):
        return float(x)
    units, unit = _on_grid(np.asarray(x), 7, -126)
    return float(np.floor(units) * unit)


def _e4m3_values() -> Float64:
    """The meaning of every byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, one NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.where(byte & 127 == 127, np.nan, np.where(byte >> 7, -size, size))


E4M3 = _e4m3_values()  # by byte


def e4m3_bytes(x: Array) -> Array:
    """The bytes of the nearest e4m3 numbers, ties to even; what is beyond 448, infinity too, becomes 448."""
    units, unit = _on_grid(np.clip(np.where(np.isnan(x), 0, x), -448, 448), 3, -6)
    size = np.abs(np.rint(units) * unit)
    byte = np.searchsorted(E4M3[:127], size).astype(np.uint8)  # bytes 0 to 126 rise from 0 to 448
    return np.where(np.isnan(x), 127, byte | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def pack(codes: Array, bits: int, axis: int) -> Array:
    """Codes below ``2 ** bits`` into bytes along ``axis``: element e at bits ``bits * (e % per_byte)``."""
    per_byte = 8 // bits
    codes = np.moveaxis(codes, axis, -1)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)])
    fields = codes.reshape(*codes.shape[:-1], -1, per_byte).astype(np.uint8) << (
        bits * np.arange(per_byte, dtype=np.uint8)
    )
    return np.moveaxis(np.bitwise_or.reduce(fields, axis=-1), -1, axis)


def unpack(packed: Array, bits: int, axis: int, size: int) -> Array:
    """The ``size`` codes that `pack` packed along ``axis``."""
    packed = np.moveaxis(packed, axis, -1)
    fields = packed[..., None] >> (bits * np.arange(8 // bits, dtype=np.uint8)) & (2**bits - 1)
    return np.moveaxis(fields.reshape(*packed.shape[:-1], -1)[..., :size], -1, axis)


# --- the cache, step by step ------------------------------------------------------------------------------


class Cache:
    """A row of a cache that starts empty: codes of whole groups, then a residual of the newest tokens.

    ``codecs`` of k and v, a residual of ``R`` tokens, groups of ``g``; tokens are ``[1, H, T, D]``.
    """

    def __init__(self, codecs: tuple[Codec, Codec], residual: int, group: int) -> None:
        self.codecs, self.keep, self.group = codecs, residual, group
        self.groups: list[tuple[Encoded, Encoded]] = []
        self.residual: tuple[Array, Array] | None = None

    def append(self, k: Array, v: Array) -> None:
        """Tokens join the residual; as long as it holds R + g of them, its oldest g are quantised."""
        new = (k, v)
        old = self.residual or (k[:, :, :0], v[:, :, :0])
        self.residual = tuple(np.concatenate(pair, axis=2) for pair in zip(old, new, strict=True))  # type: ignore[assignment]
        while self.residual and self.residual[0].shape[2] >= self.keep + self.group:
            k, v = self.residual
            g = self.group
            self.groups.append((quantise(k[:, :, :g], self.codecs[0]), quantise(v[:, :, :g], self.codecs[1])))
            self.residual = (k[:, :, g:], v[:, :, g:])

    def truncate(self, count: int) -> None:
        """Take the newest ``count`` tokens back: exact, as they are still in the residual (else ValueError)."""
        held = self.residual[0].shape[2] if self.residual else 0
        if count > held or self.residual is None:
            raise ValueError(f"{count} tokens to take back, {held} in the residual")
        k, v = self.residual
        self.residual = (k[:, :, : held - count], v[:, :, : held - count])

    def encoded(self) -> tuple[Encoded, Encoded]:
        """The quantised segment of k and of v."""
        k, v = (_joined([group[i] for group in self.groups]) for i in (0, 1))
        return k, v


def _joined(groups: Sequence[Encoded]) -> Encoded:
    codes, scales = (np.concatenate([group[i] for group in groups], axis=2) for i in (0, 1))
    zeros = [group.zero for group in groups if group.zero is not None]
    return Encoded(codes, scales, np.concatenate(zeros, axis=2) if zeros else None)


def quantised_length(tokens: int, residual: int, group: int) -> int:
    """How many of ``tokens`` appended tokens are codes: whole groups, leaving at least ``residual``."""
    return max(0, (tokens - residual) // group) * group


CASES: dict[str, list[tuple[Codec | None, Codec | None]]] = {
    "kv_plain": [(None, None)],
    "kv_int8": [(INT8, INT8)],
    "kv_fp8": [(FP8, FP8)],
    "kv_int4": [KIVI4, (None, None)],
    "kv_int2": [KIVI2, (None, None)],
    "kv_int4_new": [KIVI4, (None, None), (None, None)],
    "kv_int8_int4": [(INT8, Codec("int4", "token", 32)), (None, None)],
}
