"""What a cache does beside appending: going back, reordering, choosing, reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import check_number, check_tensor, check_values_of, shape_of
from attnkit.ops.kv_codes import (
    PLAIN,
    Part,
    Parts,
    Scheme,
    bytes_of_tokens,
    decode,
    parts_of,
    place,
    slots,
    tokens_of,
)


def check_scales(
    scheme: Scheme, heads: int, *scales: float | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The scales of fp8 keys and values, float32 ``[heads]``.

    Raises:
        AttnkitError: AK401, not finite and positive; AK402 to AK404, no such tensor; AK408, another codec.
    """
    found: list[Tensor | None] = []
    for name, codec, scale in zip(("k_scale", "v_scale"), scheme[:2], scales, strict=True):
        if scale is None:
            found.append(None)
            continue
        if codec != "fp8":
            raise error(
                "AK408", where=name, what="only fp8 has a scale of its own", given=codec, allowed="None"
            )
        if isinstance(scale, Tensor):
            check_tensor(name, scale)
            check_values_of(name, scale)
            if scale.dtype != torch.float32:
                raise error("AK404", where=name, given=str(scale.dtype), allowed="torch.float32")
            if scale.shape not in ((), (heads,)):
                raise error("AK403", where=name, given=shape_of(scale), allowed=f"[] or [{heads}]")
            held = scale.detach().expand(heads).clone()
        else:
            number = check_number(name, scale)
            held = torch.full((heads,), number, dtype=torch.float64).float()
        if not all(0 < x < math.inf for x in held.tolist()):
            raise error("AK401", where=name, given=str(held.tolist()[:8]), allowed="finite positive numbers")
        found.append(held)
    return found[0], found[1]


def tensors(scheme: Scheme, storage: Sequence[Tensor]) -> list[Tensor]:
    """Everything that holds keys and values."""
    parts = parts_of(scheme, storage)
    return [t for part in (parts.k, parts.v) for t in part if t is not None]


# --- going back ---------------------------------------------------------------------------------------------


def truncate(
    scheme: Scheme, storage: Sequence[Tensor], lengths: Tensor, n: int | Tensor, lossy: bool
) -> None:
    """Take back what comes after the first n tokens, of a scheme that keeps the newest apart.

    Raises:
        AttnkitError: AK401, n is negative, or what would be left is neither in full precision nor (``lossy``) whole groups.
    """
    state = parts_of(scheme, storage).state
    assert state is not None
    wanted = n.tolist() if isinstance(n, Tensor) else [n] * lengths.shape[0]
    if any(length < 0 for length in wanted):
        raise error("AK401", where="n", given=str(wanted[:8]), allowed="0 and more")
    rows = []
    held = (lengths.tolist(), *state.tolist())
    for b, (to, length, coded, oldest, kept) in enumerate(zip(wanted, *held, strict=True)):
        if to >= length:
            rows.append((length, coded, oldest, kept))
            continue
        exact = max(scheme.quantised(to), kept)
        if exact <= to and (exact >= oldest or exact == to):
            rows.append((to, exact, min(oldest, to), kept))
        elif lossy and to % scheme.group == 0:
            rows.append((to, to, to, to))
        else:
            allowed = f"at most {scheme.residual} tokens back, or lossy=True and a multiple of {scheme.group}"
            raise error("AK401", where=f"n, row {b}", given=f"{to} of {length} tokens", allowed=allowed)
    new = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).t()
    lengths.copy_(new[0])
    state.copy_(new[1:])


# --- reordering ---------------------------------------------------------------------------------------------


