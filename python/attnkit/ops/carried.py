"""``torch.ops.attnkit.attend_carried``: attention whose queries carry something onto keys, from one to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.ops.check import (
    NO_ROOM,
    autocasting,
    check_bindings,
    check_qkv,
    check_tensor,
    has_tangent,
    is_paged,
    needs_derivatives,
    no_room,
    shape_of,
    without_derivatives,
)
from attnkit.ops.counts import counts, recorder
from attnkit.ops.gradients import once
from attnkit.ops.warm import layout_of_output
from attnkit.plan.carried import carries
from attnkit.runtime import prepare

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "attend_carried(Tensor q, Tensor k, Tensor v, Tensor? initial, str program, Tensor[] buffers, float[] params)"
    " -> (Tensor o, Tensor lse, Tensor carry, Tensor gone)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_lib.define(
    "attend_carried_backward(Tensor d_o, Tensor d_lse, Tensor d_carry, Tensor o, Tensor lse, Tensor gone, Tensor q, Tensor k,"
    " Tensor v, Tensor? initial, str program, Tensor[] buffers, float[] params)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_initial)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

Results = tuple[Tensor, Tensor, Tensor, Tensor]
NEVER = 2**31 - 1
_NO_SECOND_DERIVATIVES = "attention that carries has no second derivatives"


class Call(NamedTuple):
    """The arguments of ``attend_carried``, in the order of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    initial: Tensor | None
    program: str
    buffers: list[Tensor]
    params: list[float]


