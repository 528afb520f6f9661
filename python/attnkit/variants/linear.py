"""The linear family: a state per head that every token decays, corrects and writes to, and then reads.

With ``q, k`` after `qk_norm` and `feature_map`, for every sequence and head, from ``S = initial_state`` or zero::

    S_t = A_t S_{t-1} + kappa_t v_t^T              S [D, Dv]
    o_t = S_t^T (scale * q_t)

    A_t = exp(gate_t)                              kappa_t = k_t             a gate is a number, or one per channel
    A_t = (I - beta_t k_t k_t^T) exp(gate_t)       kappa_t = beta_t k_t      with beta: the delta rule, after the decay
    o_t = (S_{t-1} + (bonus * k_t) v_t^T)^T (scale * q_t)                    with bonus: read before decay and write
    o_t = o_t / (scale * q_t . z_t + epsilon)                                with normalize: z is S for a value of 1
    o_t = S_T^T (scale * q_t)                                                with causal=False

Parameters (the keywords of every function here), each left out where it is not wanted: ``feature_map`` "identity" or
"elu1" (elu + 1); ``qk_norm`` "none", "l2" or "layer", before the feature map; ``scale`` (``D ** -0.5``);
``normalize`` bool; ``epsilon`` (0); ``causal`` (True); and the arrays ``gate`` ``[H]``, ``[B, H, S]`` or
``[B, H, S, D]``, a natural logarithm <= 0; ``beta`` ``[B, H, S]``; ``bonus`` ``[H, D]``; ``initial_state``
``[B, H, D, Dv]``, or a pair of that and the z to start with, ``[B, H, D]``; ``cu_seqlens`` ``[N + 1]`` for packed
batches. States are one per sequence: their B is N where tokens are packed.

H, the heads of the state, are v's. Consecutive query heads share a state; consecutive states share a key, and a query
where there are fewer of them. What is to be divided by 0 is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from attnkit.variants.sequences import Array, Float64, write


class Parameters(TypedDict, total=False):
    """What picks a member of the family; nothing given is causal attention by the bare dot product."""

    feature_map: str
    qk_norm: str
    scale: float
    normalize: bool
    epsilon: float
    causal: bool
    gate: Any
    beta: Any
    bonus: Any
    initial_state: Any
    cu_seqlens: Any


class Results(NamedTuple):
    """``o [B, max(Hq, H), S, Dv]``; the last state ``[B, H, D, Dv]``, and ``[B, H, D]`` the same for a value of 1."""

    o: Float64
    state: Float64
    norm: Float64


# --- as programs ------------------------------------------------------------------------------------------

FEATURE_MAPS = {"identity": "x", "elu1": "max(x, 0.0) + exp(min(x, 0.0))"}


def program(**parameters: Unpack[Parameters]) -> tuple[str, list[Any]]:
    """The text of a member's program (not canonical) and the arrays that its buffers are. Its inputs: `inputs`."""
    tokens, buffers = layout(**parameters)
    arrays = _arrays(parameters, tokens)
    declared = [f"{name}: {tokens}" for name in "qkv"] + [
        f"{name}: {kind}" for name, (kind, _) in arrays.items()
    ]
    q, k, lines = features(parameters.get("qk_norm", "none"), parameters.get("feature_map", "identity"))
    attributes = [f"scale = {parameters.get('scale', 'default')}", *(f"{name} = {name}" for name in arrays)]
    plain = {name: parameters.get(name) for name in ("normalize", "epsilon", "causal")}
    attributes += [f"{name} = {value}".lower() for name, value in plain.items() if value is not None]
    lines.append(f"o, state, norm = recur({q}, {k}, v, {', '.join(attributes)})")
    lines.append("return o, state, norm" if parameters.get("normalize") else "return o, state")
    return write(declared, lines, buffers), buffers


def inputs(q: Array, k: Array, v: Array, **parameters: Unpack[Parameters]) -> list[Any]:
    """The arrays that `program` takes, in its order: q, k, v, and those among the parameters."""
    return [q, k, v, *(array for _, array in _arrays(parameters, "").values())]


def layout(**parameters: Any) -> tuple[str, list[Any]]:
    """The layout of the tokens, and the buffers of the program: the lengths that the layout names, if any."""
    return ("packed[b0]", [parameters["cu_seqlens"]]) if "cu_seqlens" in parameters else ("bhsd", [])


