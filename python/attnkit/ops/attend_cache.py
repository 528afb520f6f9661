"""``torch.ops.attnkit.attend_cache``: attention to a cache that keeps codes, read where they lie.

As ``attend``, with the cache's storage in the place of k and v and the text of its scheme (`kv_codes`) beside the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.backends.cpu.cache import CacheKernel
from attnkit.errors import error
from attnkit.ir.text import parse
from attnkit.ops.check import check_bindings, check_tensor, shape_of
from attnkit.ops.counts import counts, recorder
from attnkit.ops.kv_append import refuse_gradients
from attnkit.ops.kv_codes import Parts, Scheme, parse_scheme, parts_of, store, tokens_of
from attnkit.ops.warm import is_unwatched
from attnkit.runtime import Prepared, prepare

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "attend_cache(Tensor q, Tensor[] storage, str codec, str program, Tensor[] buffers, float[] params, Tensor? seed,"
    " bool need_lse) -> (Tensor o, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Codes(NamedTuple):
    """What attention reads of a cache that keeps codes."""

    storage: list[Tensor]
    scheme: Scheme


def check_q(q: Any, scheme: Scheme, heads: int) -> None:
    """Check that queries go with a cache of so many heads.

    Raises:
        AttnkitError: AK402 not a tensor, AK403 shape, AK404 dtype, AK405 device, AK407 heads.
    """
    check_tensor("q", q, torch.device("cpu"))
    if q.dim() != 4 or q.shape[3] != scheme.head_dim:
        allowed = f"[batch, heads, length, {scheme.head_dim}]"
        raise error("AK403", where="q", given=shape_of(q), allowed=allowed)
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise error("AK404", where="q", given=str(q.dtype), allowed="float32, bfloat16 or float16")
    if q.shape[1] == 0 or q.shape[1] % heads != 0:
        raise error("AK407", where="q, cache", given=f"{q.shape[1]} query heads and {heads} kv heads")


def attend_cache(
    q: Tensor, codes: Codes, program: str, buffers: list[Tensor], params: list[float], need_lse: bool, seed: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The op, and no trip through the dispatcher where nobody could tell.

    Raises:
        AttnkitError: AK502, another backend than the CPU's is asked for; as `check_q` and the kernel.
    """
    if backend not in ("auto", "cpu"):
        raise error("AK502", where=f"backend {backend!r}", given="a cache of codes", allowed="cpu, reference")
    if not torch.compiler.is_compiling() and is_unwatched((q, *codes.storage, *buffers)):
        return _run(q, codes, program, buffers, params, seed, need_lse)
    o, lse = torch.ops.attnkit.attend_cache(
        q, codes.storage, codes.scheme.text, program, buffers, params, seed, need_lse
    )
    return o, lse if need_lse else None


def _run(
    q: Tensor, codes: Codes, program: str, buffers: list[Tensor], params: Sequence[float], seed: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    scheme, parts = codes.scheme, parts_of(codes.scheme, codes.storage)
    check_q(q, scheme, parts.k.codes.shape[1])
    refuse_gradients("q", (q, *buffers))
    prepared = _prepared(program, q, scheme)
    size = tokens_of(scheme, parts)
    rows = _Rows((parts.k.codes.shape[0], parts.k.codes.shape[1], size, scheme.head_dim))
    check_bindings(prepared.spec.program, q, rows, buffers, params, seed)  # type: ignore[arg-type]
    try:
        o, lse = _outputs(q, scheme, need_lse)
    except (RuntimeError, OverflowError) as exc:  # torch has no narrower one on the CPU
        raise error(
            "AK603", where="o, lse", given=str(exc).splitlines()[0], allowed="what fits the memory"
        ) from exc
    record = recorder()
    if record is not None:
        record(
            prepared=prepared,
            q=q,
            k=parts.k.codes,
            v=parts.v.codes,
            buffers=buffers,
            params=params,
            reason=None,
        )
        return o.zero_(), None if lse is None else lse.zero_()
    kernel = prepared.kernel
    assert isinstance(kernel, CacheKernel)
    kernel.attend_stores(
        q, *_stores(scheme, parts), None if parts.state is None else parts.state[0], size, o, lse, buffers,
        list(params), torch.get_num_threads(), None if seed is None else int(seed),
    )  # fmt: skip
    counts.run()
    return o, lse


class _Rows(NamedTuple):
    shape: tuple[int, ...]


def _stores(scheme: Scheme, parts: Parts) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (
        store(parts.k, scheme.k, scheme.head_dim, scheme.group),
        store(parts.v, scheme.v, scheme.v_head_dim, scheme.group),
    )


def _prepared(program: str, q: Tensor, scheme: Scheme) -> Prepared:
    dtype = str(q.dtype).removeprefix("torch.")
    return prepare(program, dtype, scheme.head_dim, scheme.v_head_dim, "cpu", "cpu")


def _outputs(q: Tensor, scheme: Scheme, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """o laid out as [B, Sq, Hq, Dv], and lse; unset."""
    batch, heads, length, _ = q.shape
    o = q.new_empty((batch, length, heads, scheme.v_head_dim)).transpose(1, 2)
    return o, q.new_empty((batch, heads, length), dtype=torch.float32) if need_lse else None


def _kernel(
    q: Tensor, storage: list[Tensor], codec: str, program: str, buffers: list[Tensor], params: list[float],
    seed: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, lse = _run(q, Codes(storage, parse_scheme(codec)), program, buffers, params, seed, need_lse)
    return o, q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _fake(
    q: Tensor, storage: list[Tensor], codec: str, program: str, buffers: list[Tensor], params: list[float],
    seed: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scheme = parse_scheme(codec)
    check_q(q, scheme, storage[0].shape[1])
    parse(program)
    o, lse = _outputs(q, scheme, need_lse)
    return o, q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _autograd(
    q: Tensor, storage: list[Tensor], codec: str, program: str, buffers: list[Tensor], *others: Any
) -> Any:
    refuse_gradients("q", (q, *buffers))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnkit.attend_cache.default(q, storage, codec, program, buffers, *others)


_lib.impl("attend_cache", _kernel, "CPU")
_lib.impl("attend_cache", _autograd, "AutogradCPU")
torch.library.register_fake("attnkit::attend_cache", _fake, lib=_lib)
