"""Single pairs chosen by a connectivity of low rank (Sparsifiner, arXiv 2303.13755), as a mask: a selection first, then attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import MaskFunction, causal as causal_mask
from attnkit.ir.text import parse
from attnkit.ops.block_choice import Operands, choose
from attnkit.ops.check import check_count, check_flag, check_number, check_tensor, shape_of
from attnkit.ops.tracing import kept
from attnkit.variants.sequences import CAUSAL


@dataclass(frozen=True, eq=False)
class Sparsifiner:
    """See `sparsifiner`."""

    low: Tensor
    up: Tensor
    rule: str
    causal: bool

    def over(self, operands: Operands) -> MaskFunction:
        """See `attnkit.ops.block_choice.Choice`.

        Raises:
            AttnkitError: AK403, low or up are not of these queries or keys; AK408, keys of their own lengths.
        """
        if operands.kv_lens is not None:
            raise error(
                "AK408", where="select", given="keys of their own lengths", allowed="all keys of the tensor"
            )
        rank = self.low.shape[-1:]
        for name, t, of in (("low", self.low, operands.q), ("up", self.up, operands.k)):
            if t.shape != of.shape[:3] + rank:
                allowed = f"[{', '.join(map(str, of.shape[:3]))}, r], one r for both"
                raise error("AK403", where=name, given=shape_of(t), allowed=allowed)
        chosen = choose(self.low, self.up, _text(self.rule, self.causal), [], operands.backend)
        of_key = chosen.mT.contiguous()  # the queries of a tile are read one after the other
        visible = causal_mask() if self.causal else None

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            seen = of_key[b, h, kv_idx, q_idx]
            return seen if visible is None else seen & visible(b, h, q_idx, kv_idx)

        return mask


def sparsifiner(
    low: Tensor, up: Tensor, *, top_k: int | None = None, threshold: float | None = None, causal: bool = False
) -> Sparsifiner:
    """For ``ak.attention(select=)``: each query sees the keys of largest ``low_i . up_j``, with the logits q and k give them.

    Which pairs exist takes a byte of memory for each: this is for images, not for long texts. Ties go to the first
    key, NaN comes last. No gradient passes through the choice: low and up are learned by a loss of their own.

    Args:
        low: ``[B, Hq, Sq, r]``, what queries look for, of a low rank r; float32, bfloat16 or float16.
        up: ``[B, Hkv, Skv, r]``, what keys offer, in the same dtype.
        top_k: so many keys for each query, all if there are fewer; this or threshold.
        threshold: the keys with more than so much.
        causal: only keys up to the query's own place, bottom-right aligned.

    Raises:
        AttnkitError: AK401, AK402 or AK404, a number, a tensor or its dtype is none of what is allowed; AK408, both rules or none.
    """
    for name, t in (("low", low), ("up", up)):
        check_tensor(name, t)
        if t.dtype != low.dtype or not t.is_floating_point():
            allowed = "float32, bfloat16 or float16, the same for low and up"
            raise error("AK404", where=name, given=str(t.dtype), allowed=allowed)
    if (top_k is None) == (threshold is None):
        given = "neither" if top_k is None else "both"
        raise error("AK408", where="top_k, threshold", given=given, allowed="one of them")
    check_flag("causal", causal)
    if threshold is None:
        check_count("top_k", top_k, 1, 2**31 - 1)
        return Sparsifiner(low, up, f"top_k = {top_k}", causal)
    number = check_number("threshold", threshold)
    if not math.isfinite(number):
        raise error("AK401", where="threshold", given=str(number), allowed="a finite number")
    return Sparsifiner(low, up, f"threshold = {number!r}", causal)


@kept
def _text(rule: str, causal: bool) -> str:
    lines = [
        "attnkit 1",
        "program (q: bhsd, k: bhsd) {",
        f"chosen = select(q, k, scale = 1.0, {rule})" + (f" {{ mask = {CAUSAL} }}" if causal else ""),
        "return chosen",
        "}",
    ]
    return parse("\n".join(lines)).text
