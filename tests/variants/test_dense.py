"""The dense family beyond what the kernels are tested with: sinks, merging, dropout, layouts, and every gradient."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from attnkit import testing
from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.ir.trace import param
from attnkit.variants import dense
from attnkit.variants.dropout import kept

pytestmark = pytest.mark.shows
SEED = 0x0123_4567_89AB_CDEF  # of dropout


def qkv(rng: np.random.Generator, sq: int = 5, skv: int = 7) -> Any:
    return (
        rng.standard_normal((2, 4, sq, 6)),
        rng.standard_normal((2, 2, skv, 6)),
        rng.standard_normal((2, 2, skv, 3)),
    )


# --- by hand ----------------------------------------------------------------------------------------------

Q, K, V = (np.array(x, float).reshape(1, 1, -1, 1) for x in ([1, 2], [0, 1, -1], [1, 2, 4]))
# (parameters, o of both queries, lse of both queries)
BY_HAND: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    "bottom right": ({"causal": True}, [1.731059, 1.914442], [1.313262, 2.142932]),
    "first two keys": ({"prefix": 2}, [1.731059, 1.880797], [1.313262, 2.126928]),
    "sink": ({"causal": True, "sink": np.zeros(1, np.float32)}, [1.364176, 1.713438], [1.551445, 2.253856]),
    "sink of -inf": (
        {"causal": True, "sink": np.array([-np.inf], np.float32)},
        [1.731059, 1.914442],
        [1.313262, 2.142932],
    ),
    "sink alone": ({"prefix": 0, "sink": np.array([0.5], np.float32)}, [0, 0], [0.5, 0.5]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_worked_numbers(name: str) -> None:
    parameters, o, lse = BY_HAND[name]
    got, got_lse = dense.naive(Q, K, V, scale=1.0, **parameters)
    np.testing.assert_allclose(got.ravel(), o, atol=6e-7)
    np.testing.assert_allclose(got_lse.ravel(), lse, atol=6e-7)


# --- laws of the equation ---------------------------------------------------------------------------------


def test_against_torch(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    bias = rng.standard_normal((4, 5, 7))
    got, _ = dense.naive(q, k, v, bias=bias)
    want = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (q, k, v)), attn_mask=torch.from_numpy(bias), enable_gqa=True
    )
    np.testing.assert_allclose(got, want, atol=1e-14)


def test_sink_takes_its_share(rng: np.random.Generator) -> None:
    """Rows sum to 1 - exp(sink - lse); the sink is one more key with a value of 0."""
    q, k, _ = qkv(rng)
    ones, sink = np.ones((2, 2, 7, 1)), rng.standard_normal(4)
    mass, lse = dense.naive(q, k, ones, causal=True, sink=sink)
    np.testing.assert_allclose(mass[..., 0], 1 - np.exp(sink[:, None] - lse), rtol=1e-12)
    _, plain = dense.naive(q, k, ones, causal=True)
    np.testing.assert_allclose(lse, np.logaddexp(plain, sink[:, None]), rtol=1e-12)


def test_packed_is_the_loop(rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((1, h, n, 4)) for h, n in ((2, 9), (1, 11), (1, 11)))
    cu_q, cu_kv = np.array([0, 3, 3, 5, 9], np.int32), np.array([0, 2, 5, 5, 11], np.int32)
    got, lse = dense.naive(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    for rows, keys in zip(pairwise(cu_q), pairwise(cu_kv), strict=True):
        part = [x[:, :, slice(*cut)] for x, cut in ((q, rows), (k, keys), (v, keys))]
        want, want_lse = dense.naive(*part, causal=True)
        np.testing.assert_array_equal(got[:, :, slice(*rows)], want)
        np.testing.assert_array_equal(lse[:, :, slice(*rows)], want_lse)
    assert (lse[:, :, 3:5] == -np.inf).all()


def test_dropout_is_thinned_weights(rng: np.random.Generator) -> None:
    """lse stays; weights are dropped after normalising, what is left grows; p = 0 is nothing and p = 1 everything."""
    q, k, _ = qkv(rng, 6, 6)
    eye = np.broadcast_to(np.eye(6), (2, 2, 6, 6))
    plain, lse = dense.naive(q, k, eye, causal=True)
    thinned, same_lse = dense.naive(q, k, eye, causal=True, dropout=0.25, seed=11)
    np.testing.assert_array_equal(same_lse, lse)
    keep = np.stack([[kept(11, 0.25, b, h, 6, 6) for h in range(4)] for b in range(2)])
    np.testing.assert_allclose(thinned, np.where(keep, plain / 0.75, 0), atol=1e-15)
    np.testing.assert_array_equal(dense.naive(q, k, eye, causal=True, dropout=0.0)[0], plain)
    assert not dense.naive(q, k, eye, causal=True, dropout=1.0)[0].any()


# --- as programs ------------------------------------------------------------------------------------------


def members(rng: np.random.Generator, sq: int, skv: int) -> dict[str, dict[str, Any]]:
    """Parameters of `dense.program` and `dense.naive`: the named members, and what they are not about."""

    def floats(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    named = {
        name: dict(make(4, sq, skv, rng))
        for name, make in dense.CASES.items()
        if skv > 1 or name != "document"
    }
    return named | {
        "sink": {"causal": True, "sink": floats(4)},
        "bias": {"bias": floats(2, 4, sq, skv), "causal": True},
        "bias of a row": {"bias": floats(1, sq, skv)},
        "dropout": {"causal": True, "dropout": 0.3},
        "dropout of nothing": {"dropout": 0.0},
        "dropout of everything": {"causal": True, "dropout": 1.0},
        "everything": {
            "causal": True, "window": (3, 0), "softcap": 2.0, "alibi_slopes": floats(4),
            "bias": floats(sq, skv), "sink": floats(4), "dropout": 0.2,
        },
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 7), (7, 4), (1, 6), (0, 3), (3, 0)], ids=str)
def test_the_program_is_the_equation(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    q, k, v = qkv(rng, *shape)
    for name, parameters in members(rng, *shape).items():
        text, buffers = dense.program(**parameters)
        want = dense.naive(q, k, v, seed=SEED, **parameters)
        for got, expected in zip(run(parse(text), [q, k, v], buffers, seed=SEED), want, strict=True):
            testing.agree(got, expected, what=name)


@pytest.mark.parametrize("name", BY_HAND)
def test_worked_numbers_of_the_program(name: str) -> None:
    parameters, o, lse = BY_HAND[name]
    text, buffers = dense.program(**parameters)
    for got, want in zip(run(parse(text), [Q, K, V], buffers), (o, lse), strict=True):
        np.testing.assert_allclose(got.ravel(), want, atol=6e-7)


def test_top_left_by_hand() -> None:
    """The other alignment is another mask."""
    text = "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\no, l = attend(q, k, v, scale = 1.0) { mask = kv_idx <= q_idx }\nreturn o\n}"
    np.testing.assert_allclose(run(parse(text), [Q, K, V])[0].ravel(), [1.0, 1.880797], atol=6e-7)


def test_saturation_is_not_nan(rng: np.random.Generator) -> None:
    """Caps that are reached and distances that are far: weights of exactly 0, gradients that are finite."""
    q, k, v = qkv(rng)
    slopes = np.full(4, 1e4, np.float32)
    for parameters in ({"softcap": 2.0}, {"alibi_slopes": slopes}, {"softcap": 5.0, "alibi_slopes": slopes}):
        text, buffers = dense.program(**parameters)  # type: ignore[arg-type]
        inputs = [1e4 * q, 1e4 * k, v] if "softcap" in parameters else [q, k, v]
        o, lse = run(parse(text), inputs, buffers)
        got = gradients(parse(text), inputs, [np.ones_like(o), np.ones_like(lse)], buffers)
        assert all(np.isfinite(x).all() for x in (o, lse, *got.inputs))
        if "softcap" in parameters:
            assert abs(got.inputs[0]).max() < 1e-6


def test_ragged_programs(rng: np.random.Generator) -> None:
    """Packed sequences are the loop, padded ones the slices; dropout and indices are the sequence's own."""
    q, k, v = (rng.standard_normal((1, h, n, 4)) for h, n in ((4, 9), (2, 11), (2, 11)))
    cu_q, cu_kv = np.array([0, 3, 3, 5, 9], np.int32), np.array([0, 2, 5, 5, 11], np.int32)
    slopes = dense.alibi_slopes(4)
    parameters: dict[str, Any] = {"causal": True, "alibi_slopes": slopes, "dropout": 0.3}
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    text, buffers = dense.program(**parameters, **lengths)
    want = dense.naive(q, k, v, seed=SEED, **parameters, **lengths)
    for got, expected in zip(run(parse(text), [q, k, v], buffers, seed=SEED), want, strict=True):
        testing.agree(got, expected)
    q, k, v = qkv(rng)
    lens = np.array([4, 0], np.int32)
    text, buffers = dense.program(**parameters, kv_lens=lens)
    want = dense.naive(q, k, v, seed=SEED, **parameters, kv_lens=lens)
    k[0, :, 4:], v[0, :, 4:], k[1], v[1] = np.nan, np.inf, np.nan, np.nan
    for got, expected in zip(run(parse(text), [q, k, v], buffers, seed=SEED), want, strict=True):
        testing.agree(got, expected)


