"""Arguments are checked here, before any memory is touched. Every message names the argument and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnkit.errors import AttnkitError, error
from attnkit.ir.program import Program

FLOAT32_MAX = torch.finfo(torch.float32).max
NO_ROOM = (
    RuntimeError,
    OverflowError,
)  # what torch raises where memory is out; on the CPU it has no narrower one
PAGE_SIZES = "a power of two of tokens, at least 16"
_BUFFER_DTYPES = {
    "f32": (torch.float32, torch.bfloat16, torch.float16),
    "i32": (torch.int32,),
    "i64": (torch.int64,),
    "bool": (torch.bool,),
}


def no_room(where: str, exc: Exception) -> AttnkitError:
    """AK603, of one of ``NO_ROOM``: there is no memory for the results ``where``."""
    return error("AK603", where=where, given=str(exc).splitlines()[0], allowed="what fits the memory")


def check_tensor(name: str, t: Any, device: torch.device | None = None) -> None:
    """Check that ``t`` is a tensor with plain memory, on ``device`` if one is given.

    Raises:
        AttnkitError: AK402 not a strided tensor, AK405 on another device.
    """
    if not isinstance(t, Tensor):
        raise error("AK402", where=name, given=type(t).__name__, allowed="a torch.Tensor")
    if t.is_nested:  # its layout is strided, and it has no shape
        raise error("AK402", where=name, given="a nested tensor", allowed="a tensor beside cu_seqlens")
    if t.is_quantized:
        raise error("AK402", where=name, given=f"a quantized tensor, {t.dtype}", allowed="a tensor of numbers",
                    hint="call .dequantize()")  # fmt: skip
    if t.layout != torch.strided:
        raise error(
            "AK402", where=name, given=str(t.layout), allowed="a strided tensor", hint="call .to_dense()"
        )
    if device is not None and t.device != device:
        raise error("AK405", where=name, given=str(t.device), allowed=f"the device of q, {device}")


def check_values_of(name: str, t: Tensor) -> None:
    """AK606 for a tensor whose values have to be looked at, and that has none."""
    if t.is_meta:
        raise error("AK606", where=name, given="a meta tensor", allowed="a tensor with values",
                    hint="make it on the device of q")  # fmt: skip


def check_float(name: str, t: Any, device: torch.device | None = None) -> None:
    """As `check_tensor`; AK404 unless ``t`` is of floating point."""
    check_tensor(name, t, device)
    if not t.is_floating_point():
        raise error("AK404", where=name, given=str(t.dtype), allowed="floating point")


def check_captured(buffers: Sequence[Any], q: Tensor) -> None:
    """AK402 or AK405 unless what functions capture, ``buffers``, are tensors on the device of q."""
    for i, buffer in enumerate(buffers):
        check_tensor(f"captured tensor b{i}", buffer, q.device)


def autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """q, k, v as torch's own attention takes them: under ``torch.autocast`` for their device in its dtype, float64 apart.

    Biases and what else functions capture stay as they are, as in torch's FlexAttention.
    """
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return q, k, v

    def cast(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        device = t.device.type
        known = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
        return t.to(torch.get_autocast_dtype(device)) if known else t

    return cast(q), cast(k), cast(v)


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def autocasting(op: Callable[..., Any], tensors: int = 3) -> Callable[..., Any]:
    """What an op does at torch's autocast keys: it is called with its first arguments, q, k and v, as `autocast` has them.

    ``tensors``: 2 where there is no v.
    """

    def cast(q: Any, k: Any, v: Any, *others: Any) -> Any:
        q, k, of_v = autocast(q, k, v)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(q, k, of_v if tensors == 3 else v, *others)

    return cast


def below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """What an op does at torch's autograd keys where nothing is followed: a choice has no gradient."""

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def without_derivatives(op: Any, what: str) -> Callable[..., Any]:
    """What an op does at torch's autograd keys that has no derivatives: AK503, which says ``what``, where one is asked for."""
    below = below_autograd(op)

    def call(*args: Any) -> Any:
        given = [t for each in args for t in (each if isinstance(each, list) else [each])]
        if needs_derivatives([t for t in given if isinstance(t, Tensor)]):
            raise error("AK503", where=f"torch.ops.{op.overloadpacket}", what=what)
        return below(*args)

    return call


