"""How a cache keeps codes: the tensors of each codec, and what they mean. The engine's side is csrc/cpu/store-inl.h.

Codes are words of 32 bits. Of keys a word holds channels of one token, ``[outer, H, tokens / 16, words, 16]``; of values it
holds tokens of one channel, ``[outer, H, tokens / per word, channels]``; outer are batch entries or pages. fp8 is bytes,
``[outer, H, tokens, D]``, and on a GPU int8 is too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error, no_page

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}
NUMBERS = {"int8": 1, "fp8": 2, "int4": 3, "int2": 4}  # the engine's; 0 is plain
RUN, SCALE_RUN = 16, 32  # tokens whose key words lie side by side; whose value scales do


class Scheme(NamedTuple):
    """What keys and values are kept as. Its text travels with the ops."""

    k: str
    v: str
    head_dim: int
    v_head_dim: int
    group: int
    residual: int

    @property
    def is_plain(self) -> bool:
        """Whether all elements are kept as they are."""
        return self.k in PLAIN and self.v in PLAIN

    @property
    def text(self) -> str:
        """As `scheme_of` reads it."""
        return self.k if self.is_plain else " ".join(map(str, self))

    @property
    def has_newest(self) -> bool:
        """Whether the newest tokens are kept in full precision."""
        return any(_has_zero(codec) for codec in (self.k, self.v))

    @property
    def num_tensors(self) -> int:
        """Of the storage, without a page table."""
        return sum(1 + (c not in PLAIN) + _has_zero(c) for c in self[:2]) + self.has_newest

    @property
    def block(self) -> int:
        """Tokens that a row, or a page, is a multiple of."""
        return 1 if self.is_plain else self.group if self.has_newest else RUN

    @property
    def slots(self) -> int:
        """Newest tokens that there is room for: to take back ``residual`` of them, what they had pushed out is needed."""
        return -(-(2 * self.residual + self.group) // RUN) * RUN

    @property
    def codecs(self) -> tuple[str, str]:
        """In the language of programs; empty for plain elements."""
        return _written(self.k, self.group, keys=True), _written(self.v, self.group, keys=False)

    def quantised(self, length: int) -> int:
        """How many of so many appended tokens are codes."""
        return max(0, (length - self.residual) // self.group * self.group)


@lru_cache(maxsize=256)
def parse_scheme(text: str) -> Scheme:
    """The scheme of a text."""
    k, v, *numbers = text.split()
    return Scheme(k, v, *map(int, numbers))


def scheme_of(text: str, storage: Sequence[Tensor]) -> Scheme:
    """The scheme of a text; a plain codec's name is all of it, the storage has the widths.

    Raises:
        AttnkitError: AK402, the storage is of another number of tensors; AK504, there is no such scheme.
    """
    try:
        least = 2 if text in PLAIN else parse_scheme(text).num_tensors
    except (TypeError, ValueError):
        raise error("AK504", where="codec", given=repr(text), allowed=", ".join(PLAIN)) from None
    if len(storage) not in (least, least + 1):
        allowed = f"{least} of k and v, and a page table or none"
        raise error("AK402", where="storage", given=f"{len(storage)} tensors", allowed=allowed)
    return plain_scheme(text, storage) if text in PLAIN else parse_scheme(text)


def plain_scheme(codec: str, storage: Sequence[Tensor]) -> Scheme:
    """That of elements as they are, of the widths of these tensors."""
    return Scheme(codec, codec, storage[0].shape[3], storage[1].shape[3], group=1, residual=0)


class Part(NamedTuple):
    """The tensors of keys, or of values: codes or elements, scales, the newest tokens."""

    codes: Tensor
    scales: Tensor | None
    newest: Tensor | None

    def flat(self) -> Part:
        """As a GPU's kernels take it: of int4 and int2, words and scales without the dimensions inside."""
        if self.newest is None or self.scales is None:
            return self
        return Part(self.codes.flatten(3), self.scales.flatten(3), self.newest)


