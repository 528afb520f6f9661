"""Mega (arXiv 2209.10655): a damped moving average of every channel, then single-head gated attention in chunks.

The average keeps n numbers per channel c; with alpha, delta in (0, 1), after `ema`::

    h_t = alpha_c * beta_c x_t + (1 - alpha_c * delta_c) * h_{t-1}          h [n]
    y_t = silu(n ** -0.5 * eta_c . h_t + omega_c x_t)

and the attention of tokens z that the layer projects from y, after `attention`::

    q_i = kappa_q * z_i + mu_q          k_j = kappa_k * z_j + mu_k          o_i = r_i * sum_j w_ij v_j
    w_ij = laplace(q_i . k_j / n_i + bias[j - i])         laplace(x) = (1 + erf((x - mu) / (sigma sqrt(2)))) / 2

over the n_i keys j that i sees: those of its chunk, up to itself if causal. ``mu = sqrt(1/2)``,
``sigma = 1 / sqrt(4 pi)``. The weights need not sum to 1. Instead of laplace: "relu2", ``max(x, 0) ** 2`` of the same
x; "softmax" of ``D ** -0.5 q_i . k_j + bias[j - i]``.

Parameters of the attention: ``weights`` "laplace" (the default), "relu2" or "softmax"; ``chunk`` int; ``causal``
(False); ``bias``, a float ``[2 m - 1]`` read at ``j - i + m - 1``, m no less than a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import numpy as np

from attnkit.variants.sequences import Array, Float64, write


class Parameters(TypedDict, total=False):
    """What picks a member of the family."""

    weights: str
    chunk: int
    causal: bool
    bias: Any


MU, STEEPNESS = math.sqrt(0.5), math.sqrt(2 * math.pi)  # 1 / (sigma sqrt(2))

# --- as programs ------------------------------------------------------------------------------------------


def ema_program(*, initial_state: bool = False) -> str:
    """The moving average; channels are heads of width 1.

    Inputs: ``x [B, C, S, 1]``; ``alpha``, ``delta``, ``beta``, ``eta`` ``[C, n]``; ``omega [C]``; if ``initial_state``,
    ``h [B, C, n, 1]``. Results: ``y [B, C, S, 1]`` and the last ``h``.
    """
    declared = ["x: bhsd", "alpha: hd", "delta: hd", "beta: hd", "eta: hd", "omega: h"]
    if initial_state:
        declared.append("initial: bhdv")
    lines = [
        "gate = map(x, alpha, delta) { value = log(1.0 - y * z) }",
        "taken = map(x, alpha, beta) { value = y * z }",
        "read = map(x, eta) { value = y }",
        "o, state, norm = recur(read, taken, x, scale = default, gate = gate{})".format(
            ", initial = initial" if initial_state else ""
        ),
        "y = map(o, x, omega) { u = x + y * z; value = u * sigmoid(u) }".replace("; ", "\n    "),
        "return y, state",
    ]
    return write(declared, lines)


def program(**parameters: Unpack[Parameters]) -> tuple[str, list[Any]]:
    """The attention: its text (not canonical) and the arrays that its buffers are.

    Inputs: ``z [B, H, S, D]``, ``v`` and ``r`` ``[B, H, S, Dv]``, ``kappa_q``, ``mu_q``, ``kappa_k``, ``mu_k`` ``[H, D]``.
    """
    weights, chunk, causal = (
        parameters.get("weights", "laplace"),
        parameters.get("chunk"),
        parameters.get("causal"),
    )
    position = "(q_idx + (kv_len - q_len))"
    start = f"{position} // {chunk} * {chunk}" if chunk else "0"
    end = f"{position} + 1" if causal else f"min({start} + {chunk}, kv_len)" if chunk else "kv_len"
    masks = [f"(kv_idx <= {position})"] * bool(causal)
    masks += [f"(kv_idx // {chunk} == {position} // {chunk})"] * bool(chunk)
    body, buffers = [f"mask = {' & '.join(masks)}"] if masks else [], []
    body.append("logit = s" if weights == "softmax" else f"logit = s / ({end} - {start})")
    if "bias" in parameters:
        buffers = [parameters["bias"]]
        body.append(f"biased = logit + b0[kv_idx - {position} + {(len(parameters['bias']) - 1) // 2}]")
    else:
        body.append("biased = logit")
    body.append(
        {
            "laplace": f"score = 0.5 * (1.0 + erf((biased - {MU}) * {STEEPNESS}))",
            "relu2": "score = max(biased, 0.0) * max(biased, 0.0)",
            "softmax": "score = biased",
        }[weights]
    )
    body.append(f"normalizer = {'softmax' if weights == 'softmax' else 'none'}")
    lines = [
        "q = map(z, kappa_q, mu_q) { value = x * y + z }",
        "k = map(z, kappa_k, mu_k) { value = x * y + z }",
        "{} = attend(q, k, v, scale = {}) {{".format(
            *(("o, lse", "default") if weights == "softmax" else ("o", "1.0"))
        ),
        *(f"  {line}" for line in body),
        "}",
        "gated = map(o, r) { value = x * y }",
        "return gated",
    ]
    declared = [
        "z: bhsd",
        "v: bhsd",
        "r: bhsd",
        *(f"{name}: hd" for name in ("kappa_q", "mu_q", "kappa_k", "mu_k")),
    ]
    return write(declared, lines, buffers), buffers


# --- as equations -----------------------------------------------------------------------------------------


def ema(
    x: Array,
    alpha: Array,
    delta: Array,
    beta: Array,
    eta: Array,
    omega: Array,
    initial_state: Array | float = 0.0,
) -> tuple[Float64, Float64]:
    """The moving average in float64, one token at a time; shapes as in `ema_program`."""
    y = np.zeros(x.shape)
    state = np.zeros((*x.shape[:2], alpha.shape[1], 1))
    state[:] = initial_state
    for b, c in np.ndindex(x.shape[:2]):
        h = state[b, c, :, 0]
        for t in range(x.shape[2]):
            now = float(x[b, c, t, 0])
            h[:] = alpha[c] * beta[c] * now + (1 - alpha[c] * delta[c]) * h
            u = alpha.shape[1] ** -0.5 * (eta[c] @ h) + omega[c] * now
            y[b, c, t, 0] = u / (1 + np.exp(-u))
    return y, state


def attention(
    z: Array, v: Array, r: Array, kappa_q: Array, mu_q: Array, kappa_k: Array, mu_k: Array,
    **parameters: Unpack[Parameters],
) -> Float64:  # fmt: skip
    """The attention in float64, one query at a time: knows nothing of the IR. Shapes as in `program`."""
    kind, chunk, bias = parameters.get("weights", "laplace"), parameters.get("chunk"), parameters.get("bias")
    length = z.shape[2]
    o = np.zeros(v.shape)
    for b, h, i in np.ndindex(z.shape[:3]):
        start, end = (i // chunk * chunk, min(i // chunk * chunk + chunk, length)) if chunk else (0, length)
        j = np.arange(start, i + 1 if parameters.get("causal", False) else end)
        x = (kappa_k[h] * z[b, h, j] + mu_k[h]) @ (kappa_q[h] * z[b, h, i] + mu_q[h]).astype(np.float64)
        x = x * z.shape[3] ** -0.5 if kind == "softmax" else x / len(j)
        if bias is not None:
            x = x + np.asarray(bias)[j - i + (len(bias) - 1) // 2]
        o[b, h, i] = r[b, h, i] * (WEIGHTS[kind](x) @ v[b, h, j])
    return o


def laplace(x: Float64) -> Float64:
    """The normal distribution function that Mega puts in the place of the softmax."""
    sigma = 1 / math.sqrt(4 * math.pi)
    return np.array([0.5 * (1 + math.erf((each - math.sqrt(0.5)) / (sigma * math.sqrt(2)))) for each in x])


def _softmax(x: Float64) -> Float64:
    weights = np.exp(x - x.max())
    normalised: Float64 = weights / weights.sum()
    return normalised


WEIGHTS: dict[str, Callable[[Float64], Float64]] = {
    "laplace": laplace,
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "softmax": _softmax,
}

# Named members of the attention: name -> parameters for (length, rng).
CASES: dict[str, Callable[[int, np.random.Generator], Parameters]] = {
    "mega": lambda n, rng: {"causal": True},
    "mega_full": lambda n, rng: {},
    "mega_chunk": lambda n, rng: {"causal": True, "chunk": 3, "bias": rng.normal(size=5)},
    "mega_chunk_full": lambda n, rng: {"chunk": 4},
    "mega_relu2": lambda n, rng: {"causal": True, "weights": "relu2", "bias": rng.normal(size=2 * n - 1)},
    "mega_softmax": lambda n, rng: {"causal": True, "weights": "softmax", "chunk": 4},
}
