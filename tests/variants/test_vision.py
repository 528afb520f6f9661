"""Windows over grids: against reshapes, rolls and torch's own sampling; limits; the programs."""

from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from attnkit.backends.reference import gradients, run
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.testing.gradients import agree, differences
from attnkit.variants import block_sparse as bs, dense, vision

pytestmark = pytest.mark.shows
Array = Any


def tensors(rng: np.random.Generator, tokens: int, heads: int = 2) -> list[Array]:
    return [rng.standard_normal((1, h, tokens, d)) for h, d in ((heads, 4), (1, 4), (1, 3))]


def reference(inputs: list[Array], pattern: vision.GridPattern, table: Array | None = None) -> list[Array]:
    text, buffers = vision.program(pattern, table=table)
    return run(parse(text), inputs, buffers)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        agree(one, other, tolerance)


def grid(x: Array, *shape: int) -> Array:
    return x.reshape(*x.shape[:2], *shape, x.shape[-1])


def seen(pattern: vision.GridPattern, token: int) -> list[int]:
    n = prod(pattern.shape)
    o = reference([np.zeros((1, 1, n, 1)), np.zeros((1, 1, n, 1)), np.eye(n)[None, None]], pattern)[0]
    return [int(j) for j in np.flatnonzero(o[0, 0, token])]


def test_sets_by_hand() -> None:
    """A grid of 4 x 4: row y, column x is token 4 y + x."""
    assert seen(vision.Windows((4, 4), (2, 2), (0, 0)), 5) == [0, 1, 4, 5]
    assert seen(vision.Windows((4, 4), (2, 2), (1, 1)), 5) == [5, 6, 9, 10]
    assert seen(vision.Windows((4, 4), (2, 2), (1, 1)), 0) == [
        0
    ]  # cut off by the border, not joined with the other side
    assert seen(vision.Grid((4, 4), (2, 2)), 5) == [5, 7, 13, 15]
    assert seen(vision.Halo((4, 4), (2, 2), 1), 5) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert seen(vision.Neighbourhood((4, 4), (3, 3)), 5) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert seen(vision.Neighbourhood((4, 4), (3, 3)), 0) == [
        0,
        1,
        2,
        4,
        5,
        6,
        8,
        9,
        10,
    ]  # as many at a corner
    assert seen(vision.Neighbourhood((4, 4), (2, 2), 2), 5) == [5, 7, 13, 15]
    assert seen(vision.Sampled((4, 4), 2), 0) == [5, 7, 13, 15]


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        vision.Windows((3, 4), (3, 4), (0, 0)), vision.Windows((3, 4), (8, 8), (0, 0)), vision.Grid((3, 4), (3, 4)),
        vision.Halo((3, 4), (1, 1), 3), vision.Halo((3, 4), (3, 4), 0), vision.Neighbourhood((3, 4), (3, 4)),
        vision.Sampled((3, 4), 1),
    ],
    ids=repr,
)  # fmt: skip
def test_the_whole_image_is_dense(pattern: vision.GridPattern, rng: np.random.Generator) -> None:
    inputs = tensors(rng, 12)
    close(vision.naive(*inputs, pattern), dense.naive(*inputs))
    close(reference(inputs, pattern), dense.naive(*inputs))


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_are_dense_attention_of_rolled_blocks(shift: int, rng: np.random.Generator) -> None:
    """Swin as it is usually computed: roll, partition, attend with a region mask, and back."""
    q, k, v = tensors(rng, 24, heads=1)
    found = reference([q, k, v], vision.Windows((4, 6), (2, 3), (shift, shift)))[0]
    regions = np.zeros((4, 6), int)
    for y in (slice(0, -2), slice(-2, -shift or None), slice(-shift, None) if shift else slice(0)):
        for x in (slice(0, -3), slice(-3, -shift or None), slice(-shift, None) if shift else slice(0)):
            regions[y, x] = regions.max() + 1

    def windows(x: Array) -> Array:  # [4, 6, ...] -> [window, token, ...]
        return x.reshape(2, 2, 2, 3, -1).swapaxes(1, 2).reshape(4, 6, -1)

    ids = windows(regions)[..., 0]
    parts = [windows(np.roll(grid(x, 4, 6)[0, 0], (-shift, -shift), (0, 1))) for x in (q, k, v)]
    out = [
        dense.naive(*(x[n][None, None] for x in parts), document=(ids[n], ids[n]))[0][0, 0] for n in range(4)
    ]
    o = np.stack(out).reshape(2, 2, 2, 3, -1).swapaxes(1, 2).reshape(4, 6, -1)
    close([grid(found, 4, 6)[0, 0]], [np.roll(o, (shift, shift), (0, 1))])


def test_grid_after_a_permutation_is_block(rng: np.random.Generator) -> None:
    """Exchange "which group" with "where in it" along each axis, and the grid is windows."""
    inputs = tensors(rng, 24)
    permuted = [grid(x, 2, 2, 3, 2).transpose(0, 1, 3, 2, 5, 4, 6).reshape(x.shape) for x in inputs]
    expected = reference(permuted, vision.Windows((4, 6), (2, 3), (0, 0)))[0]
    back = grid(expected, 2, 2, 2, 3).transpose(0, 1, 3, 2, 5, 4, 6).reshape(expected.shape)
    close([reference(inputs, vision.Grid((4, 6), (2, 3)))[0]], [back])


