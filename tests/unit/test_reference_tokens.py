"""Which values go together token by token in the reference: in maps, merges and recurrences."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import run
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse

Array = Any


def execute(inputs: str, line: str, *arrays: Array, buffers: tuple[Array, ...] = ()) -> Array:
    """The first result of a program of one operation."""
    kinds = " buffers(cu: i32[1], other: i32[1])" if buffers else ""
    text = f"attnkit 1\nprogram ({inputs}){kinds} {{\n{line}\nreturn r }}"
    return run(parse(text), arrays, buffers)[0]


def filled(*shape: int) -> Array:
    return np.arange(float(np.prod(shape))).reshape(shape)


def test_map_of_several_inputs_and_widths() -> None:
    x, y, z, w = filled(2, 3, 4, 1), filled(2, 3, 4, 5), filled(2, 3, 4), filled(3, 5)
    for inputs, line, arrays, expected in (
        ("x: bhsd, y: bhsd", "r = map(x, y) { value = x * y }", (x, y), x * y),
        ("x: bhsd, y: bhsd", "r = map(y, x) { value = x * y }", (x, y), x * y),
        ("x: bhsd, w: hd", "r = map(x, w) { value = x + y }", (x, w), x + w[None, :, None]),
        ("y: bhsd, z: bhs", "r = map(y, z) { value = x - y }", (y, z), y - z[..., None]),
        ("z: bhs", "r = map(z) { value = 2.0 * x }", (z,), 2 * z),
    ):
        np.testing.assert_array_equal(execute(inputs, line, *arrays), expected)


def test_map_of_packed_inputs() -> None:
    x, y, ends = filled(1, 2, 6, 3), filled(1, 2, 6, 3), np.array([0, 4, 4, 6], np.int32)
    line = "r = map(x, y) { value = x * y }"
    found = execute("x: packed[cu], y: packed[cu]", line, x, y, buffers=(ends, ends))
    np.testing.assert_array_equal(found, x * y)


@pytest.mark.parametrize("ends", [[0, 4], [0, 0], [0, 2, 4], [0]])
def test_numbers_are_packed_as_their_tokens_are(ends: list[int]) -> None:
    """However many sequences there are, and whether or not the last token is in one."""
    x, n, cu = filled(1, 2, 6, 3), filled(1, 2, 6), np.array(ends, np.int32)
    expected = np.where(np.arange(6)[:, None] < ends[-1], x * n[..., None] * 2, 0)
    for lines in (
        "r = map(x, n) { value = 2.0 * x * y }",
        "m = map(n) { value = x + x }\nr = map(x, m) { value = x * y }",
    ):
        found = execute("x: packed[cu], n: bhs", lines, x, n, buffers=(cu, cu))
        np.testing.assert_array_equal(found, expected)


def test_numbers_beside_packed_tokens_go_with_their_own() -> None:
    """Those of the keys end where the keys end, those of plain tokens do not end."""
    q, k, x, n = filled(1, 2, 6, 3), filled(1, 2, 7, 3), filled(1, 2, 5, 3), filled(1, 2, 7)
    cu, other = np.array([0, 4], np.int32), np.array([0, 7], np.int32)
    inputs = "q: packed[cu], k: packed[other], x: bhsd, n: bhs"
    found = execute(inputs, "r = map(k, n) { value = x * y }", q, k, x, n, buffers=(cu, other))
    np.testing.assert_array_equal(found, k * n[..., None])
    found = execute(inputs, "r = map(x, n) { value = x * y }", q, k, x, n[..., :5], buffers=(cu, other))
    np.testing.assert_array_equal(found, x * n[..., :5, None])


def test_a_batch_beside_packed_tokens_is_as_many_sequences() -> None:
    q, x, cu = filled(1, 2, 6, 3), filled(1, 2, 6, 3), np.array([0, 2, 4, 6], np.int32)
    with pytest.raises(AttnkitError) as caught:
        execute("q: packed[cu], x: bhsd", "r = map(x) { value = x * 2.0 }", q, x, buffers=(cu, cu))
    assert caught.value.code == "AK602"


CARRIED = "{x}, {c} = attend({q}, {k}, {k}, initial = {initial}, outputs = (o, carry)) {{ carry = exp(s) score = s - f }}"


def test_a_carry_goes_on_from_packed_and_from_plain_tokens() -> None:
    """In one program; and from the carry that another attention gives."""
    q, p, c = filled(1, 2, 6, 3) / 9, filled(2, 2, 3, 3) / 9, filled(1, 6)
    lines = [
        CARRIED.format(x="x", c="first", q="q", k="q", initial="c"), CARRIED.format(x="y", c="r", q="q", k="q", initial="first"),
        CARRIED.format(x="u", c="then", q="p", k="p", initial="d"), CARRIED.format(x="w", c="t", q="p", k="p", initial="then"),
    ]  # fmt: skip
    text = (
        "attnkit 1\nprogram (q: packed[cu], p: bhsd, c: bs, d: bs) buffers(cu: i32[1]) {{\n{}\nreturn r, t }}"
    )
    cu = np.array([0, 3, 6], np.int32)
    of_packed, of_plain = run(parse(text.format("\n".join(lines))), [q, p, c, c.reshape(2, 3)], [cu])
    pieces = q.reshape(2, 2, 3, 3).swapaxes(0, 1)
    text = "attnkit 1\nprogram (p: bhsd, d: bs) {{\n{}\nreturn t }}".format("\n".join(lines[2:]))
    for found, tokens in ((of_packed.reshape(2, 3), pieces), (of_plain, p)):
        np.testing.assert_allclose(found, run(parse(text), [tokens, c.reshape(2, 3)])[0], rtol=1e-12)


def test_merge_of_inputs_is_packed_as_they_are() -> None:
    o, ends = filled(1, 2, 6, 3), np.array([0, 4, 4, 6], np.int32)
    lse = np.zeros((1, 2, 6))
    line = "o, r = merge(a, x, b, y)"
    inputs = "a: packed[cu], x: bhs, b: packed[cu], y: bhs"
    found = execute(inputs, line, o, lse, 2 * o, lse, buffers=(ends, ends))
    np.testing.assert_allclose(found, np.full((1, 2, 6), np.log(2)))


def test_the_normaliser_is_the_state_of_a_value_of_ones() -> None:
    rng = np.random.default_rng(7)
    q, k = rng.standard_normal((2, 1, 2, 5, 3))
    beta, gate = rng.uniform(0, 1, (1, 2, 5)), -rng.uniform(0, 1, (1, 2, 5, 3))
    text = (
        "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd, beta: bhs, gate: bhsd) {\n"
        "o, state, norm = recur(q, k, v, scale = default, beta = beta, gate = gate)\nreturn state, norm }"
    )
    state, norm = run(parse(text), [q, k, np.ones((1, 2, 5, 1)), beta, gate])
    np.testing.assert_array_equal(state[..., 0], norm)


QKV = "q: bhsd, k: bhsd, v: bhsd"


@pytest.mark.parametrize(
    ("inputs", "line", "shapes"),
    [
        ("x: bhsd, y: bhsd", "r = map(x, y) { value = x * y }", [(1, 2, 4, 3), (1, 2, 5, 3)]),
        ("x: bhsd, y: bhsd", "r = map(x, y) { value = x * y }", [(1, 2, 4, 3), (1, 1, 4, 3)]),
        ("x: bhsd, y: bhsd", "r = map(x, y) { value = x * y }", [(1, 2, 4, 3), (1, 2, 4, 2)]),
        ("x: bhsd, y: bhs", "r = map(x, y) { value = x * y }", [(1, 2, 4, 3), (1, 2, 1)]),
        ("x: bhsd, y: hd", "r = map(x, y) { value = x * y }", [(1, 2, 4, 3), (1, 3)]),
        (QKV + ", k1: bhsd, v1: bhsd", "r, lse = attend(q, k, v, k1, v1)", [*[(1, 2, 4, 3)] * 3, *[(1, 1, 4, 3)] * 2]),
        (QKV + ", k1: bhsd, v1: bhsd", "r, lse = attend(q, k, v, k1, v1)", [*[(1, 2, 4, 3)] * 4, (1, 2, 4, 2)]),
        ("a: bhsd, x: bhs, b: bhsd, y: bhs", "r, lse = merge(a, x, b, y)",
         [(1, 2, 4, 3), (1, 2, 4), (1, 2, 5, 3), (1, 2, 5)]),
        (QKV, "r, s, n = recur(q, k, v, scale = default)", [(1, 2, 4, 3), (1, 2, 4, 3), (1, 3, 4, 2)]),
        (QKV, "r, s, n = recur(q, k, v, scale = default)", [(1, 3, 4, 3), (1, 2, 4, 3), (1, 2, 4, 2)]),
        (QKV, "r, s, n = recur(q, k, v, scale = default)", [(1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 2)]),
        (QKV + ", g: h", "r, s, n = recur(q, k, v, scale = default, gate = g)", [*[(1, 2, 4, 3)] * 3, (1,)]),
        (QKV + ", g: bhsd", "r, s, n = recur(q, k, v, scale = default, gate = g)",
         [*[(1, 2, 4, 3)] * 3, (1, 2, 4, 1)]),
        (QKV + ", b: bhs", "r, s, n = recur(q, k, v, scale = default, beta = b)", [*[(1, 2, 4, 3)] * 3, (1, 2, 5)]),
        (QKV + ", u: hd", "r, s, n = recur(q, k, v, scale = default, bonus = u)", [*[(1, 2, 4, 3)] * 3, (2, 2)]),
        (QKV + ", i: bhdv", "r, s, n = recur(q, k, v, scale = default, initial = i, coefficients = (1.0, 1.0))",
         [*[(1, 2, 4, 3)] * 3, (1, 2, 3, 3)]),
        (QKV + ", i: bhd", "r, s, n = recur(q, k, v, scale = default, normalize = true, initial_norm = i)",
         [*[(1, 2, 4, 3)] * 3, (1, 2, 2)]),
    ],
)  # fmt: skip
def test_shapes_that_do_not_go_together(inputs: str, line: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(AttnkitError) as caught:
        execute(inputs, line, *map(np.zeros, shapes))
    assert caught.value.code == "AK403"


@pytest.mark.parametrize(
    ("code", "inputs", "line"),
    [
        ("AK219", "x: packed[cu], y: packed[other]", "r = map(x, y) { value = x * y }"),
        ("AK219", "x: bhsd, y: hsd", "r = map(x, y) { value = x * y }"),
        ("AK211", "q: packed[cu], k: packed[cu], v: packed[cu], g: bhsd",
         "r, s, n = recur(q, k, v, scale = default, gate = g)"),
        ("AK219", "a: bhsd, x: bhs, b: packed[cu], y: bhs", "r, lse = merge(a, x, b, y)"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_go_together(code: str, inputs: str, line: str) -> None:
    text = f"attnkit 1\nprogram ({inputs}) buffers(cu: i32[1], other: i32[1]) {{\n{line}\nreturn r }}"
    with pytest.raises(AttnkitError) as caught:
        parse(text)
    assert caught.value.code == code
