"""Linear additive attention (LadaGAN; the Fastformer family): one softmax over the tokens, then products.

With a learned ``w_h`` per head, tokens ``n`` of a sequence, all of one width D::

    a_n = softmax_n(w_h . q_n * D ** -0.5)         g = sum_n a_n q_n         o_n = k_n * g * v_n        (element-wise)

Every token gets the same ``g``: linear time, and not causal. With causal=True token ``n`` gets the ``g`` of the tokens
up to n, which is the scan of `aaren`. The projection after the product belongs to the layer.

Parameters: ``causal`` (False); ``scale`` (``D ** -0.5``); ``cu_seqlens`` as in `linear`.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import numpy as np

from attnkit.variants.linear import layout, sequences_of
from attnkit.variants.sequences import Array, Float64, write


class Parameters(TypedDict, total=False):
    """What picks a member of the family."""

    causal: bool
    scale: float
    cu_seqlens: Any


def program(**parameters: Unpack[Parameters]) -> tuple[str, list[Any]]:
    """The text of a member's program (not canonical) and the arrays that its buffers are. Its inputs: `inputs`."""
    tokens, buffers = layout(**parameters)
    scale = parameters.get("scale", "default")
    declared = [f"{name}: {tokens}" for name in "qkv"]
    if parameters.get("causal", False):
        declared.append("w: hd")
        lines = [
            "queries = map(q, w) { value = y }",
            f"g, lse = attend(queries, q, q, scale = {scale}) {{ mask = kv_idx <= q_idx + (kv_len - q_len) }}",
        ]
    else:
        declared.append("w: hsd")
        lines = [
            f"all, lse = attend(w, q, q, scale = {scale})",
            "g, lse1 = attend(k, all, all, scale = default)",  # one key has all the weight: every token reads it
        ]
    lines += ["o = map(k, g, v) { value = x * y * z }", "return o"]
    return write(declared, lines, buffers), buffers


def inputs(q: Array, k: Array, v: Array, w: Array, **parameters: Unpack[Parameters]) -> list[Any]:
    """The arrays that `program` takes, in its order."""
    return [q, k, v, w if parameters.get("causal", False) else w[:, None]]


def naive(q: Array, k: Array, v: Array, w: Array, **parameters: Unpack[Parameters]) -> Float64:
    """The family's equation in float64: knows nothing of the IR. ``q, k, v [B, H, S, D]``, ``w [H, D]``."""
    o = np.zeros(v.shape)
    scale = parameters.get("scale", q.shape[3] ** -0.5)
    for _, b, rows in sequences_of(q.shape[0], q.shape[2], **parameters):
        for h in range(q.shape[1]):
            queries = q[b, h, rows].astype(np.float64)
            for i in range(len(queries)):
                seen = queries[: i + 1] if parameters.get("causal", False) else queries
                logits = scale * (seen @ w[h])
                weights = np.exp(logits - logits.max())
                o[b, h, rows][i] = k[b, h, rows][i] * (weights @ seen / weights.sum()) * v[b, h, rows][i]
    return o


# Named members: name -> parameters.
CASES: dict[str, Parameters] = {"additive": {}, "additive_causal": {"causal": True}}
