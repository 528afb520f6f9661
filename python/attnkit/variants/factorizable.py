"""The factorizable family: attention by a polynomial of the dot product, in time linear in the number of tokens.

With ``q^, k^`` after `qk_norm`, ``x_ij = q^_i . k^_j / temperature`` and ``f(x) = a0 + a1 x + a2 x^2``::

    o_i = sum_j f(x_ij) v_j / (g_i + epsilon)        g_i = sum_j f(x_ij)        j <= i if causal, else every j

Because ``f`` is a polynomial, the sums factor into moments of the keys, and the moments are the state::

    M = sum_j phi(k_j) v_j^T,  z = sum_j phi(k_j),  phi(k) = (1, k, k (x) k)     [F, Dv], [F]; F = 1 + D + D^2
    sum_j f(x_ij) v_j = a0 M_0 + a1 M_1^T q + a2 M_2^T (q (x) q)  with q = q_i / temperature,  and g_i of z

With order 1 the last part is missing, of phi too, and F = 1 + D.

Parameters (the keywords of every function here), each left out where it is not wanted: ``order`` 1 or 2 (2), or its
``coefficients``, (a0, a1) or (a0, a1, a2), instead of the Taylor series of the exponential, (1, 1, 1/2); ``qk_norm``
"none", "l2" (the default) or "layer"; ``temperature`` (1); ``epsilon`` (0); ``causal`` (False); ``initial_state``, the
pair of M and z to start with; ``cu_seqlens`` as in `linear`. What is to be divided by 0 is 0.

`naive` also knows the three normalisations of the published code that divide by the longest token of the sequence:
"seqmax_token" after taking the token's mean over channels away, "seqmax_channel" after taking the sequence's mean
token away, "seqmax" after nothing. Every output then depends on every token: they are here for comparison, not causal,
not streamable, and no programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, TypedDict, Unpack

import numpy as np

from attnkit.errors import error
from attnkit.variants.linear import Results, features, layout, normed, quotient, sequences_of
from attnkit.variants.sequences import Array, Float64, write


class Parameters(TypedDict, total=False):
    """What picks a member of the family; nothing given is full attention of order 2, tokens of length 1."""

    order: int
    coefficients: tuple[float, ...]
    qk_norm: str
    temperature: float
    epsilon: float
    causal: bool
    initial_state: tuple[Any, Any]
    cu_seqlens: Any


def coefficients_of(parameters: Parameters) -> tuple[float, ...]:
    """(a0, a1) or (a0, a1, a2)."""
    return parameters.get("coefficients", (1.0, 1.0, 0.5)[: parameters.get("order", 2) + 1])


# --- as programs ------------------------------------------------------------------------------------------


def program(**parameters: Unpack[Parameters]) -> tuple[str, list[Any]]:
    """The text of a member's program (not canonical) and the arrays that its buffers are. Its inputs: `inputs`.

    Raises:
        AttnkitError: AK401 if `qk_norm` looks at the whole sequence.
    """
    norm = parameters.get("qk_norm", "l2")
    if norm.startswith("seqmax"):
        raise error(
            "AK401", what="every output would depend on every token", where="qk_norm", given=norm,
            allowed="none, l2, layer",
        )  # fmt: skip
    tokens, buffers = layout(**parameters)
    declared = [f"{name}: {tokens}" for name in "qkv"]
    q, k, lines = features(norm, "identity")
    attributes = [
        f"scale = {1 / parameters.get('temperature', 1.0)}",
        f"coefficients = ({', '.join(str(float(a)) for a in coefficients_of(parameters))})",
        "normalize = true",
        f"epsilon = {float(parameters.get('epsilon', 0.0))}",
        f"causal = {parameters.get('causal', False)}".lower(),
    ]
    if "initial_state" in parameters:
        declared += ["initial: bhdv", "initial_norm: bhd"]
        attributes += ["initial = initial", "initial_norm = initial_norm"]
    lines += [f"o, state, norm = recur({q}, {k}, v, {', '.join(attributes)})", "return o, state, norm"]
    return write(declared, lines, buffers), buffers


def inputs(q: Array, k: Array, v: Array, **parameters: Unpack[Parameters]) -> list[Any]:
    """The arrays that `program` takes, in its order: q, k, v, and the state to start with."""
    return [q, k, v, *parameters.get("initial_state", ())]


# --- as equations -----------------------------------------------------------------------------------------


def naive(q: Array, k: Array, v: Array, **parameters: Unpack[Parameters]) -> Results:
    """The family's equation in float64, from all weights of a query: knows nothing of the IR.

    ``q [B, Hq, S, D]``, ``k [B, Hkv, S, D]``, ``v [B, Hkv, S, Dv]``; the state has Hkv heads.
    """
    coefficients = coefficients_of(parameters)
    results, heads = _heads(q, k, v, parameters)
    for x in heads:
        for g, i in np.ndindex(x.q.shape[:2]):
            seen = slice(i + 1) if parameters.get("causal", False) else slice(None)
            f = polynomial(coefficients, x.k[seen] @ x.q[g, i])
            before = phi(x.q[g, i], coefficients)
            total = f.sum() + before @ x.norm + parameters.get("epsilon", 0.0)
            x.o[g, i] = quotient(f @ x.v[seen] + before @ x.state, total)
        for key, value in zip(x.k, x.v, strict=True):
            x.state += np.outer(phi(key, ones(coefficients)), value)
            x.norm += phi(key, ones(coefficients))
    return results


def moments(
    q: Array,
    k: Array,
    v: Array,
    *,
    chunk_size: int = 64,
    packed: bool = False,
    **parameters: Unpack[Parameters],
) -> Float64:
    """``o`` in chunks: within one the weights, before it the moments. ``chunk_size`` 1 is the recurrence.

    ``packed`` keeps the half of ``k (x) k`` that is not twice there: ``1 + D + D (D + 1) / 2`` features.
    """
    coefficients, dim = coefficients_of(parameters), q.shape[3]
    causal, epsilon = parameters.get("causal", False), parameters.get("epsilon", 0.0)
    kept = phi(np.ones(dim), ones(coefficients)) > 0
    twice = np.ones(len(kept))
    if packed and len(coefficients) == 3:
        kept[1 + dim :] = np.tri(dim, dtype=bool).T.ravel()
        twice[1 + dim :] = 2 - np.eye(dim).ravel()
    results, heads = _heads(q, k, v, parameters)
    for x in heads:
        written = np.array([phi(key, ones(coefficients))[kept] for key in x.k]).reshape(len(x.k), kept.sum())
        values = np.hstack([x.v, np.ones((len(x.v), 1))])  # the channel of ones becomes the normaliser
        carried = np.hstack([x.state, x.norm[:, None]])[kept]
        if not causal:
            carried = carried + written.T @ values
        for start in range(0, len(x.k), chunk_size):
            chunk = slice(start, start + chunk_size)
            for g, queries in enumerate(x.q[:, chunk]):
                total = np.array([(phi(query, coefficients) * twice)[kept] for query in queries]) @ carried
                if causal:
                    total += np.tril(polynomial(coefficients, queries @ x.k[chunk].T)) @ values[chunk]
                x.o[g, chunk] = quotient(total[:, :-1], total[:, -1:] + epsilon)
            if causal:
                carried = carried + written[chunk].T @ values[chunk]
    return results.o


def polynomial(coefficients: tuple[float, ...], x: Float64) -> Float64:
    """``a0 + a1 x + a2 x^2``."""
    total: Float64 = sum((a * x**power for power, a in enumerate(coefficients)), np.zeros(x.shape))
    return total


def phi(x: Float64, coefficients: tuple[float, ...]) -> Float64:
    """``(1, x, x (x) x)``, each part times its coefficient, as many as there are: ``[F]``."""
    parts = [np.ones(1), x, np.outer(x, x).ravel()]
    return np.concatenate([a * part for a, part in zip(coefficients, parts, strict=False)])


def ones(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """As many ones."""
    return (1.0,) * len(coefficients)


@dataclass
class _Head:
    """One state of one sequence: its queries ``q [G, S, D]``, over the temperature, and where ``o [G, S, Dv]`` goes.

    ``state`` and ``norm`` hold what there is to start with, and take what there is at the end.
    """

    q: Float64
    k: Float64
    v: Float64
    o: Float64
    state: Float64
    norm: Float64


def _heads(q: Array, k: Array, v: Array, parameters: Parameters) -> tuple[Results, list[_Head]]:
    """Every state of every sequence, and the results that they write to."""
    batch, q_heads, length, dim = q.shape
    states, size = k.shape[1], sum(dim**i for i in range(len(coefficients_of(parameters))))
    sequences = list(sequences_of(batch, length, **parameters))
    results = Results(
        np.zeros((batch, q_heads, length, v.shape[3])),
        np.zeros((len(sequences), states, size, v.shape[3])),
        np.zeros((len(sequences), states, size)),
    )
    results.state[:], results.norm[:] = parameters.get("initial_state", (0.0, 0.0))
    norm, group = parameters.get("qk_norm", "l2"), q_heads // states
    heads = []
    for (n, b, rows), h in product(sequences, range(states)):
        share = slice(h * group, (h + 1) * group)
        heads.append(
            _Head(
                q=_normed(q[b, share, rows].astype(np.float64), norm) / parameters.get("temperature", 1.0),
                k=_normed(k[b, h, rows].astype(np.float64), norm),
                v=v[b, h, rows].astype(np.float64),
                o=results.o[b, share, rows],
                state=results.state[n, h],
                norm=results.norm[n, h],
            )
        )
    return results, heads


def _normed(x: Float64, norm: str) -> Float64:
    """The tokens ``[..., S, D]`` of one head of one sequence."""
    if not norm.startswith("seqmax"):
        return normed(x, norm)
    axis = {"seqmax_token": -1, "seqmax_channel": -2}.get(norm)
    centred = x if axis is None else x - x.mean(axis=axis, keepdims=True)
    longest = np.linalg.norm(centred, axis=-1, keepdims=True).max(axis=-2, keepdims=True, initial=0)
    scaled: Float64 = centred / np.where(longest == 0, 1, longest)
    return scaled


# --- by name ----------------------------------------------------------------------------------------------

# Named members: name -> parameters for a head_dim; the last two as flash-linear-attention has them.
CASES: dict[str, Callable[[int], Parameters]] = {
    "fastmax1": lambda d: {"order": 1, "temperature": 2.0, "causal": True},
    "fastmax2": lambda d: {"order": 2, "causal": True},
    "fastmax2_full": lambda d: {"order": 2},
    "fastmax2_layer": lambda d: {"qk_norm": "layer", "temperature": float(d), "causal": True},
    "based": lambda d: {"qk_norm": "none", "temperature": d**0.5, "epsilon": 1e-6, "causal": True},
    "rebased": lambda d: {
        "qk_norm": "none", "temperature": d**0.5, "coefficients": (0.0, 0.0, 1.0), "epsilon": 1e-5, "causal": True},
}  # fmt: skip
