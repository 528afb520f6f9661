"""The warm call: what tensors of known shapes need is found once, and the dispatcher is spared where nobody watches it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from attnkit.backends.cpu.engine import engine
from attnkit.ir.text import parse
from attnkit.ops.check import NO_ROOM, check_bindings, check_qkv, is_paged, no_room
from attnkit.ops.counts import counts, recorder
from attnkit.runtime import Prepared, prepare, when_cleared
from attnkit.tune.key import bucket

_C: Any = torch._C
_Key = _C.DispatchKey


def _bits(*keys: Any) -> int:
    found = 0
    for key in keys:
        found |= _C.DispatchKeySet(key).raw_repr()
    return found


# What torch's dispatcher looks at: a tensor's keys, and those that modes and transforms have added in this thread.
_NOT_OF_TENSORS = ~_bits(
    _Key.ADInplaceOrView, _Key.CPU, _Key.AutogradCPU, _Key.AutocastCPU, _Key.CUDA, _Key.AutogradCUDA, _Key.AutocastCUDA
)  # fmt: skip
_NOT_OF_THREADS = ~_bits(_Key.BackendSelect, _Key.ADInplaceOrView)
_AUTOGRAD = _bits(_Key.AutogradCPU, _Key.AutogradCUDA) & ~_bits(_Key.CPU, _Key.CUDA)

# Asked at every call: looked up once.
_keys_of, _raw = _C._dispatch_keys, _C.DispatchKeySet.raw_repr
_included, _excluded = (
    _C._dispatch_tls_local_include_set,
    _C._dispatch_tls_local_exclude_set,
)  # in this thread
_function_modes, _is_profiling = _C._len_torch_function_stack, _C._autograd._profiler_enabled
_autocasts = _C._is_any_autocast_enabled


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are dense memory of the CPU or a GPU and nothing else, and no mode or transform wants to see the call.

    Not so: subclasses, lazy views, functional, sparse and nested tensors, tensors of other devices, functorch's.
    """
    if _raw(_included()) & _NOT_OF_THREADS:
        return False
    seen = _met.seen  # another thread may forget it meanwhile
    if seen is not None and seen.plain(tuple(tensors)):
        return True
    for t in tensors:
        if type(t) is not Tensor and type(t) is not Parameter:
            return False
        if _raw(_keys_of(t)) & _NOT_OF_TENSORS:
            return False
    return True