def check_number(name: str, value: Any) -> float:
    """``value`` as a float. AK402 if it is no number, AK401 if it does not fit."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise error("AK402", where=name, given=type(value).__name__, allowed="a number")
    try:
        return float(value)
    except OverflowError:
        raise error(
            "AK401", where=name, given="an int beyond float", allowed="a number that fits a float"
        ) from None


def check_scale(scale: Any) -> float | None:
    """None, or a finite positive float. AK402 if it is no number, AK401 if it is another one."""
    if scale is None:
        return None
    number = check_number("scale", scale)
    if not 0 < number < math.inf:  # dynamo follows comparisons of a symbolic float, not math.isfinite
        raise error("AK401", where="scale", given=str(number), allowed="a finite positive number, or None")
    return number


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """AK402 unless ``value`` is an int, AK401 unless it is at least ``least``, and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise error("AK402", where=name, given=type(value).__name__, allowed="an int")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least}..{most}"
        raise error("AK401", where=name, given=str(value), allowed=allowed)


def check_flag(name: str, value: Any) -> None:
    """AK402 unless ``value`` is True or False, or in a graph of symbolic shapes what decides one of them."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise error("AK402", where=name, given=type(value).__name__, allowed="True or False")


def check_function(name: str, function: Any) -> None:
    """AK402 if it is neither a function nor None."""
    if function is not None and not callable(function):
        allowed = "a function; bias tensors are score=ak.bias(tensor)"
        raise error("AK402", where=name, given=type(function).__name__, allowed=allowed)


def check_absent(others: Mapping[str, Any], what: str, code: str = "AK408") -> None:
    """``code`` unless all of these, by name, are None; ``what`` says why they have to be."""
    for name, value in others.items():
        if value is not None:
            raise error(code, what=what, where=name, given=type(value).__name__, allowed="its default")


def check_beside_cache(**others: Any) -> None:
    """AK408 unless all of these are None, as they are beside a cache."""
    check_absent(others, "k is a KVCache, which has values and lengths of its own")


def needs_derivatives(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd follows any of these tensors, backward or forward."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                return True
    return has_tangent(tensors)


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    """Whether any of these tensors is a dual number of forward-mode differentiation."""
    level = forward_ad._current_level
    return level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
        for t in tensors
    )


def shape_of(t: Tensor) -> str:
    """``[2, 8, 128, 64]``, for messages."""
    return str(list(t.shape))


def shapes_of(q: Tensor, k: Tensor, v: Tensor) -> str:
    """``q [...], k [...], v [...]``, for messages."""
    return f"q {shape_of(q)}, k {shape_of(k)}, v {shape_of(v)}"


def is_paged(program: Program) -> bool:
    """Whether its keys and values are pages, ``[pages, heads, page size, head_dim]``."""
    return program.layout(program.attend.k).kind == "paged"


def check_qkv(q: Tensor, k: Tensor, v: Tensor, paged: bool = False) -> None:
    """Check that q, k and v go together, whatever the rest of the program; ``paged`` as `is_paged` has it.

    Raises:
        AttnkitError: AK402 not a tensor, AK403 shapes, AK404 dtypes, AK405 devices, AK407 head counts.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t)
        if t.dim() != 4:
            raise error("AK403", where=name, given=shape_of(t), allowed="[batch, heads, length, head_dim]")
        if t.dtype != q.dtype:
            raise error("AK404", where=name, given=str(t.dtype), allowed=f"the dtype of q, {q.dtype}")
        if t.device != q.device:
            raise error("AK405", where=name, given=str(t.device), allowed=f"the device of q, {q.device}")
    if not q.is_floating_point():
        raise error("AK404", where="q", given=str(q.dtype), allowed="float32, bfloat16 or float16")
    if k.shape[0] != v.shape[0] or not (paged or q.shape[0] == k.shape[0]):
        raise error("AK403", where="q, k, v", given=shapes_of(q, k, v), allowed="one batch size")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise error(
            "AK403", where="k, v", given=shapes_of(q, k, v), allowed="k and v of the same heads and length"
        )
    if q.shape[3] != k.shape[3]:
        raise error("AK403", where="q, k", given=shapes_of(q, k, v), allowed="one head_dim")
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise error("AK403", where="q, v", given=shapes_of(q, k, v), allowed="head dims of at least 1")
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise error("AK407", where="q, k", given=shapes_of(q, k, v))


