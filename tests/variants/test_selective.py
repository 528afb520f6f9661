"""Selective attention: by hand, as an equation, step by step, and as a program."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from attnkit import testing
from attnkit.backends.reference import gradients, run
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.variants import dense, selective

pytestmark = pytest.mark.shows

# Logits of one head, causal; the queries are rows of the identity times them, the keys unit vectors.
LOGITS = np.array([[0.5, 0, 0, 0], [2, 1, 0, 0], [1, 3, 0.2, 0], [0, -1, 2, 1]])


def by_hand() -> tuple[Any, Any, Any]:
    """q, k, v of one head with ``q k^T`` equal to `LOGITS`."""
    return LOGITS[None, None], np.eye(4)[None, None], np.eye(4)[None, None]


def qkv(
    rng: np.random.Generator, b: int = 2, hq: int = 4, hkv: int = 2, sq: int = 6, skv: int = 6, d: int = 5
) -> Any:
    q, k = rng.standard_normal((b, hq, sq, d)), rng.standard_normal((b, hkv, skv, d))
    return 2 * q, k, rng.standard_normal((b, hkv, skv, 3))


# --- by hand ----------------------------------------------------------------------------------------------


def test_worked_numbers() -> None:
    """S_21 = 3 and S_32 = 2 alone; row 3 sees F = [0, 3, 0, 0]."""
    got = selective.naive(*by_hand(), scale=1.0)
    np.testing.assert_array_equal(got.f[0, 3], [0, 3, 0, 0])
    np.testing.assert_array_equal(got.carry[0], [0, 3, 2, 0])
    weights = got.o[0, 0]  # the values are unit vectors
    np.testing.assert_allclose(weights[3], [0.089882, 0.001646, 0.664146, 0.244326], atol=6e-7)
    plain, _ = dense.naive(*by_hand(), scale=1.0, causal=True)
    np.testing.assert_allclose(plain[0, 0, 3], [0.087144, 0.032059, 0.643914, 0.236883], atol=6e-7)
    np.testing.assert_allclose(weights[:3], plain[0, 0, :3], atol=1e-15)  # F is 0 there


def test_memory_loss_by_hand() -> None:
    """Rows see F = 0 but for F_31 = 3, which is beyond tau: the worst row remembers 3 of 4 tokens."""
    f = selective.naive(*by_hand(), scale=1.0).f
    assert selective.memory_loss(f).tolist() == [3 / 4]
    assert selective.memory_loss(f, tau=6.0).tolist() == [3.5 / 4]


# --- laws of the equation ---------------------------------------------------------------------------------


def test_the_loop_is_the_equation(rng: np.random.Generator) -> None:
    """F = exclusive cumulative sum of S over queries; rows 0 and 1 and column 0 are 0; F never falls."""
    q, k, v = qkv(rng, hq=2, hkv=2)
    got = selective.naive(q, k, v)
    n = q.shape[2]
    causal = np.tril(np.ones((n, n), bool))
    logits = q @ np.swapaxes(k, 2, 3) * q.shape[3] ** -0.5
    s = np.where(np.tril(causal, -1), np.maximum(logits[:, 0], 0), 0)
    s[:, :, 0] = 0
    f = np.cumsum(s, axis=1) - s
    np.testing.assert_allclose(np.where(causal, got.f, 0), np.where(causal, f, 0), atol=1e-14)
    z = np.where(causal, logits - f[:, None], -np.inf)
    weights = np.exp(z - z.max(axis=3, keepdims=True))
    expected = weights / weights.sum(axis=3, keepdims=True) @ v
    np.testing.assert_allclose(got.o, expected, atol=1e-14)
    assert not f[:, :2].any()
    assert not f[:, :, 0].any()
    assert not np.diagonal(f, axis1=1, axis2=2).any()
    assert (np.diff(f, axis=1) >= 0).all()
    assert f.max() > 0.5


def test_a_head_that_selects_nothing_is_dense(rng: np.random.Generator) -> None:
    """A^0 <= 0 everywhere: no head forgets anything."""
    q, k, v = qkv(rng)
    q[:, 0], k[:, 0] = -abs(q[:, 0]), abs(k[:, 0])
    got = selective.naive(q, k, v)
    expected, lse = dense.naive(q, k, v, causal=True)
    np.testing.assert_allclose(got.o, expected, atol=1e-14)
    np.testing.assert_allclose(got.lse, lse, atol=1e-14)
    assert not got.carry.any()


@pytest.mark.parametrize("budget", [None, 2, 3, 5])
def test_steps_are_the_whole(rng: np.random.Generator, budget: int | None) -> None:
    """Chunks of any size with the carry handed on, and single steps, give the same bits' worth."""
    q, k, v = qkv(rng, sq=9, skv=9)
    whole = selective.naive(q, k, v, budget=budget)
    for cuts in ([4, 9], [1, 2, 7, 9], list(range(1, 10))):
        carry, start = np.zeros((2, 0)), 0
        for stop in cuts:
            carry = np.pad(carry, ((0, 0), (0, stop - start)))
            part = selective.naive(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], carry, budget=budget)
            np.testing.assert_allclose(part.o, whole.o[:, :, start:stop], atol=1e-13)
            np.testing.assert_allclose(part.lse, whole.lse[:, :, start:stop], atol=1e-13)
            carry, start = part.carry, stop
        np.testing.assert_allclose(carry, whole.carry, atol=1e-13)


