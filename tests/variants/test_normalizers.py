"""Weights that are not a softmax over keys: by hand, as equations, and as programs."""

import math
from typing import Any

import numpy as np
import pytest

from attnkit import testing
from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.variants import dense, normalizers
from attnkit.variants.normalizers import naive

pytestmark = pytest.mark.shows


def qkv(rng: np.random.Generator, sq: int = 5, skv: int = 7) -> Any:
    return (
        rng.standard_normal((2, 4, sq, 6)),
        rng.standard_normal((2, 2, skv, 6)),
        rng.standard_normal((2, 2, skv, 3)),
    )


def weights(s: Any, kind: normalizers.Kind, **parameters: Any) -> Any:
    """The weights of given scores: queries are their rows, keys and values unit vectors."""
    s = np.asarray(s, float)[None, None]
    eye = np.eye(s.shape[3])[None, None]
    return naive(s, eye, eye, kind, scale=1.0, **parameters)[0][0, 0]


# --- by hand ----------------------------------------------------------------------------------------------


def test_signed_by_hand() -> None:
    got = weights([[1, -2, 0.5]], "signed")[0]
    np.testing.assert_allclose(got, [0.231224, -0.628532, 0.140244], atol=6e-7)
    assert math.isclose(abs(got).sum(), 1)
    assert weights([[0, 1.0]], "signed")[0, 0] == 0, "a score of 0 has weight 0, and its share of the sum"


def test_over_queries_by_hand() -> None:
    """Two slots share a token: 1 / (1 + e) and e / (1 + e); each slot then divides by what it got."""
    s = [[0, 1.0], [1, 1]]
    low, high = 1 / (1 + math.e), math.e / (1 + math.e)
    np.testing.assert_allclose(weights(s, "over_queries"), [[low, 0.5], [high, 0.5]])
    slots = weights(s, "over_queries", epsilon=0.25)
    np.testing.assert_allclose(
        slots, [[low / (low + 0.75), 0.5 / (low + 0.75)], [high / (high + 0.75), 0.5 / (high + 0.75)]]
    )


def test_elementwise_by_hand() -> None:
    np.testing.assert_allclose(weights([[0.0, math.log(3)]], "sigmoid", bias=0.0), [[0.5, 0.75]])
    np.testing.assert_allclose(weights([[math.log(2), math.log(6)]], "sigmoid"), [[0.5, 0.75]])  # bias -log 2
    np.testing.assert_allclose(weights([[math.sqrt(0.5)]], "laplace"), [[0.5]])  # at mu
    at_one_sigma = weights([[math.sqrt(0.5) + 1 / math.sqrt(4 * math.pi)]], "laplace")
    np.testing.assert_allclose(at_one_sigma, 0.841345, atol=5e-7)
    np.testing.assert_allclose(weights([[1.0, -2]], "sum"), [[0.2, 0.8]])
    np.testing.assert_allclose(weights([[1.0, -2]], "sum", epsilon=5.0), [[0.1, 0.4]])


# --- laws of the equations --------------------------------------------------------------------------------


def test_signed_of_positive_scores_is_softmax(rng: np.random.Generator) -> None:
    q, k, v = (abs(x) for x in qkv(rng))
    for causal in (False, True):
        for got, want in zip(
            naive(q, k, v, "signed", causal=causal), dense.naive(q, k, v, causal=causal), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-13)


def test_signed_merges_like_softmax(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    whole, whole_lse = naive(q, k, v, "signed")
    parts = [naive(q, k[:, :, part], v[:, :, part], "signed") for part in (slice(3), slice(3, None))]
    lse = np.logaddexp(parts[0][1], parts[1][1])
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-13)
    merged = sum(np.exp(part_lse - lse)[..., None] * o for o, part_lse in parts)
    np.testing.assert_allclose(merged, whole, atol=1e-14)


def test_elementwise_kinds_add_up(rng: np.random.Generator) -> None:
    """No row couples: the sum over two stretches of keys is the whole."""
    q, k, v = qkv(rng)
    for kind, parameters in (("sigmoid", {"bias": -1.0}), ("laplace", {})):
        first, second = (
            naive(q, k[:, :, p], v[:, :, p], kind, **parameters)[0] for p in (slice(4), slice(4, None))
        )  # type: ignore[arg-type]
        np.testing.assert_allclose(first + second, naive(q, k, v, kind, **parameters)[0], atol=1e-14)  # type: ignore[arg-type]


