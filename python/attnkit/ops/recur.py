"""``torch.ops.attnkit.recur``: recurrences. The program travels as text; what it reads beside q, k and v follows them."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import AttnkitError, error
from attnkit.ir.text import parse
from attnkit.ops.check import (
    NO_ROOM,
    autocasting,
    check_tensor,
    has_tangent,
    needs_derivatives,
    no_room,
    without_derivatives,
)
from attnkit.ops.counts import counts, recorder
from attnkit.ops.gradients import once
from attnkit.ops.recur_checks import CHUNKS, Call, check_call, states_of
from attnkit.ops.warm import is_plain, keep, known
from attnkit.plan.recurrence import Recurrence, recurrence
from attnkit.runtime import Prepared, prepare

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "recur(Tensor q, Tensor k, Tensor v, Tensor[] others, str program, Tensor[] buffers, int chunk)"
    " -> (Tensor o, Tensor state, Tensor norm)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "recur_backward(Tensor d_o, Tensor d_state, Tensor d_norm, Tensor o, Tensor state, Tensor norm, Tensor q, Tensor k,"
    " Tensor v, Tensor[] others, str program, Tensor[] buffers, int chunk)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] d_others)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

Results = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor]]
_NO_SECOND_DERIVATIVES = "recurrences have no second derivatives"


def recur(
    q: Tensor, k: Tensor, v: Tensor, others: list[Tensor], program: str, buffers: list[Tensor], chunk: int
) -> Results:
    """``torch.ops.attnkit.recur``: o, the last state, and its norm, empty where nothing is normalised."""
    call = Call(q, k, v, others, program, buffers, chunk)
    new = False
    if not buffers and not torch.compiler.is_compiling():
        met = known(program, q, k, v, others)
        new = met is None
        if met is not None and (results := _at_once(met[0], met[1], call)) is not None:
            return results
    for name, t in (("q", q), ("k", k), ("v", v)):  # the dispatcher would say it in other words
        check_tensor(name, t)
    results = torch.ops.attnkit.recur(*call)
    if new and is_plain((q, k, v)):
        keep(program, q, k, v, (_prepared(call).kernel, _sizes(call, found_in(program))))
    return results  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def found_in(text: str) -> Recurrence:
    """The recurrence that a program is.

    Raises:
        AttnkitError: AK1xx, AK2xx, the text is no valid program; AK502, it is not one recurrence that kernels know.
    """
    found = recurrence(parse(text))
    if found is None:
        given = (
            "a program that is more than one recurrence over q, k, v with a norm and a feature map of its own"
        )
        raise error("AK502", where="torch.ops.attnkit.recur", given=given)
    return found


class _Sizes(NamedTuple):
    """Of ``o [B, max(Hq, H), S, Dv]``, its strides, of the last state and its norm."""

    o: tuple[int, ...]
    stride: tuple[int, ...]
    state: tuple[int, ...]
    norm: tuple[int, ...]


def _sizes(call: Call, found: Recurrence) -> _Sizes:
    batch, heads, length, width = call.v.shape
    rows, states = found.features(call.q.shape[3]), states_of(call, found)
    readers = max(call.q.shape[1], heads)
    stride = (length * readers * width, width, readers * width, 1)  # models merge heads from that
    norm = (states, heads, rows) if found.op.normalize else (0,)
    return _Sizes((batch, readers, length, width), stride, (states, heads, rows, width), norm)


def _outputs(q: Tensor, sizes: _Sizes) -> Results:
    """o, the last state and its norm, unset."""
    try:
        o = q.new_empty_strided(sizes.o, sizes.stride)
        state = q.new_empty(sizes.state, dtype=torch.float32)
        return o, state, q.new_empty(sizes.norm, dtype=torch.float32)
    except NO_ROOM as exc:
        raise no_room("o, state", exc) from exc


def _sequences(call: Call, found: Recurrence) -> list[tuple[int, int, int]] | None:
    """(batch, first token, tokens) of every packed sequence; None means one per batch entry."""
    if found.lengths is None:
        return None
    try:
        cu = call.buffers[found.lengths].tolist()
    except RuntimeError as exc:
        raise error("AK606", where="cu_seqlens", given=str(exc)) from exc
    total = call.q.shape[2]
    if cu[0] != 0 or cu[-1] != total or any(a > b for a, b in pairwise(cu)):
        raise error(
            "AK602", where="cu_seqlens", given=str(cu[:8]), allowed=f"0, ... not falling ..., {total}"
        )
    return [(0, first, end - first) for first, end in pairwise(cu)]


def _beside(call: Call, found: Recurrence) -> list[Tensor]:
    """The tensors beside q, k and v; gates may have any strides, the others are contiguous."""
    strided = ("gate", "beta")
    return [
        t if role in strided else t.contiguous() for role, t in zip(found.roles, call.others, strict=True)
    ]


def _prepared(call: Call) -> Prepared:
    q, v = call.q, call.v
    dtype = str(q.dtype).removeprefix("torch.")
    return prepare(call.program, dtype, q.shape[3], v.shape[3], q.device.type)


def _described(call: Call, found: Recurrence, chunk: int, state: Tensor, norm: Tensor) -> str:
    """What a call computes and keeps, in words."""
    (batch, heads, length, width), dim = call.v.shape, call.q.shape[3]
    kind = "recurrence" if found.op.coefficients is None else "moments"
    rows = f"a state of {found.features(dim)} x {width}{' and its norm' if found.op.normalize else ''}"
    size = state.numel() * state.element_size() + norm.numel() * norm.element_size()
    work = batch * max(heads, call.q.shape[1]) * length * found.operations(dim, width, chunk)
    return f"{kind}: {rows} for each of {heads} heads, {size:,} bytes in all; {work / 1e9:.3g} GFLOP forward"


def _kernel(*args: Any) -> Results:
    call = Call(*args)
    found = found_in(call.program)
    check_call(call, found)
    prepared = _prepared(call)
    kernel: Any = prepared.kernel
    sequences = _sequences(call, found)
    results = o, state, norm = _outputs(call.q, _sizes(call, found))
    if (record := recorder()) is not None:
        record(
            prepared=prepared, q=call.q, k=call.k, v=call.v, buffers=call.buffers, params=[], reason=None,
            config={"chunk": (chunk := kernel.tokens(call.chunk))},
            note=_described(call, found, chunk, state, norm),
        )  # fmt: skip
        return o.zero_(), state.zero_(), norm.zero_()
    _run(kernel, call, _beside(call, found), sequences, results)
    return results


def _run(kernel: Any, call: Call, others: list[Tensor], sequences: Any, results: Results) -> None:
    o, state, norm = results
    held = norm if kernel.recurrence.op.normalize else None
    kernel(
        call.q, call.k, call.v, others, sequences, o, state, held, call.chunk, torch.get_num_threads()
    )  # fmt: skip
    counts.run()


def _at_once(kernel: Any, sizes: _Sizes, call: Call) -> Results | None:
    """The results of a call that nobody watches, past the dispatcher, by what was kept of such q, k and v.

    None where somebody wants more than results, and where the engine refuses: why, is said on the long way.
    """
    if call.chunk not in CHUNKS or recorder() is not None:
        return None
    if needs_derivatives((call.q, call.k, call.v, *call.others)):
        return None
    results = _outputs(call.q, sizes)
    try:
        _run(kernel, call, call.others, None, results)
    except AttnkitError:
        return None
    return results


def _fake(*args: Any) -> Results:
    call = Call(*args)
    found = found_in(call.program)
    check_call(call, found)
    return _outputs(call.q, _sizes(call, found))


# --- backwards ----------------------------------------------------------------------------------------------


def _gradients(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """dq and dk with a head for each that reads or holds a state, float32 where several share one; and dv."""
    q, k, v = call.q, call.k, call.v
    batch, heads, length, _ = v.shape
    readers, dim = max(q.shape[1], heads), q.shape[3]
    dq = q.new_empty((batch, readers, length, dim), dtype=q.dtype if readers == q.shape[1] else torch.float32)
    dk = k.new_empty((batch, heads, length, dim), dtype=k.dtype if heads == k.shape[1] else torch.float32)
    return dq, dk, v.new_empty(v.shape)


def _of_others(call: Call, found: Recurrence) -> list[Tensor]:
    """Room for the gradients of others: gates for every token, a bonus for every sequence."""
    (batch, heads, length, _), dim, states = call.v.shape, call.q.shape[3], states_of(call, found)
    sizes = {"h": (batch, heads, length), "hd": (states, heads, dim)}
    return [
        t.new_empty(sizes.get(kind, tuple(t.shape))) for kind, t in zip(found.kinds, call.others, strict=True)
    ]


def _backward_kernel(*args: Any) -> Gradients:
    d_o, d_state, d_norm, o, state, norm, *rest = args
    call = Call(*rest)
    found = found_in(call.program)
    check_call(call, found)
    kernel: Any = _prepared(call).kernel
    sequences = _sequences(call, found)
    try:
        dq, dk, dv = _gradients(call)
        d_others = _of_others(call, found)
    except NO_ROOM as exc:
        raise no_room("gradients of q, k, v", exc) from exc
    normal = found.op.normalize
    kernel.backward(
        call.q, call.k, call.v, o, _beside(call, found), state, norm if normal else None, sequences, call.chunk,
        d_o, d_state.contiguous(), d_norm.contiguous() if normal else None, dq, dk, dv,
        d_others, torch.get_num_threads(),
    )  # fmt: skip
    counts.run()
    sums = {"h": (0, 2), "hd": (0,)}
    d_others = [
        d.sum(sums[kind]) if kind in sums else d for kind, d in zip(found.kinds, d_others, strict=True)
    ]
    return _shared(dq, call.q), _shared(dk, call.k), dv, d_others


def _shared(d: Tensor, t: Tensor) -> Tensor:
    """The gradient of t, whose heads several share."""
    if d.shape[1] == t.shape[1]:
        return d
    batch, heads, length, dim = d.shape
    return d.view(batch, t.shape[1], heads // t.shape[1], length, dim).sum(2).to(t.dtype)


def _backward_fake(*args: Any) -> Gradients:
    call = Call(*args[6:])
    contiguous = [t.new_empty(t.shape) for t in (call.q, call.k, call.v, *call.others)]
    return contiguous[0], contiguous[1], contiguous[2], contiguous[3:]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        program: str,
        chunk: int,
        buffers: list[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *others: Tensor,
    ) -> Results:
        """See `torch.autograd.Function`."""
        o, state, norm = torch.ops.attnkit.recur(q, k, v, list(others), program, buffers, chunk)
        ctx.program, ctx.chunk, ctx.count = program, chunk, len(others)
        op = found_in(program).op
        # o is needed where it is divided, the state where all tokens read the last one.
        kept = (o if op.normalize else q.new_empty(0), state if not op.causal else q.new_empty(0), norm)
        ctx.save_for_backward(*kept, q, k, v, *others, *buffers)
        return o, state, norm

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        return once(lambda: _backward(ctx, *cotangents), _NO_SECOND_DERIVATIVES)


def _backward(ctx: Any, d_o: Tensor, d_state: Tensor, d_norm: Tensor) -> tuple[Tensor | None, ...]:
    o, state, norm, q, k, v, *rest = ctx.saved_tensors
    others, buffers = rest[: ctx.count], rest[ctx.count :]
    if o.dim() == 1:
        o = torch.empty_like(d_o)
    if state.dim() == 1:
        state = torch.empty_like(d_state)
    dq, dk, dv, d_others = torch.ops.attnkit.recur_backward(
        d_o, d_state, d_norm, o, state, norm, q, k, v, others, ctx.program, buffers, ctx.chunk
    )
    found = (dq, dk, dv, *d_others)
    wanted = ctx.needs_input_grad[3:]
    return None, None, None, *(d if w else None for d, w in zip(found, wanted, strict=True))


def _autograd(*args: Any) -> Results:
    call = Call(*args)
    tensors = [call.q, call.k, call.v, *call.others]
    if needs_derivatives(tensors):
        if has_tangent(tensors):
            what = "attnkit has no forward-mode derivatives of recurrences"
            raise error("AK503", where="torch.ops.attnkit.recur", what=what)
        check_call(call, found_in(call.program))
        found: Results = _Differentiable.apply(  # type: ignore[no-untyped-call]
            call.program, call.chunk, call.buffers, call.q, call.k, call.v, *call.others
        )
        return found
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnkit.recur.default(*args)  # type: ignore[no-any-return]


_lib.impl("recur", _kernel, "CPU")
_lib.impl("recur", _autograd, "AutogradCPU")
_lib.impl("recur", autocasting(torch.ops.attnkit.recur.default), "AutocastCPU")
_lib.impl("recur_backward", _backward_kernel, "CPU")
_once = without_derivatives(torch.ops.attnkit.recur_backward.default, _NO_SECOND_DERIVATIVES)
_lib.impl("recur_backward", _once, "AutogradCPU")
torch.library.register_fake("attnkit::recur", _fake, lib=_lib)
torch.library.register_fake("attnkit::recur_backward", _backward_fake, lib=_lib)
