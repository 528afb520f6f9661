"""``ak.block_sparse_attention``: softmax attention over the blocks of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import causal as causal_mask
from attnkit.ops.check import check_flag
from attnkit.ops.functional import attention


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Any,
    *,
    causal: bool = False,
    score: Callable[..., Any] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of a block mask: blocks that are empty are never read, full ones run without a mask.

    Args:
        q: ``[B, Hq, Sq, D]``, as in `attention`, like score, scale and return_lse.
        k: ``[B, Hkv, Skv, D]``.
        v: ``[B, Hkv, Skv, Dv]``.
        block_mask: an `ak.BlockMask` (of a mask function `ak.block_mask`, of a boolean map `ak.BlockMask.from_dense`, of
            block-CSR `ak.BlockMask.from_bcsr`) or torch's flex BlockMask, built for the lengths, batch and heads of this call.
            Patterns: docs/variants/block_sparse.md.
        causal: inside the blocks leave only the pairs with ``kv_idx <= q_idx + Skv - Sq``.
        score: see q.
        scale: see q.
        return_lse: see q.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype, or ``(o, lse)``. A query whose blocks are all empty has ``o = 0``, ``lse = -inf``.

    Raises:
        AttnkitError: as `attention`; AK402, block_mask is no block mask; AK409, AK410, it was built for other sizes.
    """
    check_flag("causal", causal)
    if block_mask is None:
        raise error("AK402", where="block_mask", given="None", allowed="a block mask",
                    hint="ak.dense_attention sees all blocks")  # fmt: skip
    return attention(
        q, k, v, score=score, mask=causal_mask() if causal else None, block_mask=block_mask, scale=scale, return_lse=return_lse
    )  # fmt: skip
