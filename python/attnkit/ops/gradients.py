"""``torch.ops.attnkit.attend_backward``, and how a call of attention enters torch's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import NO_ROOM, check_bindings, no_room, shape_of, without_derivatives
from attnkit.ops.counts import counts, recorder
from attnkit.ops.warm import Ready, is_unwatched, ready, run, seed_of

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "attend_backward(Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, str program,"
    " Tensor[] buffers, float[] params, Tensor? seed, bool[] wanted)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] d_buffers)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


NO_SECOND_DERIVATIVES = "attention has no second derivatives"


class Saved(NamedTuple):
    """What the backward of a call needs of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor


class BackwardCall(NamedTuple):
    """The arguments of ``attend_backward``, in the order of its schema.

    ``d_o`` and ``d_lse`` are the cotangents of what the call returned, ``o`` and ``lse``; ``wanted`` says for each
    buffer whether its gradient is computed.
    """

    d_o: Tensor
    d_lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    program: str
    buffers: list[Tensor]
    params: list[float]
    seed: Tensor | None
    wanted: list[bool]


Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def run_backward(
    ready: Ready,
    d_o: Tensor,
    d_lse: Tensor | None,
    saved: Saved,
    buffers: list[Tensor],
    params: list[float],
    seed: Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """The gradients of q, k, v and of the wanted buffers, in the dtypes of these, by a kernel that has a backward.

    Raises:
        AttnkitError: AK4xx, the tensors do not go together; AK603, out of memory; as the kernel.
    """
    q, k, v, o, lse = saved
    if q.is_cuda and q.device.index != torch.cuda.current_device():  # as in `run`
        with torch.cuda.device(q.device):
            return run_backward(ready, d_o, d_lse, saved, buffers, params, seed, wanted)
    if ready.bound or buffers or params or seed is not None:
        check_bindings(ready.prepared.spec.program, q, k, buffers, params, seed)
    if len(wanted) != len(buffers):
        given = f"{len(wanted)} for {len(buffers)} buffers"
        raise error("AK401", where="wanted", given=given, allowed="one for each buffer")
    shape, dtype = ready.shape, q.dtype
    _check("d_o", d_o, shape, dtype)
    _check("o", o, shape, dtype)
    _check("lse", lse, shape[:3], torch.float32)
    if d_lse is not None:
        _check("d_lse", d_lse, shape[:3], torch.float32)
    new = torch.zeros_like if ready.ragged or o.numel() == 0 else torch.empty_like
    try:
        accumulated = dtype if q.is_cuda else _accumulated(q)
        dq = new(q) if dtype == accumulated else new(q, dtype=accumulated)
        dk, dv = new(k), new(v)
        sums = [_zeros(b) if w else None for b, w in zip(buffers, wanted, strict=True)] if buffers else []
    except NO_ROOM as exc:
        raise no_room("gradients of q, k, v", exc) from exc
    if recorder() is None:
        kernel: Any = ready.prepared.kernel
        kernel.backward(
            q, k, v, o, lse, buffers, params, d_o, d_lse, dq, dk, dv, sums, torch.get_num_threads(), seed_of(seed)
        )  # fmt: skip
        counts.run()
    d_buffers = (
        [d.to(b.dtype) for d, b in zip(sums, buffers, strict=True) if d is not None] if buffers else []
    )
    return dq if dtype == accumulated else dq.to(dtype), dk, dv, d_buffers


def _accumulated(t: Tensor) -> torch.dtype:
    dtype = t.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def _zeros(buffer: Tensor) -> Tensor:
    return torch.zeros(buffer.shape, dtype=_accumulated(buffer), device=buffer.device)


def _check(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t.shape != shape:
        raise error("AK403", where=name, given=shape_of(t), allowed=str(list(shape)))
    if t.dtype != dtype:
        raise error("AK404", where=name, given=str(t.dtype), allowed=str(dtype))


def _fake(*args: Any) -> Gradients:
    call = BackwardCall(*args)
    d_buffers = [b.new_empty(b.shape) for b, wanted in zip(call.buffers, call.wanted, strict=True) if wanted]
    return torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v), d_buffers


def _kernel(*args: Any) -> Gradients:
    d_o, d_lse, q, k, v, o, lse, program, buffers, params, seed, wanted = BackwardCall(*args)
    found = ready(program, q, k, v)
    if not found.differentiable:
        given = f"backend {found.prepared.backend!r}"
        raise error("AK503", where="torch.ops.attnkit.attend_backward", given=given)
    return run_backward(found, d_o, d_lse, Saved(q, k, v, o, lse), buffers, params, seed, wanted)


class Way(NamedTuple):
    """How a call is computed, in both directions: by ops, which graphs can hold, or past the dispatcher, while nobody watches.

    ``ready`` is the kernel where ops are not asked for; ``need_lse``: lse is an output and not only kept for the backward.
    """

    program: str
    params: list[float]
    need_lse: bool
    ready: Ready | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, buffers: list[Tensor], seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``o`` and ``lse``."""
        if self.ready is not None:
            return run(self.ready, q, k, v, buffers, self.params, seed, need_lse=True)  # type: ignore[return-value]
        return torch.ops.attnkit.attend(q, k, v, self.program, buffers, self.params, seed, True)  # type: ignore[no-any-return]

    def backward(
        self,
        d_o: Tensor,
        d_lse: Tensor | None,
        saved: Saved,
        buffers: list[Tensor],
        seed: Tensor | None,
        wanted: list[bool],
    ) -> Gradients:
        """The gradients by everything that `forward` was given. Cotangents may be watched even if the call was not, by vmap for one."""
        found = self.ready
        tensors = (d_o, *saved, *buffers) if d_lse is None else (d_o, d_lse, *saved, *buffers)
        # No op knows a backend that was asked for by name.
        if found is not None and (not found.automatic or is_unwatched(tensors)):
            return run_backward(found, d_o, d_lse, saved, buffers, self.params, seed, wanted)
        others = self.program, buffers, self.params, seed, wanted
        return torch.ops.attnkit.attend_backward(d_o, d_lse, *saved, *others)  # type: ignore[no-any-return]


def differentiable(
    way: Way, tensors: tuple[Tensor, ...], seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention with gradients of ``(q, k, v, *buffers)``: ``o``, and ``lse`` if the way needs it."""
    unwatched = way.ready is not None and way.ready.automatic  # what is asked for by name was not looked at
    found = (_apply if unwatched else _Differentiable.apply)(way, seed, *tensors)
    return found if way.need_lse else (found, None)


def once(backward: Callable[[], tuple[Tensor | None, ...]], refusal: str) -> tuple[Tensor | None, ...]:
    """What a backward gives; in a graph of it, what says ``refusal`` when it is differentiated itself.

    torch's once_differentiable would give constants unless a cotangent itself is followed.
    """
    if not torch.is_grad_enabled():
        return backward()
    with torch.no_grad():
        found = backward()
    refuse: Any = torch._C._functions.DelayedError(f"{refusal} (AK503)".encode(), len(found))
    return refuse(*(d if d is None else d.detach().requires_grad_() for d in found))  # type: ignore[no-any-return]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, way: Way, seed: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *buffers: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `torch.autograd.Function`."""
        o, lse = way.forward(q, k, v, list(buffers), seed)
        ctx.way = way
        ctx.save_for_backward(q, k, v, o, lse, seed, *buffers)
        if not way.need_lse:
            return o
        ctx.set_materialize_grads(False)  # either may have no cotangent
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        return once(lambda: _backward(ctx, d_o, d_lse), NO_SECOND_DERIVATIVES)


def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, seed, *buffers = ctx.saved_tensors  # to be read once, says checkpointing
    if d_o is None:
        d_o = torch.zeros_like(o)
    _, _, of_q, of_k, of_v, *wanted = ctx.needs_input_grad
    dq, dk, dv, d_buffers = ctx.way.backward(d_o, d_lse, Saved(q, k, v, o, lse), buffers, seed, wanted)
    of_inputs = None, None, dq if of_q else None, dk if of_k else None, dv if of_v else None
    if not buffers:
        return of_inputs
    found = iter(d_buffers)
    return *of_inputs, *(next(found) if w else None for w in wanted)


# Which Function.apply calls in the end: without what torch does first for function transforms.
_apply: Any = super(torch.autograd.Function, _Differentiable).apply


_once = without_derivatives(torch.ops.attnkit.attend_backward.default, NO_SECOND_DERIVATIVES)
for _device in ("CPU", "CUDA"):
    _lib.impl("attend_backward", _kernel, _device)
    _lib.impl("attend_backward", _once, f"Autograd{_device}")
torch.library.register_fake("attnkit::attend_backward", _fake, lib=_lib)
