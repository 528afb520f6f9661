"""``ak.readout``: sums, maxima and entropies of attention's weights, the largest of them, or whole rows, and never the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import Mod
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.ops.block_masks import with_blocks
from attnkit.ops.check import (
    NO_ROOM,
    autocast,
    autocasting,
    check_beside_cache,
    check_bindings,
    check_captured,
    check_count,
    check_function,
    check_lengths,
    check_qkv,
    check_scale,
    check_tensor,
    check_values_of,
    is_paged,
    needs_derivatives,
    no_room,
    shape_of,
    without_derivatives,
)
from attnkit.ops.counts import counts, recorder
from attnkit.ops.kv_cache import KVCache
from attnkit.ops.normalized import read_with_gradients
from attnkit.ops.traced import Traceable, bind
from attnkit.ops.warm import precision
from attnkit.plan.readouts import WANT, Results
from attnkit.runtime import prepare

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "readout(Tensor q, Tensor k, Tensor lse, str program, Tensor[] buffers, float[] params, str[] want, Tensor? rows, int topk)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_DIFFERENTIABLE = {"column_sum", "entropy"}  # as attentions of their own


class TopK(NamedTuple):
    """The largest weights of each query, the largest first, of equal ones that of the first key.

    ``weights`` float32 and ``keys`` int64, ``[B, Hq, Sq, k]``. Where fewer keys have a weight above 0, the others are 0 and -1.
    """

    weights: Tensor
    keys: Tensor


class Readout(NamedTuple):
    """What `readout` was asked for; None, what not. Float32. Rows and columns without a pair have 0."""

    column_sum: Tensor | None = None
    column_max: Tensor | None = None
    row_max: Tensor | None = None
    entropy: Tensor | None = None
    topk: TopK | None = None
    rows: Tensor | None = None


def readout(
    q: Tensor,
    k: Tensor | KVCache,
    lse: Tensor,
    want: Sequence[str] = ("column_sum", "row_max", "entropy"),
    *,
    rows: Tensor | Sequence[int] | None = None,
    topk: int | None = None,
    score: Mod | None = None,
    mask: Mod | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    kv_lens: Tensor | None = None,
    backend: str = "auto",
) -> Readout:
    """What people ask of the attention map, in memory that grows with queries and keys alone (and with what is asked for).

    Of the weights ``P[b, h, i, j] = exp(score(scale * q_i . k_j) - lse_i)`` over the pairs that ``mask`` has, 0 elsewhere::

        column_sum   sum_i P_ij          [B, Hq, Skv]     how much a key was attended to (H2O, SnapKV)
        column_max   max_i P_ij          [B, Hq, Skv]
        row_max      max_j P_ij          [B, Hq, Sq]
        entropy      -sum_j P log P      [B, Hq, Sq]      in nats
        topk         the k largest P_ij of each query, and their keys: `TopK`
        rows         P_ij of the queries ``rows``         [B, Hq, R, Skv]

    The weights of the last n queries alone are those of ``q[:, :, -n:]`` and ``lse[:, :, -n:]``, with a mask that is aligned to
    the end, such as `ak.causal`. Gradients pass through column_sum and entropy, to the lse and on to what it was made from too; where
    they are wanted these are attentions of their own. What asks for another's gradient is an error.

    Args:
        q: ``[B, Hq, Sq, D]``, float32, bfloat16 or float16, any strides, on the CPU.
        k: ``[B, Hkv, Skv, D]``; Hq is a multiple of Hkv. Or an `ak.KVCache` that keeps plain elements, whose rows' last tokens
            the queries are; Skv is then what a row has room for.
        lse: float32 ``[B, Hq, Sq]``, as `ak.attention` returns it with ``return_lse=True`` for the same queries, keys, score,
            mask and scale. That of more keys than these (`ak.merge`), or with a sink, makes the weights those among all of them.
        want: some of the names above.
        rows: with "rows": which queries, ``[R]`` integers from 0 to Sq - 1 (of packed sequences: tokens), in any order.
        topk: with "topk": k, at least 1.
        score: as `ak.attention` has it, and what follows too; they are those of the attention that is looked into.
        mask: the pairs that exist; an `ak.BlockMask` too.
        scale: None is ``D ** -0.5``.
        cu_seqlens_q: of packed sequences.
        cu_seqlens_kv: the same for k.
        kv_lens: of padded keys.
        backend: ``"auto"``, ``"cpu"``, or ``"reference"`` (float64 numpy, materialised, for checking).

    Raises:
        AttnkitError: AK3xx, a function cannot be traced; AK4xx, an argument is wrong; AK502, no kernel for these tensors; AK503,
            a gradient is asked for; AK6xx, an index or a length is wrong, or memory is out.
    """
    if not isinstance(backend, str):
        raise error("AK402", where="backend", given=type(backend).__name__, allowed="the name of a backend")
    keys: Any = k
    page_table = None
    if isinstance(k, KVCache):
        check_beside_cache(kv_lens=kv_lens, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
        keys, _, kv_lens, page_table, codes = k.segment
        if codes is not None:
            raise error("AK502", where="k", given="a cache that keeps codes", allowed="one that keeps plain elements",
                        hint="call .dequantize(), and pass kv_lens=cache.lengths")  # fmt: skip
    q, keys, _ = autocast(q, keys, None)
    check_qkv(q, keys, keys, paged=page_table is not None)
    check_tensor("lse", lse, q.device)
    wanted = _check_want(want, rows, topk)
    listed = None if rows is None else _as_rows(rows, q)
    scale = check_scale(scale)
    check_function("score", score)
    check_function("mask", mask)
    check_lengths(cu_seqlens_q, cu_seqlens_kv, kv_lens)
    mask = with_blocks(mask, None, q, keys, common=cu_seqlens_q is None and keys is k)
    what = Traceable(
        score, mask, scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, kv_lens=kv_lens,
        page_table=page_table,
    )  # fmt: skip
    text, buffers, params = bind(what, q)
    check_captured(buffers, q)
    numbers = [p.current() for p in params]
    if (
        needs_derivatives((q, keys, lse, *buffers))
        and backend != "reference"
        and set(wanted) <= _DIFFERENTIABLE
    ):
        _check(q, keys, lse, parse(text), wanted, None, 0)
        sums: dict[str, Any] = {
            name: read_with_gradients(q, keys, lse, text, buffers, numbers, name) for name in wanted
        }
        return Readout(**sums)
    asked = text, buffers, numbers, wanted, listed, topk or 0
    if backend in ("auto", q.device.type):
        found = torch.ops.attnkit.readout(q, keys, lse, *asked)
    else:
        found = _run(q, keys, lse, *asked, backend=backend)
    results: dict[str, Any] = dict(zip(_names(wanted), found, strict=True))
    if topk is not None:
        results["topk"] = TopK(results["topk"], results.pop("keys"))
    return Readout(**results)


def _names(want: Sequence[str]) -> list[str]:
    """Of what the op returns."""
    return [name for each in want for name in (("topk", "keys") if each == "topk" else (each,))]


def _check_want(want: Any, rows: Any, topk: Any) -> list[str]:
    names = [want] if isinstance(want, str) else list(want) if isinstance(want, Sequence) else None
    if names is None:
        raise error("AK402", where="want", given=type(want).__name__, allowed="a list of names")
    for name in names:
        if name not in WANT:
            raise error("AK401", where="want", given=repr(name), allowed=", ".join(WANT))
    if not names:
        raise error("AK401", where="want", given="nothing", allowed=", ".join(WANT))
    for name, value in (("rows", rows), ("topk", topk)):
        if (value is not None) != (name in names):
            given = f"{name}={'None' if value is None else type(value).__name__}, want {tuple(names)}"
            raise error("AK408", where=name, what=f"{name}= and {name!r} in want go together", given=given,
                        allowed="both or neither")  # fmt: skip
    if topk is not None:
        check_count("topk", topk, 1, 2**31 - 1)
    return [name for name in WANT if name in names]


def _as_rows(rows: Any, q: Tensor) -> Tensor:
    if not isinstance(rows, Tensor):
        if not isinstance(rows, Sequence):
            raise error(
                "AK402", where="rows", given=type(rows).__name__, allowed="a tensor or a list of ints"
            )
        for row in rows:
            check_count("rows", row, 0, 2**31 - 1)
        return torch.tensor(rows, dtype=torch.int32, device=q.device)
    return rows


def _results(
    q: Tensor,
    k: Tensor,
    program: Program,
    buffers: list[Tensor],
    want: list[str],
    rows: Tensor | None,
    topk: int,
) -> Results:
    """What a call gives, as a row or a column has it that has no pair."""
    layout, keys = program.layout(program.attend.k), k.shape[2]
    if layout.table is not None:
        keys = keys * buffers[layout.table].shape[1]
    batch, heads, queries, _ = q.shape

    def zeros(*shape: int, fill: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_full((batch, heads, *shape), fill, dtype=dtype)

    try:
        found: dict[str, Tensor] = {}
        for name in want:
            if name == "rows":
                assert rows is not None
                found |= {"weights": zeros(rows.shape[0], keys), "rows": rows}
            elif name == "topk":
                found |= {
                    "best": zeros(queries, topk),
                    "best_keys": zeros(queries, topk, fill=-1, dtype=torch.int64),
                }
            else:
                found[name] = zeros(keys if name.startswith("column") else queries)
        return Results(**found)
    except NO_ROOM as exc:
        raise no_room(", ".join(want), exc) from exc


def _returned(results: Results) -> list[Tensor]:
    return [t for t in results._replace(rows=None) if t is not None]


def _check(
    q: Tensor, k: Tensor, lse: Tensor, program: Program, want: list[str], rows: Tensor | None, topk: int
) -> list[str]:
    """What is wanted, in the order of `WANT`."""
    if not (program.is_attention and program.attend.plain) or program.attend.dropout is not None:
        allowed = "one softmax attention without dropout"
        raise error("AK502", where="program", given="a program that is more or less", allowed=allowed)
    check_qkv(q, k, k, is_paged(program))
    check_tensor("lse", lse, q.device)
    if lse.dtype != torch.float32:
        raise error("AK404", where="lse", given=str(lse.dtype), allowed="torch.float32")
    if lse.shape != q.shape[:3]:
        raise error("AK403", where="lse", given=shape_of(lse), allowed=f"{list(q.shape[:3])}")
    if rows is not None:
        check_tensor("rows", rows, q.device)
        if rows.dtype not in (torch.int32, torch.int64):
            raise error("AK404", where="rows", given=str(rows.dtype), allowed="torch.int32 or torch.int64")
        if rows.dim() != 1:
            raise error("AK403", where="rows", given=shape_of(rows), allowed="one dimension")
    return _check_want(want, rows, topk or None)


def _run(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    program: str,
    buffers: list[Tensor],
    params: list[float],
    want: list[str],
    rows: Tensor | None,
    topk: int,
    backend: str = "auto",
) -> list[Tensor]:
    parsed = parse(program)
    want = _check(q, k, lse, parsed, want, rows, topk)
    order = None
    if rows is not None:
        check_values_of("rows", rows)
        rows, order = _ascending(rows, q.shape[2])
    dtype, dim = str(q.dtype).removeprefix("torch."), q.shape[3]
    prepared = prepare(program, dtype, dim, dim, q.device.type, backend, precision(q))
    kernel: Any = prepared.kernel
    if not hasattr(kernel, "readout"):
        given = f"backend {prepared.backend!r}, which has no read-outs"
        raise error("AK502", where="ak.readout", given=given, allowed="tensors on the CPU")
    check_bindings(parsed, q, k, buffers, params)
    results = _results(q, k, parsed, buffers, want, rows, topk)
    if (record := recorder()) is not None:
        record(prepared=prepared, q=q, k=k, v=k, buffers=buffers, params=params, reason=None)
        return _returned(results)
    kernel.readout(q, k, lse, results, buffers, params, torch.get_num_threads())
    counts.run()
    if order is not None:
        results = results._replace(weights=results.weights.index_select(2, order))
    return _returned(results)


def _ascending(rows: Tensor, queries: int) -> tuple[Tensor, Tensor | None]:
    """The rows as a kernel takes them, and where each was; None where they lie in order."""
    if rows.numel() > 0 and (int(rows.min()) < 0 or int(rows.max()) >= queries):
        outside = [n for n in rows.tolist() if not 0 <= n < queries]
        raise error("AK601", where="rows", given=str(outside[:8]), allowed=f"0..{queries - 1}")
    sorted_rows, order = rows.sort(stable=True)
    places = None if bool((rows == sorted_rows).all()) else order.argsort()
    return sorted_rows.int().contiguous(), places


def _fake(*args: Any) -> list[Tensor]:
    q, k, lse, text, buffers, _, want, rows, topk = args
    program = parse(text)
    want = _check(q, k, lse, program, want, rows, topk)
    return _returned(_results(q, k, program, buffers, want, rows, topk))


_op = torch.ops.attnkit.readout.default
for _device in ("CPU", "CUDA"):
    _lib.impl("readout", _run, _device)
    _lib.impl("readout", without_derivatives(_op, "this read-out has no derivatives"), f"Autograd{_device}")
    _lib.impl("readout", autocasting(_op, tensors=2), f"Autocast{_device}")
torch.library.register_fake("attnkit::readout", _fake, lib=_lib)
