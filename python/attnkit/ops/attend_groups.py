"""``torch.ops.attnkit.attend_groups``: attention within groups of tokens, each a list of queries and one of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.backends.cpu import groups as engine
from attnkit.errors import error
from attnkit.ir.text import parse
from attnkit.ops.check import (
    NO_ROOM,
    autocasting,
    check_bindings,
    check_qkv,
    check_tensor,
    has_tangent,
    needs_derivatives,
    no_room,
    shape_of,
    without_derivatives,
)
from attnkit.ops.counts import counts, recorder
from attnkit.ops.gradients import NO_SECOND_DERIVATIVES, once
from attnkit.ops.warm import layout_of_output
from attnkit.runtime import Prepared, prepare

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "attend_groups(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor keys, bool shared, str program, Tensor[] buffers,"
    " float[] params, bool need_lse) -> (Tensor o, Tensor lse, Tensor rows)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "attend_groups_backward(Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor queries,"
    " Tensor keys, bool shared, str program, Tensor[] buffers, float[] params, bool[] wanted)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] d_buffers)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

Results = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor]]


class Call(NamedTuple):
    """The arguments of ``attend_groups``, in the order of its schema.

    Within each group its queries attend to its keys by the program's softmax; a token's result is the mean over the groups
    that list it, 0 if none does. ``queries`` and ``keys`` are int32 ``[B or 1, Hkv or 1, groups, most]``: ascending tokens,
    then -1. Without ``shared`` no query is in two groups of a head, and lse is ``[B, Hq, Sq]``; with it lse is that of rows,
    ``[B, Hq, groups * most]``, raised by the logarithm of the number of its token's groups, and ``rows``, float32 ``[B, Hq,
    groups * most, Dv]``, are what each group gave: what the backward reads. Both are empty unless lse is asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Tensor
    keys: Tensor
    shared: bool
    program: str
    buffers: list[Tensor]
    params: list[float]
    need_lse: bool


def attend_groups(*args: Any) -> Results:
    """``torch.ops.attnkit.attend_groups``."""
    return torch.ops.attnkit.attend_groups(*args)  # type: ignore[no-any-return]


def check_lists(queries: Any, keys: Any, q: Tensor, k: Tensor) -> None:
    """Check all but what lists hold.

    Raises:
        AttnkitError: AK402 not a tensor, AK403 shapes, AK404 dtypes, AK405 devices.
    """
    for name, t in (("queries", queries), ("keys", keys)):
        check_tensor(name, t, q.device)
        if t.dtype != torch.int32:
            raise error("AK404", where=name, given=str(t.dtype), allowed="torch.int32")
        if t.dim() != 4 or t.shape[0] not in (1, q.shape[0]) or t.shape[1] not in (1, k.shape[1]):
            allowed = f"[{q.shape[0]} or 1, {k.shape[1]} or 1, groups, most]"
            raise error("AK403", where=name, given=shape_of(t), allowed=allowed)
    if queries.shape[2] != keys.shape[2]:
        given = f"{queries.shape[2]} and {keys.shape[2]} groups"
        raise error("AK403", where="queries, keys", given=given, allowed="as many of each")


def _check(call: Call) -> None:
    check_qkv(call.q, call.k, call.v)
    check_lists(call.queries, call.keys, call.q, call.k)


def _facts(name: str, lists: Tensor, tokens: int) -> engine.ListFacts:
    found = engine.look_at(lists, tokens)
    if not found.valid:
        allowed = f"ascending tokens, 0 to {tokens - 1}, then -1"
        raise error("AK608", where=name, allowed=allowed)
    return found


def _outputs(call: Call) -> Results:
    q, v = call.q, call.v
    shape, stride = layout_of_output(q, v.shape[3])
    rows = call.queries.shape[2] * call.queries.shape[3] if call.shared else shape[2]
    try:
        o = q.new_empty_strided(shape, stride)
        lse = q.new_empty((*shape[:2], rows) if call.need_lse else (0,), dtype=torch.float32)
        kept = call.need_lse and call.shared
        return o, lse, q.new_empty((*lse.shape, v.shape[3]) if kept else (0,), dtype=torch.float32)
    except NO_ROOM as exc:
        raise no_room("o, lse, rows", exc) from exc


