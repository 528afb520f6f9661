"""``torch.ops.attnkit.select``: which keys, or blocks of them, each query or block of queries keeps, as a map."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.text import parse
from attnkit.ops.check import (
    NO_ROOM,
    autocasting,
    below_autograd,
    check_qkv,
    check_tensor,
    check_values,
    no_room,
)
from attnkit.ops.counts import counts, recorder
from attnkit.plan.selection import Selection, selection
from attnkit.runtime import prepare

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "select(Tensor q, Tensor k, str program, Tensor[] buffers, float[] params) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def select(q: Tensor, k: Tensor, program: str, buffers: list[Tensor], params: list[float]) -> Tensor:
    """``torch.ops.attnkit.select``: bool ``[B, Hq, rows, columns]``, of a selection by groups ``[B, Hkv, rows, columns]``; the
    rows of a column are adjacent.

    Args:
        q: ``[B, Hq, Sq, D]``, float32, bfloat16 or float16 on the CPU, any strides; sums are float32.
        k: ``[B, Hkv, Skv, D]``; Hq is a multiple of Hkv.
        program: a program that returns one ``select`` of q and k, or of means of them (docs/ir.md).
        buffers: what the program's expressions read.
        params: the program's params.

    Raises:
        AttnkitError: AK1xx, AK2xx, the program is not valid; AK4xx, an argument is wrong; AK502, no kernel for it; AK6xx, an
            index is wrong.
    """
    for name, t in (("q", q), ("k", k)):  # the dispatcher would say it in other words
        check_tensor(name, t)
    return torch.ops.attnkit.select(q, k, program, buffers, params)  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def found_in(text: str) -> Selection:
    """The selection that a program is.

    Raises:
        AttnkitError: AK1xx, AK2xx, the text is no valid program; AK502, it is not one selection that kernels know.
    """
    found = selection(parse(text))
    if found is None:
        given = "a program that is more than one selection among q and k, or means of them"
        raise error("AK502", where="torch.ops.attnkit.select", given=given)
    return found


def _check(q: Tensor, k: Tensor, program: str, buffers: list[Tensor], params: list[float]) -> Selection:
    found = found_in(program)
    check_qkv(q, k, k)
    check_values(parse(program), q.device, buffers, params)
    return found


def _kernel(q: Tensor, k: Tensor, program: str, buffers: list[Tensor], params: list[float]) -> Tensor:
    found = _check(q, k, program, buffers, params)
    dtype, dim = str(q.dtype).removeprefix("torch."), q.shape[3]
    kernel = prepare(program, dtype, dim, dim, q.device.type).kernel
    chosen = _chosen(found, q, k)
    kernel(q, k, chosen, buffers, params, torch.get_num_threads())
    if recorder() is None:  # which wants to know the tiles of what is chosen
        counts.run()
    return chosen


def _chosen(found: Selection, q: Tensor, k: Tensor) -> Tensor:
    batch, heads, rows, columns = found.shape(q.shape, k.shape)
    try:  # attention reads the rows of a column one after the other
        return torch.empty((batch, heads, columns, rows), dtype=torch.bool, device=q.device).mT
    except NO_ROOM as exc:
        raise no_room("chosen", exc) from exc


def _fake(q: Tensor, k: Tensor, program: str, buffers: list[Tensor], params: list[float]) -> Tensor:
    return _chosen(_check(q, k, program, buffers, params), q, k)


_lib.impl("select", _kernel, "CPU")
_lib.impl("select", below_autograd(torch.ops.attnkit.select.default), "AutogradCPU")
_lib.impl("select", autocasting(torch.ops.attnkit.select.default), "AutocastCPU")
torch.library.register_fake("attnkit::select", _fake, lib=_lib)