def test_over_queries_is_two_passes(rng: np.random.Generator) -> None:
    """L_j is the lse of attention with the roles swapped; every key gives away exactly itself."""
    q, k, v = rng.standard_normal((3, 1, 2, 5, 4))
    _, lse = dense.naive(k, q, q)
    s = 0.5 * q @ np.swapaxes(k, 2, 3)
    got, _ = naive(q, k, v, "over_queries")
    np.testing.assert_allclose(got, np.exp(s - lse[:, :, None, :]) @ v, atol=1e-14)
    np.testing.assert_allclose(got.sum(axis=2), v.sum(axis=2), atol=1e-14)


def test_slots(rng: np.random.Generator) -> None:
    """A mean of values per slot; slots are a set; one slot is the plain mean of all."""
    q, k, v = qkv(rng)
    got, _ = naive(q, k, v, "over_queries", epsilon=1e-8)
    assert (got.max(axis=2) <= v.max(axis=2).repeat(2, axis=1)).all()
    order = rng.permutation(q.shape[2])
    np.testing.assert_allclose(
        naive(q[:, :, order], k, v, "over_queries", epsilon=1e-8)[0], got[:, :, order], atol=1e-14
    )
    one, _ = naive(q[:, :, :1], k, v, "over_queries", epsilon=0.0)
    np.testing.assert_allclose(one[:, :, 0], v.mean(axis=2).repeat(2, axis=1), atol=1e-14)


def test_rows_that_see_nothing(rng: np.random.Generator) -> None:
    """More queries than keys under a causal mask: 0, and an lse of -inf where there is one."""
    q, k, v = qkv(rng, sq=7, skv=4)
    for kind in ("signed", "over_queries", "laplace", "sum"):
        o, lse = naive(q, k, v, kind, causal=True)  # type: ignore[arg-type]
        assert not o[:, :, :3].any()
        assert o[:, :, 3:].all()
        assert (lse[:, :, :3] == -np.inf).all() if kind == "signed" else np.isnan(lse).all()
    assert not naive(q, k, v, "sigmoid", bias=0.0, causal=True)[0][:, :, :3].any()


# --- as programs ------------------------------------------------------------------------------------------

SHAPES = [(5, 7), (7, 4), (1, 6), (0, 3), (3, 0)]


def case(name: str, skv: int) -> tuple[Any, dict[str, Any]]:
    kind, parameters = normalizers.CASES[name]
    return kind, parameters(skv)


def results(kind: str, o: Any, lse: Any) -> list[Any]:
    return [o, lse] if kind == "signed" else [o]


