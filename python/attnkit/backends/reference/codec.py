"""Quantised tokens by the definition: codes beside scales and zero points, unpacked (docs/ir.md, variants.md H)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnkit.backends.reference.tape import Array
from attnkit.ir.program import Codec

_LEVELS = {"int8": 127, "int4": 15, "int2": 3}
FP8_MAX = 448.0


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokens as a codec keeps them: ``x = codes * scale + zero (+ center)``, all of which broadcast to ``x``.

    ``codes`` are small ints (fp8: the rounded values) as float64, ``zero`` is 0 for symmetric codecs, ``center`` the
    mean token that was taken away.
    """

    codec: Codec
    codes: Array
    scale: Array
    zero: Array
    center: Array


def encode(x: Any, codec: Codec, center: bool = False) -> Encoded:
    """Quantise tokens ``[..., n, D]``.

    int8 is symmetric, ``round(x / scale)`` half away from zero; on tiles ``scale = max |x| / 127 + 1e-7`` in float32
    (SpargeAttn), else ``max |x| / 127`` in bf16. int4 and int2 have ``zero = min``, rounded *down* to bf16, and ``scale =
    (max - zero) / (2 ** bits - 1)`` in bf16: so nothing is out of reach, and x is met to half a scale; a constant group
    has scale and code 0. fp8 is e4m3, saturating.
    """
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=-2, keepdims=True) if center and x.shape[-2] else np.zeros_like(x[..., :1, :])
    y = x - mean
    if codec.name == "fp8":
        scale = _extreme(np.max, np.abs(y), codec) / FP8_MAX
        scale = np.where(scale == 0, 1.0, scale).astype(np.float32).astype(np.float64)
        return Encoded(codec, _e4m3(y / scale), scale, np.zeros_like(scale), mean)
    levels = _LEVELS[codec.name]
    if codec.name == "int8":
        top = _extreme(np.max, np.abs(y), codec)
        tile = codec.axis == "tile"
        scale = (top / levels + 1e-7).astype(np.float32).astype(np.float64) if tile else bf16(top / levels)
        ratio = y / np.where(scale == 0, 1.0, scale)
        codes = np.clip(np.sign(ratio) * np.floor(np.abs(ratio) + 0.5), -levels, levels)
        return Encoded(codec, codes, scale, np.zeros_like(scale), mean)
    low, high = _extreme(np.min, y, codec), _extreme(np.max, y, codec)
    zero = _bf16_below(low)
    scale = np.where(high == low, 0.0, bf16((high - zero) / levels))
    codes = np.where(scale == 0, 0.0, np.rint((y - zero) / np.where(scale == 0, 1.0, scale)))
    return Encoded(codec, np.clip(codes, 0, levels), scale, zero, mean)


def decode(encoded: Encoded) -> Array:
    """The tokens that the codes stand for."""
    x: Array = encoded.codes * encoded.scale + encoded.zero + encoded.center
    return x


def bf16(x: Any) -> Array:
    """Rounded to bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def _bf16_below(x: Array) -> Array:
    """The largest bfloat16 number that is not above."""
    step = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, -126) - 7)
    below: Array = np.floor(x / step) * step
    return below


def _extreme(reduce: Any, x: Array, codec: Codec) -> Array:
    """The extreme value of each group, repeated over the group: shaped like ``x``, or to broadcast to it."""
    d = x.shape[-1]
    if codec.axis == "head":
        return np.asarray(reduce(x, axis=(-2, -1), keepdims=True, initial=0.0))
    if codec.axis == "token":
        return _grouped(reduce, x, -1, codec.group or d)
    grouped = _grouped(reduce, x, -2, codec.group)
    return grouped if codec.axis == "channel" else np.asarray(reduce(grouped, axis=-1, keepdims=True))


def _grouped(reduce: Any, x: Array, axis: int, size: int) -> Array:
    out = np.empty_like(x)
    for first in range(0, x.shape[axis], max(size, 1)):
        part = [slice(None)] * x.ndim
        part[axis] = slice(first, first + size)
        out[tuple(part)] = reduce(x[tuple(part)], axis=axis, keepdims=True)
    return out


def _e4m3(x: Array) -> Array:
    """Rounded to float8 e4m3 (three mantissa bits, smallest exponent -6), ties to even, saturating."""
    exponent = np.maximum(np.floor(np.log2(np.where(x == 0, 1.0, np.abs(x)))), -6)
    step = np.exp2(exponent - 3)
    rounded: Array = np.clip(np.rint(x / step) * step, -FP8_MAX, FP8_MAX)
    return rounded
