"""Kernels whose scores are the weights themselves, forwards and backwards, against the reference in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit.backends import get
from attnkit.ops.traced import Traceable
from attnkit.plan.spec import KernelSpec
from attnkit.testing import Dims, qkv

TILES = {"dq_tile_q": 64, "dq_tile_kv": 64, "dkv_tile_q": 64, "dkv_tile_kv": 64}
BIAS = torch.linspace(-2, 2, 70 * 150).view(70, 150).sin()
SLOPES = torch.tensor([0.5, 0.2])
TABLE = torch.linspace(-1, 1, 30)
SCORES: dict[str, Any] = {
    "plain": None,
    "sigmoid": lambda s, b, h, i, j: (s - 1.5).sigmoid(),
    "bias": lambda s, b, h, i, j: (s + BIAS[i, j]).sigmoid(),
    "slopes": lambda s, b, h, i, j: (s - SLOPES[h] * (i - j).abs()).sigmoid(),
    "scattered": lambda s, b, h, i, j: s * TABLE[(i - j).abs().clamp(max=29)],
    "gone": lambda s, b, h, i, j: torch.where((j % 4 == 1) | (i == 5), -torch.inf, s),
}
MASKS: dict[str, Any] = {
    "all": None,
    "causal": ak.causal(),
    "lists": lambda b, h, i, j: (j + h) % 3 != i % 2,
    "rows": lambda b, h, i, j: (i % 5 != 2) & (j % 7 != 3),
}


def both(build: Callable[..., Any], arrays: Any, traced: Traceable, dtype: str) -> Any:
    """A kernel, the reference of the same program, and their tensors."""
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays]
    kernel, buffers, params = build(traced._replace(normalizer="none"), tensors[0], tensors[2], TILES)
    program = kernel.spec.program
    spec = KernelSpec(program, "float64", tensors[0].shape[3], tensors[2].shape[3], "cpu")
    return kernel, get("reference").build(spec, {}), tensors, buffers, params


def outputs(kernel: Any, tensors: list[Any], buffers: Any, params: Any, seed: Any = None) -> Any:
    q, _, v = tensors
    o, lse = q.new_full((*q.shape[:3], v.shape[3]), float("nan")), torch.full(q.shape[:3], float("nan"))
    kernel(*tensors, o, lse, buffers, params, 1, seed)
    return o, lse


def close(found: Any, expected: Any, dtype: str) -> None:
    size = float(expected.abs().nan_to_num().amax().clamp(min=1)) if expected.numel() else 1.0
    tolerance = {"float32": 4e-6, "float16": 4e-3}[dtype]
    error = (found.double() - expected.double()).abs()
    assert not error.isnan().any()
    assert float(error.amax() if error.numel() else 0) <= tolerance * size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("score", "mask"), [
    ("plain", "all"), ("sigmoid", "causal"), ("bias", "lists"), ("slopes", "rows"), ("scattered", "causal"), ("gone", "rows"),
])  # fmt: skip
def test_both_directions(score: str, mask: str, dtype: str, build: Any, rng: np.random.Generator) -> None:
    arrays = qkv("gaussian", rng, Dims(1, 2, 1, 70, 150, 16, 24), dtype)
    traced = Traceable(SCORES[score], MASKS[mask])
    kernel, reference, tensors, buffers, params = both(build, arrays, traced, dtype)
    o, lse = outputs(kernel, tensors, buffers, params)
    doubles = [t.double() for t in tensors]
    expected, _ = outputs(reference, doubles, buffers, params)
    close(o, expected, dtype)
    d_o = torch.from_numpy(rng.standard_normal(o.shape)).to(o.dtype)
    found = (
        [torch.zeros_like(t) for t in tensors],
        [torch.zeros(b.shape) if b.is_floating_point() else None for b in buffers],
    )
    exact = [torch.zeros_like(t) for t in doubles], [None if d is None else d.double() for d in found[1]]
    kernel.backward(*tensors, o, lse, buffers, params, d_o, None, *found[0], found[1], 1, None)
    reference.backward(
        *doubles, expected, lse, buffers, params, d_o.double(), None, *exact[0], exact[1], 1, None
    )
    for mine, true in zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True):
        if mine is not None:
            close(mine, true, dtype)


@pytest.mark.parametrize("q_len", [1, 3])
def test_split_keys_are_added_up(q_len: int, build: Any, rng: np.random.Generator) -> None:
    arrays = qkv("gaussian", rng, Dims(1, 4, 2, q_len, 300, 16, 16))
    kernel, reference, tensors, buffers, params = both(
        build, arrays, Traceable(SCORES["sigmoid"], None), "float32"
    )
    expected, _ = outputs(reference, [t.double() for t in tensors], buffers, params)
    close(outputs(kernel, tensors, buffers, params)[0], expected, "float32")


def test_sequences_and_dead_slots(build: Any, rng: np.random.Generator) -> None:
    q, k, v = qkv("gaussian", rng, Dims(3, 2, 1, 40, 150, 16, 16))
    lens = np.array([150, 0, 7], np.int32)
    for b, n in enumerate(lens):
        k[b, :, n:], v[b, :, n:] = np.nan, np.inf
    padded = Traceable(SCORES["sigmoid"], ak.causal(), kv_lens=torch.from_numpy(lens))
    kernel, reference, tensors, buffers, params = both(build, (q, k, v), padded, "float32")
    expected, _ = outputs(reference, [t.double() for t in tensors], buffers, params)
    close(outputs(kernel, tensors, buffers, params)[0], expected, "float32")

    arrays = qkv("gaussian", rng, Dims(1, 2, 1, 140, 170, 16, 16))
    cu_q, cu_kv = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 140], [0, 9, 100, 170]))
    packed = Traceable(None, ak.causal(), cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    kernel, reference, tensors, buffers, params = both(build, arrays, packed, "float32")
    expected, _ = outputs(reference, [t.double() for t in tensors], buffers, params)
    close(outputs(kernel, tensors, buffers, params)[0], expected, "float32")


def test_dropout(build: Any, rng: np.random.Generator) -> None:
    arrays = qkv("gaussian", rng, Dims(1, 2, 1, 70, 90, 16, 16))
    traced = Traceable(SCORES["sigmoid"], None, dropout_p=0.4)
    kernel, reference, tensors, buffers, params = both(build, arrays, traced, "float32")
    seed = 1234567
    expected, _ = outputs(reference, [t.double() for t in tensors], buffers, params, seed)
    close(outputs(kernel, tensors, buffers, params, torch.tensor(seed))[0], expected, "float32")
