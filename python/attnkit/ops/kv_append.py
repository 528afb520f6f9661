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
from attnkit.backends.triton import append as device
from attnkit.errors import error
from attnkit.ops.check import below_autograd, check_tensor, needs_derivatives, shape_of
from attnkit.ops.kv_codes import PLAIN, Parts, Scheme, capacity, parts_of, scheme_of, slots, store, tokens_of

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "kv_append(Tensor(a!)[] storage, Tensor(b!) lengths, Tensor k, Tensor v, str codec, Tensor? lens=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def append(
    storage: Sequence[Tensor], lengths: Tensor, k: Tensor, v: Tensor, codec: str, lens: Tensor | None = None
) -> None:
    """What the op does.

    Raises:
        AttnkitError: as `check_append`; AK503, gradients; AK602, a row would outgrow the cache, or has no page there (on a GPU
            nobody waits to know).
    """
    scheme = check_append(storage, lengths, k, v, codec, lens)
    refuse_gradients("append", (k, v, *storage))
    parts = parts_of(scheme, storage)
    if lengths.is_cuda:
        with torch.cuda.device(lengths.device):  # kernels run where the current stream is
            append_on_device(scheme, parts, lengths, k, v, lens)
        return
    held, new = lengths.tolist(), [k.shape[2]] * k.shape[0] if lens is None else lens.tolist()
    _check_room(held, new, k.shape[2], capacity(parts))
    if scheme.is_plain:
        _append_elements(parts, lengths, k, v, held, new)
        lengths.add_(k.shape[2] if lens is None else lens)
    else:
        _append_codes(scheme, parts, lengths, k, v, held, new, lens)


def append_on_device(
    scheme: Scheme, parts: Parts, lengths: Tensor, k: Tensor, v: Tensor, lens: Tensor | None
) -> None:
    """What there is no room for is not written, and no row grows longer than it can."""
    room, count = capacity(parts), k.shape[2]
    k, v = (t if t.dtype in PLAIN.values() else t.float() for t in (k, v))
    grown = (lengths + (count if lens is None else lens.clamp(0, count))).clamp_(max=room)
    leaving = None
    if parts.state is not None:
        coded = parts.state[0]
        groups = (grown - scheme.residual).div_(scheme.group, rounding_mode="floor").mul_(scheme.group)
        leaving = device.Leaving(coded, torch.maximum(groups, coded), scheme.group)
    held = device.Held(scheme.k, *parts.k.flat()), device.Held(scheme.v, *parts.v.flat())
    device.append((k, v), held, lengths, lens, parts.table, room, leaving)
    lengths.copy_(grown)
    if parts.state is not None and leaving is not None:
        parts.state[0].copy_(leaving.after)
        torch.maximum(parts.state[1], grown - scheme.slots, out=parts.state[1])


def _append_elements(
    parts: Parts, lengths: Tensor, k: Tensor, v: Tensor, held: list[int], new: list[int]
) -> None:
    batch, _, count, _ = k.shape
    pairs = ((parts.k.codes, k), (parts.v.codes, v))
    if parts.table is None and batch > 0 and new == [count] * batch and held == held[:1] * batch:
        for to, tokens in pairs:
            to[:, :, held[0] : held[0] + count].copy_(tokens)
        return
    exist = torch.arange(count) < torch.tensor(new, dtype=torch.int64)[:, None]
    rows, tokens_at = exist.nonzero(as_tuple=True)
    first, second = slots(parts, rows, lengths[rows] + tokens_at)
    for to, tokens in pairs:
        to[first, :, second] = tokens[rows, :, tokens_at].to(to.dtype)


def _append_codes(
    scheme: Scheme, parts: Parts, lengths: Tensor, k: Tensor, v: Tensor, held: list[int], new: list[int], lens: Tensor | None
) -> None:  # fmt: skip
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
        size, pages = tokens_of(parts), parts.k.codes.shape[0]
        raise missing_page(parts.table, about, held[about] + new[about], size, pages)
    raise error(code, where=("storage", "k", "v")[about] if 0 <= about < 3 else "append")


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
) -> Scheme:
    """Check that ``k [B, H, T, D]`` and ``v [B, H, T, Dv]`` are tokens for this storage; its scheme.

    Raises:
        AttnkitError: AK402 types, AK403 shapes, AK404 dtypes, AK405 devices, AK504 codec.
    """
    scheme = scheme_of(codec, storage)
    parts = parts_of(scheme, storage)
    batch = lengths.shape[0]
    for name, new, held, dim in zip(
        ("k", "v"), (k, v), (parts.k.codes, parts.v.codes), scheme[2:4], strict=True
    ):
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
    return scheme


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


for _device in ("CPU", "CUDA"):
    _lib.impl("kv_append", append, _device)
    _lib.impl("kv_append", below_autograd(torch.ops.attnkit.kv_append.default), f"Autograd{_device}")
torch.library.register_fake("attnkit::kv_append", _fake, lib=_lib)
