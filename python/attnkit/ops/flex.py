"""FlexAttention's function: torch's arguments and torch's meaning, attnkit's kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import Mod
from attnkit.ops.check import autocast, check_flag, check_number, check_qkv, shape_of
from attnkit.ops.functional import attention


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention`, computed by attnkit.

    ``q_idx`` and ``kv_idx`` count from the first query and the first key: there is no alignment but the function's own.

    Args:
        query: ``[B, Hq, L, E]``, of the dtypes and devices of `attnkit.attention`; key and value alike.
        key: ``[B, Hkv, S, E]``; B may be 1 beside a block mask for the query's batch, as in torch.
        value: ``[B, Hkv, S, Ev]``.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``; None changes nothing.
        block_mask: torch's BlockMask, or attnkit's; None sees everything.
        scale: any finite number; None is ``E ** -0.5``.
        enable_gqa: whether Hq may be a multiple of Hkv.
        return_lse: also return the log-sum-exp, float32 ``[B, Hq, L]``; -inf where nothing is seen.
        kernel_options: options of torch's Triton and C++ kernels. They mean nothing to ours and are ignored.
        return_aux: a torch ``AuxRequest``. ``lse`` is given; ``max_scores`` is refused, as torch does on the CPU.

    Returns:
        ``o [B, Hq, L, Ev]``; ``(o, lse)`` with ``return_lse``; ``(o, AuxOutput)`` with ``return_aux``.

    Raises:
        AttnkitError: AK3xx, a function cannot be traced; AK4xx, an argument is wrong: AK407 also for differing heads
            without ``enable_gqa``; AK504, ``max_scores``; and as `attnkit.attention`.
    """
    check_flag("enable_gqa", enable_gqa)
    check_flag("return_lse", return_lse)
    key, value = _batches(query, key, value, block_mask)
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        given = f"{query.shape[1]} query heads and {key.shape[1]} key heads"
        raise error("AK407", where="query, key", given=given, hint="pass enable_gqa=True")
    if kernel_options is not None and not isinstance(kernel_options, Mapping):
        raise error(
            "AK402", where="kernel_options", given=type(kernel_options).__name__, allowed="a dict, or None"
        )
    score_mod, scale = _scaled(score_mod, scale)
    want_lse = _check_aux(return_aux, return_lse) or return_lse
    result = attention(
        query, key, value, score=score_mod, block_mask=block_mask, scale=scale, return_lse=want_lse
    )
    if return_aux is None:
        return result
    from torch.nn.attention.flex_attention import (
        AuxOutput,
    )  # not cheap, and loaded already: it made the request

    o, lse = result if want_lse else (result, None)
    return o, AuxOutput(lse=lse)


def _batches(query: Any, key: Any, value: Any, block_mask: Any) -> tuple[Any, Any]:
    """One set of keys and values for all queries, where a block mask tells the queries apart (paged attention)."""
    tensors = all(isinstance(t, Tensor) and t.dim() == 4 for t in (query, key, value))
    if not hasattr(block_mask, "shape") or not tensors or key.shape[0] != 1 or query.shape[0] == 1:
        return key, value
    if block_mask.shape[0] != query.shape[0] or value.shape[0] != 1:
        given = f"query {shape_of(query)}, key {shape_of(key)}, a block mask for batch {block_mask.shape[0]}"
        raise error("AK403", where="query, key, block_mask", given=given, allowed="one batch size")
    return key.expand(query.shape[0], -1, -1, -1), value.expand(query.shape[0], -1, -1, -1)


def _scaled(score_mod: Mod | None, scale: Any) -> tuple[Mod | None, float | None]:
    """A program's scale is positive; torch allows any."""
    if scale is None:
        return score_mod, None
    factor = check_number("scale", scale)
    if not math.isfinite(factor):
        raise error("AK401", where="scale", given=str(scale), allowed="a finite number, or None")
    if factor > 0:
        return score_mod, factor

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        s = s * factor
        return s if score_mod is None else score_mod(s, b, h, q_idx, kv_idx)

    return score, 1.0


def _check_aux(request: Any, return_lse: bool) -> bool:
    """Whether the log-sum-exp is requested."""
    if request is None:
        return False
    if not (hasattr(request, "lse") and hasattr(request, "max_scores")):
        raise error(
            "AK402", where="return_aux", given=type(request).__name__, allowed="an AuxRequest, or None"
        )
    if return_lse:
        raise error("AK408", where="return_lse, return_aux", given="both", allowed="one of them")
    if request.max_scores:
        given = "max_scores=True"
        raise error("AK504", where="return_aux", given=given, allowed="AuxRequest(lse=True)")
    return bool(request.lse)
