"""``ak.dense_attention``: softmax attention with the usual modifiers, and the same over a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import (
    Mod,
    Weighting,
    alibi as alibi_score,
    all_of,
    causal as causal_mask,
    in_turn,
    softcap as softcap_score,
    window as window_mask,
)
from attnkit.ops.check import check_flag, check_function, check_tensor, shape_of
from attnkit.ops.functional import Output, attention
from attnkit.ops.kv_cache import KVCache


def dense_attention(
    q: Tensor,
    k: Tensor | KVCache,
    v: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mod | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    score: Mod | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Output:
    """Dense softmax attention with the usual modifiers, applied in this order: softcap, ALiBi, ``score``, masks.

    Args:
        q: as in `attention`, like k, v, score, mask, scale, the lengths, dropout_p and return_lse.
        k: see q.
        v: see q.
        causal: bottom-right aligned: query i sees keys up to ``i + Skv - Sq``.
        window: ``(left, right)``, inclusive distances from the query's position; None or -1 is unbounded.
        mask: one more mask, joined with the others by "and".
        softcap: c > 0 replaces the logit s by ``c * tanh(s / c)``.
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``; subtracts ``slope * distance``.
        score: applied after softcap and ALiBi.
        sink: float32 ``[Hq]``, one more logit per head in the denominator, without a value.
        scale: see q.
        cu_seqlens_q: see q.
        cu_seqlens_kv: see q.
        kv_lens: see q.
        dropout_p: see q.
        return_lse: see q.

    Returns:
        As `attention`.

    Raises:
        AttnkitError: as `attention`; AK406 for a window that is not a pair.
    """
    check_flag("causal", causal)
    check_function("mask", mask)
    check_function("score", score)
    distance = None if alibi_slopes is None else alibi_score(alibi_slopes)
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes)
        check_tensor("q", q)
        if q.dim() == 4 and alibi_slopes.shape[-1] not in (1, q.shape[1]):
            raise error(
                "AK403", where="alibi_slopes", given=shape_of(alibi_slopes), allowed="[Hq] or [B, Hq]"
            )
    return attention(
        q,
        k,
        v,
        score=in_turn(None if softcap is None else softcap_score(softcap), distance, score),
        mask=all_of(
            causal_mask() if causal else None, None if window is None else window_mask(*_pair(window)), mask
        ),
        normalizer=None if sink is None else Weighting(sink=sink),
        scale=scale,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        kv_lens=kv_lens,
        return_lse=return_lse,
    )


def quantized_kv_attention(
    q: Tensor,
    cache: KVCache,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    mask: Mod | None = None,
    score: Mod | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Output:
    """Attention of the last tokens of each row of a cache, which have been appended, over what the row holds.

    Args:
        q: ``[B, Hq, Sq, D]``, as in `attention`.
        cache: of any codec.
        causal: as in `dense_attention`, like window, mask and score.
        window: see causal.
        mask: see causal.
        score: see causal.
        scale: as in `attention`, like return_lse.
        return_lse: see scale.

    Returns:
        As `attention`.

    Raises:
        AttnkitError: as `attention`; AK402, cache is not an `ak.KVCache`.
    """
    if not isinstance(cache, KVCache):
        raise error("AK402", where="cache", given=type(cache).__name__, allowed="an ak.KVCache")
    return dense_attention(
        q, cache, causal=causal, window=window, mask=mask, score=score, scale=scale, return_lse=return_lse
    )


def _pair(window: Any) -> tuple[int | None, int | None]:
    if not (isinstance(window, (tuple, list)) and len(window) == 2):
        raise error("AK406", where="window", given=repr(window))
    return window[0], window[1]