def test_a_budget_forgets_for_good(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, sq=10, skv=10)
    unlimited = selective.naive(q, k, v)
    for budget in (10, 50):
        for got, want in zip(selective.naive(q, k, v, budget=budget), unlimited, strict=True):
            np.testing.assert_array_equal(got, want)
    pruned = selective.naive(q, k, v, budget=4)
    seen = pruned.f < np.inf
    assert seen.sum(axis=2).max() == 4
    assert (seen.sum(axis=2) == np.minimum(np.arange(10) + 1, 4)).all()
    assert seen[:, :, 0].all()
    assert np.diagonal(seen, axis1=1, axis2=2).all()
    causal = np.tril(np.ones((10, 10), bool))
    assert ((np.diff(seen.astype(int), axis=1) <= 0) | ~causal[:-1]).all(), "what is gone stays gone"


def test_a_budget_by_hand() -> None:
    """Budget 3: query 3 forgets key 1 (F = 3, the largest). With no selection the oldest goes, never the first."""
    got = selective.naive(*by_hand(), scale=1.0, budget=3)
    assert np.flatnonzero(got.f[0, 3] < np.inf).tolist() == [0, 2, 3]
    assert got.carry[0].tolist() == [0, np.inf, 2, 0]
    tied = selective.naive(np.zeros((1, 1, 5, 2)), np.ones((1, 1, 5, 2)), np.ones((1, 1, 5, 2)), budget=3)
    assert [np.flatnonzero(row < np.inf).tolist() for row in tied.f[0]] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 2, 3],
        [0, 3, 4],
    ]


def test_documents_start_anew(rng: np.random.Generator) -> None:
    """Packed sequences are the loop over them: each has a first token of its own, and no carry crosses."""
    q, k, v = qkv(rng, b=1, sq=11, skv=11)
    cu = np.array([0, 4, 4, 5, 11], np.int32)
    packed = selective.naive(q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu)
    for start, stop in pairwise(cu):
        part = (slice(None), slice(None), slice(start, stop))
        alone = selective.naive(q[part], k[part], v[part])
        np.testing.assert_array_equal(packed.o[part], alone.o)
        np.testing.assert_array_equal(packed.carry[:, start:stop], alone.carry)
    assert packed.carry[0, 0] == packed.carry[0, 4] == packed.carry[0, 5] == 0


# --- as programs ------------------------------------------------------------------------------------------

# (b, hq, hkv, sq, skv): grouped heads, a chunk at the end, queries before the first key, nothing to do
SHAPES = [(2, 4, 2, 6, 6), (1, 2, 1, 3, 7), (1, 3, 3, 6, 4), (1, 2, 1, 0, 3), (1, 2, 1, 3, 0)]


def check(q: Any, k: Any, v: Any, initial: Any, **parameters: Any) -> selective.Selected:
    """The program's results are those of the equation, which are returned."""
    text, buffers = selective.program(initial=initial is not None, **parameters)
    want = selective.naive(q, k, v, initial, **parameters)
    inputs = [q, k, v] if initial is None else [q, k, v, initial]
    for field, got in zip(("o", "lse", "carry"), run(parse(text), inputs, buffers), strict=True):
        testing.agree(got, getattr(want, field), what=field)
    return want


