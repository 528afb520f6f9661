"""``torch.ops.attnkit.kv_append``: tokens go to the end of each row of a cache.

The storage of a cache is the tensors of its keys, those of its values, and the page table if it has pages. The plain
codecs keep one tensor of each: ``[B, H, max_len, D]``, or ``[pages, H, page_size, D]`` beside a table int32 ``[B, n]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error, no_page
from attnkit.ops.check import check_tensor, needs_derivatives, shape_of

# How a plain codec keeps an element.
CODECS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

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
    batch, _, count, _ = k.shape
    most, held = capacity(storage), lengths.tolist()
    new = [count] * batch if lens is None else lens.tolist()
    if any(not 0 <= n <= count for n in new):
        raise error(
            "AK602", where="lens", given=str(new[:8]), allowed=f"0..{count}, the tokens that are given"
        )
    if any(n < 0 or n + more > most for n, more in zip(held, new, strict=True)):
        b = next(b for b in range(batch) if held[b] < 0 or held[b] + new[b] > most)
        raise error(
            "AK602", what="the cache is full", where=f"append, row {b}", given=f"{held[b]} tokens and {new[b]} more",
            allowed=f"{most} in all",
        )  # fmt: skip
    if len(storage) == 2 and batch > 0 and new == [count] * batch and held == held[:1] * batch:
        for to, tokens in zip(storage, (k, v), strict=True):
            to[:, :, held[0] : held[0] + count].copy_(tokens)
    else:
        exist = torch.arange(count) < torch.tensor(new, dtype=torch.int64)[:, None]
        rows, tokens_at = exist.nonzero(as_tuple=True)
        write(storage, rows, lengths[rows] + tokens_at, k[rows, :, tokens_at], v[rows, :, tokens_at])
    lengths.add_(count if lens is None else lens)


def check_append(
    storage: Sequence[Tensor], lengths: Tensor, k: Tensor, v: Tensor, codec: str, lens: Tensor | None
) -> None:
    """Check that ``k [B, H, T, D]`` and ``v [B, H, T, Dv]`` are tokens for this storage.

    Raises:
        AttnkitError: AK402 types, AK403 shapes, AK404 dtypes, AK405 devices, AK504 codec.
    """
    if codec not in CODECS:
        raise error("AK504", where="codec", given=repr(codec), allowed=", ".join(CODECS))
    if len(storage) not in (2, 3):
        raise error(
            "AK402",
            where="storage",
            given=f"{len(storage)} tensors",
            allowed="k, v, and a page table or none",
        )
    batch = lengths.shape[0]
    for name, new, held in (("k", k, storage[0]), ("v", v, storage[1])):
        check_tensor(name, new, held.device)
        count = k.shape[2] if k.dim() == 4 else 0
        shape = (batch, held.shape[1], count, held.shape[3])
        if new.shape != shape:
            raise error(
                "AK403",
                where=name,
                given=shape_of(new),
                allowed=f"{list(shape)}, [batch, heads, tokens, dim]",
            )
        if not new.is_floating_point():
            raise error("AK404", where=name, given=str(new.dtype), allowed="a float dtype")
        if held.dtype != CODECS[codec]:
            raise error(
                "AK404", where="storage", given=str(held.dtype), allowed=f"{CODECS[codec]}, of codec {codec}"
            )
    if lens is not None:
        check_tensor("lens", lens, lengths.device)
        if lens.dtype != torch.int32:
            raise error("AK404", where="lens", given=str(lens.dtype), allowed="torch.int32")
        if lens.shape != (batch,):
            raise error("AK403", where="lens", given=shape_of(lens), allowed=f"[{batch}], one a row")


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