def adjacent(t: Tensor) -> Tensor:
    """The tensor, or a copy of it whose channels are adjacent."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _prepared(call: Call) -> Prepared:
    q, v = call.q, call.v
    program = parse(call.program)
    attend = program.attend
    plain = (
        attend.plain
        and len(program.ops) == 2
        and all(x.kind == "bhsd" and x.codec is None for x in program.inputs)
    )
    if not plain or attend.dropout is not None or attend.normalizer.sink is not None:
        given = "lengths, pages, codecs, other operations, dropout, a sink or another normalizer"
        raise error("AK502", where="torch.ops.attnkit.attend_groups", given=given, allowed="score and mask")
    check_bindings(program, q, call.k, call.buffers, call.params)
    dtype = str(q.dtype).removeprefix("torch.")
    prepared = prepare(call.program, dtype, q.shape[3], v.shape[3], q.device.type)
    if prepared.backend != "cpu":
        given = f"backend {prepared.backend!r}"
        raise error(
            "AK502", where="torch.ops.attnkit.attend_groups", given=given, allowed="tensors on the CPU"
        )
    return prepared


def _kernel(*args: Any) -> Results:
    call = Call(*args)
    _check(call)
    prepared = _prepared(call)
    kernel: Any = prepared.kernel
    queries, keys = call.queries.contiguous(), call.keys.contiguous()
    q, k, v = map(adjacent, (call.q, call.k, call.v))
    o, lse, rows = _outputs(call)
    of_q, _ = _facts("queries", queries, q.shape[2]), _facts("keys", keys, k.shape[2])
    if of_q.shared and not call.shared:
        raise error(
            "AK608", where="queries", given="a token in two groups", allowed="one, unless they share tokens"
        )
    record = recorder()
    if record is not None:
        note = (
            f"within {queries.shape[2]} groups of at most {queries.shape[3]} queries and {keys.shape[3]} keys"
        )
        record(
            prepared=prepared, q=q, k=k, v=v, buffers=call.buffers, params=call.params, reason=None, note=note
        )
    if record is not None or queries.numel() == 0 or o.numel() == 0:
        return o.zero_(), lse.fill_(-torch.inf), rows.zero_()
    threads = torch.get_num_threads()

    def run(o: Tensor, lse: Tensor | None, way: engine.Way) -> None:
        engine.attend(kernel, q, k, v, o, lse, queries, keys, way, call.buffers, call.params, threads)

    if call.shared and not call.need_lse:
        run(o, None, engine.Way(mean=True))
    elif call.shared:
        if bool((queries[..., -1] < 0).any()):  # nobody gives what follows the last of a list
            lse.zero_()
            rows.zero_()
        run(rows, lse, engine.Way(rows=True))
        engine.sum_rows(rows, queries, o, True, lse, threads)
    else:
        if not of_q.complete:
            o.zero_()
            lse.fill_(-torch.inf)
        run(o, lse if call.need_lse else None, engine.Way())
    counts.run()
    return o, lse, rows


def _new(*shape: int, zero: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    try:
        return (torch.zeros if zero else torch.empty)(shape, dtype=dtype)
    except NO_ROOM as exc:
        raise no_room(f"rows {list(shape)}", exc) from exc


def _fake(*args: Any) -> Results:
    call = Call(*args)
    _check(call)
    return _outputs(call)


# --- backwards ----------------------------------------------------------------------------------------------


def _backward_kernel(
    d_o: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any
) -> Gradients:
    queries, keys, shared, program, buffers, params, wanted = rest
    call = Call(q, k, v, queries, keys, shared, program, buffers, params, True)
    _check(call)
    if len(wanted) != len(buffers):
        given = f"{len(wanted)} for {len(buffers)} buffers"
        raise error("AK401", where="wanted", given=given, allowed="one for each buffer")
    kernel: Any = _prepared(call).kernel
    queries, keys = queries.contiguous(), keys.contiguous()
    q, k, v, d_o = map(adjacent, (q, k, v, d_o))
    _facts("queries", queries, q.shape[2])
    of_k = _facts("keys", keys, k.shape[2])
    sums = [_new(*b.shape, zero=True) if w else None for b, w in zip(buffers, wanted, strict=True)]
    empty = queries.numel() == 0 or keys.numel() == 0 or o.numel() == 0
    zero = empty or not of_k.complete
    dk, dv = ((torch.zeros_like if zero else torch.empty_like)(t) for t in (k, v))
    if empty:
        return (
            torch.zeros_like(q),
            dk,
            dv,
            [d.to(b.dtype) for d, b in zip(sums, buffers, strict=True) if d is not None],
        )
    threads = torch.get_num_threads()
    of_q = (*q.shape[:2], queries.shape[2] * queries.shape[3] if shared else q.shape[2], q.shape[3])
    dq = _new(*of_q, zero=True)
    of_keys = (*k.shape[:2], keys.shape[2] * keys.shape[3])
    dk_rows, dv_rows = (_new(*of_keys, t.shape[3]) if of_k.shared else d for t, d in ((k, dk), (v, dv)))
    engine.backward(
        kernel, q, k, v, o, lse, queries, keys, shared, of_k.shared, buffers, params, d_o, d_lse, dq, dk_rows, dv_rows,
        sums, threads,
    )  # fmt: skip
    if shared:
        dq_rows, dq = dq, torch.empty_like(q)
        engine.sum_rows(dq_rows, queries, dq, False, None, threads)
    if of_k.shared:
        engine.sum_rows(dk_rows, keys, dk, False, None, threads)
        engine.sum_rows(dv_rows, keys, dv, False, None, threads)
    counts.run()
    return (
        dq.to(q.dtype),
        dk,
        dv,
        [d.to(b.dtype) for d, b in zip(sums, buffers, strict=True) if d is not None],
    )


def _backward_fake(*args: Any) -> Gradients:
    _, _, q, k, v, _, _, _, _, _, _, buffers, _, wanted = args
    d_buffers = [b.new_empty(b.shape) for b, w in zip(buffers, wanted, strict=True) if w]
    return (
        torch.empty_like(adjacent(q)),
        torch.empty_like(adjacent(k)),
        torch.empty_like(adjacent(v)),
        d_buffers,
    )


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, *buffers: Tensor) -> Results:
        """See `torch.autograd.Function`."""
        o, lse, rows = torch.ops.attnkit.attend_groups(q, k, v, *call[3:7], list(buffers), call.params, True)
        ctx.shared, ctx.program, ctx.params = call.shared, call.program, call.params
        ctx.save_for_backward(q, k, v, rows if call.shared else o, lse, call.queries, call.keys, *buffers)
        ctx.mark_non_differentiable(*((lse, rows) if call.shared else (rows,)))
        ctx.set_materialize_grads(False)
        return o, lse, rows

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        return once(lambda: _backward(ctx, d_o, d_lse), NO_SECOND_DERIVATIVES)


def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, queries, keys, *buffers = ctx.saved_tensors
    of = ctx.needs_input_grad[1:]
    if d_o is None:
        d_o = q.new_zeros((*q.shape[:3], v.shape[3]))
    dq, dk, dv, d_buffers = torch.ops.attnkit.attend_groups_backward(
        d_o, d_lse, q, k, v, o, lse, queries, keys, ctx.shared, ctx.program, buffers, ctx.params, of[3:]
    )
    found = iter(d_buffers)
    of_buffers = [next(found) if w else None for w in of[3:]]
    return None, *(d if w else None for d, w in zip((dq, dk, dv), of[:3], strict=True)), *of_buffers


def _autograd(*args: Any) -> Results:
    call = Call(*args)
    tensors = [call.q, call.k, call.v, *call.buffers]
    if needs_derivatives(tensors):
        if has_tangent(tensors):
            what = "attnkit has no forward-mode derivatives of groups"
            raise error("AK503", where="torch.ops.attnkit.attend_groups", what=what)
        _check(call)
        found: Results = _Differentiable.apply(call, call.q, call.k, call.v, *call.buffers)  # type: ignore[no-untyped-call]
        return found
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnkit.attend_groups.default(*args)  # type: ignore[no-any-return]


_lib.impl("attend_groups", _kernel, "CPU")
_lib.impl("attend_groups", _autograd, "AutogradCPU")
_lib.impl("attend_groups", autocasting(torch.ops.attnkit.attend_groups.default), "AutocastCPU")
_lib.impl("attend_groups_backward", _backward_kernel, "CPU")
_once = without_derivatives(torch.ops.attnkit.attend_groups_backward.default, NO_SECOND_DERIVATIVES)
_lib.impl("attend_groups_backward", _once, "AutogradCPU")
torch.library.register_fake("attnkit::attend_groups", _fake, lib=_lib)
torch.library.register_fake("attnkit::attend_groups_backward", _backward_fake, lib=_lib)