class Parts(NamedTuple):
    """The storage of a cache. ``state`` is int32 ``[3, B]``: how many tokens are codes, the oldest that is in full precision
    too, and how many stay codes whatever is taken back."""

    k: Part
    v: Part
    state: Tensor | None
    table: Tensor | None


def parts_of(scheme: Scheme, storage: Sequence[Tensor]) -> Parts:
    """The storage, a list of tensors in the order of `Parts`, as what it is."""
    rest = list(storage)
    k, v = (
        Part(
            rest.pop(0),
            rest.pop(0) if codec not in PLAIN else None,
            rest.pop(0) if _has_zero(codec) else None,
        )
        for codec in scheme[:2]
    )
    state = rest.pop(0) if scheme.has_newest else None
    return Parts(k, v, state, rest.pop(0) if rest else None)


def allocate(
    scheme: Scheme, batch: int, heads: int, outer: int, tokens: int, table: Tensor | None,
    head_scales: Sequence[Tensor | None], device: torch.device, rows: bool,
) -> list[Tensor]:  # fmt: skip
    """Storage for ``outer`` batch entries or pages of so many tokens, a multiple of ``scheme.block``.

    ``rows``: int8 codes are bytes, as a GPU has them.
    """
    storage = []
    for keys, codec, dim, scale in zip((True, False), scheme[:2], scheme[2:4], head_scales, strict=True):
        in_rows = rows and codec == "int8"
        shape = (tokens, dim) if in_rows else _shape(codec, keys, dim, tokens)
        element = torch.int8 if in_rows else _element(codec)
        storage.append(_empty(outer, heads, shape, element, table is not None, device))
        if codec == "fp8":
            ones = torch.ones(heads, dtype=torch.float32, device=device)
            storage.append(ones if scale is None else scale.to(device))
        elif codec not in PLAIN:
            of_scales = _scale_shape(codec, keys, dim, tokens, scheme.group)
            storage.append(_empty(outer, heads, of_scales, torch.bfloat16, table is not None, device))
        if _has_zero(codec):
            newest = torch.empty(batch, heads, scheme.slots, dim, dtype=torch.bfloat16, device=device)
            storage.append(newest)
    if scheme.has_newest:
        storage.append(torch.zeros(3, batch, dtype=torch.int32, device=device))
    return storage if table is None else [*storage, table]


def tokens_of(parts: Parts) -> int:
    """Tokens of a batch entry, or of a page."""
    codes = parts.k.codes
    return codes.shape[2] * (RUN if codes.dtype == torch.int32 else 1)


def capacity(parts: Parts) -> int:
    """How many tokens a row can hold."""
    return tokens_of(parts) * (1 if parts.table is None else parts.table.shape[1])


