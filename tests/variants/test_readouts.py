"""What is read off the attention map, against the whole map."""

from typing import Any

import numpy as np
import pytest
import torch

from attnkit import testing
from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.variants import dense, readouts

pytestmark = pytest.mark.shows


def qkv(rng: np.random.Generator, sq: int = 5, skv: int = 7) -> Any:
    return (
        rng.standard_normal((2, 4, sq, 6)),
        rng.standard_normal((2, 2, skv, 6)),
        rng.standard_normal((2, 2, skv, 3)),
    )


def test_by_hand() -> None:
    """The worked example of dense attention: rows [.268941 .731059 0] and [.117310 .866813 .015876]."""
    q, k, v = (np.array(x, float).reshape(1, 1, -1, 1) for x in ([1, 2], [0, 1, -1], [1, 2, 4]))
    got = readouts.naive(q, k, v, scale=1.0, causal=True)
    np.testing.assert_allclose(
        got.weights[0, 0], [[0.268941, 0.731059, 0], [0.117310, 0.866813, 0.015876]], atol=6e-7
    )
    np.testing.assert_allclose(got.column_sum[0, 0], [0.386252, 1.597872, 0.015876], atol=1e-6)
    np.testing.assert_allclose(got.column_max[0, 0], [0.268941, 0.866813, 0.015876], atol=6e-7)
    np.testing.assert_allclose(got.row_max[0, 0], [0.731059, 0.866813], atol=6e-7)
    np.testing.assert_allclose(got.entropy[0, 0], [0.582203, 0.441057], atol=1e-6)


@pytest.mark.parametrize("name", readouts.CASES)
def test_against_the_map(rng: np.random.Generator, name: str) -> None:
    """torch's softmax of all scores, and reductions of it."""
    parameters = readouts.CASES[name]
    q, k, v = qkv(rng)
    got = readouts.naive(q, k, v, **parameters)
    s = torch.from_numpy(q) @ torch.from_numpy(k.repeat(2, axis=1)).mT * 6**-0.5
    cap = parameters.get("softcap")
    s = s if cap is None else cap * torch.tanh(s / cap)
    i, j = torch.arange(5)[:, None], torch.arange(7)[None]
    seen = (j <= i + 2) | torch.tensor(not parameters.get("causal"))
    seen = seen & (i >= parameters.get("first_row", 0))
    p = torch.softmax(s.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0)
    expected = {
        "weights": p,
        "column_sum": p.sum(-2),
        "column_max": p.amax(-2),
        "row_max": p.amax(-1),
        "entropy": torch.special.entr(p).sum(-1),
    }
    for field, value in expected.items():
        np.testing.assert_allclose(getattr(got, field), value, atol=1e-13, err_msg=field)
    if "first_row" not in parameters:
        o, lse = dense.naive(
            q, k, v, causal=parameters.get("causal", False), **({"softcap": cap} if cap else {})
        )
        np.testing.assert_allclose(got.o, o, atol=1e-14)
        np.testing.assert_allclose(got.lse, lse, atol=1e-14)


def test_identities(rng: np.random.Generator) -> None:
    """Rows sum to 1, so columns to the number of queries; the largest weight bounds the entropy."""
    got = readouts.naive(*qkv(rng), causal=True)
    np.testing.assert_allclose(got.column_sum.sum(axis=2), 5)
    assert (got.entropy <= np.log(np.arange(3, 8)) + 1e-12).all()
    assert (got.entropy >= -np.log(got.row_max) - 1e-12).all()
    assert (got.column_max >= got.column_sum / 5 - 1e-12).all()


# --- as programs ------------------------------------------------------------------------------------------

SHAPES = [(5, 7), (7, 4), (0, 3), (3, 0)]


@pytest.mark.parametrize("name", readouts.CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_program_is_the_equation(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    q, k, v = qkv(rng, *shape)
    text, buffers = readouts.program(**readouts.CASES[name])
    want = readouts.naive(q, k, v, **readouts.CASES[name])
    for what, got in zip(readouts.OUTPUTS, run(parse(text), [q, k, v], buffers), strict=True):
        testing.agree(got, getattr(want, what), what=what)


def test_padded_programs(rng: np.random.Generator) -> None:
    q, k, v = qkv(rng)
    lens = np.array([7, 4], np.int32)
    k[1, :, 4:], v[1, :, 4:] = np.nan, np.inf
    text, buffers = readouts.program(causal=True, kv_lens=lens)
    want = readouts.naive(q, np.nan_to_num(k), np.nan_to_num(v), causal=True, kv_lens=lens)
    for what, got in zip(readouts.OUTPUTS, run(parse(text), [q, k, v], buffers), strict=True):
        testing.agree(got, getattr(want, what), what=what)


@pytest.mark.parametrize("name", readouts.CASES)
def test_gradients(rng: np.random.Generator, name: str) -> None:
    """A cotangent on every output at once, and on each alone."""
    inputs = [x[:1] for x in qkv(rng, 4, 5)]
    text, buffers = readouts.program(**readouts.CASES[name])
    shapes = [x.shape for x in readouts.naive(*inputs, **readouts.CASES[name])]
    everything = [rng.standard_normal(shape) for shape in shapes]
    known: dict[bytes, Any] = {}

    def naive(*x: Any) -> Any:  # each cotangent wants the same ones
        key = b"".join(t.tobytes() for t in x)
        if key not in known:
            known[key] = readouts.naive(*x, **readouts.CASES[name])
        return known[key]

    for only in (None, *range(len(shapes))):
        cotangents = [x if only in (None, i) else np.zeros_like(x) for i, x in enumerate(everything)]
        want = testing.differences(naive, inputs, cotangents)
        got = gradients(parse(text), inputs, cotangents, buffers)
        for what, a, b in zip("qkv", got.inputs, want, strict=True):
            testing.agree(a, b, 1e-6, f"{what} of {'all' if only is None else readouts.OUTPUTS[only]}")


def test_cotangent_of_the_weights_in_closed_form(rng: np.random.Generator) -> None:
    """dz = P * (R - sum_j P R)."""
    q, k, v = rng.standard_normal((3, 1, 1, 5, 4))
    r = rng.standard_normal((1, 1, 5, 5))
    text = "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\np = attend(q, k, v, outputs = (weights))\nreturn p\n}"
    p = readouts.naive(q, k, v).weights
    dz = p * (r - np.sum(p * r, axis=3, keepdims=True))
    got = gradients(parse(text), [q, k, v], [r])
    testing.agree(got.inputs[0], 0.5 * dz @ k)
    testing.agree(got.inputs[1], 0.5 * np.swapaxes(dz, 2, 3) @ q)


def test_rows_of_the_map(rng: np.random.Generator) -> None:
    """The full rows of chosen queries are the weights of a program of those queries."""
    q, k, v = qkv(rng)
    text = "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\np = attend(q, k, v, outputs = (weights))\nreturn p\n}"
    (rows,) = run(parse(text), [q[:, :, [1, 4]], k, v])
    testing.agree(rows, readouts.naive(q, k, v).weights[:, :, [1, 4]])
