"""``ak.selective_attention``: a head decides which keys no later query needs, and every head forgets them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.expr import const, make, var
from attnkit.ir.mods import Selective, all_of, causal
from attnkit.ir.program import Layout, Program, Return
from attnkit.ir.text import parse
from attnkit.ops.carried import attend_carried
from attnkit.ops.carried_cache import attend_carried_cache
from attnkit.ops.check import (
    autocast,
    check_absent,
    check_beside_cache,
    check_captured,
    check_count,
    check_flag,
    check_function,
    check_lengths,
    check_number,
    check_qkv,
    check_scale,
    check_tensor,
)
from attnkit.ops.kv_append import refuse_gradients
from attnkit.ops.kv_cache import KVCache
from attnkit.ops.traced import Traceable, bind
from attnkit.ops.tracing import kept
from attnkit.plan.carried import RESULTS


def selective_attention(
    q: Tensor,
    k: Tensor | KVCache,
    v: Tensor | None = None,
    *,
    mask: Callable[..., Any] | None = None,
    scale: float | None = None,
    head: int = 0,
    budget: int | None = None,
    carry: Tensor | None = None,
    return_carry: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which one head decides what all heads forget (Leviathan, Kalman, Matias, arXiv 2410.02703).

    What the logits of ``head`` give a key, where they are above 0, is taken from every head's logits of all later queries. A
    sequence's first key, and a query's own, are never selected against. It has no parameters, and costs one head's products
    of queries and keys more than causal attention; memory is linear in the number of tokens.

    Args:
        q: ``[B, Hq, Sq, D]``, float32, bfloat16 or float16 on the CPU, any strides. Under ``torch.autocast`` q, k and v are cast
            to its dtype.
        k: ``[B, Hkv, Skv, D]``; Hq is a multiple of Hkv. The last query stands at the last key. Or an `ak.KVCache`:
            then the queries are the last Sq tokens of each row, already appended.
        v: ``[B, Hkv, Skv, Dv]``; None beside a cache.
        mask: ``(b, h, q_idx, kv_idx) -> bool``, joined with causality by "and". Pairs that do not exist carry nothing.
        scale: finite and positive; None is ``D ** -0.5``.
        head: the head that selects.
        budget: the most keys a query sees, at least 2: one that would see more first forgets those most selected
            against, for all heads and for good, never the first it sees nor its own; of equals the oldest.
        carry: float32 ``[B, Skv]``, what earlier queries carried onto each key; 0 for new keys, infinity for one that is
            forgotten, whose k and v may hold anything. ``[1, total]`` if packed, ``[B, max_len]`` beside a cache.
        return_carry: also return what is carried after the last query: the ``carry`` of the next call.
        cu_seqlens_q: int32 ``[N + 1]``: tokens are ``[1, H, total, D]``, packed; nothing is carried from one sequence to
            the next.
        cu_seqlens_kv: the same for k and v; both or neither.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype, or ``(o, carry)``.

    Raises:
        AttnkitError: AK3xx, the mask cannot be traced; AK4xx, an argument is wrong; AK5xx, not built; AK6xx, a length or an
            index is wrong, or out of memory.
    """
    check_count("head", head, 0)
    if budget is not None:
        check_count("budget", budget, 2)
    check_flag("return_carry", return_carry)
    check_function("mask", mask)
    if carry is not None:
        check_tensor("carry", carry)
    o, _, carried = _attend(
        Selective(head, None), q, k, v, mask, scale, cu_seqlens_q, cu_seqlens_kv, budget, carry
    )
    return (o, carried) if return_carry else o


