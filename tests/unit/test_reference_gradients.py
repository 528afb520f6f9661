"""The gradients of the reference against differences: random programs of all operations, along random directions."""

from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.program import Attend, Encode, Merge, Program, Recur, attributes
from attnkit.ir.text import parse
from attnkit.testing.arrays import random_inputs
from attnkit.testing.generate import random_program

STEP = 1e-5


def numbers_are_params(program: Program) -> bool:
    """Whether a param is a dropout, a threshold ...: those have no derivative."""
    held = [
        getattr(op, f.name)
        for op in program.ops
        for f in attributes(type(op))
        if f.metadata["kind"] == "number"
    ]
    return any(number is not None and number.op == "param" for number in held)


def along_a_direction(program: Program, seed: int) -> tuple[float, list[float]]:
    """The derivative of a random sum of the results, by `gradients`, and differences of two steps."""
    rng = np.random.default_rng(seed)
    inputs, buffers, params = random_inputs(program, rng)
    results = run(program, inputs, buffers, params, seed)
    cotangents = [np.where(np.isfinite(x), rng.standard_normal(x.shape), 0.0) for x in results]
    plain = [layout.codec is None for layout in program.inputs]
    move_inputs = [rng.standard_normal(x.shape) if p else 0.0 for x, p in zip(inputs, plain, strict=True)]
    move_buffers = [rng.standard_normal(x.shape) if x.dtype.kind == "f" else 0 for x in buffers]
    move_params = [0.0 if numbers_are_params(program) else float(rng.standard_normal()) for _ in params]

    def loss(step: float) -> float:
        moved: Any = run(
            program,
            [x + step * d if p else x for x, d, p in zip(inputs, move_inputs, plain, strict=True)],
            [x + step * d if x.dtype.kind == "f" else x for x, d in zip(buffers, move_buffers, strict=True)],
            [x + step * d for x, d in zip(params, move_params, strict=True)],
            seed,
        )
        return sum(
            float(np.sum(g * np.where(g == 0, 0.0, x))) for x, g in zip(moved, cotangents, strict=True)
        )

    found = gradients(program, inputs, cotangents, buffers, params, seed)
    given = sum(float(np.sum(g * d)) for g, d in zip(found.inputs, move_inputs, strict=True))
    given += sum(
        float(np.sum(g * d)) for g, d in zip(found.buffers, move_buffers, strict=True) if g is not None
    )
    given += sum(g * d for g, d in zip(found.params, move_params, strict=True))
    return given, [(loss(h) - loss(-h)) / (2 * h) for h in (STEP, STEP / 2)]


def check(seeds: range) -> Counter[str]:
    """What was checked: programs without `encode`, whose gradient is not that of its steps."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        program = random_program(Random(seed), tame=True)  # noqa: S311
        if any(isinstance(op, Encode) for op in program.ops):
            continue
        given, (wide, near) = along_a_direction(program, seed)
        scale = max(1.0, abs(near))
        if abs(wide - near) > 1e-5 * scale:  # a choice flips in between
            seen["jump"] += 1
            continue
        assert given == pytest.approx(near, abs=1e-4 * scale), f"seed {seed}\n{program.text}"
        seen.update(["checked", "moving"] if near else ["checked"])
        if near:
            seen.update(op.NAME for op in program.ops)
    return seen


def test_gradients_of_random_programs() -> None:
    seen = check(range(150))
    assert seen["moving"] > 60
    assert seen["jump"] < 10
    assert all(seen[op.NAME] > 3 for op in (Attend, Recur, Merge))


@pytest.mark.slow
@pytest.mark.shows
def test_gradients_of_thousands_of_random_programs() -> None:
    seen = check(range(1000, 6000))
    assert seen["moving"] > 2500
    assert seen["jump"] < 50


ENCODED = """attnkit 1 program (q: bhsd, k: bhsd, v: bhsd) {
  e = encode(k, codec = int4(token, 0))
  o, lse = attend(q, e, v, scale = 0.5)
  return o }"""


def test_quantisation_passes_gradients_straight_through(rng: np.random.Generator) -> None:
    """As if the decoded tokens had been given: so says docs/ir.md, and differences could not."""
    program = parse(ENCODED)
    q, k, v, g = (rng.standard_normal((1, 2, 5, 4)) for _ in range(4))
    given = gradients(program, [q, k, v], [g])
    plain = parse(ENCODED.replace("e = encode(k, codec = int4(token, 0))", "e = map(k)"))
    decoded = run(parse(ENCODED.replace("return o", "return e")), [q, k, v])[0]
    expected = gradients(plain, [q, decoded, v], [g])
    assert abs(decoded - k).max() > 0.01
    for a, b in zip(given.inputs, expected.inputs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
