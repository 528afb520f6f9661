"""Attention whose queries and keys are multiplied as int8, and what a running softmax leaves out, against the reference."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnkit.backends import reference
from attnkit.backends.cpu.engine import engine
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.ops.registry import attend

CAUSAL = "kv_idx <= q_idx + (kv_len - q_len)"
SHAPES = [  # batch, Hq, Hkv, Sq, Skv, D, Dv
    (1, 2, 1, 200, 300, 64, 64),
    (2, 4, 2, 70, 70, 24, 9),
    (1, 1, 1, 1, 1, 16, 16),
    (1, 4, 1, 5, 130, 128, 32),
    (1, 1, 1, 40, 65, 600, 8),
    (1, 2, 2, 130, 64, 7, 3),
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def text(
    *, mask: str = "", score: str = "", center: str = "none", int8: bool = True, skip: float | None = None,
    q_tile: int = 128, kv_tile: int = 64, keys: str = "bhsd", buffers: str = "",
) -> str:  # fmt: skip
    encodes = [
        f"q8 = encode(q, codec = int8(tile, {q_tile}))",
        f"k8 = encode(k, codec = int8(tile, {kv_tile}), center = {center})",
    ]
    operands = "q8, k8" if int8 else "q, k"
    skipping = "" if skip is None else f", skip = {skip}"
    body = " ".join(f"{name} = {of}" for name, of in (("score", score), ("mask", mask)) if of)
    lines = [
        *(encodes if int8 else []),
        f"o, lse = attend({operands}, v, scale = default{skipping}) {{ {body} }}",
    ]
    declared = f"q: bhsd, k: {keys}, v: {keys}"
    return parse(
        f"attnkit 1\nprogram ({declared}) {buffers} {{ {' '.join(lines)} return o, lse }}".replace(
            ") return", ")\n return"
        )
    ).text


def on_grid(rng: np.random.Generator, heads: tuple[int, int], tokens: int, width: int, tile: int) -> Tensor:
    """Tokens that int8 holds: a power of two for each tile, times whole numbers, the largest of them 127."""
    x = rng.integers(-127, 128, (*heads, tokens, width)).astype(np.float32)
    for first in range(0, tokens, tile):
        x[..., first, 0] = 127
        x[..., first : first + tile, :] *= 2.0 ** rng.integers(-8, -5)
    return torch.from_numpy(x)


def tensors(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, tiles: tuple[int, int] = (128, 64)
) -> list[Tensor]:
    batch, heads, kv_heads, q_len, kv_len, width, v_width = shape
    q, k = (
        on_grid(rng, (batch, heads), q_len, width, tiles[0]),
        on_grid(rng, (batch, kv_heads), kv_len, width, tiles[1]),
    )
    v = torch.from_numpy(rng.standard_normal((batch, kv_heads, kv_len, v_width)).astype(np.float32))
    return [x.to(dtype) for x in (q, k, v)]


def expected(program: str, inputs: list[Tensor], buffers: Any = ()) -> list[Any]:
    return reference.run(parse(program), [x.double().numpy() for x in inputs], [b.numpy() for b in buffers])


def agree(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x.double().numpy(), y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.shows
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("mask", "score"), [("", ""), (CAUSAL, ""), ("(q_idx + kv_idx) % 3 != 0", "3 * tanh(s / 3)")]
)
def test_int8_is_the_reference(
    mask: str, score: str, dtype: torch.dtype, isa: str, rng: np.random.Generator
) -> None:
    for shape, tiles in zip(
        SHAPES, ((128, 64), (128, 64), (5, 3), (128, 64), (16, 100), (128, 128)), strict=True
    ):
        inputs = tensors(rng, shape, dtype, tiles)
        program = text(mask=mask, score=score, q_tile=tiles[0], kv_tile=tiles[1])
        agree(attend(*inputs, program, [], [], True), expected(program, inputs), dtype)


@pytest.mark.parametrize("mask", ["", CAUSAL])
def test_the_mean_key_is_given_back(mask: str, isa: str, rng: np.random.Generator) -> None:
    """Keys of which half mirror the others, so that their mean is what was added to all; lse is that of the keys as they were."""
    for shape in ((1, 2, 1, 100, 300, 64, 16), (2, 4, 2, 33, 64, 40, 8)):
        q, k, v = tensors(rng, shape, torch.float32)
        k[:, :, k.shape[2] // 2 :] = -k[:, :, : k.shape[2] // 2]
        steps = k.abs().amax(3, keepdim=True)
        k = torch.where(steps > 0, k, k) + torch.arange(shape[5]) % 5
        program = text(mask=mask, center="mean", kv_tile=64 * 5)  # one tile: the halves share a step
        inputs = [q, k, v]
        agree(attend(*inputs, program, [], [], True), expected(program, inputs), torch.float32)


def test_the_error_of_int8(rng: np.random.Generator) -> None:
    """Of normal numbers about one part in a hundred; an offset that all keys share does no harm if the mean is taken out."""
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 2, 500, 64)).astype(np.float32)) for _ in range(3))
    k += 20 * torch.from_numpy(rng.standard_normal(64).astype(np.float32))
    exact = expected(text(int8=False), [q, k, v])[0]
    errors = {}
    for center in ("none", "mean"):
        o, lse = attend(q, k, v, text(center=center), [], [], True)
        wanted = expected(text(center=center), [q, k, v])
        # a code may be rounded to its neighbour, where float32 and float64 differ
        np.testing.assert_allclose(o.numpy(), wanted[0], atol=5e-3)
        assert lse is not None
        np.testing.assert_allclose(lse.numpy(), wanted[1], rtol=1e-3)
        errors[center] = float(np.linalg.norm(o.numpy() - exact) / np.linalg.norm(exact))
    assert errors["mean"] < 0.02
    assert errors["mean"] < errors["none"] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_schedule_changes_a_bit(dtype: torch.dtype, rng: np.random.Generator) -> None:
    q, k, v = (
        torch.from_numpy(rng.standard_normal((3, 4, n, 40)).astype(np.float32)).to(dtype)
        for n in (150, 333, 333)
    )
    k, v = k[:, :2], v[:, :2]
    for program in (text(mask=CAUSAL, center="mean"), text(skip=1.5), text(int8=False, skip=1.5)):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attend(q, k, v, program, [], [], True))
        found.append(
            tuple(
                torch.cat(x)  # type: ignore[arg-type]
                for x in zip(
                    *(
                        attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], program, [], [], True)
                        for b in range(3)
                    ),
                    strict=True,
                )
            )
        )
        for o, lse in found[1:]:
            assert torch.equal(o, found[0][0])
            assert torch.equal(lse, found[0][1])  # type: ignore[arg-type]


def test_levels_that_fuse_agree(rng: np.random.Generator) -> None:
    """Codes and their products are the same integers everywhere, and what follows is rounded alike."""
    inputs = [torch.from_numpy(rng.standard_normal((1, 2, 200, 72)).astype(np.float32)) for _ in range(3)]
    before, found = engine().current_isa(), []
    for level in set(engine().isa_levels()) - {"scalar"}:
        engine().set_isa(level)
        found.append(attend(*inputs, text(center="mean"), [], [], True))
    engine().set_isa(before)
    for o, lse in found[1:]:
        assert torch.equal(o, found[0][0])
        assert torch.equal(lse, found[0][1])  # type: ignore[arg-type]


@pytest.mark.shows
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_does_not_exist_reaches_nothing(poison: float, isa: str, rng: np.random.Generator) -> None:
    q, k, v = tensors(rng, (2, 2, 1, 70, 200, 24, 8), torch.float32)
    lengths = torch.tensor([150, 0], dtype=torch.int32)
    program = text(keys="padded[b0]", buffers="buffers(b0: i32[1])", center="mean")
    clean = attend(q, k, v, program, [lengths], [], True)
    for t in (k, v):
        for b, n in enumerate(lengths.tolist()):
            t[b, :, n:] = poison
    o, lse = attend(q, k, v, program, [lengths], [], True)
    assert torch.equal(o, clean[0])
    assert torch.equal(lse, clean[1])  # type: ignore[arg-type]
    assert (o[1] == 0).all()
    # a key that exists reaches the rows that see its tile, and no others
    k[0, 0, 100, 3] = poison
    o, _ = attend(q, k, v, text(mask="(q_idx < 30) | (kv_idx < 64)"), [], [], False)
    assert o[0, :, :30].isnan().all()
    assert not o[0, :, 30:].isnan().any()


@pytest.mark.shows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("int8", [True, False])
def test_what_is_skipped(int8: bool, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
    """Tiles that more or less lies in, as in tests/variants: the same are left out, and what is left out is bounded."""
    q, k, v = tensors(rng, (1, 2, 1, 140, 900, 32, 16), torch.float32)
    q[..., 0] = 1.984375  # what all queries look for: it is in tiles, some of them and in some rows more
    k[..., 0] = torch.from_numpy(np.repeat(rng.integers(0, 40, 15), 64)[:900]).float()
    k[..., 100:130, 1:] *= 2
    inputs = [x.to(dtype) for x in (q, k, v)]
    exact = expected(text(int8=int8), inputs)
    left_out = 0.0
    for threshold in (6.0, 12.0, 40.0):
        program = text(int8=int8, skip=threshold)
        o, lse = attend(*inputs, program, [], [], True)
        assert lse is not None
        if dtype == torch.float32 and not int8:
            agree((o, lse), expected(program, inputs), dtype)
        dropped = 900 * 2.0**-threshold
        slack = 20 * TOLERANCE[dtype]
        assert abs(o.double().numpy() - exact[0]).max() <= 2 * dropped * float(v.abs().max()) + slack
        assert (exact[1] - lse.numpy() <= -np.log1p(-min(dropped, 0.999999)) + slack).all()
        left_out = max(left_out, float((exact[1] - lse.numpy()).max()))
    assert left_out > 1e-4 or int8


def test_gradients_are_those_at_what_the_codes_mean(rng: np.random.Generator) -> None:
    for mask, center in (("", "none"), (CAUSAL, "mean")):
        inputs = [
            torch.from_numpy(rng.standard_normal((1, h, 150, 16)).astype(np.float32)).requires_grad_()
            for h in (4, 2, 2)
        ]
        program = text(mask=mask, center=center)
        o, lse = attend(*inputs, program, [], [], True)
        assert lse is not None
        d_o, d_lse = torch.randn_like(o), torch.randn_like(lse)
        torch.autograd.backward([o, lse], [d_o, d_lse])
        wanted = reference.gradients(
            parse(program),
            [x.detach().double().numpy() for x in inputs],
            [d_o.double().numpy(), d_lse.double().numpy()],
        ).inputs
        for x, y in zip(inputs, wanted, strict=True):
            assert x.grad is not None
            assert np.linalg.norm(x.grad.numpy() - y) < 1e-3 * np.linalg.norm(y)


def test_what_skips_has_no_gradient(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 1, 1, 70, 70, 16, 16), torch.float32)
    inputs[0].requires_grad_()
    with pytest.raises(AttnkitError, match="AK503"):
        attend(*inputs, text(skip=20.0), [], [], False)


def test_opcheck(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 2, 1, 20, 20, 16, 16), torch.float32)
    for x in inputs:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.attnkit.attend, (*inputs, text(center="mean"), [], [], None, True))
