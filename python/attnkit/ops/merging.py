"""``ak.merge``: attention over several stretches of keys, each with its lse, is attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import check_tensor, shape_of


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One attention of several over disjoint keys: a shared prefix, chunks, a ring of devices.

    ``lse = log sum_a exp(lse_a)``, ``o = sum_a exp(lse_a - lse) o_a`` (arXiv 2205.14135, section 3.1; in float32). A part that saw
    nothing, lse = -inf, counts for nothing, whatever its o. A sink belongs to one part alone. Gradients reach every o and lse.

    Args:
        parts: one or more ``(o, lse)`` as `attention` returns them with ``return_lse=True``: o ``[B, H, Sq, Dv]``, all of one
            shape, dtype and device; lse ``[B, H, Sq]`` in float32.

    Returns:
        ``(o, lse)`` like those of a part. Where no part saw anything o is 0 and lse -inf.

    Raises:
        AttnkitError: AK401, there are no parts; AK402, they are no pairs of tensors; AK403, AK404 or AK405, their shapes, dtypes or
            devices are not those of the first.
    """
    _check(parts)
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)  # where no part saw anything
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    o = torch.zeros((), dtype=torch.float32, device=lses.device)
    for (o_a, lse_a), weight in zip(parts, weights, strict=True):
        seen = torch.where((lse_a == -torch.inf)[..., None], 0.0, o_a.float())
        o = o + (weight / total)[..., None] * seen
    return o.to(parts[0][0].dtype), torch.where(nothing, -torch.inf, top + torch.log(total))


def _check(parts: Any) -> None:
    if not isinstance(parts, Sequence) or not all(
        isinstance(p, (tuple, list)) and len(p) == 2 for p in parts
    ):
        raise error("AK402", where="parts", given=type(parts).__name__, allowed="a list of pairs (o, lse)")
    if not parts:
        raise error("AK401", where="parts", given="no parts", allowed="one or more")
    first = parts[0][0]
    for i, (o, lse) in enumerate(parts):
        for name, t in ((f"o of part {i}", o), (f"lse of part {i}", lse)):
            check_tensor(name, t, first.device if isinstance(first, Tensor) else None)
        shape = first.shape if first.dim() == 4 else None
        if o.shape != shape:
            allowed = "[B, H, Sq, Dv]" if shape is None else f"{shape_of(first)}, as o of part 0"
            raise error("AK403", where=f"o of part {i}", given=shape_of(o), allowed=allowed)
        if lse.shape != o.shape[:3]:
            raise error(
                "AK403", where=f"lse of part {i}", given=shape_of(lse), allowed=f"{list(o.shape[:3])}"
            )
        if o.dtype != first.dtype or not o.is_floating_point():
            allowed = f"floating point, {first.dtype} as o of part 0"
            raise error("AK404", where=f"o of part {i}", given=str(o.dtype), allowed=allowed)
        if lse.dtype != torch.float32:
            raise error("AK404", where=f"lse of part {i}", given=str(lse.dtype), allowed="torch.float32")
