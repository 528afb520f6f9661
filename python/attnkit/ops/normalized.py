"""Attention that no kernel has as attentions that kernels have: `attnkit.plan.normalizers`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnkit.ir.text import parse
from attnkit.ops.registry import attend
from attnkit.ops.tracing import kept
from attnkit.plan.normalizers import lower, read

# (q, k, v, program, buffers, params, whether lse is wanted, seed) to o and lse
Attention = Callable[..., tuple[Tensor, Tensor | None]]


@kept
def _two(text: str) -> tuple[str, bool, str]:
    lowered = lower(parse(text))
    return lowered.sums.text, lowered.swapped, lowered.weights.text


@kept
def _one(text: str, what: str) -> tuple[str, bool]:
    program, swapped = read(parse(text), what)
    return program.text, swapped


def attend_in_two(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, text: str, buffers: list[Tensor], params: list[float], seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``o``, and the lse of the sums of a normaliser that splits over keys. ``attend`` runs one attention.

    Raises:
        AttnkitError: AK502, the program is more than kernels have.
    """
    sums, swapped, weights = _two(text)
    rows, columns = _in_places(q, k, swapped=swapped)
    _, lse = attend(rows, columns, _values(columns), sums, buffers, params, True, None)
    assert lse is not None
    o, _ = attend(q, k, v, weights, [*buffers, _finite(lse)], params, False, seed)
    return o, None if swapped else lse


def read_with_gradients(
    q: Tensor, k: Tensor, lse: Tensor, text: str, buffers: list[Tensor], params: list[float], what: str
) -> Tensor:
    """``column_sum [B, Hq, Skv]`` or ``entropy [B, Hq, Sq]`` of an attention, float32, with its gradients.

    Raises:
        AttnkitError: AK502, the program is more than kernels have.
    """
    program, swapped = _one(text, what)
    rows, columns = _in_places(q.float(), k.float(), swapped=swapped)
    found, _ = attend(rows, columns, _values(columns), program, [*buffers, _finite(lse)], params, False)
    return found.squeeze(-1)


def _in_places(q: Tensor, k: Tensor, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys; or, of each query head by itself, the other way round."""
    return (k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), q) if swapped else (q, k)


def _values(keys: Tensor) -> Tensor:
    return keys.new_ones(()).expand(*keys.shape[:3], 1)


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == -torch.inf, 0.0, lse)  # of what sees nothing