def check_bindings(
    program: Program,
    q: Tensor,
    k: Tensor,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    seed: Tensor | None = None,
) -> None:
    """Check that buffers, params and seed are what a program of attention needs, and that its lengths describe q, k and v.

    Raises:
        AttnkitError: AK401 counts and values, AK402 types, AK403 shapes, AK404 dtypes, AK405 devices, AK602 lengths.
    """
    check_values(program, q.device, buffers, params)
    attend = program.attend
    if attend.normalizer.sink is not None:
        sink = buffers[attend.normalizer.sink]
        if sink.shape[0] != q.shape[1]:
            raise error(
                "AK403", where="sink", given=shape_of(sink), allowed=f"[{q.shape[1]}], one logit a head"
            )
        if sink.dtype != torch.float32:
            raise error("AK404", where="sink", given=str(sink.dtype), allowed="float32")
        if not sink.is_contiguous():
            raise error(
                "AK403", where="sink", given=f"stride {sink.stride(0)}", allowed="a contiguous tensor"
            )
    _check_dropout(program, params, seed)
    _check_lengths(program, q, k, buffers)


def check_values(
    program: Program, device: torch.device, buffers: Sequence[Tensor], params: Sequence[float]
) -> None:
    """Check that buffers and params are those that a program declares.

    Raises:
        AttnkitError: AK401 counts and values, AK402 types, AK403 ranks, AK404 dtypes, AK405 devices.
    """
    if len(buffers) != len(program.buffers):
        raise error(
            "AK401", where="buffers", given=str(len(buffers)), allowed=f"{len(program.buffers)} tensors"
        )
    if len(params) != program.num_params:
        raise error("AK401", where="params", given=str(len(params)), allowed=f"{program.num_params} numbers")
    for i, value in enumerate(params):
        if FLOAT32_MAX < abs(value) < math.inf:
            raise error("AK401", where=f"param p{i}", given=str(value), allowed="what float32 can hold")
    for i, (tensor, declared) in enumerate(zip(buffers, program.buffers, strict=True)):
        where = f"buffer b{i}"
        check_tensor(where, tensor, device)
        if tensor.dtype not in _BUFFER_DTYPES[declared.dtype]:
            raise error("AK404", where=where, given=str(tensor.dtype), allowed=declared.dtype)
        if tensor.dim() != declared.rank:
            raise error("AK403", where=where, given=shape_of(tensor), allowed=f"rank {declared.rank}")


def check_probability(name: str, value: Any) -> float:
    """``value`` as a float from 0 to 1. AK402 if it is no number, AK401 if it is another one."""
    p = check_number(name, value)
    if not 0.0 <= p <= 1.0:
        raise error("AK401", where=name, given=str(p), allowed="0..1")
    return p


def _check_dropout(program: Program, params: Sequence[float], seed: Tensor | None) -> None:
    dropout = program.attend.dropout
    if dropout is None:
        if seed is not None:
            raise error("AK408", where="seed", given="a seed and a program without dropout", allowed="None")
        return
    if dropout.op == "param":
        check_probability("dropout", params[int(dropout.attr or 0)])
    check_tensor("seed", seed)
    assert seed is not None
    if seed.dtype != torch.int64:
        raise error("AK404", where="seed", given=str(seed.dtype), allowed="torch.int64")
    if seed.numel() != 1:
        raise error("AK403", where="seed", given=shape_of(seed), allowed="one element")


