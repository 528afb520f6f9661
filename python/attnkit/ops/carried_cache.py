"""``torch.ops.attnkit.attend_carried_cache``: `attend_carried` to a cache that keeps codes, as ``attend_cache`` is ``attend``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.ir.program import Program
from attnkit.ops.attend_cache import Codes, check_q
from attnkit.ops.carried import Results, check_initial, keys_of, program_of, start
from attnkit.ops.check import NO_ROOM, check_bindings, check_tensor, no_room
from attnkit.ops.counts import counts, recorder
from attnkit.ops.kv_append import refuse_gradients
from attnkit.ops.kv_codes import parse_scheme
from attnkit.runtime import prepare

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "attend_carried_cache(Tensor q, Tensor[] storage, str codec, Tensor? initial, str program, Tensor[] buffers,"
    " float[] params) -> (Tensor o, Tensor lse, Tensor carry, Tensor gone)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attend_carried_cache(
    q: Tensor, codes: Codes, initial: Tensor | None, program: str, buffers: list[Tensor], params: list[float]
) -> Results:  # fmt: skip
    """As `attnkit.ops.carried.attend_carried`, of what a cache holds.

    Raises:
        AttnkitError: as `check_q`, `check_initial` and the kernel; AK503, q requires gradients.
    """
    check_tensor("q", q, torch.device("cpu"))  # the dispatcher would say it in other words
    return torch.ops.attnkit.attend_carried_cache(  # type: ignore[no-any-return]
        q, codes.storage, codes.scheme.text, initial, program, buffers, params
    )


def _checked(
    q: Tensor, storage: list[Tensor], codec: str, initial: Tensor | None, text: str, buffers: list[Tensor]
) -> tuple[Codes, Program, Any]:  # fmt: skip
    """The cache's tensors, the program, and how many keys there is room for."""
    codes, program = Codes.of(storage, parse_scheme(codec)), program_of(text)
    check_q(q, codes.scheme, storage[0].shape[1], storage[0].device)
    keys = keys_of(program, codes.tokens, buffers)
    check_initial(program, q, keys, initial)
    return codes, program, keys


def _kernel(
    q: Tensor, storage: list[Tensor], codec: str, initial: Tensor | None, text: str, buffers: list[Tensor],
    params: list[float],
) -> Results:  # fmt: skip
    codes, program, keys = _checked(q, storage, codec, initial, text, buffers)
    try:
        results = start(program, q, codes.scheme.v_head_dim, keys, initial)
    except NO_ROOM as exc:
        raise no_room("o, lse, carry", exc) from exc
    o, lse, carry, gone = results
    scheme, rows = codes.scheme, codes.rows
    check_bindings(program, q, rows, buffers, params)  # type: ignore[arg-type]
    dtype = str(q.dtype).removeprefix("torch.")
    kernel: Any = prepare(text, dtype, scheme.head_dim, scheme.v_head_dim, "cpu", "cpu").kernel
    if recorder() is not None:  # which describes attention alone
        return o.zero_(), lse.zero_(), carry, gone
    kernel.attend_stores(
        q, codes.k, codes.v, codes.state, rows, o, lse, carry, gone if program.attend.budget is not None else None,
        buffers, params, torch.get_num_threads(),
    )  # fmt: skip
    counts.run()
    return results


def _fake(
    q: Tensor, storage: list[Tensor], codec: str, initial: Any, text: str, buffers: Any, _: Any
) -> Results:
    codes, program, keys = _checked(q, storage, codec, initial, text, buffers)
    return start(program, q, codes.scheme.v_head_dim, keys, initial)


def _autograd(
    q: Tensor, storage: Any, codec: str, initial: Any, text: str, buffers: Any, params: Any
) -> Results:
    refuse_gradients("q", (q, *buffers))
    if initial is not None:
        refuse_gradients("carry", (initial,))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnkit.attend_carried_cache.default(  # type: ignore[no-any-return]
            q, storage, codec, initial, text, buffers, params
        )


_lib.impl("attend_carried_cache", _kernel, "CPU")
_lib.impl("attend_carried_cache", _autograd, "AutogradCPU")
torch.library.register_fake("attnkit::attend_carried_cache", _fake, lib=_lib)