def attend_selectively(
    score: Selective, q: Tensor, k: Tensor | KVCache, v: Tensor | None, mask: Any, scale: float | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_kv: Tensor | None, apart: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ak.attention` with this score: o and lse. ``apart`` holds the arguments that it has no room for.

    Raises:
        AttnkitError: as `selective_attention`; AK408, one of ``apart`` is there.
    """
    check_absent(apart, "ak.selective does not go with this")
    check_count("head", score.head, 0)
    check_function("score", score.score)
    check_function("mask", mask)
    o, lse, _ = _attend(score, q, k, v, mask, scale, cu_seqlens_q, cu_seqlens_kv)
    return o, lse


def _attend(
    score: Selective, q: Tensor, k: Tensor | KVCache, v: Tensor | None, mask: Any, scale: float | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_kv: Tensor | None, budget: int | None = None, carry: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, lse and the carry."""
    kv_lens = page_table = codes = None
    keys: Any
    values: Any
    if isinstance(k, KVCache):
        check_beside_cache(v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
        q = _beside(q, k)
        keys, values, kv_lens, page_table, codes = k.segment
    else:
        q, keys, values = autocast(q, k, v)
    if codes is None:
        check_qkv(q, keys, values, paged=page_table is not None)
    check_lengths(cu_seqlens_q, cu_seqlens_kv, None)
    text, buffers, params = _bound(
        q, mask, scale, score.score, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, kv_lens=kv_lens,
        page_table=page_table, codecs=None if codes is None else codes.scheme.codecs,
    )  # fmt: skip
    text = selective_text(text, score.head, budget, carry is not None)
    if codes is not None:
        return attend_carried_cache(q, codes, carry, text, buffers, params)[:3]
    return attend_carried(q, keys, values, carry, text, buffers, params)[:3]


def selective_memory(
    q: Tensor,
    k: Tensor,
    *,
    tau: float = 1.0,
    mask: Callable[..., Any] | None = None,
    scale: float | None = None,
    head: int = 0,
    carry: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
) -> Tensor:
    """How many keys every query still remembers, ``M_i = sum_j (1 - min(F_ij, tau) / tau)`` over the keys it sees.

    F is what `selective_attention` of the same arguments takes from the logits. The memory loss of a layer is
    ``(M.amax(-1) / S).mean()``: a model that is trained with it forgets what it does not need, so that a budget costs less. It
    costs as much as two heads' products of queries and keys.

    Args:
        q: as in `selective_attention`, like k, mask, scale, head, carry and cu_seqlens.
        k: see q.
        tau: what a key has lost when it counts as forgotten; finite and positive.
        mask: see q.
        scale: see q.
        head: see q.
        carry: see q.
        cu_seqlens_q: see q.
        cu_seqlens_kv: see q.

    Returns:
        Float32 ``[B, Sq]``, with gradients of q, k and the carry.

    Raises:
        AttnkitError: as `selective_attention`.
    """
    tau = check_number("tau", tau)
    if not 0 < tau < math.inf:
        raise error("AK401", where="tau", given=str(tau), allowed="a finite positive number")
    check_count("head", head, 0)
    check_function("mask", mask)
    if carry is not None:
        check_tensor("carry", carry)
    q, k, _ = autocast(q, k, k)
    check_qkv(q, k, k)
    check_lengths(cu_seqlens_q, cu_seqlens_kv, None)
    if head >= q.shape[1]:
        raise error("AK401", where="head", given=str(head), allowed=f"0..{q.shape[1] - 1}")
    of_head = head // (q.shape[1] // k.shape[1])
    q, k = q[:, head : head + 1], k[:, of_head : of_head + 1]
    text, buffers, params = _bound(q, mask, scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
    text = selective_text(text, 0, None, carry is not None, tau)
    nothing = torch.zeros_like(k[..., :1])
    _, lse, _, _ = attend_carried(q, k, nothing, carry, text, buffers, params)
    return lse[:, 0].exp()  # whose scores are the logarithms


def _bound(
    q: Tensor, mask: Any, scale: Any, score: Any = None, **layout: Any
) -> tuple[str, list[Tensor], list[float]]:
    """The program of causal attention, and what it reads."""
    text, buffers, params = bind(Traceable(score, all_of(causal(), mask), check_scale(scale), **layout), q)
    check_captured(buffers, q)
    return text, buffers, [p.current() for p in params]


def _beside(q: Tensor, cache: KVCache) -> Tensor:
    """q, under autocast in the cache's dtype; beside codes in that of autocast."""
    check_tensor("q", q)
    refuse_gradients("q", (q,))
    if not torch.is_autocast_enabled("cpu"):
        return q
    k = cache.segment.k
    return q.to(torch.get_autocast_dtype("cpu") if k is None else k.dtype)


@kept
def selective_text(text: str, head: int, budget: int | None, initial: bool, tau: float | None = None) -> str:
    """The program of softmax attention, with selection added to it; with ``tau`` its lse is the logarithm of the memory."""
    program = parse(text)
    op, own = program.attend, parse(_OWN).attend.mask
    assert own is not None
    selects = make("and", own, make("gt", op.score, const(0.0)))  # at 0 the derivative is 0: not a maximum
    score = make("sub", op.score, var("f"))
    if tau is not None:
        lost = make("div", make("min", var("f"), const(tau)), const(tau))
        score = make("log", make("sub", const(1.0), lost))
    attend = replace(
        op, score=score, carry=make("where", selects, op.score, const(0.0)), head=head,
        budget=budget, initial=3 if initial else None, outputs=RESULTS,
    )  # fmt: skip
    inputs = (*program.inputs, Layout("bs")) if initial else program.inputs
    results = Return(tuple(len(inputs) + i for i in range(3)))
    return parse(Program(inputs, program.buffers, program.num_params, (attend, results)).text).text


# Neither a sequence's first key nor the query's own.
_OWN = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) {
  o, lse = attend(q, k, v, scale = default) {
    mask = (kv_idx >= 1) & (kv_idx < q_idx + (kv_len - q_len))
    normalizer = softmax
  }
  return o, lse
}
"""
