"""The factorizable family: moments are the matrix of weights; limits; closed-form gradients; the programs."""

import math
from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.testing import agree, differences
from attnkit.variants import factorizable, linear
from attnkit.variants.linear import normed

pytestmark = pytest.mark.shows
Array = Any
each_case = pytest.mark.parametrize("name", factorizable.CASES)
SEQMAX = ("seqmax_token", "seqmax_channel", "seqmax")


def random(
    rng: np.random.Generator, heads: int = 2, kv_heads: int = 2, batch: int = 2, length: int = 7, dim: int = 3
) -> tuple[Array, Array, Array]:
    return (
        rng.standard_normal((batch, heads, length, dim)),
        rng.standard_normal((batch, kv_heads, length, dim)),
        rng.standard_normal((batch, kv_heads, length, 2)),
    )


# --- numbers by hand --------------------------------------------------------------------------------------

Q = np.array([[[[1.0, 0.0], [0.0, 1.0]]]])
V = np.array([[[[1.0], [3.0]]]])


def test_orders_by_hand() -> None:
    for order, expected in ((1, [5 / 3, 7 / 3]), (2, [11 / 7, 17 / 7])):  # weights 2 and 1; 5/2 and 1
        agree(factorizable.naive(Q, Q, V, order=order, qk_norm="none").o.ravel(), expected)
    softmax = [(math.e + 3) / (math.e + 1), (1 + 3 * math.e) / (1 + math.e)]
    agree(softmax, [1.537883, 2.462117], 1e-6)
    distance = [
        abs(factorizable.naive(Q, Q, V, order=p, qk_norm="none").o.ravel() - softmax).max() for p in (1, 2)
    ]
    assert distance[1] < distance[0]


def test_state_by_hand() -> None:
    found = factorizable.naive(2 * Q, 2 * Q, V, qk_norm="none")
    agree(found.state[0, 0, :, 0], [4, 2, 6, 4, 0, 0, 12])  # 1; k; k (x) k, times 1 and 3
    agree(found.norm[0, 0], [2, 2, 2, 4, 0, 0, 4])


def test_temperature_divides_the_products() -> None:
    found = factorizable.naive(Q, Q, V, order=1, qk_norm="none", temperature=2.0)
    agree(found.o.ravel(), [(1.5 + 3) / 2.5, (1 + 4.5) / 2.5])


# --- ways to say the same ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
@each_case
def test_moments_are_the_matrix(name: str, kv_heads: int, rng: np.random.Generator) -> None:
    q, k, v = random(rng, kv_heads=kv_heads)
    parameters = factorizable.CASES[name](3)
    start = factorizable.naive(*random(rng, kv_heads=kv_heads), **parameters)
    for extra in ({}, {"initial_state": (start.state, start.norm)}):
        o = factorizable.naive(q, k, v, **parameters, **extra).o
        for size in (1, 3, 64):  # recurrence, chunks, one piece
            for packed in (False, True):
                found = factorizable.moments(q, k, v, chunk_size=size, packed=packed, **parameters, **extra)
                agree(found, o)


