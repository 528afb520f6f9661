"""Mega: the moving average is a convolution and carries its state; gated attention in chunks; the programs."""

import math
from typing import Any

import numpy as np
import pytest

from attnkit.backends.reference import gradients, run
from attnkit.ir.text import parse
from attnkit.testing import agree, differences
from attnkit.variants import dense, mega

pytestmark = pytest.mark.shows
Array = Any


def averaged(rng: np.random.Generator, batch: int = 2, length: int = 7) -> dict[str, Array]:
    """The inputs of the moving average: 3 channels of 2 numbers."""
    return {
        "x": rng.standard_normal((batch, 3, length, 1)),
        "alpha": rng.uniform(0.1, 0.9, (3, 2)),
        "delta": rng.uniform(0.1, 0.9, (3, 2)),
        "beta": rng.standard_normal((3, 2)),
        "eta": rng.standard_normal((3, 2)),
        "omega": rng.standard_normal(3),
    }


def attended(rng: np.random.Generator, batch: int = 2, heads: int = 1, length: int = 7) -> dict[str, Array]:
    """The inputs of the attention."""
    tokens = {
        name: rng.standard_normal((batch, heads, length, width))
        for name, width in (("z", 3), ("v", 2), ("r", 2))
    }
    return tokens | {name: rng.standard_normal((heads, 3)) for name in ("kappa_q", "mu_q", "kappa_k", "mu_k")}


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


# --- the moving average -----------------------------------------------------------------------------------


def test_average_by_hand() -> None:
    x = np.array([1.0, 2.0])[None, None, :, None]
    one = np.ones((1, 1))
    y, h = mega.ema(x, alpha=0.5 * one, delta=0.5 * one, beta=2 * one, eta=3 * one, omega=np.array([0.5]))
    # h = 0.5 * 2 * 1, then 2 + 0.75 * 1
    agree(y.ravel(), silu(np.array([3 * 1 + 0.5, 3 * 2.75 + 1])))
    agree(h.ravel(), [2.75])


def test_it_is_a_convolution(rng: np.random.Generator) -> None:
    inputs = averaged(rng)
    ages = np.arange(7)
    kept = (1 - inputs["alpha"] * inputs["delta"])[..., None] ** ages  # [C, n, age]
    kernel = 2**-0.5 * np.einsum("cn,cn,cnt->ct", inputs["eta"], inputs["alpha"] * inputs["beta"], kept)
    x = inputs["x"][..., 0]
    u = np.stack([np.convolve(row, kernel[i % 3])[:7] for i, row in enumerate(x.reshape(-1, 7))]).reshape(
        x.shape
    )
    agree(mega.ema(**inputs)[0][..., 0], silu(u + inputs["omega"][:, None] * x))


def test_no_damping_and_full_weight_is_the_token_alone(rng: np.random.Generator) -> None:
    inputs = averaged(rng) | {"alpha": np.ones((3, 2)), "delta": np.ones((3, 2))}
    gain = 2**-0.5 * np.sum(inputs["eta"] * inputs["beta"], axis=1) + inputs["omega"]
    agree(mega.ema(**inputs)[0], silu(gain[:, None, None] * inputs["x"]))


def test_state_carries_a_sequence_on(rng: np.random.Generator) -> None:
    inputs = averaged(rng)
    y, h = mega.ema(**inputs)
    first, state = mega.ema(**inputs | {"x": inputs["x"][:, :, :4]})
    rest, end = mega.ema(**inputs | {"x": inputs["x"][:, :, 4:]}, initial_state=state)
    agree(np.concatenate([first, rest], axis=2), y)
    agree(end, h)


# --- the attention ----------------------------------------------------------------------------------------


def test_laplace_by_hand() -> None:
    agree(mega.laplace(np.array([math.sqrt(0.5)])), 0.5)
    sigma = 1 / math.sqrt(4 * math.pi)
    agree(
        mega.laplace(np.sqrt(0.5) + sigma * np.array([-1, 1, 2])),
        [0.1586552539, 0.8413447461, 0.9772498681],
        1e-9,
    )
    # It was chosen to touch max(x, 0) ** 2 at mu, in value and in slope.
    slope = (
        mega.laplace(np.array([math.sqrt(0.5) + 1e-6])) - mega.laplace(np.array([math.sqrt(0.5) - 1e-6]))
    ) / 2e-6
    agree(slope, 2 * math.sqrt(0.5), 1e-6)