@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("cuts", [[3], [0, 3, 3, 7], [1, 2, 6]], ids=str)
def test_splits_merge_to_the_whole(rng: np.random.Generator, cuts: list[int], sink: bool) -> None:
    """Also empty parts, and rows that no part sees; a sink belongs to exactly one part."""
    q, k, v = qkv(rng, 9, 7)  # queries 0 and 1 see nothing
    a = [rng.standard_normal(4).astype(np.float32)] if sink else []
    want = dense.naive(q, k, v, causal=True, sink=a[0] if sink else None)
    ends = [0, *cuts, 7]
    tensors, lines = [q], []
    for n, (start, stop) in enumerate(pairwise(ends)):
        tensors += [k[:, :, start:stop], v[:, :, start:stop]]
        normalizer = "softmax(sink = b0)" if sink and n == 0 else "softmax"
        mask = f"kv_idx + {start} <= q_idx - 2"
        lines.append(f"o{n}, l{n} = attend(q, k{n}, v{n}) {{ mask = {mask}  normalizer = {normalizer} }}")
    parts = range(len(ends) - 1)
    names = ", ".join(f"k{n}: bhsd, v{n}: bhsd" for n in parts)
    text = "\n".join(
        [
            f"attnkit 1\nprogram (q: bhsd, {names}) buffers({'b0: f32[1]' if sink else ''}) {{",
            *lines,
            f"o, lse = merge({', '.join(f'o{n}, l{n}' for n in parts)})",
            "return o, lse\n}",
        ]
    )
    program = parse(text)
    for got, expected in zip(run(program, tensors, a), want, strict=True):
        testing.agree(got, expected)
    cotangents = [rng.standard_normal(x.shape) for x in want]
    if not sink:
        cotangents[1][:, :, :2] = 0  # lse is -inf there
    whole = gradients(
        parse(dense.program(causal=True, sink=a[0] if sink else None)[0]), [q, k, v], cotangents, a
    )
    split = gradients(program, tensors, cotangents, a)
    testing.agree(split.inputs[0], whole.inputs[0])
    testing.agree(np.concatenate(split.inputs[1::2], axis=2), whole.inputs[1])
    testing.agree(np.concatenate(split.inputs[2::2], axis=2), whole.inputs[2])
    if sink:
        testing.agree(split.buffers[0], whole.buffers[0])


