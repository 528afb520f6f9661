"""Which tokens go together in map, select and attend, and what a pooled operand of map means."""

from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.testing.gradients import differences

Array = Any


def text(inputs: str, *lines: str, buffers: str = "") -> str:
    return "\n  ".join([f"attnkit 1\nprogram ({inputs}) buffers({buffers}) {{", *lines]) + "\n}"


def code(caught: Any) -> str:
    return caught.value.code  # type: ignore[no-any-return]


def test_a_pooled_operand_stands_for_its_tokens(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 7, 4))
    program = parse(
        text("x: bhsd", "m = pool(x, size = 3)", "y = map(x, m) { value = x - y * y }", "return y")
    )
    means = np.stack([x[:, :, i // 3 * 3 : i // 3 * 3 + 3].mean(axis=2) for i in range(7)], axis=2)
    np.testing.assert_allclose(run(program, [x])[0], x - means**2, rtol=1e-12, atol=1e-12)
    small, cotangent = x[:1, :1], rng.standard_normal((1, 1, 7, 4))
    found = gradients(program, [small], [cotangent]).inputs
    expected = differences(lambda x: run(program, [x]), [small], [cotangent])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-8)


def test_pools_of_pools_and_of_sequences(rng: np.random.Generator) -> None:
    x, ends = rng.standard_normal((1, 2, 9, 4)), np.array([0, 5, 5, 9], np.int32)
    lines = [
        "a = pool(x, size = 2)",
        "b = pool(a, size = 100)",
        "y = map(a, b) { value = x - y }",
        "return y, a",
    ]
    y, a = run(parse(text("x: packed[b0]", *lines, buffers="b0: i32[1]")), [x], [ends])
    for n, (first, last) in enumerate(((0, 5), (5, 5), (5, 9))):
        pooled = a[n, :, : -(-(last - first) // 2)]
        centred = pooled - pooled.mean(axis=1, keepdims=True) if last > first else pooled
        np.testing.assert_allclose(y[n, :, : pooled.shape[1]], centred, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "lines",
    [
        ("m = pool(k, size = 2)", "y = map(q, m) { value = x - y }"),  # another input's
        ("m = pool(q, size = 2)", "y = map(m, q) { value = x - y }"),  # finer than the first
        ("m = pool(q, size = 2)", "n = pool(q, size = 3)", "y = map(m, n) { value = x - y }"),  # cuts across
        (
            "m = select(k, q, scale = 1.0, top_k = 1)",
            "y, l = attend(q, k, k, scale = 1.0, blocks = m)",
        ),  # exchanged
        (
            "m = select(q, c, scale = 1.0, top_k = 1)",
            "y, l = attend(q, k, k, scale = 1.0, blocks = m)",
        ),  # shared ones
        (
            "m = select(q, other, scale = 1.0, top_k = 1)",
            "y, l = attend(q, k, k, scale = 1.0, blocks = m)",
        ),  # padded
    ],
)
def test_refuses(lines: tuple[str, ...]) -> None:
    inputs = "q: bhsd, k: bhsd, c: hsd, other: padded[b0]"
    with pytest.raises(AttnkitError) as caught:
        parse(text(inputs, *lines, "return y", buffers="b0: i32[1]"))
    assert code(caught) == "AK219"


def test_a_relation_may_be_of_other_inputs_that_lie_alike(rng: np.random.Generator) -> None:
    lines = (
        "m = select(a, b, scale = 1.0, threshold = 0.0)",
        "o, lse = attend(q, k, k, scale = default, blocks = m)",
    )
    program = parse(text("q: bhsd, k: bhsd, a: bhsd, b: bhsd", *lines, "return o"))
    q, k = rng.standard_normal((2, 4, 5, 3)), rng.standard_normal((2, 2, 6, 3))
    a, b = rng.standard_normal((2, 2, 5, 2)), rng.standard_normal((2, 2, 6, 2))
    z = np.where(
        np.repeat(a @ b.swapaxes(2, 3) > 0, 2, axis=1),
        3**-0.5 * q @ np.repeat(k, 2, axis=1).swapaxes(2, 3),
        -np.inf,
    )
    p = np.exp(z)
    expected = np.divide(
        p, p.sum(axis=3, keepdims=True), out=np.zeros_like(p), where=p.sum(axis=3, keepdims=True) > 0
    )
    np.testing.assert_allclose(run(program, [q, k, a, b])[0], expected @ np.repeat(k, 2, axis=1), rtol=1e-12)
    for wrong in ([q, k, a[:, :, :4], b], [q, k, a, b[:, :, :4]], [q[:, :2], k, np.repeat(a, 2, axis=1), b]):
        with pytest.raises(AttnkitError) as caught:
            run(program, wrong)
        assert code(caught) == "AK403"


def test_groups_of_other_inputs(rng: np.random.Generator) -> None:
    lines = ["i = select(c, a, scale = 1.0, top_k = 2)", "j = select(c, b, scale = 1.0, top_k = 2)",
             "o = attend(q, k, k, scale = default, groups = (i, j))", "return o"]  # fmt: skip
    program = parse(text("q: bhsd, k: bhsd, a: bhsd, b: bhsd, c: hsd", *lines))
    q, k, c = (
        rng.standard_normal((1, 2, 5, 3)),
        rng.standard_normal((1, 2, 6, 3)),
        rng.standard_normal((2, 4, 3)),
    )
    same = run(
        parse(
            text(
                "q: bhsd, k: bhsd, c: hsd",
                *[x.replace("(c, a", "(c, q").replace("(c, b", "(c, k") for x in lines],
            )
        ),
        [q, k, c],
    )
    np.testing.assert_array_equal(run(program, [q, k, q, k, c])[0], same[0])
    for wrong in ([q, k, q[:, :, :4], k, c], [q, k, q, k[:, :, :4], c]):
        with pytest.raises(AttnkitError) as caught:
            run(program, wrong)
        assert code(caught) == "AK403"
