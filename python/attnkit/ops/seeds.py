"""The random numbers of a call: one int64, from which every backend makes the same bits (`attnkit.variants.dropout`)."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(dropout_p: float) -> Tensor | None:
    """The key of dropout for one call, from torch's default generator; None where nothing is dropped.

    It is drawn outside the op: a compiled graph draws a new one at every call, and recomputation, which restores the
    generator, the same one again.
    """
    return None if dropout_p == 0.0 else torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
