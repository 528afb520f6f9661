"""Sparge: prediction, quantisation and skipping by hand, limits, laws, and the program."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing.gradients import agree, differences
from attnkit.variants import dense, sparge

pytestmark = pytest.mark.shows
Array = Any
SMALL = (4, 3)  # tiles of queries and of keys: more of them in less time
SHAPES = [
    (1, 2, 1, 13, 13),
    (2, 2, 2, 9, 20),
    (1, 1, 1, 1, 1),
    (1, 2, 1, 0, 3),
    (1, 2, 1, 3, 0),
]  # (batch, Hq, Hkv, Sq, Skv)
PLAIN: Any = {"int8": False, "smooth_k": False}


def tensors(rng: np.random.Generator, shape: tuple[int, ...], width: int = 4) -> list[Array]:
    batch, heads, kv_heads, q_len, kv_len = shape
    shapes = ((heads, q_len, width), (kv_heads, kv_len, width), (kv_heads, kv_len, 3))
    return [rng.standard_normal((batch, *of)) for of in shapes]


def past(inputs: list[Array]) -> Array:
    return np.full(len(inputs[0]), inputs[1].shape[2] - inputs[0].shape[2], np.int32)


def reference(inputs: list[Array], **parameters: Any) -> list[Array]:
    text, buffers = sparge.program(past=past(inputs), **parameters)
    return run(parse(text), inputs, buffers)


def both(inputs: list[Array], **parameters: Any) -> list[Any]:
    """The result by the equation and by the program."""
    return [sparge.naive(*inputs, **parameters), reference(inputs, **parameters)]


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        agree(one, other, tolerance)


def structured(rng: np.random.Generator, q_len: int, kv_len: int, width: int = 8) -> list[Array]:
    """Tokens that resemble their neighbours, in stretches: coherent tiles and some that are not."""
    inputs = []
    for length, d in ((q_len, width), (kv_len, width), (kv_len, 3)):
        centres = rng.standard_normal((1, 2, -(-length // 48), d))
        noise = 0.5 * rng.standard_normal((1, 2, length, d))
        inputs.append(np.repeat(centres, 48, axis=2)[:, :, :length] + noise)
    return inputs


# --- by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cdf", "count"), [(0.4, 1), (0.5, 1), (0.79, 1), (0.8, 2), (0.98, 3), (1.001, 4)])
def test_the_worked_prefixes(cdf: float, count: int) -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    assert sparge.prefix_within(p, cdf) == count
    # as attention: one query, one key per tile whose logits are log p; cdf just above, as log and exp round
    q, k, v = np.ones((1, 1, 1, 1)), np.log(p[[2, 0, 3, 1]])[None, None, :, None], np.eye(4)[None, None]
    for o, *_ in both([q, k, v], tiles=(1, 1), cdf=cdf + 1e-9, similarity=-1.0, **PLAIN):
        assert set(np.flatnonzero(o[0, 0, 0])) == set([1, 3, 0, 2][:count])


@pytest.mark.parametrize(("topk", "tiles", "count"), [(0.5, 5, 2), (0.1, 5, 1), (1.0, 5, 5), (0.75, 4, 3)])
def test_top_k_is_a_fraction(topk: float, tiles: int, count: int) -> None:
    q, k, v = np.ones((1, 1, 1, 1)), np.arange(tiles)[None, None, :, None] + 1.0, np.eye(tiles)[None, None]
    for o, *_ in both([q, k, v], tiles=(1, 1), topk=topk, **PLAIN):
        assert list(np.flatnonzero(o[0, 0, 0])) == list(range(tiles - count, tiles))


def test_coherence_by_hand() -> None:
    same, opposite, right = np.ones((4, 2)), np.array([[1.0, 0], [-1, 0]]), np.array([[1.0, 0], [0, 3]])
    for tile, similarity in (
        (same, 1.0),
        (opposite, 0.0),
        (right, 0.5),
    ):  # over all pairs, a token with itself too
        assert sparge.is_coherent(tile, similarity - 0.01)
        assert not sparge.is_coherent(tile, similarity + 1e-9)
    assert not sparge.is_coherent(np.zeros((2, 2)), -1.0)


def test_incoherent_rows_and_columns_are_kept(rng: np.random.Generator) -> None:
    """Tiles of two; the second of the queries and the third of the keys point to opposite sides."""
    away = np.array([1.0, -1.0])
    q = np.array([1, 1, *away, 1, 1])[None, None, :, None]
    k = np.array([1, 1, 2, 2, *away, 3, 3])[None, None, :, None]
    for o, *_ in both([q, k, np.eye(8)[None, None]], tiles=(2, 2), topk=0.25, similarity=0.5, **PLAIN):
        for row in (0, 1, 4, 5):  # the best of the others, and the incoherent
            assert list(np.flatnonzero(o[0, 0, row])) == [4, 5, 6, 7]
        for row in (2, 3):
            assert list(np.flatnonzero(o[0, 0, row])) == list(range(8))


def test_density_counts_live_tiles(rng: np.random.Generator) -> None:
    """300 queries and keys: 3 x 5 tiles, of which 2 + 4 + 5 are live under a causal mask."""
    inputs = tensors(rng, (1, 1, 1, 300, 300))
    for parameters, density in (
        ({"topk": 0.4}, (2 + 2 + 2) / 11),
        ({"topk": 1.0}, 1),
        ({"similarity": 1.0}, 1),
    ):
        for results in both(inputs, causal=True, **({"similarity": -1.0} | parameters), **PLAIN):
            np.testing.assert_allclose(results[2], density)
    for results in both(inputs, topk=0.4, similarity=-1.0, **PLAIN):
        np.testing.assert_allclose(results[2], 2 / 5)


def test_quantisation_by_hand(rng: np.random.Generator) -> None:
    step = float(np.float32(1 + 1e-7))
    x = np.array([[127.0], [2.5 * step], [-2.5 * step], [0.49], [0], [0]])
    np.testing.assert_allclose(
        sparge.quantise(x, 4)[:, 0], [127 * step, 3 * step, -3 * step, 0, 0, 0], rtol=1e-15
    )
    x = rng.standard_normal((11, 5))
    steps = np.repeat([abs(x[i : i + 4]).max() / 127 + 1e-7 for i in (0, 4, 8)], 4)[:11, None]
    assert (abs(sparge.quantise(x, 4) - x) <= steps / 2 * (1 + 1e-6)).all()


# --- skipping ---------------------------------------------------------------------------------------------


def attended(z: Array, threshold: float | None, width: int = 1) -> list[int]:
    """Which tiles of a few rows' logits are not skipped."""
    keys = z.shape[1]
    tiles = [slice(j, j + width) for j in range(0, keys, width)]
    o, _ = sparge.attend_tiles(z, np.eye(keys), tiles, threshold)
    return [n for n, tile in enumerate(tiles) if (o[:, tile] != 0).any()]