@each_case
def test_state_carries_a_sequence_on(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = factorizable.CASES[name](3) | {"causal": True}
    whole = factorizable.naive(q, k, v, **parameters)
    start = factorizable.naive(*(x[:, :, :4] for x in (q, k, v)), **parameters)
    carried = parameters | {"initial_state": (start.state, start.norm)}
    end = factorizable.naive(*(x[:, :, 4:] for x in (q, k, v)), **carried)
    agree(np.concatenate([start.o, end.o], axis=2), whole.o)
    agree(end.state, whole.state)
    agree(end.norm, whole.norm)


@each_case
def test_packed_is_a_loop_over_sequences(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, batch=1)
    parameters = factorizable.CASES[name](3)
    ends = np.array([0, 3, 3, 7], np.int32)
    packed = factorizable.naive(q, k, v, cu_seqlens=ends, **parameters)
    for n in range(3):
        alone = factorizable.naive(*(x[:, :, ends[n] : ends[n + 1]] for x in (q, k, v)), **parameters)
        agree(packed.o[:, :, ends[n] : ends[n + 1]], alone.o)
        agree(packed.state[n], alone.state[0])
        agree(packed.norm[n], alone.norm[0])


def test_order_one_is_linear_attention_of_one_more_channel(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    one = np.ones((2, 2, 7, 1))
    wider = (np.concatenate([x, one], axis=3) for x in (q, k))
    expected = linear.naive(*wider, v, scale=1.0, normalize=True, epsilon=10.0).o
    agree(factorizable.naive(q, k, v, order=1, qk_norm="none", causal=True, epsilon=10.0).o, expected)


# --- limits -----------------------------------------------------------------------------------------------


@each_case
def test_the_last_causal_row_is_the_last_full_row(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = factorizable.CASES[name](3)
    causal, full = (
        factorizable.naive(q, k, v, **parameters | {"causal": causal}).o for causal in (True, False)
    )
    agree(causal[:, :, -1], full[:, :, -1])
    if not parameters.get("epsilon"):
        agree(causal[:, :, 0], v[:, :, 0])


def test_a_constant_polynomial_is_a_running_mean(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    found = factorizable.naive(q, k, v, coefficients=(1.0, 0.0, 0.0), causal=True).o
    agree(found, np.cumsum(v, axis=2) / np.arange(1, 8)[:, None])


def test_order_two_divides_by_no_less_than_half_the_keys(rng: np.random.Generator) -> None:
    q, k, v = (10 * x for x in random(rng))
    twos = np.full(v.shape, 2.0)
    small = factorizable.naive(q, k, v, qk_norm="none", causal=True, coefficients=(1.0, 1.0, 0.5))
    same = factorizable.naive(q, k, twos, qk_norm="none", causal=True)
    assert np.isfinite(small.o).all()
    agree(same.o, twos)  # the weights sum to 1, and none is negative:
    assert (small.o <= np.maximum.accumulate(v, axis=2) + 1e-12).all()
    assert (small.o >= np.minimum.accumulate(v, axis=2) - 1e-12).all()


def test_order_two_is_softmax_for_short_tokens(rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    x = q @ np.swapaxes(k, 2, 3)
    errors = []
    for temperature in (100.0, 200.0):
        weights = np.exp(x / temperature)
        expected = weights @ v / weights.sum(axis=-1, keepdims=True)
        errors.append(
            abs(factorizable.naive(q, k, v, qk_norm="none", temperature=temperature).o - expected).max()
        )
    assert 7 < errors[0] / errors[1] < 9  # the third order is missing


@pytest.mark.parametrize("norm", SEQMAX)
def test_the_longest_token_of_a_sequence_normalises_it(norm: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    found = factorizable.naive(q, k, v, qk_norm=norm)
    axis = {"seqmax_token": 3, "seqmax_channel": 2}.get(norm)

    def by_hand(x: Array) -> Array:
        x = x if axis is None else x - x.mean(axis=axis, keepdims=True)
        return x / np.sqrt((x * x).sum(axis=3).max(axis=2))[:, :, None, None]

    agree(found.o, factorizable.naive(by_hand(q), by_hand(k), v, qk_norm="none").o)
    scaled = factorizable.naive(5 * q, 5 * k, v, qk_norm=norm)
    agree(found.o, scaled.o)
    zero = factorizable.naive(0 * q, 0 * k, v, qk_norm=norm)  # nothing to divide by
    agree(zero.o, np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape))


@pytest.mark.parametrize("norm", SEQMAX)
def test_what_looks_at_the_whole_sequence_is_no_program(norm: str) -> None:
    with pytest.raises(AttnkitError, match="seqmax") as caught:
        factorizable.program(qk_norm=norm)
    assert caught.value.code == "AK401"


# --- gradients in closed form -----------------------------------------------------------------------------


def backward(
    q: Array, k: Array, v: Array, y: Array, *, a: tuple[float, ...], causal: bool
) -> dict[str, Array]:
    """In linear time, from q, k, v, o, g alone; one head: ``q, k [S, D]`` as they enter the product, ``v, y [S, Dv]``.

    The gradient of ``x_ij`` is ``f'(x_ij) (y_i . v_j - c_i) / g_i`` with ``c_i = y_i . o_i``: sums over keys are prefix
    moments (of all keys, if not causal), sums over queries suffix moments.
    """
    a0, a1, a2 = (*a, 0.0)[:3]

    def before(x: Array) -> Array:
        return np.cumsum(x, axis=0) if causal else np.broadcast_to(x.sum(axis=0), x.shape)

    def after(x: Array) -> Array:
        return np.cumsum(x[::-1], axis=0)[::-1] if causal else np.broadcast_to(x.sum(axis=0), x.shape)

    kk, qq = np.einsum("sa,sb->sab", k, k), np.einsum("sa,sb->sab", q, q)
    ones = np.ones((len(k), 1))
    m0, m1, m2 = (
        before(np.einsum("s...,sv->s...v", x, np.hstack([v, ones]))) for x in (np.ones(len(k)), k, kk)
    )  # the last channel is z
    sums = a0 * m0 + a1 * np.einsum("ta,tav->tv", q, m1) + a2 * np.einsum("sab,sabv->sv", qq, m2)
    g, o = sums[:, -1:], sums[:, :-1] / sums[:, -1:]
    up = np.hstack([y / g, -np.sum(y * o, axis=1, keepdims=True) / g])  # of the numerator and of g
    d_q = a1 * np.einsum("tav,tv->ta", m1, up) + 2 * a2 * np.einsum("sabv,sv,sb->sa", m2, up, q)
    n0, n1, n2 = (after(np.einsum("s...,sv->s...v", x, up)) for x in (np.ones(len(k)), q, qq))
    values = np.hstack([v, ones])
    d_k = a1 * np.einsum("tav,tv->ta", n1, values) + 2 * a2 * np.einsum("sabv,sv,sb->sa", n2, values, k)
    d_v = a0 * n0 + a1 * np.einsum("ta,tav->tv", k, n1) + a2 * np.einsum("sab,sabv->sv", kk, n2)
    return {"q": d_q, "k": d_k, "v": d_v[:, :-1]}


def norm_backward(x: Array, y: Array, norm: str) -> Array:
    """The gradient of `normed` by its tokens."""
    if norm == "none":
        return y
    n = normed(x, norm)
    if norm == "layer":
        size = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
        return (y - y.mean(axis=-1, keepdims=True) - n * np.mean(n * y, axis=-1, keepdims=True)) / size
    return (y - n * np.sum(n * y, axis=-1, keepdims=True)) / np.linalg.norm(x, axis=-1, keepdims=True)


def backward_of(q: Array, k: Array, v: Array, y: Array, **parameters: Any) -> list[Array]:
    """`backward` of every head, with the gradient of the normalisation composed around it."""
    norm, temperature = parameters.get("qk_norm", "l2"), parameters.get("temperature", 1.0)
    found = [np.zeros(x.shape) for x in (q, k, v)]
    for b, h in np.ndindex(q.shape[:2]):
        grads = backward(
            normed(q[b, h], norm) / temperature, normed(k[b, h], norm), v[b, h], y[b, h],
            a=factorizable.coefficients_of(parameters), causal=parameters.get("causal", False),
        )  # fmt: skip
        found[0][b, h] = norm_backward(q[b, h], grads["q"] / temperature, norm)
        found[1][b, h] = norm_backward(k[b, h], grads["k"], norm)
        found[2][b, h] = grads["v"]
    return found


@each_case
def test_linear_time_backward_is_the_gradient(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, heads=1, kv_heads=1, batch=1, length=6)
    parameters = factorizable.CASES[name](3) | {"epsilon": 0.0}
    y = rng.standard_normal(v.shape)

    def function(*inputs: Array) -> Any:
        return factorizable.naive(*inputs, **parameters)[:1]

    found = backward_of(q, k, v, y, **parameters)
    for one, other in zip(found, differences(function, [q, k, v], [y]), strict=True):
        agree(one, other, 1e-6)


# --- the programs, on the reference backend ---------------------------------------------------------------


def reference(q: Array, k: Array, v: Array, **parameters: Any) -> list[Array]:
    text, buffers = factorizable.program(**parameters)
    return run(parse(text), factorizable.inputs(q, k, v, **parameters), buffers)


@pytest.mark.parametrize("kv_heads", [1, 2])
@each_case
def test_program_is_the_equation(name: str, kv_heads: int, rng: np.random.Generator) -> None:
    q, k, v = random(rng, kv_heads=kv_heads)
    parameters = factorizable.CASES[name](3)
    start = factorizable.naive(*random(rng, kv_heads=kv_heads), **parameters)
    for extra in ({}, {"initial_state": (start.state, start.norm)}):
        results = reference(q, k, v, **parameters, **extra)
        for found, expected in zip(results, factorizable.naive(q, k, v, **parameters, **extra), strict=True):
            agree(found, expected)


@each_case
def test_program_keeps_sequences_apart(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, batch=1)
    parameters = factorizable.CASES[name](3) | {"cu_seqlens": np.array([0, 3, 3, 7], np.int32)}
    expected = factorizable.naive(q, k, v, **parameters)
    for found, want in zip(reference(q, k, v, **parameters), expected, strict=True):
        agree(found, want)
    k[:, :, :3] = np.nan
    o, state, norm = reference(q, k, v, **parameters)
    agree(o[:, :, 3:], expected.o[:, :, 3:])
    agree(state[1:], expected.state[1:])
    agree(norm[1:], expected.norm[1:])


@each_case
def test_program_generates_token_by_token(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = factorizable.CASES[name](3) | {"causal": True}
    whole = reference(q, k, v, **parameters)
    steps, carried = [], {}
    for tokens in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 7)):
        o, *states = reference(*(x[:, :, tokens] for x in (q, k, v)), **parameters, **carried)
        carried = {"initial_state": tuple(states)}
        steps.append(o)
    for found, expected in zip((np.concatenate(steps, axis=2), *states), whole, strict=True):
        agree(found, expected)


@pytest.mark.parametrize("where", "qkv")
@each_case
def test_a_nan_reaches_only_those_who_see_it(name: str, where: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = factorizable.CASES[name](3)
    clean = factorizable.naive(q, k, v, **parameters).o
    {"q": q, "k": k, "v": v}[where][0, 0, 4, 0] = np.nan
    seen_from = 4 if parameters.get("causal", False) or where == "q" else 0
    sees = np.zeros(clean.shape, bool)
    sees[0, 0, seen_from : 5 if where == "q" else None, 0 if where == "v" else slice(None)] = True
    for found in (factorizable.naive(q, k, v, **parameters).o, reference(q, k, v, **parameters)[0]):
        assert (np.isnan(found) == sees).all()
        agree(found[~sees], clean[~sees])


@each_case
def test_program_has_the_gradients_of_the_equation(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng, kv_heads=1, batch=1, length=4)
    parameters = factorizable.CASES[name](3)
    start = factorizable.naive(*random(rng, kv_heads=1, batch=1, length=4), **parameters)
    state = (start.state, start.norm)

    def function(q: Array, k: Array, v: Array, *state: Array) -> Any:
        return factorizable.naive(q, k, v, **parameters, initial_state=state)

    text, buffers = factorizable.program(**parameters, initial_state=state)
    inputs = factorizable.inputs(q, k, v, initial_state=state)
    cotangents = [rng.standard_normal(x.shape) for x in function(*inputs)]
    found = gradients(parse(text), inputs, cotangents, buffers).inputs
    for one, other in zip(found, differences(function, inputs, cotangents), strict=True):
        agree(one, other, 1e-6)


@each_case
def test_program_has_the_gradients_of_linear_time(name: str, rng: np.random.Generator) -> None:
    q, k, v = random(rng)
    parameters = factorizable.CASES[name](3) | {"epsilon": 0.0}
    y = rng.standard_normal(v.shape)
    text, buffers = factorizable.program(**parameters)
    found = gradients(parse(text), [q, k, v], [y, None, None], buffers).inputs
    for one, other in zip(found, backward_of(q, k, v, y, **parameters), strict=True):
        agree(one, other, 1e-10)
