"""The reference backend against values worked out by hand, and against the rules that define the semantics."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import attend
from attnkit.errors import AttnkitError
from attnkit.ir import alibi, bias, causal, document, prefix, softcap, window
from attnkit.ir.text import parse
from attnkit.ir.trace import Context, Param, build_text, trace

INF, NAN = np.inf, np.nan


def run(
    q: Any,
    k: Any,
    v: Any,
    score: Any = None,
    mask: Any = None,
    scale: float | None = 1.0,
    params: Any = (),
    **extra: Any,
) -> Any:
    traced = trace(score, mask, Context())
    program = parse(build_text(traced, scale=scale, **extra))
    return attend(program, q, k, v, traced.buffers, [p.value for p in traced.params])


def column(*values: Any) -> Any:
    return np.array(values, dtype=np.float64)[None, None, :, None]


def random(rng: np.random.Generator, *shape: Any) -> Any:
    return rng.standard_normal(shape)


def naive(
    q: Any,
    k: Any,
    v: Any,
    score: Any = lambda s, i, j: s,
    visible: Any = lambda i, j: True,
    scale: float | None = 1.0,
) -> Any:
    """One head, from the definition, with Python loops."""
    o, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -INF)
    for i in range(len(q)):
        z = [(score(scale * float(q[i] @ k[j]), i, j), j) for j in range(len(k)) if visible(i, j)]
        if z:
            total = sum(np.exp(s) for s, _ in z)
            o[i] = sum(np.exp(s) * v[j] for s, j in z) / total
            lse[i] = np.log(total)
    return o, lse


Q, K, V = column(1, 2), column(0, 1, -1), column(1, 2, 4)


def test_worked_example_bottom_right() -> None:
    o, lse = run(Q, K, V, mask=causal())
    np.testing.assert_allclose(o[0, 0, :, 0], [1.731059, 1.914442], atol=1e-6)
    np.testing.assert_allclose(lse[0, 0], [1.313262, 2.142932], atol=1e-6)


def test_worked_example_top_left() -> None:
    o, _ = run(Q, K, V, mask=causal("top_left"))
    np.testing.assert_allclose(o[0, 0, :, 0], [1.0, 1.880797], atol=1e-6)


def test_worked_example_sink() -> None:
    o, lse = run(Q, K, V, mask=causal(), sink=np.zeros(1, np.float32))
    np.testing.assert_allclose(o[0, 0, 1, 0], 1.713438, atol=1e-6)
    np.testing.assert_allclose(lse[0, 0, 1], 2.253856, atol=1e-6)


def test_sink_of_minus_infinity_is_no_sink() -> None:
    plain, with_sink = run(Q, K, V), run(Q, K, V, sink=np.full(1, -INF, np.float32))
    np.testing.assert_array_equal(plain[0], with_sink[0])
    np.testing.assert_array_equal(plain[1], with_sink[1])


def test_rows_that_see_nothing() -> None:
    o, lse = run(column(1, 2, 3), K[:, :, :1], V[:, :, :1], mask=causal())
    np.testing.assert_array_equal(o[0, 0, :, 0], [0, 0, 1])
    np.testing.assert_array_equal(lse[0, 0, :2], [-INF, -INF])
    o, lse = run(Q, K, V, mask=~window(None, None), sink=np.full(1, 0.5, np.float32))
    np.testing.assert_array_equal(o, np.zeros_like(o))
    np.testing.assert_array_equal(lse, np.full_like(lse, 0.5))
    o, lse = run(Q, K, V, score=lambda s, b, h, q, k: s.where(k < 0, -INF))
    np.testing.assert_array_equal(o, np.zeros_like(o))
    np.testing.assert_array_equal(lse, np.full_like(lse, -INF))


def test_empty_sequences() -> None:
    o, lse = run(Q, K[:, :, :0], V[:, :, :0])
    np.testing.assert_array_equal(o, np.zeros((1, 1, 2, 1)))
    np.testing.assert_array_equal(lse, np.full((1, 1, 2), -INF))
    assert run(Q[:, :, :0], K, V)[0].shape == (1, 1, 0, 1)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_masked_pair_does_not_exist(bad: Any) -> None:
    k, v = K.copy(), V.copy()
    k[..., 2, :], v[..., 2, :] = bad, bad
    o, lse = run(Q, k, v, mask=causal())
    clean, clean_lse = run(Q, K, V, mask=causal())
    np.testing.assert_array_equal(o[0, 0, 0], clean[0, 0, 0])
    np.testing.assert_array_equal(lse[0, 0, 0], clean_lse[0, 0, 0])
    if np.isnan(bad):
        assert np.isnan(o[0, 0, 1]).all()


def test_nan_in_a_query_stays_in_its_row() -> None:
    q = Q.copy()
    q[..., 0, :] = NAN
    o, lse = run(q, K, V)
    assert np.isnan(o[0, 0, 0]).all()
    assert np.isnan(lse[0, 0, 0])
    np.testing.assert_array_equal(o[0, 0, 1], run(Q, K, V)[0][0, 0, 1])


def test_minus_infinite_score_has_weight_zero_but_the_pair_exists() -> None:
    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s.where(kv_idx != 1, -INF)

    o, _ = run(Q, K, V, score=score)
    np.testing.assert_allclose(o, run(Q, K[:, :, ::2], V[:, :, ::2])[0])
    v = V.copy()
    v[..., 1, :] = NAN
    assert np.isnan(run(Q, K, v, score=score)[0]).all()


def test_huge_logits_do_not_overflow() -> None:
    o, lse = run(1e4 * Q, K, V)
    np.testing.assert_allclose(o[0, 0, :, 0], [2, 2])
    np.testing.assert_allclose(lse[0, 0], [1e4, 2e4])


def test_grouped_heads(rng: np.random.Generator) -> None:
    q, k, v = random(rng, 2, 6, 5, 4), random(rng, 2, 2, 7, 4), random(rng, 2, 2, 7, 3)
    o, lse = run(q, k, v, scale=None)
    for b in range(2):
        for h in range(6):
            expected = naive(q[b, h], k[b, h // 3], v[b, h // 3], scale=0.5)
            np.testing.assert_allclose(o[b, h], expected[0])
            np.testing.assert_allclose(lse[b, h], expected[1])


def test_mods_against_their_equations(rng: np.random.Generator) -> None:
    q, k, v = random(rng, 1, 2, 4, 3), random(rng, 1, 2, 6, 3), random(rng, 1, 2, 6, 2)
    slopes = np.array([0.5, 0.25], np.float32)
    table = rng.standard_normal((2, 4, 6)).astype(np.float32)
    q_ids, kv_ids = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 3])
    cap = Param("cap", 2.0)
    scores = {
        "softcap": (softcap(2.0), lambda s, i, j, h: 2 * np.tanh(s / 2)),
        "param": (softcap(cap), lambda s, i, j, h: 2 * np.tanh(s / 2)),
        "no cap": (softcap(0), lambda s, i, j, h: s),
        "alibi": (alibi(slopes), lambda s, i, j, h: s - float(slopes[h]) * abs(i + 2 - j)),
        "alibi per batch": (alibi(slopes[None]), lambda s, i, j, h: s - float(slopes[h]) * abs(i + 2 - j)),
        "bias": (bias(table), lambda s, i, j, h: s + float(table[h, i, j])),
        "bias of size 1": (bias(table[None, :1, :, :1]), lambda s, i, j, h: s + float(table[0, i, 0])),
        "bias of two dimensions": (bias(table[0]), lambda s, i, j, h: s + float(table[0, i, j])),
    }
    masks = {
        "causal": (causal(), lambda i, j: j <= i + 2),
        "top left": (causal("top_left"), lambda i, j: j <= i),
        "window": (window(1, 2), lambda i, j: i + 2 - 1 <= j <= i + 2 + 2),
        "left": (window(1, None), lambda i, j: i + 2 - 1 <= j),
        "right": (window(-1, 1), lambda i, j: j <= i + 2 + 1),
        "document": (document(q_ids, kv_ids), lambda i, j: q_ids[i] == kv_ids[j]),
        "document per batch": (document(q_ids[None], kv_ids[None]), lambda i, j: q_ids[i] == kv_ids[j]),
        "prefix": (prefix(3) | causal("top_left"), lambda i, j: j < 3 or j <= i),
        "prefix per batch": (prefix(np.array([3])), lambda i, j: j < 3),
        "and not": (causal() & ~window(1), lambda i, j: j <= i + 2 and not i + 1 <= j <= i + 2),
        "function": ((lambda b, h, q, k: k != 2) & causal(), lambda i, j: j != 2 and j <= i + 2),
    }
    for score, score_by_hand in scores.values():
        o, lse = run(q, k, v, score=score)
        for h in range(2):
            expected = naive(q[0, h], k[0, h], v[0, h], score=lambda s, i, j: score_by_hand(s, i, j, h))  # noqa: B023
            np.testing.assert_allclose(o[0, h], expected[0], rtol=1e-12)
            np.testing.assert_allclose(lse[0, h], expected[1], rtol=1e-12)
    for mask, visible in masks.values():
        o, lse = run(q, k, v, mask=mask)
        for h in range(2):
            expected = naive(q[0, h], k[0, h], v[0, h], visible=visible)
            np.testing.assert_allclose(o[0, h], expected[0], rtol=1e-12)
            np.testing.assert_allclose(lse[0, h], expected[1], rtol=1e-12)


def test_packed_is_a_loop_over_segments(rng: np.random.Generator) -> None:
    q, k, v = random(rng, 1, 2, 9, 4), random(rng, 1, 1, 12, 4), random(rng, 1, 1, 12, 3)
    cu_q, cu_kv = np.array([0, 3, 3, 8], np.int32), np.array([0, 5, 6, 11], np.int32)

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s + b * 0.1

    o, lse = run(q, k, v, score=score, mask=causal(), cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    for n in range(3):
        rows, cols = slice(cu_q[n], cu_q[n + 1]), slice(cu_kv[n], cu_kv[n + 1])
        part = [q[:, :, rows], k[:, :, cols], v[:, :, cols]]
        expected = run(*part, score=lambda s, b, h, q_idx, kv_idx: s + 0.1 * n, mask=causal())  # noqa: B023
        np.testing.assert_allclose(o[:, :, rows], expected[0])
        np.testing.assert_allclose(lse[:, :, rows], expected[1])
    np.testing.assert_array_equal(o[:, :, 8:], 0)  # tokens of no segment
    np.testing.assert_array_equal(lse[:, :, 8:], -INF)


def test_padded_is_a_loop_over_batches(rng: np.random.Generator) -> None:
    q, k, v = random(rng, 3, 1, 2, 4), random(rng, 3, 1, 6, 4), random(rng, 3, 1, 6, 3)
    lens = np.array([6, 0, 3], np.int32)
    for b, n in enumerate(lens):
        k[b, :, n:], v[b, :, n:] = NAN, NAN
    o, lse = run(q, k, v, mask=causal(), kv_lens=lens)
    for b, n in enumerate(lens):
        expected = run(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], mask=causal())
        np.testing.assert_allclose(o[b], expected[0][0])
        np.testing.assert_allclose(lse[b], expected[1][0])


def test_loads_outside_their_buffer_matter_only_where_visible() -> None:
    table = np.arange(3, dtype=np.float32)

    def relative(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s + q_idx.context.load(table, q_idx - kv_idx)

    q = column(1, 2, 3)
    run(q, K, V, score=relative, mask=causal())
    with pytest.raises(AttnkitError, match="AK601"):
        run(q, K, V, score=relative)
    for threshold, code in ((-1, "AK601"), (0, None)):  # an index outside reads the nearest element, a 0

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, above: int = threshold) -> Any:
            return q_idx.context.load(table, q_idx - kv_idx) > above

        if code is None:
            run(q, K, V, mask=mask)
        else:
            with pytest.raises(AttnkitError, match=code):
                run(q, K, V, mask=mask)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"q": Q[0]}, "AK403"),
        ({"v": V[:, :, :2]}, "AK403"),
        ({"k": np.zeros((1, 2, 3, 1)), "v": np.zeros((1, 2, 3, 1))}, "AK407"),
        ({"kv_lens": np.array([4], np.int32)}, "AK602"),
        ({"kv_lens": np.array([1, 1], np.int32)}, "AK602"),
        (
            {"cu_seqlens_q": np.array([0, 2], np.int32), "cu_seqlens_kv": np.array([0, 2, 1], np.int32)},
            "AK602",
        ),
        (
            {"cu_seqlens_q": np.array([0, 2], np.int32), "cu_seqlens_kv": np.array([0, 1, 2], np.int32)},
            "AK602",
        ),
    ],
)
def test_refuses(change: Any, code: str) -> None:
    with pytest.raises(AttnkitError) as caught:
        run(**({"q": Q, "k": K, "v": V} | change))
    assert caught.value.code == code


def test_refuses_the_wrong_number_of_buffers() -> None:
    program = parse(build_text(trace(None, document(np.arange(3)), Context())))
    with pytest.raises(AttnkitError, match="AK401"):
        attend(program, Q, K, V)
