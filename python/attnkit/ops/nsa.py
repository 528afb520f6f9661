"""Native sparse attention (arXiv 2502.11089): three attentions, mixed by gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import causal, window
from attnkit.ir.text import parse
from attnkit.ops.block_choice import choose
from attnkit.ops.check import check_count, check_qkv, shape_of
from attnkit.ops.functional import attention
from attnkit.variants.block_select import nsa_program


def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, *, block: int, top_k: int, left: int,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention over the means of blocks that have ended, over chosen blocks, and over a window: ``sum of g * o``.

    With ``p = q_idx + Skv - Sq``. Chosen are the ``top_k`` blocks of largest weight in the first attention, that being the mean
    over the query heads that share a kv head, and in any case the first block, the own, and the one before. The first
    attention carries gradients to q, k and v; the choice carries none.

    Args:
        q: ``[B, Hq, Sq, D]``.
        k: ``[B, Hkv, Skv, D]``; Hq is a multiple of Hkv.
        v: ``[B, Hkv, Skv, Dv]``.
        g_cmp: ``[B, Hq, Sq]``, the gate of the means.
        g_slc: the same of the chosen blocks.
        g_swa: the same of the window ``p - left <= kv_idx <= p``.
        block: keys in a block.
        top_k: how many blocks are chosen, at least 0.
        left: how far the window reaches back.
        scale: finite and positive; None is ``D ** -0.5``.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype.

    Raises:
        AttnkitError: as `attnkit.attention`; AK401, AK402, AK403, a number or a gate is wrong.
    """
    check_qkv(q, k, v)
    for name, gate in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_swa", g_swa)):
        if gate.shape != q.shape[:3]:
            raise error("AK403", where=name, given=shape_of(gate), allowed=shape_of(q[..., 0]))
    for name, value, least in (("block", block, 1), ("top_k", top_k, 0), ("left", left, 0)):
        check_count(name, value, least)
    past, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    ended = k.shape[2] // block
    text = _choice_text(block, top_k, left, scale)
    chosen = choose(q, k, text, [torch.full((q.shape[0],), past, dtype=torch.int32)], "auto").mT.contiguous()

    def is_chosen(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return chosen[b, h // group, kv_idx // block, q_idx]

    k_cmp, v_cmp = (
        x[:, :, : ended * block].reshape(*x.shape[:2], ended, block, x.shape[3]).mean(3) for x in (k, v)
    )
    compressed = attention(
        q, k_cmp, v_cmp, mask=lambda b, h, i, j: j < (i + (past + 1)) // block, scale=scale
    )
    selected = attention(q, k, v, mask=causal() & is_chosen, scale=scale)
    near = attention(q, k, v, mask=window(left, 0), scale=scale)
    gated = ((g_cmp, compressed), (g_slc, selected), (g_swa, near))
    return sum(g[..., None].to(q.dtype) * o for g, o in gated)  # type: ignore[misc, return-value]


def _choice_text(block: int, top_k: int, left: int, scale: float | None) -> str:
    """The selection of `nsa_program`, by itself."""
    text, _ = nsa_program(
        block=block, top_k=top_k, left=left, scale=scale, past=torch.zeros(1, dtype=torch.int32)
    )
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("chosen ="))
    body = lines[first : lines.index("}", first) + 1]
    pooled = f"k_cmp = pool(k, size = {block}, how = mean)"
    return parse(
        "\n".join(
            [
                "attnkit 1",
                "program (q: bhsd, k: bhsd) buffers(b0: i32[1]) {",
                pooled,
                *body,
                "return chosen",
                "}",
            ]
        )
    ).text