def _check_lengths(program: Program, q: Tensor, k: Tensor, buffers: Sequence[Tensor]) -> None:
    if q.is_cuda:  # to look at lengths there would be to wait for them
        return
    q_layout, kv_layout = program.layout(program.attend.q), program.layout(program.attend.k)
    if kv_layout.kind == "padded":
        assert kv_layout.lengths is not None
        lens = buffers[kv_layout.lengths]
        if lens.shape[0] != q.shape[0]:
            raise error(
                "AK602", where="kv_lens", given=shape_of(lens), allowed=f"[{q.shape[0]}], one a batch entry"
            )
        read_lengths("kv_lens", lens, k.shape[2])
    elif kv_layout.kind == "paged":
        assert kv_layout.lengths is not None
        assert kv_layout.table is not None
        check_pages(k.shape[2], buffers[kv_layout.table], buffers[kv_layout.lengths], q.shape[0])
    elif kv_layout.kind == "packed":
        assert q_layout.lengths is not None  # the verifier allows packed k only beside packed q
        assert kv_layout.lengths is not None
        cu_q, cu_kv = buffers[q_layout.lengths], buffers[kv_layout.lengths]
        if q.shape[0] != 1:
            raise error(
                "AK602", where="q", given=shape_of(q), allowed="[1, heads, total, head_dim] beside cu_seqlens"
            )
        if cu_q.shape != cu_kv.shape:
            raise error(
                "AK602",
                where="cu_seqlens_q, cu_seqlens_kv",
                given=f"{shape_of(cu_q)} and {shape_of(cu_kv)}",
                allowed="one number of sequences",
            )
        for name, cu, total in (
            ("cu_seqlens_q", _values("cu_seqlens_q", cu_q), q.shape[2]),
            ("cu_seqlens_kv", _values("cu_seqlens_kv", cu_kv), k.shape[2]),
        ):
            if not cu or cu[0] != 0 or cu[-1] != total or any(a > b for a, b in pairwise(cu)):
                raise error(
                    "AK602", where=name, given=str(cu[:8]), allowed=f"0, ... not falling ..., {total}"
                )


def is_page_size(tokens: int) -> bool:
    """Whether pages may hold this many tokens: see `PAGE_SIZES`."""
    return tokens >= 16 and tokens & (tokens - 1) == 0


def check_pages(page_size: int, table: Tensor, lengths: Tensor, batch: int) -> None:
    """Check the shapes of a page table and its lengths, and that lengths on the CPU fit; its entries the kernel checks.

    Raises:
        AttnkitError: AK403 shapes, AK602 lengths.
    """
    if not is_page_size(page_size):
        raise error("AK403", where="k, v", given=f"pages of {page_size} tokens", allowed=PAGE_SIZES)
    for name, t in (("page_table", table), ("lengths", lengths)):
        if t.shape[0] != batch:
            raise error(
                "AK602", where=name, given=shape_of(t), allowed=f"a row for each of {batch} sequences"
            )
    if lengths.is_cuda:  # to look at them there would be to wait for them
        return
    read_lengths("lengths", lengths, table.shape[1] * page_size, ", what the table has")


def check_lengths(cu_seqlens_q: Any, cu_seqlens_kv: Any, kv_lens: Any) -> None:
    """What can be told of lengths without looking at what they hold."""
    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        raise error(
            "AK408",
            where="cu_seqlens_q, cu_seqlens_kv",
            what="one is given without the other",
            given="cu_seqlens_kv alone" if cu_seqlens_q is None else "cu_seqlens_q alone",
            allowed="both or neither",
        )
    if cu_seqlens_q is not None and kv_lens is not None:
        raise error(
            "AK408",
            where="kv_lens",
            what="packed and padded lengths exclude each other",
            given="cu_seqlens_q and kv_lens",
            allowed="one of them",
        )
    for name, lengths in (
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_kv", cu_seqlens_kv),
        ("kv_lens", kv_lens),
    ):
        if lengths is None:
            continue
        check_tensor(name, lengths)
        if lengths.dtype != torch.int32:
            raise error("AK404", where=name, given=str(lengths.dtype), allowed="torch.int32")
        if lengths.dim() != 1:
            raise error("AK403", where=name, given=shape_of(lengths), allowed="one dimension")


def read_lengths(name: str, lengths: Tensor, most: int, what: str = "") -> list[int]:
    """The lengths that a tensor holds, each from 0 to ``most``; ``what`` says what sets that limit.

    Raises:
        AttnkitError: AK602, one is not; AK606, they cannot be read.
    """
    given = _values(name, lengths)
    if any(not 0 <= n <= most for n in given):
        raise error("AK602", where=name, given=str(given[:8]), allowed=f"0..{most}{what}")
    return given


def _values(name: str, lengths: Tensor) -> list[int]:
    try:
        return lengths.tolist()
    except RuntimeError as exc:
        raise error("AK606", where=name, given=str(exc)) from exc