def test_no_halo_is_blocks(rng: np.random.Generator) -> None:
    inputs = tensors(rng, 20)
    expected = reference(inputs, vision.Windows((4, 5), (2, 2), (0, 0)))
    close(reference(inputs, vision.Halo((4, 5), (2, 2), 0)), expected)


def test_every_query_has_as_many_neighbours() -> None:
    for pattern in (p for name, p in vision.CASES.items() if isinstance(p, vision.Neighbourhood)):
        for i in range(prod(pattern.shape)):
            keys = list(pattern.keys(bs.Query(0, 0, i, prod(pattern.shape), prod(pattern.shape))))
            assert len(set(keys)) == prod(pattern.size)
            assert i in keys


@pytest.mark.parametrize(("shape", "factor"), [((5, 6), 2), ((7, 9), 3), ((8, 11), 4), ((10, 10), 7)])
def test_sampling_is_nearest_exact(shape: tuple[int, int], factor: int, rng: np.random.Generator) -> None:
    """ToDo: dense attention of keys and values of the image that torch has scaled down."""
    inputs = tensors(rng, prod(shape))

    def down(x: Array) -> Array:
        image = torch.from_numpy(grid(x, *shape)[0]).permute(0, 3, 1, 2)
        size = [n // factor for n in shape]
        small = torch.nn.functional.interpolate(image, size=size, mode="nearest-exact")
        return small.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[-1]).numpy()

    expected = dense.naive(inputs[0], down(inputs[1]), down(inputs[2]))
    close(vision.naive(*inputs, vision.Sampled(shape, factor)), expected)
    close(reference(inputs, vision.Sampled(shape, factor)), expected)


def test_channel_attention_is_dense_with_roles_exchanged(rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((2, 3, 7, 4)) for _ in range(3))
    weights = torch.softmax(0.5 * torch.from_numpy(k).mT @ torch.from_numpy(v), dim=-1)
    close([vision.channel_naive(q, k, v)], [(weights @ torch.from_numpy(q).mT).mT.numpy()])
    text, _ = dense.program()
    text = text.replace("scale = default", "scale = 0.5")
    o, _ = run(parse(text), [x.swapaxes(2, 3) for x in (k, v, q)])
    close([o.swapaxes(2, 3)], [vision.channel_naive(q, k, v)])


# --- the programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vision.CASES)
def test_program_is_the_equation(name: str, rng: np.random.Generator) -> None:
    pattern = vision.CASES[name]
    inputs = tensors(rng, prod(pattern.shape))
    table = rng.standard_normal((2, *(2 * n - 1 for n in pattern.shape))).astype(np.float32)
    close(reference(inputs, pattern), vision.naive(*inputs, pattern))
    close(reference(inputs, pattern, table), vision.naive(*inputs, pattern, table=table))


def test_every_length_of_an_axis(rng: np.random.Generator) -> None:
    for length in range(1, 8):
        inputs = tensors(rng, length)
        for n in range(1, length + 1):
            patterns = [vision.Windows((length,), (n,), (s,)) for s in range(n)]
            patterns += [vision.Neighbourhood((length,), (n,), step) for step in range(1, length // n + 1)]
            patterns += [
                vision.Sampled((length,), n),
                vision.Grid((length,), (n,)),
                vision.Halo((length,), (n,), 1),
            ]
            for pattern in patterns:
                close(reference(inputs, pattern), vision.naive(*inputs, pattern))


@pytest.mark.parametrize("name", ["swin_shifted", "neighbourhood_dilated", "todo"])
def test_gradients(name: str, rng: np.random.Generator) -> None:
    """By q, k, v and by the table of biases, which many pairs share."""
    small = {
        "swin_shifted": vision.Windows((2, 4), (2, 2), (0, 1)), "todo": vision.Sampled((3, 2), 2),
        "neighbourhood_dilated": vision.Neighbourhood((4, 2), (2, 2), 1),
    }  # fmt: skip
    pattern = small[name]
    inputs = tensors(rng, prod(pattern.shape))
    table = rng.standard_normal((2, *(2 * n - 1 for n in pattern.shape))).astype(np.float32)
    text, buffers = vision.program(pattern, table=table)
    results = vision.naive(*inputs, pattern, table=table)
    cotangents = [rng.standard_normal(x.shape) for x in results]
    found = gradients(parse(text), inputs, cotangents, buffers)
    expected = differences(
        lambda *x: vision.naive(*x[:3], pattern, table=x[3]), [*inputs, table.astype(float)], cotangents
    )
    close([*found.inputs, *found.buffers], expected, 1e-6)


@pytest.mark.parametrize(
    "make",
    [lambda: vision.Neighbourhood((4, 4), (5, 1)), lambda: vision.Neighbourhood((4, 4), (2, 3), 2),
     lambda: vision.Sampled((4, 2), 3), lambda: vision.Sampled((4, 2), 0)],
)  # fmt: skip
def test_refuses(make: Any) -> None:
    with pytest.raises(AttnkitError) as caught:
        make()
    assert caught.value.code == "AK401"