def test_what_is_skipped_by_hand() -> None:
    far = -20 * np.log(2)
    row = np.array([far, 0, far, -19 * np.log(2), far, far, far])
    assert attended(row[None], 20.0) == [
        0,
        1,
        3,
        5,
        6,
    ]  # at least 20 powers of two below; the first and last two stay
    assert attended(row[None], 20.01) == list(range(7))
    assert attended(row[None], None) == list(range(7))
    other = np.zeros(7)
    assert attended(np.stack([row, other]), 20.0) == list(range(7))  # one row that needs it is enough
    assert attended(np.stack([row, np.full(7, -np.inf)]), 20.0) == [
        0,
        1,
        3,
        5,
        6,
    ]  # one without a pair needs nothing
    late = np.array([far, far, far, 0, far, 0, 0])  # below a maximum that came before, not after
    assert attended(late[None], 20.0) == [0, 1, 2, 3, 5, 6]


def test_shifting_the_logits_changes_nothing_that_is_skipped(rng: np.random.Generator) -> None:
    for _ in range(20):
        z = 6 * rng.standard_normal((4, 12))
        kept = attended(z, 6.0, 2)
        assert kept == attended(z + 100 * rng.standard_normal((4, 1)), 6.0, 2)
        assert {0, 4, 5} <= set(kept)