def slots(parts: Parts, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Batch entry or page, and the token's number there.

    Raises:
        AttnkitError: AK602, the page table names no page for one of them.
    """
    if parts.table is None:
        return rows, positions
    size, pages = tokens_of(parts), parts.k.codes.shape[0]
    found = parts.table[rows, positions // size]
    missing = (found < 0) | (found >= pages)
    if bool(missing.any()):
        bad = int(missing.nonzero()[0, 0])
        raise no_page(int(rows[bad]), int(positions[bad]) // size, int(found[bad]), pages)
    return found.long(), positions % size


def store(part: Part, codec: str, dim: int, group: int) -> tuple[Any, ...]:
    """As the engine takes it."""
    return (NUMBERS.get(codec, 0), dim, group, *part)


# --- what codes mean --------------------------------------------------------------------------------------


def decode(part: Part, codec: str, dim: int, group: int, keys: bool) -> Tensor:
    """All of ``[outer, H, tokens, dim]`` in float32; what nobody has written means nothing."""
    if codec == "fp8":
        assert part.scales is not None
        return part.codes.view(torch.float8_e4m3fn).float() * part.scales[:, None, None]
    words = part.codes.dtype == torch.int32
    codes = (_unpacked(part.codes, BITS[codec], keys)[..., :dim] if words else part.codes).float()
    assert part.scales is not None
    scales = part.scales.float()
    if codec == "int8":
        return codes * scales[..., None]
    if keys:
        scale, zero = (x[..., :dim].repeat_interleave(group, 2) for x in scales.unbind(3))
    else:  # [outer, H, blocks, groups, SCALE_RUN] to tokens by channels
        scale, zero = (
            x.transpose(3, 4).flatten(2, 3).repeat_interleave(group, 3)[..., :dim] for x in scales.unbind(4)
        )
    return codes * scale + zero


def _unpacked(words: Tensor, bits: int, keys: bool) -> Tensor:
    fields = torch.tensor(
        [_field(keys, bits, e) for e in range(32 // bits)], dtype=torch.int32, device=words.device
    )
    codes = words[..., None] >> fields & (1 << bits) - 1
    if bits == 8:
        codes = codes - (codes >> 7 << 8)
    if keys:
        return codes.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return codes.transpose(3, 4).flatten(2, 3)


def _field(keys: bool, bits: int, e: int) -> int:
    """The first bit of element e of a word."""
    return bits * (e // 4) + e % 4 * 8 if keys or bits == 8 else bits * (e // 2) + e % 2 * 16


def bytes_of_tokens(part: Part) -> Tensor:
    """A view of the codes of int8, fp8 or plain elements by tokens: index it by ``(outer, :, *place(...))``."""
    if part.codes.dtype != torch.int32:
        return part.codes
    codes = part.codes.view(torch.int8)
    return codes.view(*codes.shape[:-1], -1, 4)


def place(part: Part, keys: bool, token: Tensor) -> tuple[Any, ...]:
    """Where a token stands in `bytes_of_tokens` behind its head."""
    if part.codes.dtype != torch.int32:
        return (token,)
    return (token // RUN, slice(None), token % RUN) if keys else (token // 4, slice(None), token % 4)


# --- shapes -----------------------------------------------------------------------------------------------


def _has_zero(codec: str) -> bool:
    return codec in ("int4", "int2")


def _written(codec: str, group: int, keys: bool) -> str:
    if codec in PLAIN:
        return ""
    if _has_zero(codec):
        return f"{codec}({'channel' if keys else 'token'}, {group})"
    return f"{codec}({'head' if codec == 'fp8' else 'token'}, 0)"


def _element(codec: str) -> torch.dtype:
    return PLAIN.get(codec) or (torch.uint8 if codec == "fp8" else torch.int32)


def _shape(codec: str, keys: bool, dim: int, tokens: int) -> tuple[int, ...]:
    if codec in PLAIN or codec == "fp8":
        return tokens, dim
    per_word = 32 // BITS[codec]
    return (tokens // RUN, -(-dim // per_word), RUN) if keys else (tokens // per_word, -(-dim // 16) * 16)


def _scale_shape(codec: str, keys: bool, dim: int, tokens: int, group: int) -> tuple[int, ...]:
    if codec == "int8":
        return (tokens,)
    per_word = 32 // BITS[codec]
    if keys:
        return tokens // group, 2, -(-dim // per_word) * per_word
    return tokens // SCALE_RUN, -(-dim // group), 2, SCALE_RUN


def _empty(
    outer: int, heads: int, shape: tuple[int, ...], dtype: torch.dtype, paged: bool, device: torch.device
) -> Tensor:
    """``[outer, heads, *shape]``, unset; of pages, those of a head follow each other, as do the tokens of a row."""
    if paged:
        return torch.empty(heads, outer, *shape, dtype=dtype, device=device).transpose(0, 1)
    return torch.empty(outer, heads, *shape, dtype=dtype, device=device)
