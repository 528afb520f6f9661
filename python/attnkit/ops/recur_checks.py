"""Whether the tensors of a recurrence go with each other and with its program. What they hold is not looked at here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import check_tensor, shape_of, shapes_of
from attnkit.plan.recurrence import Recurrence

CHUNKS = (16, 32, 64, 128)


class Call(NamedTuple):
    """The arguments of ``recur``, in the order of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    others: list[Tensor]
    program: str
    buffers: list[Tensor]
    chunk: int


def states_of(call: Call, found: Recurrence) -> Any:
    """How many sequences there are: each has a state."""
    return call.q.shape[0] if found.lengths is None else call.buffers[found.lengths].shape[0] - 1


def check_call(call: Call, found: Recurrence) -> None:
    """Check everything but what cu_seqlens holds.

    Raises:
        AttnkitError: AK401 counts, AK402 not a tensor, AK403 shapes, AK404 dtypes, AK405 devices, AK407 head counts, AK602
            packed tokens in more than one batch entry.
    """
    _check_tokens(call.q, call.k, call.v)
    _check_heads(call.q, call.k, call.v)
    for name, given, wanted in (
        ("others", len(call.others), len(found.roles)),
        ("buffers", len(call.buffers), int(found.lengths is not None)),
    ):
        if given != wanted:
            raise error("AK401", where=name, given=str(given), allowed=f"{wanted} tensors")
    if found.lengths is not None:
        _check_lengths(call.buffers[found.lengths], call.q)
    _check_others(call, found)
    check_chunk(call.chunk)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t, getattr(q, "device", None))
        if t.dim() != 4:
            raise error("AK403", where=name, given=shape_of(t), allowed="[batch, heads, length, head_dim]")
        if t.dtype != q.dtype:
            raise error("AK404", where=name, given=str(t.dtype), allowed=f"the dtype of q, {q.dtype}")
    if not q.is_floating_point():
        raise error("AK404", where="q", given=str(q.dtype), allowed="float32, bfloat16 or float16")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2] == k.shape[2] == v.shape[2]):
        raise error(
            "AK403", where="q, k, v", given=shapes_of(q, k, v), allowed="one batch size and one length"
        )
    if q.shape[3] != k.shape[3] or q.shape[3] == 0 or v.shape[3] == 0:
        raise error(
            "AK403",
            where="q, k, v",
            given=shapes_of(q, k, v),
            allowed="q and k of one head_dim, dims of at least 1",
        )


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    q_heads, k_heads, heads = q.shape[1], k.shape[1], v.shape[1]
    if 0 in (q_heads, k_heads, heads) or heads % k_heads or (q_heads % heads and heads % q_heads):
        allowed = "heads of v a multiple of those of k; of q and v one a multiple of the other"
        raise error(
            "AK407",
            where="q, k, v",
            given=shapes_of(q, k, v),
            allowed=allowed,
            hint="repeat the heads that are fewer",
        )


def _check_lengths(cu: Tensor, q: Tensor) -> None:
    check_tensor("cu_seqlens", cu, q.device)
    if cu.dtype != torch.int32:
        raise error("AK404", where="cu_seqlens", given=str(cu.dtype), allowed="torch.int32")
    if cu.dim() != 1 or cu.shape[0] == 0:
        raise error("AK403", where="cu_seqlens", given=shape_of(cu), allowed="[N + 1]")
    if q.shape[0] != 1:
        raise error(
            "AK602", where="q", given=shape_of(q), allowed="[1, heads, total, head_dim] beside cu_seqlens"
        )


def _check_others(call: Call, found: Recurrence) -> None:
    q, v = call.q, call.v
    (batch, _, length, dim), heads, states = q.shape, v.shape[1], states_of(call, found)
    rows = found.features(dim)
    sizes = {
        "h": (heads,), "bhs": (batch, heads, length), "bhsd": (batch, heads, length, dim),
        "packed": (batch, heads, length, dim), "hd": (heads, dim), "bhd": (states, heads, rows),
        "bhdv": (states, heads, rows, v.shape[3]),
    }  # fmt: skip
    for role, kind, t in zip(found.roles, found.kinds, call.others, strict=True):
        check_tensor(role, t, q.device)
        if t.dtype != torch.float32:
            raise error("AK404", where=role, given=str(t.dtype), allowed="torch.float32")
        if tuple(t.shape) != sizes[kind]:
            raise error("AK403", where=role, given=shape_of(t), allowed=str(list(sizes[kind])))


def check_chunk(size: Any) -> None:
    """AK402 unless ``size`` is an int, AK401 unless it is one of `CHUNKS`."""
    allowed = ", ".join(map(str, CHUNKS))
    if type(size) is not int:
        raise error("AK402", where="chunk_size", given=type(size).__name__, allowed=allowed)
    if size not in CHUNKS:
        raise error("AK401", where="chunk_size", given=str(size), allowed=allowed)