def test_the_merge_by_hand() -> None:
    """(lse, o) = (2.126928, 1.880797) and (-2, 4) merge to o = 1.914442."""
    text = "attnkit 1\nprogram (o: bhsd, l: bhs, o1: bhsd, l1: bhs) {\nm, n = merge(o, l, o1, l1)\nreturn m, n\n}"
    parts = [
        np.full((1, 1, 1, 1), 1.880797),
        np.full((1, 1, 1), 2.126928),
        np.full((1, 1, 1, 1), 4.0),
        np.full((1, 1, 1), -2.0),
    ]
    o, lse = run(parse(text), parts)
    np.testing.assert_allclose(o.item(), 1.914442, atol=1e-6)
    np.testing.assert_allclose(lse.item(), 2.142932, atol=1e-6)
    dead = [np.zeros((1, 1, 1, 1)), np.full((1, 1, 1), -np.inf)]
    o, lse = run(parse(text), [*dead, *dead])
    assert (o.item(), lse.item()) == (0, -np.inf)


@pytest.mark.parametrize("page", [1, 2, 4])
def test_pages_in_any_order(rng: np.random.Generator, page: int) -> None:
    """A paged cache is the contiguous one; what lies in free pages and behind the lengths reaches nothing."""
    q, k, v = qkv(rng, 3, 8)
    lens = np.array([8, 5], np.int32)
    per_sequence = 8 // page
    slots = rng.permutation(2 * per_sequence + 3)
    table = slots[: 2 * per_sequence].reshape(2, -1).astype(np.int32)
    pages = []
    for x in (k, v):
        paged = np.full((len(slots), 2, page, x.shape[3]), np.nan)
        for b, j in np.ndindex(2, 8):
            if j < lens[b]:
                paged[table[b, j // page], :, j % page] = x[b, :, j]
        pages.append(paged)
    text = """attnkit 1
        program (q: bhsd, k: paged[b0, b1], v: paged[b0, b1]) buffers(b0: i32[2], b1: i32[1]) {
          o, lse = attend(q, k, v) { mask = kv_idx <= q_idx + (kv_len - q_len)  normalizer = softmax }
          return o, lse
        }"""
    want = dense.naive(q, k, v, causal=True, kv_lens=lens)
    for got, expected in zip(run(parse(text), [q, *pages], [table, lens]), want, strict=True):
        testing.agree(got, expected)


def test_laws_of_the_program(rng: np.random.Generator) -> None:
    """Keys are a set; a constant on all logits moves lse alone; a constant value comes out; MQA is GQA of equal heads."""
    q, k, v = qkv(rng)
    plain = parse(dense.program()[0])
    o, lse = run(plain, [q, k, v])
    order = rng.permutation(7)
    for got, want in zip(run(plain, [q, k[:, :, order], v[:, :, order]]), (o, lse), strict=True):
        testing.agree(got, want)
    shifted = "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\no, l = attend(q, k, v) { score = s + 3.0 }\nreturn o, l\n}"
    for got, want in zip(run(parse(shifted), [q, k, v]), (o, lse + 3), strict=True):
        testing.agree(got, want)
    testing.agree(run(plain, [q, k, np.full(v.shape, 2.5)])[0], np.full((2, 4, 5, 3), 2.5))
    one_k, one_v = k[:, :1], v[:, :1]
    repeated = [x.repeat(4, axis=1) for x in (one_k, one_v)]
    for got, want in zip(run(plain, [q, one_k, one_v]), run(plain, [q, *repeated]), strict=True):
        testing.agree(got, want)


@pytest.mark.parametrize(("batch", "shape"), [(2, (3, 4)), (1, (5, 3))], ids=str)
def test_gradients(rng: np.random.Generator, batch: int, shape: tuple[int, int]) -> None:
    """Of q, k, v and every float buffer: slopes, biases, sinks; with a cotangent on lse."""
    heads = ((4, shape[0]), (2, shape[1]), (2, shape[1]))
    q, k, v = (rng.standard_normal((batch, h, n, 2)) for h, n in heads)
    for name, parameters in members(rng, *shape).items():
        text, buffers = dense.program(**parameters)
        floats = [key for key in ("alibi_slopes", "bias", "sink") if key in parameters]

        def naive(q: Any, k: Any, v: Any, *rest: Any, fixed: Any = parameters, names: Any = floats) -> Any:
            return dense.naive(q, k, v, seed=SEED, **(fixed | dict(zip(names, rest, strict=True))))

        extra = [parameters[key].astype(np.float64) for key in floats]
        cotangents = [rng.standard_normal((batch, 4, shape[0], 2)), rng.standard_normal((batch, 4, shape[0]))]
        want = testing.differences(naive, [q, k, v, *extra], cotangents)
        got = gradients(parse(text), [q, k, v], cotangents, buffers, seed=SEED)
        for what, a, b in zip("qkv", got.inputs, want, strict=False):
            testing.agree(a, b, 1e-6, f"{what} of {name}")
        by_buffer = {id(array): gradient for array, gradient in zip(buffers, got.buffers, strict=True)}
        for key, b in zip(floats, want[3:], strict=True):
            testing.agree(by_buffer[id(parameters[key])], b, 1e-6, f"{key} of {name}")


def test_gradient_of_a_param(rng: np.random.Generator) -> None:
    """The cap as a run-time scalar."""
    q, k, v = (rng.standard_normal((1, 2, 4, 3)) for _ in range(3))
    text, buffers = dense.program(softcap=param("cap", 1.5))
    cotangents = [rng.standard_normal((1, 2, 4, 3)), rng.standard_normal((1, 2, 4))]
    (want,) = testing.differences(
        lambda c: dense.naive(q, k, v, softcap=float(c)), [np.array(1.5)], cotangents
    )
    got = gradients(parse(text), [q, k, v], cotangents, buffers, params=[1.5])
    testing.agree(got.params[0], want, 1e-6)
