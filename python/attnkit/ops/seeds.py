"""The random numbers of a call: one int64, from which every backend makes the same bits (`attnkit.variants.dropout`)."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(dropout_p: float, like: Tensor) -> Tensor | None:
    """The key of dropout for one call, from the default generator of a tensor's device; None where nothing is dropped.

    It is drawn outside the op: a compiled graph draws a new one at every call, and recomputation, which restores the
    generator, the same one again.
    """
    if dropout_p == 0.0:
        return None
    device = like.device if like.is_cuda else "cpu"
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
