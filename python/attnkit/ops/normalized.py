"""Attention whose weights are another normaliser's than softmax, where kernels have none of it: `attnkit.plan.normalizers`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attnkit.ir.text import parse
from attnkit.ops.tracing import kept
from attnkit.plan.normalizers import lower

# (q, k, v, program, buffers, params, whether lse is wanted, seed) to o and lse
Attention = Callable[..., tuple[Tensor, Tensor | None]]


@kept
def _texts(text: str) -> tuple[str, bool, str]:
    lowered = lower(parse(text))
    return lowered.sums.text, lowered.swapped, lowered.weights.text


def attend_in_two(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, text: str, buffers: list[Tensor], params: list[float], seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``o``, and the lse of the sums of a normaliser that splits over keys. ``attend`` runs one.

    Raises:
        AttnkitError: AK502, the program is more than kernels have.
    """
    sums, swapped, weights = _texts(text)
    rows, columns = (k, q) if swapped else (q, k)
    if swapped and q.shape[1] != k.shape[1]:  # each query head has sums of its own
        rows = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    nothing = columns.new_zeros(()).expand(*columns.shape[:3], 1)
    _, lse = attend(rows, columns, nothing, sums, buffers, params, True, None)
    assert lse is not None
    finite = lse.masked_fill(lse == -float("inf"), 0.0)  # of what sees nothing
    o, _ = attend(q, k, v, weights, [*buffers, finite], params, False, seed)
    return o, None if swapped else lse