def features(qk_norm: str, feature_map: str) -> tuple[str, str, list[str]]:
    """The names of the queries and keys that the recurrence reads, and the lines that make them of q and k."""
    if (qk_norm, feature_map) == ("none", "identity"):
        return "q", "k", []
    line = "{0}_mapped = map({0}, norm = {1}) {{ value = {2} }}"
    return "q_mapped", "k_mapped", [line.format(name, qk_norm, FEATURE_MAPS[feature_map]) for name in "qk"]


def _arrays(parameters: Parameters, tokens: str) -> dict[str, tuple[str, Any]]:
    """What the recurrence is given beside tokens: attribute -> (layout, array)."""
    gate, initial = parameters.get("gate"), parameters.get("initial_state")
    initial, initial_norm = initial if isinstance(initial, tuple) else (initial, None)
    arrays = {
        "gate": ("" if gate is None else {1: "h", 3: "bhs", 4: tokens}[gate.ndim], gate),
        "beta": ("bhs", parameters.get("beta")),
        "bonus": ("hd", parameters.get("bonus")),
        "initial": ("bhdv", initial),
        "initial_norm": ("bhd", initial_norm),
    }
    return {name: given for name, given in arrays.items() if given[1] is not None}


# --- as equations -----------------------------------------------------------------------------------------


def naive(q: Array, k: Array, v: Array, **parameters: Unpack[Parameters]) -> Results:
    """The family's equation in float64, one token at a time: knows nothing of the IR.

    ``q [B, Hq, S, D]``, ``k [B, Hk, S, D]``, ``v [B, Hv, S, Dv]``.
    """
    results, heads = _heads(q, k, v, parameters)
    for x in heads:
        state, norm = x.state.copy(), x.norm.copy()
        for t in range(len(x.k)):
            key, value, beta = x.k[t], x.v[t], x.beta[t]
            if x.bonus is not None:
                x.read(t, state + np.outer(x.bonus * key, value), norm + x.bonus * key)
            decay = np.exp(x.gate[t])
            state, norm = decay[:, None] * state, decay * norm
            if x.delta:
                state, norm = state - beta * np.outer(key, key @ state), norm - beta * key * (key @ norm)
            state, norm = state + beta * np.outer(key, value), norm + beta * key
            if x.bonus is None:
                x.read(t, state, norm)
        if not parameters.get("causal", True):
            for t in range(len(x.k)):
                x.read(t, state, norm)
        x.state[:], x.norm[:] = state, norm
    return results


def chunked(
    q: Array, k: Array, v: Array, *, chunk_size: int = 64, **parameters: Unpack[Parameters]
) -> Results:
    """The same in chunks: within one a matrix of decayed products, between them the state. Causal, finite gates.

    With ``b`` the running sum of the gates in a chunk, and in products over channels ``exp(b_r - b_s)`` for rows
    ``s <= r``::

        T = (I + tril(beta K K^T, -1))^-1,  U = T (beta V) - T (beta exp(b) K) S      (without beta, U = V)
        O = (Q exp(b)) S + tril(Q K^T) U,   S' = exp(b_end) S + (K exp(b_end - b))^T U

    A value of 1 rides along as one more channel: its state is the normaliser's.
    """
    results, heads = _heads(q, k, v, parameters)
    for x in heads:
        values = np.hstack([x.v, np.ones((len(x.v), 1))])
        state = np.hstack([x.state, x.norm[:, None]])
        for start in range(0, len(x.k), chunk_size):
            chunk = slice(start, start + chunk_size)
            keys, gates, beta, written = x.k[chunk], x.gate[chunk], x.beta[chunk, None], values[chunk]
            b = np.cumsum(gates, axis=0)
            if x.delta:
                inverse = np.linalg.inv(np.eye(len(keys)) + beta * _products(keys, keys, b, b, -1))
                written = inverse @ (beta * written) - inverse @ (beta * np.exp(b) * keys) @ state
            for g, queries in enumerate(x.q[:, chunk]):
                if x.bonus is None:
                    o = (queries * np.exp(b)) @ state + _products(queries, keys, b, b, 0) @ written
                else:  # what is read before the decay lags by one gate
                    own = np.sum(queries * x.bonus * keys, axis=1, keepdims=True) * written
                    o = (
                        (queries * np.exp(b - gates)) @ state
                        + _products(queries, keys, b - gates, b, -1) @ written
                        + own
                    )
                x.o[g, chunk] = quotient(o[:, :-1], o[:, -1:] + x.epsilon) if x.normalize else o[:, :-1]
            state = np.exp(b[-1])[:, None] * state + (keys * np.exp(b[-1] - b)).T @ written
        x.state[:], x.norm[:] = state[:, :-1], state[:, -1]
    return results


