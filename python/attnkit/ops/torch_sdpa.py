"""torch's own attention op, reached past our override of it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten.scaled_dot_product_attention.default


class _Local(threading.local):
    bypassed = False


_local = _Local()


def bypassed() -> bool:
    """Whether the call now in this thread is on its way to torch's own implementation."""
    return _local.bypassed


def forget_dispatch() -> None:
    """Let torch's Python dispatcher look the op's kernels up again; it remembers them from call to call."""
    _aten._dispatch_cache.clear()


def decompose(*args: Any, **kwargs: Any) -> Tensor:
    """torch's implementation of the op with these arguments."""
    return _aten.decompose(*args, **kwargs)  # type: ignore[no-any-return]


def call(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """``F.scaled_dot_product_attention`` without a mask or dropout, computed by torch even while installed."""
    previous = _local.bypassed
    try:
        _local.bypassed = True
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    finally:
        _local.bypassed = previous
