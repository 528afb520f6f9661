"""Calls of nothing but tensors, at once: one look for what is kept of such tensors, one launch, in both directions.

What somebody watches, what has not been met and what the engine refuses goes the long way, which says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnkit.ops.check import NO_ROOM
from attnkit.ops.counts import counts, recorder
from attnkit.ops.gradients import NO_SECOND_DERIVATIVES, Saved, Way, once
from attnkit.ops.warm import Ready, is_below_autograd, known, run

_REFUSED = (ValueError, *NO_ROOM)


def at_once(text: str, q: Tensor, k: Tensor, v: Tensor, *, share: bool = True) -> Tensor | None:
    """``o`` of a program, with its gradients, or None: then it is for `attend`. Not for dynamo to look into.

    ``share``: whether query heads may share those of k and v.
    """
    ready: Ready | None = known(text, q, k, v)
    if ready is None or ready.launch is None or recorder() is not None or forward_ad._current_level >= 0:
        return None
    if ready.shared and not share:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None if is_below_autograd() else _apply(ready, q, k, v)
    return _forward(ready, q, k, v, need_lse=False)[0]


def _forward(
    ready: Ready, q: Tensor, k: Tensor, v: Tensor, *, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    try:
        o = q.new_empty_strided(ready.shape, ready.stride)
        lse = None
        if need_lse:
            lse = q.new_empty_strided(ready.shape[:3], ready.stride_of_lse, dtype=torch.float32)
        fault, _ = ready.launch(q, k, v, o, lse, torch.get_num_threads())
        if not fault:
            counts.run()
            return o, lse
    except _REFUSED:
        pass
    return run(ready, q, k, v, [], [], None, need_lse)


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ready: Ready, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `torch.autograd.Function`."""
        o, lse = _forward(ready, q, k, v, need_lse=True)
        ctx.ready = ready
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        return once(lambda: _backward(ctx, d_o), NO_SECOND_DERIVATIVES)


_apply: Any = super(torch.autograd.Function, _AtOnce).apply  # without what is for function transforms


def _backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all three: torch drops those that nobody wants."""
    ready: Ready = ctx.ready
    saved = q, k, v, o, lse = ctx.saved_tensors  # to be read once, says checkpointing
    # Hooks may have changed what was saved.
    if known(ready.text, q, k, v, (d_o, o, lse)) is ready and recorder() is None:
        try:
            dq = torch.empty_like(q, dtype=torch.float32)
            dk, dv = torch.empty_like(k), torch.empty_like(v)
            launch = ready.prepared.kernel.launch_backward
            fault, _ = launch(q, k, v, o, lse, d_o, None, dq, dk, dv, torch.get_num_threads())
            if not fault:
                counts.run()
                return None, dq if q.dtype == torch.float32 else dq.to(q.dtype), dk, dv
        except _REFUSED:
            pass
    dq, dk, dv, _ = Way(ready.text, [], False, ready).backward(d_o, None, Saved(*saved), [], None, [])
    return None, dq, dk, dv
