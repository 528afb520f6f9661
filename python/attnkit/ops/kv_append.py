"""``torch.ops.attnkit.kv_append``: tokens go to the end of each row of a cache.

The storage of a cache is the tensors of its keys, those of its values, and the page table if it has pages. The plain
codecs keep one tensor of each: ``[B, H, max_len, D]``, or ``[pages, H, page_size, D]`` beside a table int32 ``[B, n]``.
What the others keep says `kv_codes`; their ``codec`` is the text of a scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.cpu import cache as engine
from attnkit.backends.cpu.backend import missing_page
from attnkit.errors import error, no_page
from attnkit.ops.check import check_tensor, needs_derivatives, shape_of
from attnkit.ops.kv_codes import PLAIN, parse_scheme, parts_of, store, tokens_of

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "kv_append(Tensor(a!)[] storage, Tensor(b!) lengths, Tensor k, Tensor v, str codec, Tensor? lens=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def capacity(storage: Sequence[Tensor]) -> int:
    """How many tokens a row can hold."""
    k, _, *table = storage
    return k.shape[2] * (table[0].shape[1] if table else 1)


def slots(storage: Sequence[Tensor], rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of tokens in the first and third dimension of the storage, from their rows and positions.

    Raises:
        AttnkitError: AK602, the page table names no page for one of them.
    """
    k, _, *table = storage
    if not table:
        return rows, positions
    size = k.shape[2]
    pages = table[0][rows, positions // size]
    if bool(((pages < 0) | (pages >= k.shape[0])).any()):
        bad = int(((pages < 0) | (pages >= k.shape[0])).nonzero()[0, 0])
        raise no_page(int(rows[bad]), int(positions[bad]) // size, int(pages[bad]), k.shape[0])
    return pages.long(), positions % size


def write(storage: Sequence[Tensor], rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
    """Put tokens ``[N, H, D]``, rounded to what the storage holds, at these positions of these rows."""
    first, second = slots(storage, rows, positions)
    for held, new in zip(storage, (k, v), strict=False):
        held[first, :, second] = new.to(held.dtype)


def append(
    storage: Sequence[Tensor], lengths: Tensor, k: Tensor, v: Tensor, codec: str, lens: Tensor | None = None
) -> None:
    """What the op does.

    Raises:
        AttnkitError: as `check_append`; AK503, gradients; AK602, a row would outgrow the cache, or has no page there.
    """
    check_append(storage, lengths, k, v, codec, lens)
    refuse_gradients("append", (k, v, *storage))
    if codec not in PLAIN:
        _append_codes(storage, lengths, k, v, codec, lens)
        return
    batch, _, count, _ = k.shape
    held, new = lengths.tolist(), _counts(k, lens)
    _check_room(held, new, count, capacity(storage))
    if len(storage) == 2 and batch > 0 and new == [count] * batch and held == held[:1] * batch:
        for to, tokens in zip(storage, (k, v), strict=True):
            to[:, :, held[0] : held[0] + count].copy_(tokens)
    else:
        exist = torch.arange(count) < torch.tensor(new, dtype=torch.int64)[:, None]
        rows, tokens_at = exist.nonzero(as_tuple=True)
        write(storage, rows, lengths[rows] + tokens_at, k[rows, :, tokens_at], v[rows, :, tokens_at])
    lengths.add_(count if lens is None else lens)


def _append_codes(
    storage: Sequence[Tensor], lengths: Tensor, k: Tensor, v: Tensor, codec: str, lens: Tensor | None
) -> None:
    scheme = parse_scheme(codec)
    parts = parts_of(scheme, storage)
    size = tokens_of(scheme, parts)
    held, new = lengths.tolist(), _counts(k, lens)
    _check_room(held, new, k.shape[2], size * (1 if parts.table is None else parts.table.shape[1]))
    stores = (
        store(parts.k, scheme.k, scheme.head_dim, scheme.group),
        store(parts.v, scheme.v, scheme.v_head_dim, scheme.group),
    )
    k, v = (t if t.dtype in PLAIN.values() else t.float() for t in (k, v))
    bad = engine.append(
        *stores, k, v, lengths, lens, parts.state, scheme.residual, parts.table, torch.get_num_threads()
    )
    if bad is None:
        return
    code, about = bad
    if code == "AK602":
        assert parts.table is not None
        raise missing_page(parts.table, about, held[about] + new[about], size, parts.k.codes.shape[0])
    raise error(code, where=("storage", "k", "v")[about] if 0 <= about < 3 else "append")


def _counts(k: Tensor, lens: Tensor | None) -> list[int]:
    return [k.shape[2]] * k.shape[0] if lens is None else lens.tolist()


def _check_room(held: list[int], new: list[int], count: int, most: int) -> None:
    if any(not 0 <= n <= count for n in new):
        raise error(
            "AK602", where="lens", given=str(new[:8]), allowed=f"0..{count}, the tokens that are given"
        )
    if any(n < 0 or n + more > most for n, more in zip(held, new, strict=True)):
        b = next(b for b in range(len(held)) if held[b] < 0 or held[b] + new[b] > most)
        raise error(
            "AK602", what="the cache is full", where=f"append, row {b}", given=f"{held[b]} tokens and {new[b]} more",
            allowed=f"{most} in all",
        )  # fmt: skip


def check_append(
    storage: Sequence[Tensor], lengths: Tensor, k: Tensor, v: Tensor, codec: str, lens: Tensor | None
) -> None:
    """Check that ``k [B, H, T, D]`` and ``v [B, H, T, Dv]`` are tokens for this storage.

    Raises:
        AttnkitError: AK402 types, AK403 shapes, AK404 dtypes, AK405 devices, AK504 codec.
    """
    held_tensors, dims = _held(storage, codec)
    batch = lengths.shape[0]
    for name, new, held, dim in zip(("k", "v"), (k, v), held_tensors, dims, strict=True):
        check_tensor(name, new, held.device)
        count = k.shape[2] if k.dim() == 4 else 0
        shape = (batch, held.shape[1], count, dim)
        if new.shape != shape:
            raise error(
                "AK403",
                where=name,
                given=shape_of(new),
                allowed=f"{list(shape)}, [batch, heads, tokens, dim]",
            )
        if not new.is_floating_point():
            raise error("AK404", where=name, given=str(new.dtype), allowed="a float dtype")
        if codec in PLAIN and held.dtype != PLAIN[codec]:
            raise error(
                "AK404", where="storage", given=str(held.dtype), allowed=f"{PLAIN[codec]}, of codec {codec}"
            )
    if lens is not None:
        check_tensor("lens", lens, lengths.device)
        if lens.dtype != torch.int32:
            raise error("AK404", where="lens", given=str(lens.dtype), allowed="torch.int32")
        if lens.shape != (batch,):
            raise error("AK403", where="lens", given=shape_of(lens), allowed=f"[{batch}], one a row")


def _held(storage: Sequence[Tensor], codec: str) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The elements or codes of k and v, and their channels."""
    plain = codec in PLAIN
    try:
        scheme = None if plain else parse_scheme(codec)
    except (TypeError, ValueError):
        raise error("AK504", where="codec", given=repr(codec), allowed=", ".join(PLAIN)) from None
    least = 2 if scheme is None else scheme.num_tensors
    if len(storage) not in (least, least + 1):
        allowed = f"{least} of k and v, and a page table or none"
        raise error("AK402", where="storage", given=f"{len(storage)} tensors", allowed=allowed)
    if scheme is None:
        return (storage[0], storage[1]), (storage[0].shape[3], storage[1].shape[3])
    parts = parts_of(scheme, storage)
    return (parts.k.codes, parts.v.codes), scheme[2:4]


def refuse_gradients(where: str, tensors: Sequence[Tensor]) -> None:
    """A cache is for inference: it takes no gradient and gives none.

    Raises:
        AttnkitError: AK503, autograd follows one of the tensors.
    """
    if needs_derivatives(tensors):
        given, allowed = "tensors that require gradients", "tensors that do not"
        raise error("AK503", what="a KV cache takes no gradient", where=where, given=given, allowed=allowed)


def _fake(storage: Any, lengths: Any, k: Any, v: Any, codec: str, lens: Any = None) -> None:
    check_append(storage, lengths, k, v, codec, lens)


def _autograd(*args: Any) -> None:
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.attnkit.kv_append.default(*args)


_lib.impl("kv_append", append, "CPU")
_lib.impl("kv_append", _autograd, "AutogradCPU")
torch.library.register_fake("attnkit::kv_append", _fake, lib=_lib)