def is_unwatched(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing could tell a call of the op from a call of what the op does. To be asked outside dynamo."""
    return _function_modes() == 0 and not _is_profiling() and not _autocasts() and is_plain(tensors)


def known(text: str, q: Tensor, k: Tensor, v: Tensor, others: Sequence[Tensor] = ()) -> Any:
    """What was kept, where all tensors are unwatched as `is_unwatched` has it and such q, k and v were met before.

    Of attention that is a `Ready`. None where that is not known at a glance. To be asked outside dynamo.
    """
    seen = _met.seen
    if (
        seen is None
        or _function_modes()
        or _is_profiling()
        or _autocasts()
        or _raw(_included()) & _NOT_OF_THREADS
    ):
        return None
    return seen.find(sys.intern(text), q, k, v, *others)


def keep(text: str, q: Tensor, k: Tensor, v: Tensor, what: Any) -> None:
    """Let ``what`` be known of such tensors of the CPU, by this text."""
    seen = _met.seen = _met.seen or engine().Seen(Tensor, Parameter, _MAX_ENTRIES)
    seen.keep(sys.intern(text), q, k, v, what)


def is_below_autograd() -> bool:
    """Whether this thread is inside an op whose derivatives are somebody else's."""
    return bool(_raw(_excluded()) & _AUTOGRAD)


class Ready(NamedTuple):
    """A kernel, and what is known of every call with the same program, shapes and dtypes, which have been checked."""

    text: str
    prepared: Prepared
    launch: Any  # the kernel's, where it needs nothing but tensors
    shape: tuple[int, ...]  # of o,
    stride: tuple[int, ...]  # laid out as [B, Sq, Hq, Dv]
    stride_of_lse: tuple[int, ...]
    shared: bool  # query heads share those of k and v
    bound: bool  # the program has buffers, params or dropout
    ragged: bool
    automatic: bool  # nobody asked for this backend by name
    differentiable: bool  # the kernel has a backward


# A model has a handful; the bound only stops a leak.
_MAX_ENTRIES = 4096
_ready: dict[Any, Ready] = {}


class _Met:
    """The same of the CPU, as the engine knows it again: an `_engine.Seen`, from the first of them on."""

    seen: Any = None


_met = _Met()


def forget() -> None:
    """Every kernel is looked up again: the configs that are known may be others now."""
    _ready.clear()
    _met.seen = None


when_cleared(forget)


def ready(text: str, q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Ready:
    """The kernel for dense tensors of one device. One lookup, the first call of such tensors apart.

    Raises:
        AttnkitError: as `check_qkv` and `attnkit.runtime.prepare`.
    """
    seen = _met.seen
    found = seen.find(sys.intern(text), q, k, v) if seen is not None and backend == "auto" else None
    if found is not None:
        return found  # type: ignore[no-any-return]
    exact = precision(q) if q.is_cuda else "highest"
    key = _key(text, q, k, v, backend, exact)
    found = _ready.get(key)
    if found is not None:
        return found
    check_qkv(q, k, v, is_paged(parse(text)))
    prepared = prepare(
        text, str(q.dtype).removeprefix("torch."), q.shape[3], v.shape[3], q.device.type, backend, exact,
        (q.shape[2], k.shape[2]),
    )  # fmt: skip
    program = prepared.spec.program
    new = Ready(
        text,
        prepared,
        getattr(prepared.kernel, "launch", None),
        *layout_of_output(q, v.shape[3]),
        stride_of_lse=torch.empty(q.shape[:3], device="meta").stride(),
        shared=q.shape[1] != k.shape[1],
        bound=bool(program.buffers) or program.num_params > 0 or program.attend.dropout is not None,
        ragged=program.layout(program.attend.k).lengths is not None,
        automatic=backend == "auto",
        differentiable=has_backward(prepared),
    )
    if len(_ready) >= _MAX_ENTRIES:
        _ready.clear()
    if prepared.backend == "cpu" and backend == "auto":
        keep(text, q, k, v, new)
    return _ready.setdefault(key, new)


def _key(text: str, q: Tensor, k: Tensor, v: Tensor, backend: str, exact: str) -> Any:
    """What a `Ready` is known by; None, under which none is kept, for tensors that do not go together.

    Of how many keys there are only their bucket is part of it: a decoder has one more at every step.
    """
    of_k, of_v = k.shape, v.shape
    if len(of_k) != 4 or len(of_v) != 4 or of_k[2] != of_v[2]:
        return None
    sizes = of_k[0], of_k[1], bucket(of_k[2]), of_k[3], of_v[0], of_v[1], of_v[3]
    return text, q.shape, sizes, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, backend, exact


def precision(q: Tensor) -> str:
    """How exact products of q are to be: torch's setting for float32 on a GPU; everything else is exact anyway."""
    return torch.get_float32_matmul_precision() if q.is_cuda and q.dtype == torch.float32 else "highest"


def seed_of(seed: Tensor | None) -> int | Tensor | None:
    """The seed of a call as a kernel takes it: a number, or on a GPU a tensor, which nobody waits for."""
    return seed if seed is None or seed.is_cuda else int(seed)


def has_backward(prepared: Prepared) -> bool:
    """Whether a kernel can go backwards. Pages belong to a cache, which takes no gradient; what skips has none."""
    program = prepared.spec.program
    return hasattr(prepared.kernel, "backward") and not is_paged(program) and program.attend.skip is None


def layout_of_output(q: Tensor, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape ``[B, Hq, Sq, Dv]`` and strides of o, laid out as [B, Sq, Hq, Dv]: models merge heads from that."""
    batch, heads, length, _ = q.shape
    return (batch, heads, length, width), (length * heads * width, width, heads * width, 1)


def run(
    ready: Ready,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    seed: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute o and lse, or describe the call to who is recording.

    Raises:
        AttnkitError: as `check_bindings`; AK603, out of memory; as the kernel.
    """
    if q.is_cuda and q.device.index != torch.cuda.current_device():  # kernels run where the current stream is
        with torch.cuda.device(q.device):
            return run(ready, q, k, v, buffers, params, seed, need_lse)
    prepared = ready.prepared
    if ready.bound or buffers or params or seed is not None:
        check_bindings(prepared.spec.program, q, k, buffers, params, seed)
    try:
        o = q.new_empty_strided(ready.shape, ready.stride)
        lse = (
            q.new_empty_strided(ready.shape[:3], ready.stride_of_lse, dtype=torch.float32)
            if need_lse
            else None
        )
    except NO_ROOM as exc:
        raise no_room("o, lse", exc) from exc
    record = recorder()
    if record is not None:
        record(prepared=prepared, q=q, k=k, v=v, buffers=buffers, params=params, reason=None)
        return o.zero_(), None if lse is None else lse.zero_()
    prepared.kernel(q, k, v, o, lse, buffers, params, torch.get_num_threads(), seed_of(seed))
    counts.run()
    return o, lse