@pytest.mark.parametrize("name", selective.CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_program_is_the_equation(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> None:
    b, hq, _, sq, skv = shape
    q, k, v = qkv(rng, *shape)
    parameters = selective.CASES[name](hq, sq, skv, rng)
    initial = abs(rng.standard_normal((b, skv)))
    check(q, k, v, initial, **parameters)
    want = check(q, k, v, None, **parameters)
    memory, buffers = selective.memory_program(tau=0.7, **parameters)
    (rows,) = run(parse(memory), [q, k, v], buffers)
    for head in range(hq):
        testing.agree(rows[:, head, :, 0], np.sum(1 - np.minimum(want.f, 0.7) / 0.7, axis=2))


@pytest.mark.parametrize("name", selective.CASES)
def test_ragged_programs(rng: np.random.Generator, name: str) -> None:
    """Packed documents, an empty one among them, and padded keys; what lies beyond a length reaches nothing."""
    parameters = selective.CASES[name](4, 6, 6, rng)
    q, k, v = qkv(rng, b=1, sq=9, skv=11)
    cu_q, cu_kv = np.array([0, 3, 3, 4, 9], np.int32), np.array([0, 4, 4, 5, 11], np.int32)
    before = abs(rng.standard_normal((1, 11)))
    lengths: Any = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    check(q, k, v, before, **parameters, **lengths)
    q, k, v = qkv(rng, b=3, sq=4, skv=8)
    lens = np.array([7, 4, 5], np.int32)
    before = abs(rng.standard_normal((3, 8)))
    for b, length in enumerate(lens):
        k[b, :, length:], v[b, :, length:], before[b, length:] = np.nan, np.inf, 0
    check(q, k, v, before, **parameters, kv_lens=lens)


def test_the_accumulator_of_the_program() -> None:
    """F itself, read as a score: sums of earlier rows alone, not blurred by what comes with its own row."""
    q, k, eye = by_hand()
    body = (
        selective.program()[0]
        .replace("score = t - f", "score = f")
        .replace("normalizer = softmax", "normalizer = none")
    )
    program = parse(
        body.replace("scale = default", "scale = 1.0")
        .replace("(o, lse, carry)", "(o, carry)")
        .replace("o, lse, c", "o, c")
    )
    f, carry = run(program, [q, k, eye])
    np.testing.assert_array_equal(f[0, 0], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 3, 0, 0]])
    np.testing.assert_array_equal(carry, [[0, 3, 2, 0]])
    huge = q.copy()
    huge[0, 0, 3, 1] = 1e30
    f, carry = run(program, [huge, k, eye])
    np.testing.assert_array_equal(f[0, 0, 3], [0, 3, 0, 0])
    np.testing.assert_array_equal(carry, [[0, 1e30, 2, 0]])


@pytest.mark.parametrize("budget", [None, 4, 50])
def test_a_key_that_starts_with_inf_is_gone(rng: np.random.Generator, budget: int | None) -> None:
    """A cache may use its slot for anything: it reaches neither results nor gradients, and does not count."""
    q, k, v = qkv(rng, sq=3, skv=9)
    initial = abs(rng.standard_normal((2, 9)))
    initial[0, 2] = initial[1, 4] = initial[1, 5] = np.inf
    want = check(q, k, v, initial, budget=budget)
    for b, j in ((0, 2), (1, 4), (1, 5)):
        k[b, :, j], v[b, :, j] = np.nan, np.inf
    program = parse(selective.program(initial=True, budget=budget)[0])
    for field, got in zip(("o", "lse", "carry"), run(program, [q, k, v, initial]), strict=True):
        testing.agree(got, getattr(want, field), what=field)
    found = gradients(program, [q, k, v, initial], [np.ones_like(x) for x in want[:3]])
    assert all(np.isfinite(x).all() for x in found.inputs)