def attend_carried(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, program: str, buffers: list[Tensor], params: list[float]
) -> Results:  # fmt: skip
    """``torch.ops.attnkit.attend_carried``: o, lse, what is carried after the last query, and which query first misses a key.

    The last is empty without a budget.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):  # the dispatcher would say it in other words
        check_tensor(name, t)
    return torch.ops.attnkit.attend_carried(q, k, v, initial, program, buffers, params)  # type: ignore[no-any-return]


def program_of(text: str) -> Program:
    """A program that carries.

    Raises:
        AttnkitError: AK502, it is none.
    """
    program = parse(text)
    if not carries(program):
        raise error("AK502", where="torch.ops.attnkit.attend_carried", given="a program that carries nothing")
    return program


def keys_of(program: Program, tokens: Any, buffers: list[Tensor]) -> Any:
    """How many keys each batch entry has room for, of so many tokens of a batch entry or of a page."""
    table = program.inputs[1].table
    return tokens if table is None else buffers[table].shape[1] * tokens


def check_initial(program: Program, q: Tensor, keys: Any, initial: Tensor | None) -> None:
    """Check that there is a head that selects, and that what was carried before is a number for each of so many keys.

    Raises:
        AttnkitError: AK401, AK403, AK404.
    """
    op = program.attend
    if op.head >= q.shape[1]:
        raise error("AK401", where="head", given=str(op.head), allowed=f"0..{q.shape[1] - 1}")
    if (initial is None) != (op.initial is None):
        given = "None" if initial is None else "a tensor"
        raise error("AK401", where="carry", given=given, allowed="what the program starts with")
    if initial is None:
        return
    check_tensor("carry", initial, q.device)
    wanted = (q.shape[0], keys)
    if initial.dim() != 2 or initial.shape[0] != wanted[0] or initial.shape[1] != wanted[1]:
        raise error(
            "AK403", where="carry", given=shape_of(initial), allowed=f"{list(wanted)}, a number for each key"
        )
    if initial.dtype != torch.float32:
        raise error("AK404", where="carry", given=str(initial.dtype), allowed="torch.float32")


def start(program: Program, q: Tensor, width: int, keys: Any, initial: Tensor | None) -> Results:
    """o, ``width`` channels wide, lse, the carry to start with, and nothing gone yet."""
    shape, stride = layout_of_output(q, width)
    o = torch.empty_strided(shape, stride, dtype=q.dtype, device=q.device)
    lse = q.new_empty(shape[:3], dtype=torch.float32)
    if initial is None:
        carry = q.new_zeros((q.shape[0], keys), dtype=torch.float32)
    else:
        carry = initial.clone(memory_format=torch.contiguous_format)
    gone = (q.shape[0], keys) if program.attend.budget is not None else (0,)
    return o, lse, carry, torch.full(gone, NEVER, dtype=torch.int32, device=q.device)


def _check(call: Call, program: Program) -> None:
    check_qkv(call.q, call.k, call.v, is_paged(program))
    check_initial(program, call.q, keys_of(program, call.k.shape[2], call.buffers), call.initial)


def _outputs(call: Call, program: Program) -> Results:
    keys = keys_of(program, call.k.shape[2], call.buffers)
    return start(program, call.q, call.v.shape[3], keys, call.initial)


def _kernel(*args: Any) -> Results:
    call = Call(*args)
    program = program_of(call.program)
    _check(call, program)
    check_bindings(program, call.q, call.k, call.buffers, call.params)
    kernel = _kernel_of(call)
    try:
        results = o, lse, carry, gone = _outputs(call, program)
    except NO_ROOM as exc:
        raise no_room("o, lse, carry", exc) from exc
    if recorder() is not None:  # which describes attention alone
        return o.zero_(), lse.zero_(), carry, gone
    kernel.attend(
        call.q, call.k, call.v, o, lse, carry, gone if program.attend.budget is not None else None, call.buffers,
        call.params, torch.get_num_threads(),
    )  # fmt: skip
    counts.run()
    return results


def _kernel_of(call: Call) -> Any:
    q, k, v = call.q, call.k, call.v
    dtype = str(q.dtype).removeprefix("torch.")
    lengths = q.shape[2], k.shape[2]
    return prepare(call.program, dtype, q.shape[3], v.shape[3], q.device.type, lengths=lengths).kernel


def _fake(*args: Any) -> Results:
    call = Call(*args)
    program = program_of(call.program)
    _check(call, program)
    return _outputs(call, program)


# --- backwards ----------------------------------------------------------------------------------------------


def _backward_kernel(*args: Any) -> Results:
    d_o, d_lse, d_carry, o, lse, gone, *rest = args
    call = Call(*rest)
    program = program_of(call.program)
    _check(call, program)
    check_bindings(program, call.q, call.k, call.buffers, call.params)
    q, k, v, initial = call.q, call.k, call.v, call.initial
    try:
        dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(k), torch.zeros_like(v)
        sums = torch.zeros_like(d_carry) if initial is None else initial.contiguous()
        d_initial = (
            q.new_zeros((0,)) if initial is None else d_carry.clone()
        )  # what is of no sequence stays as it was
    except NO_ROOM as exc:
        raise no_room("gradients of q, k, v", exc) from exc
    if recorder() is None:
        _kernel_of(call).backward_of(
            q, k, v, o, lse, sums, None if program.attend.budget is None else gone, call.buffers, call.params, d_o, d_lse,
            d_carry.contiguous(), dq, dk, dv, None if initial is None else d_initial, torch.get_num_threads(),
        )  # fmt: skip
        counts.run()
    return dq.to(q.dtype), dk, dv, d_initial


def _backward_fake(*args: Any) -> Results:
    call = Call(*args[6:])
    d_initial = (0,) if call.initial is None else call.initial.shape
    like = [t.new_empty(t.shape) for t in (call.q, call.k, call.v)]
    return like[0], like[1], like[2], call.q.new_empty(d_initial, dtype=torch.float32)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial: Tensor | None,
        program: str,
        buffers: list[Tensor],
        params: list[float],
    ) -> Results:
        """See `torch.autograd.Function`."""
        o, lse, carry, gone = torch.ops.attnkit.attend_carried(q, k, v, initial, program, buffers, params)
        ctx.program, ctx.params = program, params
        ctx.save_for_backward(o, lse, gone, q, k, v, initial, *buffers)
        ctx.mark_non_differentiable(gone)
        return o, lse, carry, gone

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_lse: Tensor, d_carry: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        return once(lambda: _backward(ctx, d_o, d_lse, d_carry), _NO_SECOND_DERIVATIVES)


def _backward(ctx: Any, d_o: Tensor, d_lse: Tensor, d_carry: Tensor) -> tuple[Tensor | None, ...]:
    o, lse, gone, q, k, v, initial, *buffers = ctx.saved_tensors
    found = torch.ops.attnkit.attend_carried_backward(
        d_o, d_lse, d_carry, o, lse, gone, q, k, v, initial, ctx.program, buffers, ctx.params
    )
    return *(d if w else None for d, w in zip(found, ctx.needs_input_grad, strict=False)), None, None, None


def _autograd(*args: Any) -> Results:
    call = Call(*args)
    tensors = [t for t in (call.q, call.k, call.v, call.initial) if t is not None]
    if needs_derivatives((*tensors, *call.buffers)):
        where = "torch.ops.attnkit.attend_carried"
        if has_tangent(tensors):
            raise error(
                "AK503", where=where, what="attnkit has no forward-mode derivatives of attention that carries"
            )
        program = program_of(call.program)
        _check(call, program)
        if is_paged(program) or any(b.requires_grad for b in call.buffers):
            given = "pages, or captured tensors that require gradients"
            raise error("AK503", where=where, given=given, allowed="gradients of q, k, v and the carry")
        return _Differentiable.apply(*args)  # type: ignore[no-any-return, no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnkit.attend_carried.default(*args)  # type: ignore[no-any-return]


_lib.impl("attend_carried", _kernel, "CPU")
_lib.impl("attend_carried", _autograd, "AutogradCPU")
_lib.impl("attend_carried", autocasting(torch.ops.attnkit.attend_carried.default), "AutocastCPU")
_lib.impl("attend_carried_backward", _backward_kernel, "CPU")
_once = without_derivatives(torch.ops.attnkit.attend_carried_backward.default, _NO_SECOND_DERIVATIVES)
_lib.impl("attend_carried_backward", _once, "AutogradCPU")
torch.library.register_fake("attnkit::attend_carried", _fake, lib=_lib)
torch.library.register_fake("attnkit::attend_carried_backward", _backward_fake, lib=_lib)