def test_skipping_is_bounded(rng: np.random.Generator) -> None:
    """What is left out weighs at most 2^-t of the largest, each key; and the program leaves out the same."""
    inputs = tensors(rng, (1, 2, 1, 40, 600))
    inputs[0] += [6, 0, 0, 0]  # what all queries look for, and tiles that have more or less of it
    inputs[1] += np.repeat(np.array([0, 3, -1, -3, 2, 0, -2, 1, 0, 0]), 64)[:600, None] * np.eye(4)[0]
    exact = sparge.naive(*inputs, topk=1.0, **PLAIN)
    for threshold in (4.0, 8.0, 30.0):
        naive, program = both(inputs, topk=1.0, pv_threshold=threshold, **PLAIN)
        close(program, naive)
        dropped = 600 * 2.0**-threshold
        assert abs(naive.o - exact.o).max() <= 2 * dropped * abs(inputs[2]).max() + 1e-12
        assert (naive.lse <= exact.lse + 1e-12).all()
        assert (exact.lse - naive.lse <= -np.log1p(-min(dropped, 0.999999)) + 1e-12).all()
        np.testing.assert_array_equal(naive.density, exact.density)
        if threshold == 4.0:
            assert abs(naive.o - exact.o).max() > 0  # something was skipped


# --- limits and laws --------------------------------------------------------------------------------------