def test_dropout_does_not_touch_the_selection(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    text = selective.program()[0]
    o, lse, carry = run(parse(text), [q, k, v])
    dropped = run(parse(text.replace("head = 0", "head = 0, dropout = 0.5")), [q, k, v], seed=3)
    testing.agree(dropped[1], lse)
    testing.agree(dropped[2], carry)
    assert abs(dropped[0] - o).max() > 0.1


def test_an_initial_carry_of_the_wrong_size(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    for size in (5, 7):
        with pytest.raises(AttnkitError) as caught:
            run(parse(selective.program(initial=True)[0]), [q, k, v, np.zeros((2, size))])
        assert caught.value.code == "AK403"


@pytest.mark.parametrize("budget", [None, 3])
def test_program_steps_are_the_whole(rng: np.random.Generator, budget: int | None) -> None:
    """Chunked prefill and decoding with the carry handed on."""
    q, k, v = qkv(rng, sq=9, skv=9)
    program = parse(selective.program(initial=True, budget=budget)[0])
    o, lse, last = run(program, [q, k, v, np.zeros((2, 9))])
    for cuts in ([4, 9], list(range(1, 10))):
        carry, start = np.zeros((2, 0)), 0
        for stop in cuts:
            carry = np.pad(carry, ((0, 0), (0, stop - start)))
            part = run(program, [q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], carry])
            testing.agree(part[0], o[:, :, start:stop])
            testing.agree(part[1], lse[:, :, start:stop])
            carry, start = part[2], stop
        testing.agree(carry, last)


@pytest.mark.parametrize("name", selective.CASES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 6, 6), (1, 2, 2, 3, 5)], ids=str)
def test_gradients(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> None:
    """Of q, k, v and the initial carry, with cotangents on o, lse and the carry."""
    b, hq, _, sq, skv = shape
    q, k, v = qkv(rng, *shape, d=3)
    parameters = selective.CASES[name](hq, sq, skv, rng)
    inputs = [q, k, v, abs(rng.standard_normal((b, skv)))]
    cotangents = [rng.standard_normal(x) for x in ((b, hq, sq, 3), (b, hq, sq), (b, skv))]
    want = testing.differences(lambda *x: selective.naive(*x, **parameters)[:3], inputs, cotangents)
    carried = selective.naive(*inputs, **parameters).carry
    cotangents[2][~np.isfinite(carried)] = 0  # the carry of what is forgotten is inf
    got = gradients(parse(selective.program(initial=True, **parameters)[0]), inputs, cotangents)
    for what, a, b_ in zip(("q", "k", "v", "initial"), got.inputs, want, strict=True):
        testing.agree(a, b_, 1e-6, what)


def test_gradient_of_the_memory_loss(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng, 1, 2, 1, 6, 6, d=3)
    cotangent = np.zeros((1, 2, 6, 3))
    cotangent[:, 0, :, 0] = rng.standard_normal((1, 6))

    def rows(q: Any, k: Any) -> list[Any]:
        f = selective.naive(q, k, v).f
        return [np.sum(1 - np.minimum(f, 2.0) / 2.0, axis=2)]

    want = testing.differences(rows, [q, k], [cotangent[:, 0, :, 0]])
    got = gradients(parse(selective.memory_program(2.0)[0]), [q, k, v], [cotangent])
    for a, b in zip(got.inputs[:2], want, strict=True):
        testing.agree(a, b, 1e-6)
    assert abs(want[0]).max() > 0.01  # type: ignore[arg-type]


def test_backward_in_closed_form(rng: np.random.Generator) -> None:
    """dF = -sum_h dZ, dS its reverse cumulative sum over later queries, joined to head 0 where A^0 > 0: not where it is 0."""
    q, k, v = qkv(rng, 1, 2, 2, 6, 6, d=4)
    k[:, 0, 2] = 0  # head 0's logits against key 2 are exactly 0: relu'(0) = 0
    y = rng.standard_normal((1, 2, 6, 3))
    n, scale = 6, 0.5
    causal = np.tril(np.ones((n, n), bool))
    logits = scale * q @ np.swapaxes(k, 2, 3)
    selects = np.tril(causal, -1) & (np.arange(n) >= 1) & (logits[0, 0] > 0)
    s = np.where(selects, logits[0, 0], 0)
    f = np.cumsum(s, axis=0) - s
    z = np.where(causal, logits - f, -np.inf)
    p = np.exp(z - np.logaddexp.reduce(z, axis=3)[..., None])
    dp = y @ np.swapaxes(v, 2, 3)
    dz = p * (dp - np.sum(p * dp, axis=3, keepdims=True))
    df = -dz[0].sum(axis=0)
    ds = np.flip(np.cumsum(np.flip(df, 0), axis=0), 0) - df
    da = dz.copy()
    da[0, 0] += np.where(selects, ds, 0)
    got = gradients(parse(selective.program()[0]), [q, k, v], [y, np.zeros((1, 2, 6)), np.zeros((1, 6))])
    testing.agree(got.inputs[0], scale * da @ k)
    testing.agree(got.inputs[1], scale * np.swapaxes(da, 2, 3) @ q)
    testing.agree(got.inputs[2], np.swapaxes(p, 2, 3) @ y)


def test_a_nan_query_spoils_its_own_row(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    clean, *_ = run(parse(selective.program()[0]), [q, k, v])
    q[:, 0, 3] = np.nan
    o, _, carry = run(parse(selective.program()[0]), [q, k, v])
    assert np.isnan(o[:, 0, 3]).all()
    assert np.isfinite(np.delete(o, 3, axis=2)).all()
    assert np.isfinite(carry).all()
    testing.agree(o[:, :, :3], clean[:, :, :3])