@pytest.mark.parametrize("name", normalizers.CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_program_is_the_equation(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    kind, parameters = case(name, shape[1])
    q, k, v = qkv(rng, *shape)
    text, buffers = normalizers.program(kind, **parameters)
    want = results(kind, *naive(q, k, v, kind, **parameters))
    for got, expected in zip(run(parse(text), [q, k, v], buffers), want, strict=True):
        testing.agree(got, expected)


@pytest.mark.parametrize("name", normalizers.CASES)
def test_ragged_programs(rng: np.random.Generator, name: str) -> None:
    kind, parameters = case(name, 4)
    q, k, v = (x[:1] for x in qkv(rng, 9, 11))
    packed = {
        "cu_seqlens_q": np.array([0, 3, 3, 9], np.int32),
        "cu_seqlens_kv": np.array([0, 2, 5, 11], np.int32),
    }
    text, buffers = normalizers.program(kind, **parameters, **packed)  # type: ignore[arg-type]
    want = results(kind, *naive(q, k, v, kind, **parameters, **packed))  # type: ignore[arg-type]
    for got, expected in zip(run(parse(text), [q, k, v], buffers), want, strict=True):
        testing.agree(got, expected)
    q, k, v = qkv(rng)
    lens = np.array([7, 4], np.int32)
    k[1, :, 4:], v[1, :, 4:] = np.nan, np.inf
    text, buffers = normalizers.program(kind, **parameters, kv_lens=lens)
    want = results(kind, *naive(q, k, v, kind, **parameters, kv_lens=lens))
    for got, expected in zip(run(parse(text), [q, k, v], buffers), want, strict=True):
        testing.agree(got, expected)


@pytest.mark.parametrize("name", normalizers.CASES)
@pytest.mark.parametrize("shape", [(4, 5), (5, 3)], ids=str)
def test_gradients(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    """Of q, k and v, rows without a key included; of the lse where there is one."""
    kind, parameters = case(name, shape[1])
    inputs = [x[:1] for x in qkv(rng, *shape)]
    text, buffers = normalizers.program(kind, **parameters)
    cotangents = results(
        kind, rng.standard_normal((1, 4, shape[0], 3)), rng.standard_normal((1, 4, shape[0]))
    )
    want = testing.differences(lambda *x: results(kind, *naive(*x, kind, **parameters)), inputs, cotangents)
    got = gradients(parse(text), inputs, cotangents, buffers)
    for what, a, b in zip("qkv", got.inputs, want, strict=True):
        testing.agree(a, b, 1e-6, what)


def test_reversed_backward_in_closed_form(rng: np.random.Generator) -> None:
    """ds_ij = P_ij (dP_ij - C_j) with C_j = v_j . dv_j."""
    q, k, v, y = rng.standard_normal((4, 1, 1, 5, 4))
    s = 0.5 * q @ np.swapaxes(k, 2, 3)
    p = np.exp(s) / np.exp(s).sum(axis=2, keepdims=True)
    dv = np.swapaxes(p, 2, 3) @ y
    ds = p * (y @ np.swapaxes(v, 2, 3) - np.sum(v * dv, axis=3)[:, :, None, :])
    got = gradients(parse(normalizers.program("over_queries")[0]), [q, k, v], [y])
    for a, b in zip(got.inputs, (0.5 * ds @ k, 0.5 * np.swapaxes(ds, 2, 3) @ q, dv), strict=True):
        testing.agree(a, b)


def test_the_sign_has_no_gradient(rng: np.random.Generator) -> None:
    """dz = sign(s) a (da - sum a da), a = softmax |s|; a score of exactly 0 gets none."""
    q, k, v, y = rng.standard_normal((4, 1, 1, 5, 4))
    k[:, :, 2] = 0
    s = 0.5 * q @ np.swapaxes(k, 2, 3)
    a = np.exp(abs(s)) / np.exp(abs(s)).sum(axis=3, keepdims=True)
    da = np.sign(s) * (y @ np.swapaxes(v, 2, 3))
    ds = np.sign(s) * a * (da - np.sum(a * da, axis=3, keepdims=True))
    got = gradients(parse(normalizers.program("signed")[0]), [q, k, v], [y, np.zeros((1, 1, 5))])
    for x, want in zip(got.inputs, (0.5 * ds @ k, 0.5 * np.swapaxes(ds, 2, 3) @ q), strict=False):
        testing.agree(x, want)
    assert not got.inputs[1][0, 0, 2].any()


def test_signed_segments_and_merges(rng: np.random.Generator) -> None:
    """Two segments are the whole, and so is the merge of two attentions."""
    q, k, v = qkv(rng)
    parts = [k[:, :, :3], v[:, :, :3], k[:, :, 3:], v[:, :, 3:]]
    want = naive(q, k, v, "signed")
    body = "{ normalizer = signed_softmax }"
    head = "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd, k1: bhsd, v1: bhsd) {\n"
    segments = f"o, lse = attend(q, k, v, k1, v1, scale = default) {body}\nreturn o, lse\n}}"
    merged = "\n".join(
        [
            f"o, lse = attend(q, k, v, scale = default) {body}",
            f"o1, lse1 = attend(q, k1, v1, scale = default) {body}",
            "o2, lse2 = merge(o, lse, o1, lse1)",
            "return o2, lse2\n}",
        ]
    )
    for text in (segments, merged):
        for got, expected in zip(run(parse(head + text), [q, *parts]), want, strict=True):
            testing.agree(got, expected)


def test_reversed_as_two_programs(rng: np.random.Generator) -> None:
    """First the lse of keys over queries, then weights without a normaliser that load it."""
    q, k, v = rng.standard_normal((3, 2, 2, 5, 4))
    (over, _), (roles, _) = normalizers.program("over_queries"), dense.program()
    _, lse = run(parse(roles), [k, q, q])
    second = """attnkit 1
        program (q: bhsd, k: bhsd, v: bhsd) buffers(b0: f32[3]) {
          o = attend(q, k, v, scale = default) { score = exp(s - b0[b, h, kv_idx])  normalizer = none }
          return o
        }"""
    testing.agree(run(parse(second), [q, k, v], [lse])[0], run(parse(over), [q, k, v])[0])