EVERYTHING: list[Any] = [
    {"topk": 1.0},
    {"cdf": 1.001, "similarity": -1.0},
    {"topk": 0.1, "similarity": 1.0},
    {"cdf": 0.1, "similarity": 2.0},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parameters", EVERYTHING, ids=str)
def test_everything_chosen_is_dense(parameters: Any, causal: bool, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        inputs = tensors(rng, shape)
        expected = dense.naive(*inputs, causal=causal)
        for smooth in (False, True):  # exact without quantisation
            for results in both(
                inputs, tiles=SMALL, causal=causal, int8=False, smooth_k=smooth, **parameters
            ):
                close(results[:2], expected)
        quantised = [
            np.stack([[sparge.quantise(x, n) for x in head] for head in y])
            for y, n in zip(inputs[:2], SMALL, strict=True)
        ]
        expected = dense.naive(*quantised, inputs[2], causal=causal)
        for results in both(inputs, tiles=SMALL, causal=causal, smooth_k=False, **parameters):
            close(results[:2], expected)


def test_constant_values_survive_any_selection(rng: np.random.Generator) -> None:
    for name, parameters in sparge.CASES.items():
        q, k, v = tensors(rng, (1, 2, 1, 300, 300))
        constant = np.broadcast_to(v[:, :, :1], v.shape)
        for results in (
            sparge.naive(q, k, constant, **parameters),
            reference([q, k, constant], **parameters),
        ):
            sees = np.asarray(
                results[1] > -np.inf
            )  # under a causal mask, a row may lie before all that was chosen
            np.testing.assert_allclose(
                results[0][sees], np.broadcast_to(constant[:, :, :1], results[0].shape)[sees], err_msg=name
            )
            assert (results[0][~sees] == 0).all()
            assert sees.all() or parameters.get("causal")


def test_smoothing_gives_the_mean_back(rng: np.random.Generator) -> None:
    """An offset that all keys share: it moves the lse by scale * q . offset, o not at all, and int8 hardly notices."""
    q, k, v = tensors(rng, (1, 2, 1, 40, 40))
    offset = np.array([40.0, 0, -30, 0])
    for smooth in (True, False):
        o, lse, _ = sparge.naive(q, k, v, topk=1.0, int8=False, smooth_k=smooth)
        moved_o, moved_lse, _ = sparge.naive(q, k + offset, v, topk=1.0, int8=False, smooth_k=smooth)
        np.testing.assert_allclose(moved_o, o, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(moved_lse, lse + 0.5 * q @ offset, rtol=1e-10)
    exact = sparge.naive(q, k + offset, v, topk=1.0, int8=False).o
    errors = [
        abs(reference([q, k + offset, v], topk=1.0, smooth_k=smooth)[0] - exact).max()
        for smooth in (True, False)
    ]
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("cdf", [0.3, 0.7, 0.9])
def test_kept_mass_does_not_exceed_the_cdf(cdf: float, rng: np.random.Generator) -> None:
    q, k, _ = structured(rng, 60, 60)
    given: Any = {"cdf": cdf, "topk": None, "similarity": -1.0}
    for h in range(2):
        chosen = sparge.choose(q[0, h], k[0, h], np.ones((15, 20), bool), SMALL, given)
        pooled = [
            np.stack([x[0, h, i : i + n].mean(axis=0) for i in range(0, 60, n)]) for x, n in ((q, 4), (k, 3))
        ]
        z = 8**-0.5 * pooled[0] @ pooled[1].T
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        kept = np.where(chosen, p, 0)
        assert ((kept.sum(axis=1) <= cdf) | (chosen.sum(axis=1) == 1)).all()
        more = kept.sum(axis=1) + np.where(chosen, 0, p).max(axis=1)  # the next would exceed it
        assert (more > cdf).all()


def test_better_prediction_costs_less_error(rng: np.random.Generator) -> None:
    """relative L1, cosine and root mean square error, the family's own measures, fall as more is kept."""
    inputs = structured(rng, 200, 384)
    exact = dense.naive(*inputs)[0]
    errors = []
    for topk in (0.2, 0.5, 1.0):
        o, _, density = reference(inputs, topk=topk, similarity=-1.0, **PLAIN)
        errors.append([abs(o - exact).sum() / abs(exact).sum(), np.sqrt(((o - exact) ** 2).mean()),
                       1 - (o * exact).sum() / np.sqrt((o**2).sum() * (exact**2).sum())])  # fmt: skip
        np.testing.assert_allclose(density, int(topk * 6) / 6)
    assert (np.diff(errors, axis=0) < 0).all()
    assert max(errors[2]) < 1e-12


# --- the program ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sparge.CASES)
def test_program_is_the_equation(name: str, rng: np.random.Generator) -> None:
    parameters = sparge.CASES[name]
    for shape in SHAPES:
        inputs = tensors(rng, shape)
        naive, program = both(inputs, tiles=SMALL, **parameters | {"pv_threshold": None})
        close(program[:2], naive[:2])  # density and skipping are of tiles of 128 x 64
    for inputs in (structured(rng, 300, 300), structured(rng, 130, 200)):
        naive, program = both(inputs, **parameters)
        close(program, naive)


@pytest.mark.parametrize("name", ["sparge_cdf_causal", "sparge_plain"])
def test_gradients(name: str, rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 2, 1, 5, 7))
    parameters: Any = sparge.CASES[name] | {"tiles": (2, 2)}
    cotangents = [rng.standard_normal((1, 2, 5, 3)), rng.standard_normal((1, 2, 5)), np.zeros((1, 2))]
    text, buffers = sparge.program(past=past(inputs), **parameters)
    found = gradients(parse(text), inputs, cotangents, buffers).inputs
    close(found, differences(lambda *x: sparge.naive(*x, **parameters), inputs, cotangents), 1e-6)


def test_gradients_pass_straight_through_quantisation(rng: np.random.Generator) -> None:
    """They are those of plain attention at the quantised queries and keys."""
    inputs = tensors(rng, (1, 2, 1, 5, 7))
    cotangents = [rng.standard_normal((1, 2, 5, 3)), rng.standard_normal((1, 2, 5))]
    everything: Any = {"topk": 1.0, "tiles": (2, 2), "smooth_k": False}
    text, buffers = sparge.program(past=past(inputs), **everything)
    found = gradients(parse(text), inputs, [*cotangents, np.zeros((1, 2))], buffers).inputs
    quantised = [np.stack([[sparge.quantise(x, 2) for x in head] for head in y]) for y in inputs[:2]]
    expected = differences(dense.naive, [*quantised, inputs[2]], cotangents)
    close(found, expected, 1e-6)