def weights(q: Array, k: Array, v: Array, **parameters: Unpack[Parameters]) -> Float64:
    """What multiplies each value, from products of all the A between two tokens: ``[B, heads of o, S, S]``.

    Without initial state; before normalisation, which divides each row by its sum + epsilon.
    """
    results, heads = _heads(q, k, np.broadcast_to(np.eye(v.shape[2]), (*v.shape[:3], v.shape[2])), parameters)
    for x in heads:
        written = x.beta[:, None] * x.k
        transitions = [
            (np.eye(x.k.shape[1]) - (beta * np.outer(key, key) if x.delta else 0)) @ np.diag(np.exp(gate))
            for key, gate, beta in zip(x.k, x.gate, x.beta, strict=True)
        ]
        for t in range(len(x.k)):
            last = t if parameters.get("causal", True) else len(x.k) - 1
            if x.bonus is not None:
                x.o[:, t, t] = x.q[:, t] @ (x.bonus * x.k[t])
                last = t - 1
            reach = x.q[:, t]
            for s in range(last, -1, -1):
                x.o[:, t, s] = reach @ written[s]
                reach = reach @ transitions[s]
    return results.o


def _products(rows: Float64, columns: Float64, b_rows: Float64, b_columns: Float64, diagonal: int) -> Float64:
    """``sum_d rows[r, d] columns[s, d] exp(b_rows[r, d] - b_columns[s, d])`` for ``s <= r + diagonal``, else 0."""
    seen = np.tri(len(rows), k=diagonal, dtype=bool)[:, :, None]
    decay = np.exp(np.where(seen, b_rows[:, None] - b_columns[None], -np.inf))
    products: Float64 = np.einsum("rd,sd,rsd->rs", rows, columns, decay)
    return products


@dataclass
class _Head:
    """One state of one sequence: its G queries ``q [G, S, D]``, scaled, and where ``o [G, S, Dv]`` goes.

    ``state`` and ``norm`` hold what there is to start with, and take what there is at the end.
    """

    q: Float64
    k: Float64
    v: Float64
    gate: Float64  # [S, D]
    beta: Float64  # [S], 1 without the delta rule
    delta: bool
    bonus: Float64 | None
    normalize: bool
    epsilon: float
    o: Float64
    state: Float64
    norm: Float64

    def read(self, t: int, state: Float64, norm: Float64) -> None:
        o = self.q[:, t] @ state
        self.o[:, t] = quotient(o, (self.q[:, t] @ norm + self.epsilon)[:, None]) if self.normalize else o


