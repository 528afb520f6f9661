"""The torch ops: ``torch.ops.attnkit.attend``. Programs travel as text, captured tensors beside them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import AttnkitError, error
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.ops import torch_sdpa
from attnkit.ops.check import (
    autocasting,
    check_bindings,
    check_qkv,
    check_tensor,
    has_tangent,
    is_paged,
    needs_derivatives,
)
from attnkit.ops.counts import counts, recorder
from attnkit.ops.gradients import Way, differentiable
from attnkit.ops.warm import (
    has_backward,
    is_below_autograd,
    is_plain,
    is_unwatched,
    layout_of_output,
    precision,
    ready,
    run,
)
from attnkit.runtime import prepare

_lib: Any = torch.library.Library("attnkit", "DEF")  # type: ignore[no-untyped-call]
_lib.define(
    "attend(Tensor q, Tensor k, Tensor v, str program, Tensor[] buffers, float[] params, Tensor? seed, bool need_lse)"
    " -> (Tensor o, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Call(NamedTuple):
    """The arguments of ``attend``, in the order of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    program: str
    buffers: list[Tensor]
    params: list[float]
    seed: Tensor | None
    need_lse: bool


def outputs(q: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor]:
    """``o [B, Hq, Sq, Dv]`` and lse, unset."""
    shape, stride = layout_of_output(q, v.shape[3])
    o = torch.empty_strided(shape, stride, dtype=q.dtype, device=q.device)
    return o, torch.empty(shape[:3] if need_lse else (0,), dtype=torch.float32, device=q.device)


def _attend_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, program, buffers, _, _, need_lse = Call(*args)
    check_qkv(q, k, v, is_paged(parse(program)))
    for i, buffer in enumerate(buffers):  # one on "meta" brings a call with real memory here
        check_tensor(f"buffer b{i}", buffer, q.device)
    return outputs(q, v, need_lse)


