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
from attnkit.ops.check import NO_ROOM, check_bindings, check_tensor, no_room, shape_of
from attnkit.ops.counts import counts, recorder
from attnkit.ops.kv_append import refuse_gradients
from attnkit.ops.kv_codes import Scheme, parse_scheme, parts_of, store, tokens_of
from attnkit.ops.warm import is_unwatched, layout_of_output, precision, seed_of
from attnkit.runtime import Prepared, prepare, when_cleared

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "attend_cache(Tensor q, Tensor[] storage, str codec, str program, Tensor[] buffers, float[] params, Tensor? seed,"
    " bool need_lse) -> (Tensor o, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # that read codes, by device


class Rows(NamedTuple):
    """What is known of keys without looking at them."""

    shape: tuple[int, ...]


class Codes(NamedTuple):
    """What attention reads of a cache that keeps codes; ``k`` and ``v`` are what the engine takes for its tensors."""

    storage: list[Tensor]
    scheme: Scheme
    k: tuple[Any, ...]
    v: tuple[Any, ...]
    state: Tensor | None
    table: Tensor | None
    tokens: int  # of a batch entry, or of a page

    @classmethod
    def of(cls, storage: list[Tensor], scheme: Scheme) -> Codes:
        """The tensors of a cache, sorted."""
        parts = parts_of(scheme, storage)
        return cls(
            storage, scheme, store(parts.k, scheme.k, scheme.head_dim, scheme.group),
            store(parts.v, scheme.v, scheme.v_head_dim, scheme.group), None if parts.state is None else parts.state.select(0, 0),
            parts.table, tokens_of(parts),
        )  # fmt: skip

    @property
    def on_device(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Codes of keys and of values as a GPU keeps them, and what belongs to them; a head's scale is that of each row."""
        k, v = (part.flat() for part in parts_of(self.scheme, self.storage)[:2])
        beside = {} if self.state is None else {"coded_of": self.state}
        for x, part in (("k", k), ("v", v)):
            scales = part.scales
            if scales is not None:
                of_head = scales.dim() == 1
                beside[f"{x}_scales"] = scales[:, None].expand(part.codes.shape[:3]) if of_head else scales
            if part.newest is not None:
                beside[f"{x}_newest"] = part.newest
        return k.codes, v.codes, beside

    @property
    def rows(self) -> Rows:
        """The keys as if they were elements."""
        outer, heads = self.storage[0].shape[:2]
        return Rows((outer, heads, self.tokens, self.scheme.head_dim))


class _Ready(NamedTuple):
    """A kernel, and what is known of every call with the same program, scheme and q of these sizes, which has been checked."""

    prepared: Prepared
    shape: tuple[int, ...]  # of o,
    stride: tuple[int, ...]  # laid out as [B, Sq, Hq, Dv]


# A model has a handful; the bound only stops a leak.
_MAX_ENTRIES = 4096
_ready: dict[Any, _Ready] = {}
when_cleared(_ready.clear)


def _make_ready(program: str, q: Tensor, codes: Codes) -> _Ready:
    """The kernel for a q of these sizes and this dtype. One lookup, the first call apart.

    Raises:
        AttnkitError: as `check_q` and `attnkit.runtime.prepare`.
    """
    scheme, heads = codes.scheme, codes.storage[0].shape[1]
    exact = precision(q)
    key = program, scheme, heads, q.shape, q.dtype, q.device, exact
    found = _ready.get(key)
    if found is None:
        check_q(q, scheme, heads, codes.storage[0].device)
        dtype, name = str(q.dtype).removeprefix("torch."), BACKENDS[q.device.type]
        dims = scheme.head_dim, scheme.v_head_dim
        prepared = prepare(program, dtype, *dims, q.device.type, name, exact)
        if len(_ready) >= _MAX_ENTRIES:
            _ready.clear()
        found = _ready[key] = _Ready(prepared, *layout_of_output(q, scheme.v_head_dim))
    return found


def check_q(q: Any, scheme: Scheme, heads: int, device: torch.device) -> None:
    """Check that queries go with a cache of so many heads on a device.

    Raises:
        AttnkitError: AK402 not a tensor, AK403 shape, AK404 dtype, AK405 device, AK407 heads.
    """
    check_tensor("q", q, device)
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
        AttnkitError: AK502, another backend than that of its device is asked for; as `check_q` and the kernel.
    """
    if backend != "auto" and backend != (own := BACKENDS[codes.storage[0].device.type]):
        raise error(
            "AK502", where=f"backend {backend!r}", given="a cache of codes", allowed=f"{own}, reference"
        )
    if not torch.compiler.is_compiling() and is_unwatched((q, *codes.storage, *buffers)):
        return _run(q, codes, program, buffers, params, seed, need_lse)
    o, lse = torch.ops.attnkit.attend_cache(
        q, codes.storage, codes.scheme.text, program, buffers, params, seed, need_lse
    )
    return o, lse if need_lse else None


def _run(
    q: Tensor, codes: Codes, program: str, buffers: list[Tensor], params: Sequence[float], seed: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    check_tensor("q", q)
    if q.is_cuda and q.device.index != torch.cuda.current_device():  # kernels run where the current stream is
        with torch.cuda.device(q.device):
            return _run(q, codes, program, buffers, params, seed, need_lse)
    ready = _make_ready(program, q, codes)
    refuse_gradients("q", (q, *buffers))
    prepared, rows = ready.prepared, codes.rows
    check_bindings(prepared.spec.program, q, rows, buffers, params, seed)  # type: ignore[arg-type]
    try:
        o = q.new_empty_strided(ready.shape, ready.stride)
        lse = q.new_empty(ready.shape[:3], dtype=torch.float32) if need_lse else None
    except NO_ROOM as exc:
        raise no_room("o, lse", exc) from exc
    record = recorder()
    if record is not None:
        k, v = codes.k[3], codes.v[3]
        record(prepared=prepared, q=q, k=k, v=v, buffers=buffers, params=params, reason=None)
        return o.zero_(), None if lse is None else lse.zero_()
    kernel, threads = prepared.kernel, torch.get_num_threads()
    if isinstance(kernel, CacheKernel):
        number = None if seed is None else int(seed)
        kernel.attend_stores(
            q, codes.k, codes.v, codes.state, rows, o, lse, buffers, list(params), threads, number
        )
    else:
        k, v, beside = codes.on_device
        for name, t in (("k", k), ("v", v)):
            if t.is_floating_point() and t.dtype != q.dtype:
                raise error(
                    "AK404",
                    where=f"q, {name} of the cache",
                    given=f"{q.dtype} and {t.dtype}",
                    allowed="one dtype",
                )
        kernel(q, k, v, o, lse, buffers, list(params), threads, seed_of(seed), beside)
    counts.run()
    return o, lse


def _kernel(
    q: Tensor, storage: list[Tensor], codec: str, program: str, buffers: list[Tensor], params: list[float],
    seed: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, lse = _run(q, Codes.of(storage, parse_scheme(codec)), program, buffers, params, seed, need_lse)
    return o, q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _fake(
    q: Tensor, storage: list[Tensor], codec: str, program: str, buffers: list[Tensor], params: list[float],
    seed: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scheme = parse_scheme(codec)
    check_q(q, scheme, storage[0].shape[1], storage[0].device)
    parse(program)
    shape, stride = layout_of_output(q, scheme.v_head_dim)
    lse = q.new_empty(shape[:3] if need_lse else (0,), dtype=torch.float32)
    return q.new_empty_strided(shape, stride), lse


def _autograd(
    q: Tensor, storage: list[Tensor], codec: str, program: str, buffers: list[Tensor], *others: Any
) -> Any:
    refuse_gradients("q", (q, *buffers))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnkit.attend_cache.default(q, storage, codec, program, buffers, *others)


for _device in ("CPU", "CUDA"):
    _lib.impl("attend_cache", _kernel, _device)
    _lib.impl("attend_cache", _autograd, f"Autograd{_device}")
torch.library.register_fake("attnkit::attend_cache", _fake, lib=_lib)
