"""The linear family: chunks, recurrence and matrix are one; limits; state; closed-form gradients; the programs."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing import agree, differences
from attnkit.variants import linear

pytestmark = pytest.mark.shows
Array = Any
HEADS = {"equal": (2, 2, 2), "grouped queries": (4, 2, 2), "grouped keys": (2, 2, 4)}  # of q, k, v
each_case = pytest.mark.parametrize("name", linear.CASES)


def random(
    rng: np.random.Generator,
    heads: tuple[int, int, int] = (2, 2, 2),
    batch: int = 2,
    length: int = 7,
    dim: int = 3,
) -> tuple[Array, Array, Array]:
    return (
        rng.standard_normal((batch, heads[0], length, dim)),
        rng.standard_normal((batch, heads[1], length, dim)),
        rng.standard_normal((batch, heads[2], length, 2)),
    )


def member(name: str, rng: np.random.Generator, q: Array, k: Array, v: Array) -> dict[str, Any]:
    return {**linear.CASES[name](q.shape[0], v.shape[1], q.shape[2], q.shape[3], rng)}


def cut(parameters: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """The parameters of a stretch of tokens."""
    of_tokens = {name for name in ("gate", "beta") if name in parameters and np.ndim(parameters[name]) > 2}
    return {**parameters, **{name: parameters[name][:, :, tokens] for name in of_tokens}}


def same(found: linear.Results, expected: linear.Results, rtol: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        agree(one, other, rtol)


def column(*values: float) -> Array:
    return np.array(values, np.float64)[None, None, :, None]


# --- numbers by hand --------------------------------------------------------------------------------------


def test_decay_by_hand() -> None:
    found = linear.naive(column(1, 1, 2), column(1, 2, 3), column(1, 1, 1), gate=np.log([0.5]))
    # S = 1, 0.5 + 2, 1.25 + 3
    agree(found.o, column(1, 2.5, 8.5))
    agree(found.state, [[[[4.25]]]])


def test_normaliser_by_hand() -> None:
    found = linear.naive(column(1, 2), column(0, -1), column(3, 5), feature_map="elu1", normalize=True)
    # elu(x) + 1: the keys are 1 and exp(-1)
    agree(found.o, column(3, (3 + 5 / np.e) / (1 + 1 / np.e)))
    agree(found.norm, [[[1 + 1 / np.e]]])


def test_delta_rule_by_hand() -> None:
    found = linear.naive(column(1, 1), column(1, 1), column(4, 8), beta=np.array([[[0.5, 0.25]]]))
    # S = 0 + 0.5 (4 - 0), 2 + 0.25 (8 - 2)
    agree(found.o, column(2, 3.5))


def test_decay_comes_before_the_delta_rule() -> None:
    gate, beta = np.log([0.5]), np.array([[[1.0, 0.5]]])
    found = linear.naive(column(1, 1), column(1, 1), column(4, 8), gate=gate, beta=beta)
    # S = 4, then decayed to 2 and moved half the way to 8
    agree(found.o, column(4, 5))


def test_bonus_reads_before_decay_and_write() -> None:
    found = linear.naive(
        column(1, 1), column(1, 2), column(3, 5), gate=np.log([0.5]), bonus=np.array([[10.0]])
    )
    # reads 0 + 10 * 3, then the whole 3 + 10 * 2 * 5; the state is 3, then 1.5 + 10
    agree(found.o, column(30, 103))
    agree(found.state, [[[[11.5]]]])


def test_named_decays() -> None:
    agree(np.exp(linear.retention_gate(3)), [31 / 32, 63 / 64, 127 / 128])
    agree(linear.lightning_gate(4, 1, 4), [0, -1.5, -3, -4.5])


# --- three ways to say the same ---------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
@each_case
def test_chunks_and_matrix_are_the_recurrence(name: str, heads: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, HEADS[heads])
    parameters = member(name, rng, q, k, v)
    whole = linear.naive(q, k, v, **parameters)
    weights = linear.weights(q, k, v, **parameters)
    o = weights @ np.repeat(v, weights.shape[1] // v.shape[1], axis=1)
    if parameters.get("normalize"):
        o /= weights.sum(axis=-1, keepdims=True) + parameters.get("epsilon", 0)
    agree(o, whole.o)
    if parameters.get("causal", True):
        for size in (1, 3, 64):
            same(linear.chunked(q, k, v, chunk_size=size, **parameters), whole)


@pytest.mark.parametrize("name", [name for name in linear.CASES if not name.endswith("_full")])
def test_state_carries_a_sequence_on(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = member(name, rng, q, k, v)
    whole = linear.naive(q, k, v, **parameters)
    first, rest = slice(0, 4), slice(4, None)
    start = linear.naive(*(x[:, :, first] for x in (q, k, v)), **cut(parameters, first))
    carried = cut(parameters, rest) | {"initial_state": (start.state, start.norm)}
    for evaluate in (linear.naive, linear.chunked):
        end = evaluate(*(x[:, :, rest] for x in (q, k, v)), **carried)
        agree(np.concatenate([start.o, end.o], axis=2), whole.o)
        agree(end.state, whole.state)
        agree(end.norm, whole.norm)


@each_case
def test_packed_is_a_loop_over_sequences(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, batch=1)
    parameters = member(name, rng, q, k, v)
    ends = np.array([0, 3, 3, 7], np.int32)
    packed = linear.naive(q, k, v, cu_seqlens=ends, **parameters)
    for n in range(3):
        rows = slice(ends[n], ends[n + 1])
        alone = linear.naive(*(x[:, :, rows] for x in (q, k, v)), **cut(parameters, rows))
        agree(packed.o[:, :, rows], alone.o)
        agree(packed.state[n], alone.state[0])
        agree(packed.norm[n], alone.norm[0])


# --- limits -----------------------------------------------------------------------------------------------


def test_no_forgetting_is_no_gate(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    same(linear.naive(q, k, v, gate=np.zeros(2)), linear.naive(q, k, v))


def test_equal_channels_are_one_gate(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    gate = linear.CASES["simple_gla"](2, 2, 7, 3, rng)["gate"]
    channels = np.repeat(gate[..., None], 3, axis=-1)
    same(linear.naive(q, k, v, gate=channels), linear.naive(q, k, v, gate=gate))
    delta = member("delta_rule", rng, q, k, v)  # and so Kimi delta attention is the gated delta rule
    same(linear.naive(q, k, v, gate=channels, **delta), linear.naive(q, k, v, gate=gate, **delta))


def test_gated_delta_rule_without_gates_is_the_delta_rule(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    delta = member("delta_rule", rng, q, k, v)
    same(linear.naive(q, k, v, gate=np.zeros((2, 2, 7)), **delta), linear.naive(q, k, v, **delta))


def test_a_bonus_of_one_without_gates_reads_what_it_writes(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    same(linear.naive(q, k, v, gate=np.zeros(2), bonus=np.ones((2, 3))), linear.naive(q, k, v))


def test_beta_of_zero_only_forgets(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    state, gate = rng.standard_normal((2, 2, 3, 2)), member("gla", rng, q, k, v)["gate"]
    found = linear.naive(q, k, v, gate=gate, beta=np.zeros((2, 2, 7)), initial_state=state)
    agree(found.state, np.exp(gate.sum(axis=2))[..., None] * state)


def test_delta_rule_recalls_orthonormal_keys(rng: np.random.Generator) -> None:
    keys, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    v = rng.standard_normal((1, 1, 4, 3))
    found = linear.naive(keys[None, None], keys[None, None], v, beta=np.ones((1, 1, 4)))
    agree(keys @ found.state[0, 0], v[0, 0])
    rewritten = linear.naive(
        keys[None, None], keys[None, None], 2 * v, beta=np.ones((1, 1, 4)), initial_state=found.state
    )
    agree(keys @ rewritten.state[0, 0], 2 * v[0, 0])  # a key written again holds the new value alone


def test_beta_of_two_reflects(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    state = rng.standard_normal((2, 2, 3, 2))
    found = linear.naive(q, k, 0 * v, qk_norm="l2", beta=np.full((2, 2, 7), 2.0), initial_state=state)
    agree(np.linalg.norm(found.state, axis=2), np.linalg.norm(state, axis=2))


def test_positive_features_give_convex_combinations(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    found = linear.naive(q, k, v, feature_map="elu1", normalize=True)
    seen = [v[:, :, : t + 1] for t in range(7)]
    assert all((found.o[:, :, t] <= seen[t].max(axis=2) + 1e-12).all() for t in range(7))
    assert all((found.o[:, :, t] >= seen[t].min(axis=2) - 1e-12).all() for t in range(7))
    agree(found.o[:, :, 0], v[:, :, 0])


def test_a_gate_of_minus_infinity_forgets_everything(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    gate = member("gla", rng, q, k, v)["gate"]
    gate[:, :, 4] = -np.inf
    found = linear.naive(q, k, v, gate=gate)
    agree(found.o[:, :, 4:], linear.naive(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], gate=gate[:, :, 4:]).o)
    assert np.isfinite(found.o).all()


@pytest.mark.parametrize("where", "qkv")
@each_case
def test_a_nan_reaches_only_those_who_see_it(name: str, where: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = member(name, rng, q, k, v)
    clean = linear.naive(q, k, v, **parameters).o
    {"q": q, "k": k, "v": v}[where][0, 0, 4, 0] = np.nan
    seen_from = 4 if parameters.get("causal", True) or where == "q" else 0
    sees = np.zeros(clean.shape, bool)
    sees[0, 0, seen_from : 5 if where == "q" else None, 0 if where == "v" else slice(None)] = True
    for found in (linear.naive(q, k, v, **parameters).o, reference(q, k, v, **parameters)[0]):
        assert (np.isnan(found) == sees).all()
        agree(found[~sees], clean[~sees])


# --- gradients in closed form -----------------------------------------------------------------------------


def backward(
    q: Array, k: Array, v: Array, y: Array, state_cotangent: Array, state: Array, *,
    scale: float, gate: Array | None = None, beta: Array | None = None, bonus: Array | None = None,
) -> dict[str, Array]:  # fmt: skip
    """A reverse scan over one head: ``q, k [S, D]``, ``v, y [S, Dv]``, ``gate [S, D]``, ``beta [S]``, states ``[D, Dv]``.

    With dS of the state after t, D' = dS after what the token wrote is undone, everything follows from
    ``S' = exp(g) S_{t-1}``, ``u = v - S'^T k`` and ``S_t = S' + beta k u^T``.
    """
    length = len(k)
    gate = np.zeros(k.shape) if gate is None else gate
    grads = {name: np.zeros(x.shape) for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate))}
    grads["beta"], grads["bonus"] = np.zeros(length), np.zeros(k.shape[1])
    before, after = [], []
    for t in range(length):
        before.append(state)
        state = np.exp(gate[t])[:, None] * state
        b, correction = (1.0, 0.0) if beta is None else (beta[t], k[t] @ state)
        state = state + b * np.outer(k[t], v[t] - correction)
        after.append(state)
    d_state = state_cotangent
    for t in reversed(range(length)):
        if bonus is None:
            grads["q"][t] = scale * after[t] @ y[t]
            d_state = d_state + scale * np.outer(q[t], y[t])
        decayed = np.exp(gate[t])[:, None] * before[t]
        b, u = (1.0, v[t]) if beta is None else (beta[t], v[t] - k[t] @ decayed)
        d_u = b * d_state.T @ k[t]
        grads["v"][t] += d_u
        grads["k"][t] += b * d_state @ u
        grads["beta"][t] = k[t] @ d_state @ u
        d_decayed = d_state
        if beta is not None:
            grads["k"][t] -= decayed @ d_u
            d_decayed = d_state - np.outer(k[t], d_u)
        grads["gate"][t] = np.sum(d_decayed * decayed, axis=1)
        d_state = np.exp(gate[t])[:, None] * d_decayed
        if bonus is not None:
            grads["q"][t] = scale * (before[t] @ y[t] + bonus * k[t] * (v[t] @ y[t]))
            grads["k"][t] += scale * bonus * q[t] * (v[t] @ y[t])
            grads["v"][t] += scale * (q[t] @ (bonus * k[t])) * y[t]
            grads["bonus"] += scale * q[t] * k[t] * (v[t] @ y[t])
            d_state = d_state + scale * np.outer(q[t], y[t])
    grads["initial_state"] = d_state
    return grads


MEMBERS = ["retention", "simple_gla", "gla", "rwkv6", "delta_rule", "gated_delta_rule", "kda"]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_reverse_scan_is_the_gradient(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, (1, 1, 1), batch=1, length=5)
    parameters = member(name, rng, q, k, v)
    parameters.pop("qk_norm", None)
    arrays = {"q": q, "k": k, "v": v, "initial_state": rng.standard_normal((1, 1, 3, 2))} | {
        key: np.asarray(x) for key, x in parameters.items()
    }

    def function(*inputs: Array) -> Any:
        return linear.naive(**dict(zip(arrays, inputs, strict=True)))[:2]

    y, cotangent = rng.standard_normal((1, 1, 5, 2)), rng.standard_normal((1, 1, 3, 2))
    expected = dict(zip(arrays, differences(function, list(arrays.values()), [y, cotangent]), strict=True))
    found = backward_of(arrays, y, cotangent)
    for key in arrays:
        agree(found[key], expected[key], 1e-8)


def backward_of(arrays: dict[str, Array], y: Array, cotangent: Array) -> dict[str, Array]:
    """`backward` of one sequence of one head, in the shapes of the arrays."""
    length, dim = arrays["k"].shape[2:]
    gate = arrays.get("gate")
    if gate is not None:
        gate = np.broadcast_to(gate.reshape(-1, dim if gate.ndim == 4 else 1), (length, dim))
    found = backward(
        *(arrays[name][0, 0] for name in "qkv"), y[0, 0], cotangent[0, 0], arrays["initial_state"][0, 0],
        scale=dim**-0.5, gate=gate,
        beta=arrays["beta"][0, 0] if "beta" in arrays else None,
        bonus=arrays["bonus"][0] if "bonus" in arrays else None,
    )  # fmt: skip
    if "gate" in arrays and arrays["gate"].ndim < 4:
        found["gate"] = found["gate"].sum(axis=1)
        found["gate"] = found["gate"].sum() if arrays["gate"].ndim == 1 else found["gate"]
    return {name: np.reshape(found[name], x.shape) for name, x in arrays.items()}


@pytest.mark.parametrize("name", ["simple_gla", "gla"])
def test_gate_gradient_needs_no_states(name: str, rng: np.random.Generator) -> None:
    """``dg_t = sum_{u >= t} (q_u dq_u - k_u dk_u) + sum S_T dS_T``: what a kernel can do without any state."""
    q, k, v = random(rng, (1, 1, 1), batch=1)
    arrays = {"q": q, "k": k, "v": v, "initial_state": rng.standard_normal((1, 1, 3, 2))}
    arrays |= member(name, rng, q, k, v)
    y, cotangent = rng.standard_normal((1, 1, 7, 2)), rng.standard_normal((1, 1, 3, 2))
    grads = backward_of(arrays, y, cotangent)
    last = np.sum(linear.naive(**arrays).state * cotangent, axis=-1)[:, :, None]
    gate = np.cumsum((q * grads["q"] - k * grads["k"])[:, :, ::-1], axis=2)[:, :, ::-1] + last
    agree(grads["gate"], gate if name == "gla" else gate.sum(axis=-1))


def test_normaliser_gradient_in_closed_form(rng: np.random.Generator) -> None:
    """``o = num / den``: num has the gradient of a linear recurrence, den adds prefix and suffix sums."""
    q, k = (np.abs(x) for x in random(rng, (1, 1, 1), batch=1)[:2])
    v, y = rng.standard_normal((2, 1, 1, 7, 2))
    found = linear.naive(q, k, v, normalize=True, epsilon=0.1)
    scale = 3**-0.5
    z = np.cumsum(k, axis=2)
    den = scale * np.sum(q * z, axis=-1, keepdims=True) + 0.1
    d_den = -np.sum(y * found.o, axis=-1, keepdims=True) / den
    zero = np.zeros((1, 1, 3, 2))
    grads = backward_of({"q": q, "k": k, "v": v, "initial_state": zero}, y / den, zero)
    grads["q"] += scale * d_den * z
    grads["k"] += np.cumsum((scale * d_den * q)[:, :, ::-1], axis=2)[:, :, ::-1]

    def function(*inputs: Array) -> Any:
        return linear.naive(*inputs, normalize=True, epsilon=0.1)[:1]

    for name, expected in zip("qkv", differences(function, [q, k, v], [y]), strict=True):
        agree(grads[name], expected, 1e-8)


# --- the programs, on the reference backend ---------------------------------------------------------------


def reference(q: Array, k: Array, v: Array, **parameters: Any) -> list[Array]:
    text, buffers = linear.program(**parameters)
    return run(parse(text), linear.inputs(q, k, v, **parameters), buffers)


@pytest.mark.parametrize("heads", HEADS)
@each_case
def test_program_is_the_equation(name: str, heads: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, HEADS[heads])
    parameters = member(name, rng, q, k, v)
    start = linear.naive(*random(rng, HEADS[heads]), **parameters)
    initial = (start.state, start.norm) if parameters.get("normalize") else start.state
    for extra in ({}, {"initial_state": initial}, {"scale": 0.3}):
        results = reference(q, k, v, **parameters, **extra)
        for found, expected in zip(results, linear.naive(q, k, v, **parameters, **extra), strict=False):
            agree(found, expected)


@each_case
def test_program_keeps_sequences_apart(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, HEADS["grouped keys"], batch=1)
    parameters = member(name, rng, q, k, v) | {"cu_seqlens": np.array([0, 3, 3, 7], np.int32)}
    state = rng.standard_normal((3, 4, 3, 2)), np.abs(rng.standard_normal((3, 4, 3)))
    parameters["initial_state"] = state if parameters.get("normalize") else state[0]
    expected = linear.naive(q, k, v, **parameters)
    for found, want in zip(reference(q, k, v, **parameters), expected, strict=False):
        agree(found, want)
    k[:, :, :3] = np.nan
    o, last = reference(q, k, v, **parameters)[:2]
    agree(o[:, :, 3:], expected.o[:, :, 3:])
    agree(last[1:], expected.state[1:])


@pytest.mark.parametrize("name", [name for name in linear.CASES if not name.endswith("_full")])
def test_program_generates_token_by_token(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = member(name, rng, q, k, v)
    whole = reference(q, k, v, **parameters)
    steps, carried = [], {}
    for tokens in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 7)):
        o, *states = reference(*(x[:, :, tokens] for x in (q, k, v)), **cut(parameters, tokens), **carried)
        carried = {"initial_state": tuple(states) if parameters.get("normalize") else states[0]}
        steps.append(o)
    agree(np.concatenate(steps, axis=2), whole[0])
    for found, expected in zip(states, whole[1:], strict=True):
        agree(found, expected)


def test_program_of_no_tokens(rng: np.random.Generator) -> None:
    q, k, v = random(rng, length=0)
    state = rng.standard_normal((2, 2, 3, 2))
    o, last = reference(q, k, v, initial_state=state)
    assert o.shape == (2, 2, 0, 2)
    agree(last, state)


def test_program_forgets_everything_exactly(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    gate = member("gla", rng, q, k, v)["gate"]
    gate[:, :, 4] = -np.inf
    agree(reference(q, k, v, gate=gate)[0], linear.naive(q, k, v, gate=gate).o)
    y = np.zeros((2, 2, 7, 2))
    y[:, :, 4:] = rng.standard_normal((2, 2, 3, 2))
    found = gradients(parse(linear.program(gate=gate)[0]), [q, k, v, gate], [y, None]).inputs
    assert all((x[:, :, :4] == 0).all() and np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("heads", HEADS)
@each_case
def test_program_has_the_gradients_of_the_equation(name: str, heads: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, HEADS[heads], batch=1, length=4, dim=2)
    parameters = member(name, rng, q, k, v)
    parameters["initial_state"] = rng.standard_normal((1, v.shape[1], 2, 2))
    if parameters.get("normalize"):
        norm = np.abs(rng.standard_normal((1, v.shape[1], 2)))
        parameters["initial_state"] = parameters["initial_state"], norm
    arrays = [name for name in ("gate", "beta", "bonus") if name in parameters]

    def function(q: Array, k: Array, v: Array, *others: Array) -> Any:
        given = parameters | dict(zip(arrays, others, strict=False))
        state = others[len(arrays) :]
        given["initial_state"] = state if parameters.get("normalize") else state[0]
        return linear.naive(q, k, v, **given)[: 3 if parameters.get("normalize") else 2]

    text, buffers = linear.program(**parameters)
    inputs = linear.inputs(q, k, v, **parameters)
    cotangents = [rng.standard_normal(x.shape) for x in function(*inputs)]
    found = gradients(parse(text), inputs, cotangents, buffers).inputs
    for one, other in zip(found, differences(function, inputs, cotangents), strict=True):
        agree(one, other, 1e-6)


@pytest.mark.parametrize("name", MEMBERS)
def test_program_has_the_gradients_of_the_reverse_scan(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, (1, 1, 1), batch=1)
    parameters = member(name, rng, q, k, v) | {"initial_state": rng.standard_normal((1, 1, 3, 2))}
    parameters.pop("qk_norm", None)
    y, cotangent = rng.standard_normal((1, 1, 7, 2)), rng.standard_normal((1, 1, 3, 2))
    text, buffers = linear.program(**parameters)
    found = gradients(parse(text), linear.inputs(q, k, v, **parameters), [y, cotangent], buffers).inputs
    expected = backward_of({"q": q, "k": k, "v": v} | parameters, y, cotangent)
    order = [name for name in ("q", "k", "v", "gate", "beta", "bonus", "initial_state") if name in expected]
    for one, name in zip(found, order, strict=True):
        agree(one, expected[name], 1e-11)