def test_attention_by_hand() -> None:
    tokens = np.array([1.0, 2.0])[None, None, :, None]
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    o = mega.attention(tokens, tokens, 10 * tokens, one, zero, one, one, weights="relu2", causal=True)
    # the keys are 2 and 3; the first query sees one, the second two: 2; 4 / 2 and 6 / 2
    agree(o.ravel(), [10 * 4 * 1, 20 * (4 * 1 + 9 * 2)])


@pytest.mark.parametrize("name", mega.CASES)
def test_chunks_are_sequences_of_their_own(name: str, rng: np.random.Generator) -> None:
    inputs = attended(rng)
    parameters = mega.CASES[name](7, rng) | {"chunk": 3}
    o = mega.attention(**inputs, **parameters)
    alone = {key: value for key, value in parameters.items() if key != "chunk"}
    for start in (0, 3, 6):
        piece = {key: x[:, :, start : start + 3] if x.ndim == 4 else x for key, x in inputs.items()}
        agree(o[:, :, start : start + 3], mega.attention(**piece, **alone))


def test_softmax_weights_are_dense_attention(rng: np.random.Generator) -> None:
    inputs = attended(rng, heads=2)
    q, k = (inputs[f"kappa_{x}"][:, None] * inputs["z"] + inputs[f"mu_{x}"][:, None] for x in "qk")
    expected = inputs["r"] * dense.naive(q, k, inputs["v"], causal=True)[0]
    agree(mega.attention(**inputs, weights="softmax", causal=True), expected)


# --- the programs, on the reference backend ---------------------------------------------------------------


def test_average_program_is_the_equation(rng: np.random.Generator) -> None:
    inputs = averaged(rng)
    for extra in ({}, {"initial_state": rng.standard_normal((2, 3, 2, 1))}):
        program = parse(mega.ema_program(initial_state=bool(extra)))
        found = run(program, [*inputs.values(), *extra.values()])
        for one, other in zip(found, mega.ema(**inputs, **extra), strict=True):
            agree(one, other)


def test_average_program_has_the_gradients_of_the_equation(rng: np.random.Generator) -> None:
    inputs = [*averaged(rng, batch=1, length=4).values(), rng.standard_normal((1, 3, 2, 1))]
    cotangents = [rng.standard_normal(x.shape) for x in mega.ema(*inputs)]
    found = gradients(parse(mega.ema_program(initial_state=True)), inputs, cotangents).inputs
    for one, other in zip(found, differences(mega.ema, inputs, cotangents), strict=True):
        agree(one, other, 1e-6)


@pytest.mark.parametrize("name", mega.CASES)
def test_attention_program_is_the_equation(name: str, rng: np.random.Generator) -> None:
    for heads in (1, 2):
        inputs, parameters = attended(rng, heads=heads), mega.CASES[name](7, rng)
        text, buffers = mega.program(**parameters)
        (found,) = run(parse(text), list(inputs.values()), buffers)
        agree(found, mega.attention(**inputs, **parameters))


@pytest.mark.parametrize("name", mega.CASES)
def test_attention_program_has_the_gradients_of_the_equation(name: str, rng: np.random.Generator) -> None:
    inputs, parameters = list(attended(rng, batch=1, length=5).values()), mega.CASES[name](5, rng)
    text, buffers = mega.program(**parameters)
    y = rng.standard_normal((1, 1, 5, 2))
    found = gradients(parse(text), inputs, [y], buffers)

    def function(*arrays: Array) -> Any:
        bias = dict(zip(["bias"], arrays[7:], strict=False))
        return [mega.attention(*arrays[:7], **parameters | bias)]

    for one, other in zip(
        [*found.inputs, *found.buffers], differences(function, [*inputs, *buffers], [y]), strict=True
    ):
        agree(one, other, 1e-6)