def reorder(scheme: Scheme, storage: Sequence[Tensor], index: list[int], lengths: list[int]) -> None:
    """Row b becomes what row ``index[b]`` was."""
    parts = parts_of(scheme, storage)
    whole = torch.tensor(index, dtype=torch.int64)
    size = tokens_of(parts)
    stores = [t for part in (parts.k, parts.v) for t in part[:2] if t is not None and t.dim() > 1]
    if parts.table is not None:
        reorder_pages(stores, parts.table, index, lengths, size)
    else:
        longest = max((lengths[b] for b in index), default=0)
        for t in stores:
            used = -(-longest * t.shape[2] // size)
            t[:, :, :used] = t[whole, :, :used]
    for part in (parts.k, parts.v):
        if part.newest is not None:
            part.newest.copy_(part.newest[whole])
    if parts.state is not None:
        parts.state.copy_(parts.state[:, whole])


def reorder_pages(
    stores: Sequence[Tensor], table: Tensor, index: list[int], lengths: list[int], page: int
) -> None:
    """The rows of the table change places; the pages of those that repeat are copied."""
    unused = [b for b in range(len(index)) if b not in index]
    rows: list[int] = []  # whose pages each row gets
    for b in index:
        if b not in rows:
            rows.append(b)
            continue
        rows.append(unused.pop())
        used = -(-lengths[b] // page)
        to, source = table[rows[-1], :used].long(), table[b, :used].long()
        for t in stores:
            t[to] = t[source]
    table.copy_(table[torch.tensor(rows, dtype=torch.int64)])


# --- choosing -----------------------------------------------------------------------------------------------


def select(
    scheme: Scheme,
    storage: Sequence[Tensor],
    lengths: Tensor,
    wanted: Tensor,
    counts: Tensor,
    append: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Keep the tokens at ``wanted [B, n]``, of which ``counts [B]`` exist.

    Raises:
        AttnkitError: AK401, a token that only codes are left of would have to be quantised anew.
    """
    if not scheme.has_newest:
        rows, columns = (wanted >= 0).nonzero(as_tuple=True)
        _copy(scheme, parts_of(scheme, storage), rows, wanted[rows, columns], columns)
        lengths.copy_(counts)
        return
    parts = parts_of(scheme, storage)
    assert parts.state is not None
    places = torch.arange(wanted.shape[1], device=wanted.device)
    same = (wanted == places).long().cumprod(1).sum(1)
    moved = places >= same[:, None]
    moved &= wanted >= 0
    if bool((moved & (wanted < parts.state[1][:, None])).any()):
        allowed = "older tokens where they are, and of the newest any"
        raise error("AK401", where="positions", given="tokens of which there are only codes", allowed=allowed)
    rows, columns = moved.nonzero(as_tuple=True)
    most = int((counts - same).max()) if len(same) else 0
    new = []
    for part, codec in zip((parts.k, parts.v), scheme[:2], strict=True):
        tokens = _newest(part, codec, scheme, rows, wanted[rows, columns], parts)
        room = tokens.new_zeros(len(same), tokens.shape[1], max(most, 0), tokens.shape[2])
        room[rows, :, columns - same[rows]] = tokens
        new.append(room)
    truncate(scheme, storage, lengths, same, lossy=False)
    append(new[0], new[1], (counts - same).int())


def _newest(part: Part, codec: str, scheme: Scheme, rows: Tensor, positions: Tensor, parts: Parts) -> Tensor:
    if part.newest is not None:
        return part.newest[rows, :, positions % part.newest.shape[2]].float()
    keys = part is parts.k
    return _decoded(part, codec, scheme, keys, *slots(parts, rows, positions))


def _copy(scheme: Scheme, parts: Parts, rows: Tensor, source: Tensor, to: Tensor) -> None:
    at, put = slots(parts, rows, source), slots(parts, rows, to)
    for keys, part, codec in zip((True, False), (parts.k, parts.v), scheme[:2], strict=True):
        held = bytes_of_tokens(part)
        held[put[0], :, *place(part, keys, put[1])] = held[at[0], :, *place(part, keys, at[1])]
        if codec == "int8":
            assert part.scales is not None
            part.scales[put[0], :, put[1]] = part.scales[at[0], :, at[1]]


# --- reading ------------------------------------------------------------------------------------------------


def read(scheme: Scheme, storage: Sequence[Tensor], rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[N, H, D]`` of keys and of values: in float32, if any are codes."""
    parts = parts_of(scheme, storage)
    first, second = slots(parts, rows, positions)
    found: list[Tensor] = []
    for keys, part, codec in zip((True, False), (parts.k, parts.v), scheme[:2], strict=True):
        tokens = _decoded(part, codec, scheme, keys, first, second)
        if part.newest is not None:
            assert parts.state is not None
            newest = part.newest[rows, :, positions % part.newest.shape[2]].float()
            tokens = torch.where((positions >= parts.state[0][rows])[:, None, None], newest, tokens)
        found.append(tokens)
    return found[0], found[1]


def _decoded(part: Part, codec: str, scheme: Scheme, keys: bool, first: Tensor, second: Tensor) -> Tensor:
    if codec in PLAIN:
        elements = part.codes[first, :, second]
        return elements if scheme.is_plain else elements.float()
    dim: Any = scheme.head_dim if keys else scheme.v_head_dim
    return decode(part, codec, dim, scheme.group, keys)[first, :, second]
