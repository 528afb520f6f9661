"""Programs of several attentions: the difference of two, and reading, thinking and writing over latents.

Differential attention (arXiv 2410.05258), two maps over one set of values, and the head's own RMS norm::

    d_i = (softmax(scale q1 k1^T) - lambda softmax(scale q2 k2^T))_i v
    o_i = (1 - lambda_init) * d_i / sqrt(mean(d_i ** 2)) * gain          left out in the second version

with ``lambda = exp(a1 . b1) - exp(a2 . b2) + lambda_init`` of learned vectors and ``lambda_init = 0.8 - 0.6 exp(-0.3
(layer - 1))``. Lambda is the run-time scalar p0. The norm has no epsilon: a row that sees nothing is 0 / 0.

Perceiver, and the RIN block: M latents read N tokens, attend to themselves, and the tokens read the latents back;
none of the three is causal::

    z' = attention(z, x, x)      z'' = attention(z', z', z')      x' = attention(x, z'', z'')
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnkit.variants import dense
from attnkit.variants.sequences import CAUSAL, Array, Float64, write


def differential_program(causal: bool = False, norm: tuple[float, int] | None = None) -> str:
    """Inputs q, k, q1, k1, v; param lambda. ``norm = (lambda_init, Dv)`` adds the norm and the input gain ``[Hq, Dv]``."""
    body = f"mask = {CAUSAL}  normalizer = softmax" if causal else "normalizer = softmax"
    inputs = ["q: bhsd", "k: bhsd", "q1: bhsd", "k1: bhsd", "v: bhsd"]
    lines = []
    for o, q, k in (("o", "q", "k"), ("o1", "q1", "k1")):
        lines.append(f"{o} = attend({q}, {k}, v, scale = default, outputs = (o)) {{ {body} }}")
    lines.append("d = map(o, o1) { value = x - p0 * y }")
    if norm is None:
        return write(inputs, [*lines, "return d"], params=1)
    start, v_head_dim = norm
    # rows of length 1 have an rms of 1 / sqrt(Dv)
    lines.append(f"n = map(d, gain, norm = l2) {{ value = {(1 - start) * math.sqrt(v_head_dim)!r} * x * y }}")
    return write([*inputs, "gain: hd"], [*lines, "return n"], params=1)


def differential(
    q: Array, k: Array, q1: Array, k1: Array, v: Array, lambda_: float, *, causal: bool = False,
    gain: Array | None = None, lambda_init: float = 0.0,
) -> Float64:  # fmt: skip
    """The equation in float64 ``[B, Hq, Sq, Dv]``; with ``gain [Hq, Dv]`` the norm is applied."""
    d = dense.naive(q, k, v, causal=causal)[0] - lambda_ * dense.naive(q1, k1, v, causal=causal)[0]
    if gain is None:
        return d
    rms = np.sqrt(np.mean(d**2, axis=3, keepdims=True))
    o: Float64 = (1 - lambda_init) * d / rms * gain[None, :, None, :]
    return o


def lambda_init(layer: int) -> float:
    """What lambda starts from in the layer of that number, the first being 1."""
    return 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))


def learned_lambda(a1: Array, b1: Array, a2: Array, b2: Array, start: float) -> float:
    """``exp(a1 . b1) - exp(a2 . b2) + start``, computed outside the program."""
    return float(np.exp(a1 @ b1) - np.exp(a2 @ b2) + start)


PERCEIVER = write(
    ["latents: bhsd", "tokens: bhsd"],
    [
        "read = attend(latents, tokens, tokens, scale = default, outputs = (o)) { normalizer = softmax }",
        "thought = attend(read, read, read, scale = default, outputs = (o)) { normalizer = softmax }",
        "written = attend(tokens, thought, thought, scale = default, outputs = (o)) { normalizer = softmax }",
        "return thought, written",
    ],
)


def perceiver(z: Array, x: Array) -> tuple[Float64, Float64]:
    """Latents ``[B, H, M, D]`` and tokens ``[B, H, N, D]`` after one block."""
    z = dense.naive(z, x, x)[0]
    z = dense.naive(z, z, z)[0]
    return z, dense.naive(x, z, z)[0]


Case = dict[str, Any]
CASES: dict[str, Case] = {
    "differential": {"lambda_": 0.3},
    "differential_causal": {"lambda_": 0.3, "causal": True},
    "differential_norm": {"lambda_": 0.5, "causal": True, "lambda_init": lambda_init(2)},
}
