"""The gates themselves: what they let through, what they stop, and that they notice when they compare nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnkit import testing
from attnkit.testing import DISTRIBUTIONS, KAPPA, Dims, Expected, Pairs, qkv
from attnkit.testing.floats import rounded
from attnkit.variants import dense

DIMS = Dims(2, 4, 2, 40, 50, 16, 24)
CAUSAL: dict[str, Any] = {"mask": lambda p: p.kv_idx <= p.position}


def right(expected: Expected) -> tuple[Any, Any]:
    """The oracle's own result, rounded once."""
    return expected.o.astype(np.float32), expected.lse.astype(np.float32)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_naive_results_pass(distribution: str, rng: np.random.Generator) -> None:
    expected = testing.attention(*qkv(distribution, rng, DIMS), **CAUSAL)
    testing.check(*right(expected), expected)
    testing.check(expected.naive_o[0], expected.naive_lse[0], expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_wrong_element_in_any_place_is_seen(distribution: str, rng: np.random.Generator) -> None:
    """Off by twice what the bound allows where the bound is tightest, or by 1e-4 of the largest anywhere."""
    expected = testing.attention(*qkv(distribution, rng, DIMS), **CAUSAL)
    at = np.unravel_index(expected.o_terms.argmin(), expected.o.shape)
    u = 2.0**-24
    allowed = u * (KAPPA["cpu"].o * expected.o_terms[at] + 2 * abs(expected.o[at])) + 50 * 2.0**-149
    o, lse = right(expected)
    o[at] += 2 * np.float32(allowed) + np.spacing(o[at])
    assert testing.measure(o, lse, expected).o_kappa > KAPPA["cpu"].o
    with pytest.raises(AssertionError, match=r"o: (kappa is|error over)"):
        testing.check(o, lse, expected)
    for which, match in ((0, "o: error over"), (1, "lse: error over")):
        results = right(expected)
        results[which].flat[17] += np.float32(1e-3) * np.abs(results[which]).max()
        with pytest.raises(AssertionError, match=match):
            testing.check(*results, expected)


Wrong = Callable[[Any, Any], tuple[Any, Any]]
WRONG: dict[str, Wrong] = {
    "NaN": lambda o, lse: (np.where(np.arange(24) == 3, np.float32(np.nan), o), lse),
    "infinity": lambda o, lse: (o, np.where(np.arange(40) == 3, np.float32(np.inf), lse)),
    "a dead row": lambda o, lse: (o, np.where(np.arange(40) == 3, np.float32(-np.inf), lse)),
    "shape": lambda o, lse: (o[..., :-1], lse),
    "zeros": lambda o, lse: (np.zeros_like(o), lse),
    "base 2": lambda o, lse: (o, lse / np.float32(np.log(2))),
    "no lse": lambda o, lse: (o, np.zeros_like(lse)),
    "half precision": lambda o, lse: (o.astype(np.float16).astype(np.float32), lse),
    "rows swapped": lambda o, lse: (o[:, :, ::-1], lse),
    "heads swapped": lambda o, lse: (o[:, ::-1], lse[:, ::-1]),
    "one row's sum a bit off": lambda o, lse: (
        np.where(np.arange(40)[:, None] == 9, o * np.float32(1.00001), o),
        lse,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_stopped(name: str, rng: np.random.Generator) -> None:
    expected = testing.attention(*qkv("gaussian", rng, DIMS))
    with pytest.raises(AssertionError):
        testing.check(*WRONG[name](*right(expected)), expected)


def half_kernel(q: Any, k: Any, v: Any, dtype: str, wrong: str = "") -> tuple[Any, Any]:
    """Attention as a 16-bit kernel does it: float32 scores and sums, weights rounded for bfloat16 products."""

    def narrow(x: Any) -> Any:
        return rounded(x, dtype)

    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scale = np.float32(0.3)
    s = narrow(scale * q) @ k.mT if wrong == "scaled queries rounded" else scale * (q @ k.mT)
    if wrong == "scores rounded":
        s = narrow(s)
    top = s.max(3, keepdims=True)
    w = np.exp(s - top)
    total = w.sum(3, keepdims=True)
    w = narrow(w) if dtype == "bfloat16" or wrong == "weights rounded" else w
    if wrong == "sums of a tile rounded":
        o = sum(narrow(w[..., i::4] @ v[:, :, i::4]) for i in range(4))
    else:
        o = w @ v
    o = o / total
    if wrong == "truncated":
        o = np.sign(o) * np.minimum(abs(narrow(o)), abs(narrow(o * (1 - 2.0**-11))))
    return narrow(o), (top + np.log(total))[..., 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("distribution", ["gaussian", "outlier", "near_tie", "constant", "one_hot"])
def test_kernels_of_halves_pass(distribution: str, dtype: str, rng: np.random.Generator) -> None:
    tensors = qkv(distribution, rng, DIMS, dtype)
    expected = testing.attention(*tensors, scale=0.3, dtype=dtype)
    testing.check(*half_kernel(*tensors, dtype), expected)
    testing.check(rounded(expected.o, dtype).astype(np.float32), expected.lse.astype(np.float32), expected)


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        ("bfloat16", "scaled queries rounded"),
        ("bfloat16", "scores rounded"),
        ("float16", "scaled queries rounded"),
        ("float16", "scores rounded"),
        ("float16", "weights rounded"),
        ("float16", "sums of a tile rounded"),
        ("float16", "truncated"),
    ],
)
def test_kernels_of_halves_that_round_too_often_are_stopped(
    dtype: str, wrong: str, rng: np.random.Generator
) -> None:
    tensors = qkv("gaussian", rng, DIMS, dtype)
    expected = testing.attention(*tensors, scale=0.3, dtype=dtype)
    with pytest.raises(AssertionError, match="kappa"):
        testing.check(*half_kernel(*tensors, dtype, wrong), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_naive_results_of_halves_are_values_of_theirs(dtype: str, rng: np.random.Generator) -> None:
    expected = testing.attention(*qkv("gaussian", rng, DIMS, dtype), **CAUSAL, dtype=dtype)
    for o in expected.naive_o:
        np.testing.assert_array_equal(rounded(o, dtype), o)
    assert len(np.unique(expected.naive_o, axis=0)) > 1  # its sums are nearly exact


# Other attentions than the one asked for: the keywords of the oracle.
OTHER: dict[str, dict[str, Any]] = {
    "off by one": {"mask": lambda p: p.kv_idx < p.position},
    "top left": {"mask": lambda p: p.kv_idx <= p.q_idx},
    "no mask": {},
    "one pair missing": {"mask": lambda p: (p.kv_idx <= p.position) & ((p.q_idx != 20) | (p.kv_idx != 7))},
    "one extra pair": {"mask": lambda p: (p.kv_idx <= p.position) | ((p.q_idx == 20) & (p.kv_idx == 49))},
    "scale": {**CAUSAL, "scale": 0.25 * (1 + 1e-4)},
    "sink": {**CAUSAL, "sink": np.full(4, -9.0)},
    "score": {**CAUSAL, "score": lambda s, p: s + 1e-4 * p.kv_idx},
    "lengths": {**CAUSAL, "kv_lens": np.array([50, 49])},
}


@pytest.mark.parametrize("name", OTHER)
def test_another_attention_is_stopped(name: str, rng: np.random.Generator) -> None:
    tensors = qkv("gaussian", rng, DIMS)
    expected = testing.attention(*tensors, **CAUSAL)
    other = testing.attention(*tensors, **OTHER[name])
    with pytest.raises(AssertionError):
        testing.check(*right(other), expected)


def test_a_dead_row_is_exactly_zero(rng: np.random.Generator) -> None:
    expected = testing.attention(*qkv("gaussian", rng, DIMS), mask=lambda p: p.q_idx > 3)
    o, lse = right(expected)
    testing.check(o, lse, expected)
    o[1, 2, 3, 4] = 1e-40
    with pytest.raises(AssertionError, match="not exactly 0"):
        testing.check(o, lse, expected)


def test_vacuous_comparisons_are_mistrusted(rng: np.random.Generator) -> None:
    q, k, v = qkv("gaussian", rng, DIMS)
    dead = testing.attention(q, k, v, mask=lambda p: p.q_idx > 37)
    with pytest.raises(AssertionError, match=r"MISTRUSTED .*95% of the reference is zero"):
        testing.check(*right(dead), dead)
    testing.check(*right(dead), dead, mostly_dead=True)
    constant = testing.attention(q, k, np.ones_like(v), mask=lambda p: p.kv_idx == 0)
    with pytest.raises(AssertionError, match=r"MISTRUSTED .*constant"):
        testing.check(*right(constant), constant)


def test_nan_and_infinity_must_be_where_the_oracle_has_them(rng: np.random.Generator) -> None:
    q, k, v = qkv("gaussian", rng, DIMS)
    k[0, 1, 30], v[1, 0, 20, 5] = np.nan, np.inf
    expected = testing.attention(q, k, v, **CAUSAL)
    assert np.isnan(expected.o[0, 2:, 20:]).all()
    assert not np.isnan(expected.o[0, 2:, :20]).any()
    assert np.isposinf(expected.o[1, :2, 10:, 5]).all()
    testing.check(*right(expected), expected)
    clean = right(testing.attention(q, np.nan_to_num(k), v, **CAUSAL))
    with pytest.raises(AssertionError, match="NaN at"):
        testing.check(*clean, expected)
    blind = testing.attention(q, np.nan_to_num(k), v, score=lambda s, p: np.where(p.q_idx < 2, -np.inf, s))
    assert not blind.o[1, :2, :2].any()
    assert np.isposinf(blind.o[1, :2, 2:, 5]).all()


# --- inputs and oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_inputs_depend_on_the_seed_alone(distribution: str) -> None:
    first, again, other = (qkv(distribution, np.random.default_rng(seed), DIMS) for seed in (1, 1, 2))
    for x, y, shape in zip(first, again, DIMS.shapes, strict=True):
        assert x.shape == shape
        assert x.dtype == np.float32
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(first[2], other[2])


def test_inputs_are_what_their_names_say(rng: np.random.Generator) -> None:
    def scores(name: str) -> Any:
        q, k, _ = qkv(name, rng, DIMS._replace(kv_heads=4))
        return np.einsum("bhid,bhjd->bhij", q.astype(np.float64), k.astype(np.float64)) * 0.25

    assert 5e3 < np.std(scores("huge")) < 2e4
    assert np.ptp(scores("constant")) == 0
    assert 0 < np.ptp(scores("near_tie"), axis=3).max() < 1e-4
    assert 0 < np.abs(scores("tiny")).max() < np.finfo(np.float32).tiny
    assert np.mean(scores("one_hot") == 0) > 0.8
    outliers = qkv("outlier", rng, DIMS)[0]
    assert np.abs(outliers).max() > 20


@pytest.mark.parametrize(("q_len", "kv_len"), [(30, 30), (20, 45), (45, 20)])
@pytest.mark.parametrize("name", dense.CASES)
def test_the_oracle_is_the_family_equation(
    name: str, q_len: int, kv_len: int, rng: np.random.Generator
) -> None:
    """Two statements of the same equation, neither of which knows the other."""
    tensors = qkv("gaussian", rng, Dims(2, 4, 2, q_len, kv_len, 16, 24))
    parameters = dense.CASES[name](4, q_len, kv_len, rng)
    o, lse = dense.naive(*tensors, **parameters)
    seen = dense.visible(q_len, kv_len, **parameters)
    bias = np.broadcast_to(dense.added_bias(q_len, kv_len, **parameters), (4, q_len, kv_len))
    cap = parameters.get("softcap", np.inf)

    def score(s: Any, p: Pairs) -> Any:
        return (s if cap == np.inf else cap * np.tanh(s / cap)) + bias[p.h]

    expected = testing.attention(*(x.astype(np.float64) for x in tensors), score=score, mask=lambda p: seen)
    np.testing.assert_allclose(expected.o, o, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(expected.lse, lse, rtol=1e-12, atol=1e-13)