def _heads(q: Array, k: Array, v: Array, parameters: Parameters) -> tuple[Results, list[_Head]]:
    """Every state of every sequence, and the results that they write to."""
    get: Callable[..., Any] = parameters.get
    batch, q_heads, length, dim = q.shape
    states = v.shape[1]
    sequences = list(sequences_of(batch, length, **parameters))
    results = Results(
        np.zeros((batch, max(q_heads, states), length, v.shape[3])),
        np.zeros((len(sequences), states, dim, v.shape[3])),
        np.zeros((len(sequences), states, dim)),
    )
    initial = get("initial_state", 0)
    results.state[:], results.norm[:] = initial if isinstance(initial, tuple) else (initial, 0)
    q, k = (
        FEATURES[get("feature_map", "identity")](normed(x.astype(np.float64), get("qk_norm", "none")))
        for x in (q, k)
    )
    q = q * get("scale", dim**-0.5)
    gate = np.asarray(get("gate", np.zeros(states)), np.float64)
    if gate.ndim == 1:
        gate = gate[None, :, None]
    gate = np.broadcast_to(gate if gate.ndim == 4 else gate[..., None], (batch, states, length, dim))
    beta = np.broadcast_to(get("beta", 1.0), (batch, states, length)).astype(np.float64)
    heads = []
    for (n, b, rows), h in product(sequences, range(states)):
        out = slice(h * results.o.shape[1] // states, (h + 1) * results.o.shape[1] // states)
        queries = slice(h * q_heads // states, max(h * q_heads // states + 1, (h + 1) * q_heads // states))
        heads.append(
            _Head(
                q=q[b, queries, rows],
                k=k[b, h * k.shape[1] // states, rows],
                v=v[b, h * v.shape[1] // states, rows].astype(np.float64),
                gate=gate[b, h, rows],
                beta=beta[b, h, rows],
                delta="beta" in parameters,
                bonus=np.asarray(parameters["bonus"], np.float64)[h] if "bonus" in parameters else None,
                normalize=get("normalize", False),
                epsilon=get("epsilon", 0.0),
                o=results.o[b, out, rows],
                state=results.state[n, h],
                norm=results.norm[n, h],
            )
        )
    return results, heads


def sequences_of(batch: int, length: int, **parameters: Any) -> Iterator[tuple[int, int, slice]]:
    """(number, batch entry, tokens) of every sequence of a batch."""
    if "cu_seqlens" not in parameters:
        yield from ((b, b, slice(0, length)) for b in range(batch))
        return
    cuts = parameters["cu_seqlens"]
    yield from ((n, 0, slice(cuts[n], cuts[n + 1])) for n in range(len(cuts) - 1))


FEATURES: dict[str, Callable[[Float64], Float64]] = {
    "identity": lambda x: x,
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
}


def quotient(x: Float64, total: Float64) -> Float64:
    """``x / total``, 0 where total is 0."""
    return np.where(total == 0, 0, x / np.where(total == 0, 1, total))


def normed(x: Float64, norm: str) -> Float64:
    """Every token by itself: of length 1 ("l2"; the token 0 stays 0), or of mean 0 and variance 1 ("layer")."""
    if norm == "l2":
        size = np.linalg.norm(x, axis=-1, keepdims=True)
        x = x / np.where(size == 0, 1, size)
    elif norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + LAYER_EPSILON)
    return x


LAYER_EPSILON = 1e-6


# --- by name ----------------------------------------------------------------------------------------------


def retention_gate(num_heads: int) -> Float64:
    """RetNet's decays ``log(1 - 2 ** (-5 - h))``, ``[H]``."""
    gate: Float64 = np.log1p(-np.exp2(-5.0 - np.arange(num_heads)))
    return gate


def lightning_gate(num_heads: int, layer: int, num_layers: int) -> Float64:
    """Lightning attention's decays ``-(8 / H) (1 - layer / layers) h``, ``[H]``; the first head never forgets."""
    return -8 / num_heads * (1 - layer / num_layers) * np.arange(num_heads, dtype=np.float64)


def _decay(rng: np.random.Generator, *shape: int) -> Array:
    return -np.logaddexp(0, -rng.normal(1.0, 1.0, shape))  # log(sigmoid)


def _beta(rng: np.random.Generator, *shape: int) -> Array:
    return np.exp(_decay(rng, *shape))


# Named members, under flash-linear-attention's names: name -> parameters for (batch, heads, length, head_dim, rng).
CASES: dict[str, Callable[[int, int, int, int, np.random.Generator], Parameters]] = {
    "linear_attn": lambda b, h, n, d, rng: {"feature_map": "elu1", "normalize": True, "epsilon": 1e-10},
    "linear_attn_full": lambda b, h, n, d, rng: {"feature_map": "elu1", "normalize": True, "causal": False},
    "retention": lambda b, h, n, d, rng: {"gate": retention_gate(h)},
    "lightning_attn": lambda b, h, n, d, rng: {"gate": lightning_gate(h, 1, 4)},
    "simple_gla": lambda b, h, n, d, rng: {"gate": _decay(rng, b, h, n)},
    "gla": lambda b, h, n, d, rng: {"gate": _decay(rng, b, h, n, d)},
    "rwkv6": lambda b, h, n, d, rng: {"gate": _decay(rng, b, h, n, d), "bonus": rng.normal(size=(h, d))},
    "delta_rule": lambda b, h, n, d, rng: {"qk_norm": "l2", "beta": _beta(rng, b, h, n)},
    "gated_delta_rule": lambda b, h, n, d, rng: {
        "qk_norm": "l2", "beta": _beta(rng, b, h, n), "gate": _decay(rng, b, h, n)},
    "kda": lambda b, h, n, d, rng: {
        "qk_norm": "l2", "beta": _beta(rng, b, h, n), "gate": _decay(rng, b, h, n, d)},
}  # fmt: skip
