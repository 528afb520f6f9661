"""``ak.attention``: the program of the functions it is given, checked, traced and run."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import Mod, Selective, Weighting, all_of, in_turn
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.ops.at_once import at_once
from attnkit.ops.attend_cache import Codes, attend_cache, check_q
from attnkit.ops.block_choice import Operands, chosen_by
from attnkit.ops.block_masks import BlockMask, with_blocks
from attnkit.ops.check import (
    autocast,
    check_beside_cache,
    check_captured,
    check_flag,
    check_function,
    check_lengths,
    check_probability,
    check_qkv,
    check_scale,
    check_tensor,
    has_tangent,
    needs_derivatives,
    shape_of,
)
from attnkit.ops.gradients import Way, differentiable
from attnkit.ops.kv_append import refuse_gradients
from attnkit.ops.kv_cache import KVCache
from attnkit.ops.normalized import attend_in_two
from attnkit.ops.registry import attend
from attnkit.ops.routed import Groups, Routing, within
from attnkit.ops.seeds import draw
from attnkit.ops.selective import attend_selectively
from attnkit.ops.traced import Traceable, bind, bind_function
from attnkit.ops.warm import is_unwatched, ready, run
from attnkit.plan.normalizers import LOWERED
from attnkit.variants.vision import GridPattern

Output = Tensor | tuple[Tensor, Tensor]


def attention(
    q: Tensor,
    k: Tensor | KVCache,
    v: Tensor | None = None,
    *,
    score: Mod | Selective | None = None,
    mask: Mod | None = None,
    select: Any = None,
    normalizer: Weighting | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    block_mask: Any = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    kv_lens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Output:
    """Attention with any score and mask, compiled to one kernel.

    ``o[b, h, i] = sum_j softmax_j(score(scale * q_i . k_j)) v_j`` over the keys j that ``mask`` lets i see.

    Args:
        q: ``[B, Hq, Sq, D]``, float32, bfloat16 or float16 on the CPU (float64 too with ``backend="reference"``), any
            strides. Under ``torch.autocast`` q, k and v are cast to its dtype.
        k: ``[B, Hkv, Skv, D]``; Hq is a multiple of Hkv, consecutive query heads share a kv head. Or an `ak.KVCache`: then
            the queries are the last Sq tokens of each row, already appended, and ``kv_len`` is the row's length; q has
            the dtype of the cache, to which it is cast under ``torch.autocast``. A cache takes no gradient.
        v: ``[B, Hkv, Skv, Dv]``; None beside a cache.
        score: ``(s, b, h, q_idx, kv_idx) -> number``; s is the scaled logit. FlexAttention's score_mod. Or `ak.selective`, on
            the CPU, beside mask, scale, cu_seqlens and return_lse: then it is causal.
        mask: ``(b, h, q_idx, kv_idx) -> bool``, True where the pair exists. FlexAttention's mask_mod.
        select: which pairs meet. ``ak.top_k_blocks(block, k)`` or ``ak.sparge(...)``: blocks of keys that the queries choose, joined
            with the masks by "and". Or groups, on the CPU, beside score, mask, scale and, where each query is in one group,
            return_lse: `ak.routing` (clusters), `ak.groups` (lists of tokens), or a pattern over a grid of
            `attnkit.variants.vision` (windows, halos).
        normalizer: ``ak.softmax()``, ``ak.softmax(sink)`` with one float32 logit per query head, ``ak.sigmoid()``,
            ``ak.signed_softmax()``, ``ak.softmax_over_queries()``: the last three on the CPU, the last two as two attentions.
        scale: finite and positive; None is ``D ** -0.5``.
        dropout_p: the probability with which a weight is dropped; the others are divided by ``1 - dropout_p``. lse is that
            of all. One number drawn from torch's default generator decides which: see docs/variants/dense.md.
        block_mask: an `ak.BlockMask` or torch's flex BlockMask, joined with ``mask`` by "and". It must be built for the
            lengths, batch and heads of this call. Without one the block structure is found from ``mask``.
        cu_seqlens_q: int32 ``[N + 1]``: q is ``[1, Hq, total, D]``, packed; b, q_idx and the lengths are per segment.
        cu_seqlens_kv: the same for k and v; both or neither.
        kv_lens: int32 ``[B]``: only the first ``kv_lens[b]`` keys of each batch entry exist.
        return_lse: also return the natural-log sum of exponentials, float32 ``[B, Hq, Sq]``, -inf where no key is seen.
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` (tensors on an NVIDIA GPU: compiled, not run on one yet), or ``"reference"``
            (float64 numpy, materialised, for checking).

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype, or ``(o, lse)``. A row that sees nothing is 0.

    Raises:
        AttnkitError: AK3xx, a function cannot be traced; AK4xx, an argument is wrong; AK5xx, not built, or derivatives
            in forward mode are required and torch's op cannot stand in, or any are and k is a cache; AK6xx, an index
            or a length is wrong.
    """
    check_flag("return_lse", return_lse)
    if not isinstance(backend, str):
        raise error("AK402", where="backend", given=type(backend).__name__, allowed="the name of a backend")
    if (
        block_mask is None and type(mask) is not BlockMask and not isinstance(score, Selective) and normalizer is None
        and (scale is None or (type(scale) is float and 0.0 < scale < math.inf))
        and kv_lens is None and cu_seqlens_q is None and cu_seqlens_kv is None and select is None
        and type(dropout_p) in (float, int) and dropout_p == 0 and backend in ("auto", "cpu")
        and not torch.compiler.is_compiling()
    ):  # fmt: skip
        found = _short_way(q, k, v, score, mask, scale, return_lse)
        if found is not None:
            o, lse = found
            return o if lse is None or not return_lse else (o, lse)
    if isinstance(score, Selective) or isinstance(select, (Routing, Groups, GridPattern)):
        apart = {
            "normalizer": normalizer, "dropout_p": check_probability("dropout_p", dropout_p) or None,
            "block_mask": block_mask, "kv_lens": kv_lens,
            "backend": None if backend in ("auto", "cpu") else backend,
        }  # fmt: skip
        return _of_its_own(
            q, k, v, score, mask, select, scale, cu_seqlens_q, cu_seqlens_kv, return_lse, apart
        )
    cached = isinstance(k, KVCache)
    if isinstance(k, KVCache):
        check_beside_cache(
            v=v, block_mask=block_mask, kv_lens=kv_lens, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv
        )  # fmt: skip
        if backend == "reference" and k.segment.codes is not None:
            return _on_decoded(q, k, score, mask, normalizer, scale, dropout_p, return_lse)
    q, keys, values, kv_lens, page_table, codes = _autocast(q, k, v, kv_lens)
    _check_operands(q, keys, values, page_table, codes)
    _check_normalizer(normalizer)
    dropout_p, scale = check_probability("dropout_p", dropout_p), check_scale(scale)
    check_function("score", score)
    check_function("mask", mask)
    check_lengths(cu_seqlens_q, cu_seqlens_kv, kv_lens)
    common = cu_seqlens_q is None and not cached
    mask = with_blocks(mask, block_mask, q, keys, common=common)
    approximation = None
    if select is not None:
        approximation = getattr(select, "approximation", None)
        apart = {"packed": cu_seqlens_q, "in pages": page_table, "codes": codes}
        chosen = chosen_by(select, Operands(q, keys, scale, kv_lens, backend), apart)
        mask = all_of(chosen, mask)
    normalizer = normalizer or Weighting()
    if return_lse and not normalizer.has_lse:
        raise error("AK221", where="return_lse", given=normalizer.kind, allowed="softmax and signed_softmax")
    sink = _check_sink(normalizer.sink, q)
    text, buffers, params = bind(
        Traceable(
            in_turn(score, normalizer.score), mask, scale, normalizer.kind, sink, cu_seqlens_q, cu_seqlens_kv, kv_lens,
            page_table, dropout_p, None if codes is None else codes.scheme.codecs, approximation,
        ),
        q,
    )  # fmt: skip
    check_captured(buffers, q)
    numbers = [p.current() for p in params]
    if cached:
        refuse_gradients("q", (q, *buffers))
    seed = draw(dropout_p, q)
    if codes is not None:
        o, lse = attend_cache(q, codes, text, buffers, numbers, return_lse, seed, backend)
    elif normalizer.kind in LOWERED and backend != "reference":
        o, lse = attend_in_two(partial(_run_on, backend), q, keys, values, text, buffers, numbers, seed)
    else:
        o, lse = _run_on(backend, q, keys, values, text, buffers, numbers, return_lse, seed)
    return o if lse is None or not return_lse else (o, lse)


def _of_its_own(
    q: Tensor, k: Any, v: Any, score: Mod | Selective | None, mask: Mod | None, select: Any, scale: float | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_kv: Tensor | None, return_lse: bool, apart: dict[str, Any],
) -> Output:  # fmt: skip
    """What has kernels of its own: selection by a head, and attention within groups. ``apart``: what does not go with them."""
    if isinstance(score, Selective):
        apart = {"select": select, **apart}
        o, lse = attend_selectively(score, q, k, v, mask, scale, cu_seqlens_q, cu_seqlens_kv, apart)
    else:
        check_function("score", score)
        check_function("mask", mask)
        apart = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv, **apart}
        o, lse = within(select, q, k, v, score, mask, check_scale(scale), return_lse, **apart)
    return (o, lse) if return_lse else o


def _short_way(
    q: Tensor, k: Any, v: Any, score: Mod | None, mask: Mod | None, scale: float | None, need_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """A score and a mask at most, and nobody watches: what else there is to check, ops do for tensors that they have not seen.

    None where that is not so.
    """
    plain = plain_text(scale) if v is not None and score is None and mask is None else None
    if plain is not None and not need_lse and (o := at_once(plain, q, k, v)) is not None:
        return o, None
    cached = type(k) is KVCache
    if (v is None) is not cached or not is_unwatched((q,) if cached else (q, k, v)):
        return None
    if cached:
        if needs_derivatives((q,)):
            return None  # which is said elsewhere
        k, v, kv_lens, page_table, codes = k.segment
        codecs = None if codes is None else codes.scheme.codecs
        what = Traceable(score, mask, scale, kv_lens=kv_lens, page_table=page_table, codecs=codecs)
    elif plain is not None:
        return attend(q, k, v, plain, [], [], need_lse, unwatched=True)
    else:
        what, codes = Traceable(score, mask, scale), None
    check_function("score", score)
    check_function("mask", mask)
    text, buffers, params = bind(what, q)
    check_captured(buffers, q)
    numbers = [p.current() for p in params]
    if codes is not None:
        return attend_cache(q, codes, text, buffers, numbers, need_lse, None)
    if cached:
        refuse_gradients("q", buffers)
    if not (buffers or numbers or need_lse) and (o := at_once(text, q, k, v)) is not None:
        return o, None
    return attend(q, k, v, text, buffers, numbers, need_lse)


@lru_cache(maxsize=1024)
def plain_text(scale: float | None = None) -> str:
    """The program of plain attention."""
    return bind(Traceable(None, None, scale)).text


def trace(function: Mod) -> Program:
    """The program of one score (five arguments) or mask (four arguments) function, to look at or to keep.

    Raises:
        AttnkitError: AK3xx, the function cannot be traced; AK402, it takes another number of arguments.
    """
    return parse(bind_function(function).text)


def _autocast(
    q: Tensor, k: Tensor | KVCache, v: Tensor | None, kv_lens: Tensor | None
) -> tuple[Tensor, Any, Any, Tensor | None, Tensor | None, Codes | None]:
    """q, k, v, the lengths, the page table and codes, in the dtype of `autocast`; of a cache only q is cast, to the cache's
    where that has one."""
    if isinstance(k, KVCache):
        held = k.segment
        check_tensor("q", q)
        kind = "cuda" if q.is_cuda else "cpu"
        if torch.is_autocast_enabled(kind):
            q = q.to(torch.get_autocast_dtype(kind) if held.k is None else held.k.dtype)
        return q, *held
    if v is None:
        hint = "only a KVCache has values of its own"
        raise error("AK402", where="v", given="None", allowed="a tensor", hint=hint)
    return *autocast(q, k, v), kv_lens, None, None


def _check_operands(q: Tensor, k: Any, v: Any, page_table: Tensor | None, codes: Codes | None) -> None:
    if codes is None:
        check_qkv(q, k, v, paged=page_table is not None)
    else:
        check_q(q, codes.scheme, codes.storage[0].shape[1], codes.storage[0].device)


def _check_normalizer(normalizer: Any) -> None:
    if normalizer is not None and not isinstance(normalizer, Weighting):
        raise error("AK402", where="normalizer", given=type(normalizer).__name__, allowed="ak.softmax(...)")


def _check_sink(sink: Any, q: Tensor) -> Any:
    if sink is not None:
        check_tensor("sink", sink, q.device)
        if sink.dtype != torch.float32 or sink.dim() != 1:
            raise error("AK403", where="sink", given=f"{sink.dtype} {shape_of(sink)}", allowed="float32 [Hq]")
    return sink


def _on_decoded(
    q: Tensor,
    cache: KVCache,
    score: Mod | None,
    mask: Mod | None,
    normalizer: Weighting | None,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Output:
    """The reference, on what the codes of a cache mean."""
    check_tensor("q", q)
    k, v = cache.dequantize()
    found = attention(
        q.double(), k.double(), v.double(), score=score, mask=mask, normalizer=normalizer, scale=scale,
        dropout_p=dropout_p, kv_lens=cache.lengths, return_lse=return_lse, backend="reference",
    )  # fmt: skip
    return found.to(q.dtype) if isinstance(found, Tensor) else (found[0].to(q.dtype), found[1])


def _run_on(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: str,
    buffers: list[Tensor],
    params: list[float],
    need_lse: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention, or that of a backend asked for by name, outside the dispatcher: for checking."""
    if backend in ("auto", q.device.type):
        return attend(q, k, v, text, buffers, params, need_lse, seed)
    found = ready(text, q, k, v, backend)
    tensors = (q, k, v, *buffers)
    if not needs_derivatives(tensors):
        return run(found, q, k, v, buffers, params, seed, need_lse)
    if has_tangent(tensors) or not found.differentiable:
        raise error("AK503", where=f"backend {backend!r}", given="tensors that require gradients")
    return differentiable(Way(text, params, need_lse, found), tensors, seed)