def _attend_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, program, buffers, params, seed, need_lse = Call(*args)
    o, lse = run(ready(program, q, k, v), q, k, v, buffers, params, seed, need_lse)
    return o, q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _attend_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args)
    tensors = (call.q, call.k, call.v, *call.buffers)
    if not all(isinstance(t, Tensor) for t in tensors):
        check_qkv(call.q, call.k, call.v, is_paged(parse(call.program)))
    plain = is_plain(tensors if call.seed is None else (*tensors, call.seed))
    if needs_derivatives(tensors):
        o, lse = _with_gradients(call, plain=plain)
        return o, call.q.new_empty((0,), dtype=torch.float32) if lse is None else lse
    if plain:
        return _attend_kernel(*args)  # nobody is watching: spare the second trip through the dispatcher
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnkit.attend.default(*args)  # type: ignore[no-any-return]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    program: str,
    buffers: list[Tensor],
    params: list[float],
    need_lse: bool,
    seed: Tensor | None = None,
    unwatched: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``torch.ops.attnkit.attend``, and no trip through the dispatcher where nobody could tell (`is_unwatched`).

    q, k and v are what `autocast` makes of them.
    """
    if unwatched is None:
        unwatched = not torch.compiler.is_compiling() and is_unwatched((q, k, v, *buffers))
    if unwatched:
        tensors = (q, k, v, *buffers)
        if not needs_derivatives(tensors):
            return run(ready(program, q, k, v), q, k, v, buffers, params, seed, need_lse)
        if not is_below_autograd():
            call = Call(q, k, v, program, buffers, params, seed, need_lse)
            return _with_gradients(call, plain=True)
    return torch.ops.attnkit.attend(q, k, v, program, buffers, params, seed, need_lse)  # type: ignore[no-any-return]


is_transformed = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap, grad, jvp


def _with_gradients(call: Call, *, plain: bool) -> tuple[Tensor, Tensor | None]:
    q, k, v, program, buffers, params, seed, need_lse = call
    tensors = (q, k, v, *buffers)
    if not plain:
        check_qkv(q, k, v, is_paged(parse(program)))
        check_bindings(parse(program), q, k, buffers, params, seed)
    if has_tangent(tensors) or (not plain and any(map(is_transformed, tensors))):
        return _on_torch(call, "forward-mode derivatives and function transforms")
    found = None
    try:
        if plain:
            found = ready(program, q, k, v)
            goes, prepared = found.differentiable, found.prepared
        else:
            dims = [
                n if type(n) is int else 1 for n in (q.shape[3], v.shape[3])
            ]  # symbolic in a dynamic graph
            dtype = str(q.dtype).removeprefix("torch.")
            prepared = prepare(program, dtype, dims[0], dims[1], q.device.type, precision=precision(q))
            goes = has_backward(prepared)
    except AttnkitError as exc:
        if exc.code != "AK502":
            raise
        return _on_torch(call, f"gradients of {q.dtype} tensors")
    if not goes:
        return _on_torch(call, f"gradients on backend {prepared.backend!r}")
    return differentiable(Way(program, params, need_lse, found), tensors, seed)


def _on_torch(call: Call, reason: str) -> tuple[Tensor, Tensor]:
    """What attnkit has no derivatives of: torch's own op where it means the same, else a typed error."""
    q, k, v, program, buffers, _, _, need_lse = call
    form = _torch_form(parse(program), bool(q.shape[2] == k.shape[2]))
    if form is None or need_lse or k.shape[2] == 0:
        given = "lse requested" if need_lse else "a program that torch's own attention op cannot express"
        raise error(
            "AK503",
            where="torch.ops.attnkit.attend",
            what=f"attnkit has no {reason}",
            given=given,
            allowed="plain or causal softmax attention, which is then computed by torch",
            hint="call it under torch.no_grad(), or detach its inputs",
        )
    if is_plain((q, k, v)):  # torch would say it in other words, or read what is not there
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.numel() > 0 and t.data_ptr() == 0:
                raise error("AK606", where=name)
    is_causal, scale = form
    if (record := recorder()) is not None:
        record(prepared=None, q=q, k=k, v=v, buffers=buffers, params=[], reason=reason)
        if is_plain((q, k, v)):  # while a graph is captured, it must not capture zeros
            return outputs(q, v, False)[0].zero_(), q.new_empty((0,))
    else:
        counts.decline(reason)
    o = torch_sdpa.call(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=bool(q.shape[1] != k.shape[1]))
    return o, q.new_empty((0,), dtype=torch.float32)


@lru_cache(maxsize=1)
def _causal_masks() -> tuple[object, object]:
    """The two causal masks as interned expressions: top-left aligned, bottom-right aligned."""
    head = "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\n  o, lse = attend(q, k, v, scale = default) {\n    mask = "
    tail = "\n    normalizer = softmax\n  }\n  return o\n}\n"
    masks = [
        parse(head + m + tail).attend.mask for m in ("kv_idx <= q_idx", "kv_idx <= q_idx + (kv_len - q_len)")
    ]
    return masks[0], masks[1]


def _torch_form(program: Program, square: bool) -> tuple[bool, float | None] | None:
    """(is_causal, scale) if torch's op computes this program, which is top-left causal or unmasked softmax."""
    attend = program.attend
    if (
        not attend.plain
        or attend.dropout is not None
        or program.buffers
        or attend.score.op != "var"
        or attend.normalizer.sink is not None
    ):
        return None
    top_left, bottom_right = _causal_masks()
    if attend.mask is None:
        return False, attend.scale
    if attend.mask is top_left or (square and attend.mask is bottom_right):
        return True, attend.scale
    return None


for _device in ("CPU", "CUDA"):
    _lib.impl("attend", _attend_kernel, _device)
    _lib.impl("attend", _attend_autograd, f"Autograd{_device}")
    _lib.impl("attend", autocasting(torch.ops.attnkit.attend.default), f"Autocast{_device}")
torch.library.register_fake("attnkit::attend", _attend_fake, lib=_lib)
