"""Block-sparse attention at a tenth of the pairs, beside our own dense attention and FlexAttention on the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attnkit
from attnkit.bench.peers.flex import compiled
from attnkit.bench.rows import Bar
from attnkit.bench.variants.jobs import OWN, Job, Prepared, both, distance, forward
from attnkit.variants.block_sparse import bigbird_layout

_HEADS, _DIM, _LENGTH, _DENSITY = 8, 64, 8192, 0.1
_SAMPLED = 32  # queries whose results are compared with float64
# The block, the least ratios to dense attention, forward and with gradients, and that to FlexAttention by dtype.
_FORWARD, _BOTH, _FLEX = 7, 5, {"float32": 2.5, "bfloat16": 5}
_WRONG = {"float32": 1e-4, "bfloat16": 2e-2}


def _random(block: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """As many blocks in each row, give or take one, of every head its own. bool ``[H, n, n]``."""
    n = _LENGTH // block
    ends = np.rint(_DENSITY * n * np.arange(n + 1)).astype(int)
    kept = np.zeros((_HEADS, n, n), bool)
    for head in kept:
        for row, count in zip(head, np.diff(ends), strict=True):
            row[rng.permutation(n)[:count]] = True
    return kept


def _bigbird(block: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """The first block, the own and the one before, and random ones; under the diagonal."""
    n = _LENGTH // block
    layout = bigbird_layout(n, n, _HEADS, reach=1, first=1, random=10, seed=int(rng.integers(2**31)))
    found: np.ndarray[Any, Any] = layout & np.tri(n, dtype=bool)
    return found


PATTERNS: dict[str, tuple[Callable[..., np.ndarray[Any, Any]], int, bool]] = {
    "random 128": (_random, 128, False),
    "random 64": (_random, 64, False),
    "bigbird 128": (_bigbird, 128, True),
}


def jobs() -> list[Job]:
    """Patterns by dtype, forward and in training; and blocks that queries choose."""
    found = []
    for name, (_, _, causal) in PATTERNS.items():
        for dtype, flex in _FLEX.items():
            title = f"block-sparse {name} {dtype} b1 h{_HEADS} s{_LENGTH} d{_DIM}"
            asked = not causal  # of how many pairs there are, it is what the promise says
            forward_bars = (*((Bar("dense", least=_FORWARD),) if asked else ()), Bar("flex", least=flex))
            both_bars = (Bar("dense", least=_BOTH),) if asked else ()
            found += [
                Job(f"{title} fwd", partial(_prepare, name, dtype, False), forward_bars),
                Job(f"{title} fwdbwd", partial(_prepare, name, dtype, True), both_bars),
            ]
    return found + [
        Job(
            f"{choice} {dtype} b1 h{_HEADS} s{_LENGTH} d{_DIM} {way}",
            partial(_prepare_choice, choice, dtype, way),
        )
        for choice in CHOICES
        for dtype in _FLEX
        for way in ("fwd", "fwdbwd")
    ]


def _tensors(dtype: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, _HEADS, _LENGTH, _DIM, generator=generator).to(getattr(torch, dtype)) for _ in range(4)
    ]


def _prepare(name: str, dtype: str, backward: bool, seed: int) -> Prepared:
    make, block, causal = PATTERNS[name]
    layout = torch.from_numpy(make(block, np.random.default_rng(seed)))
    kinds = layout.byte() * 2
    if causal:
        kinds[:, range(len(kinds[0])), range(len(kinds[0]))] = 1  # the diagonal
    mask = attnkit.causal("top_left") if causal else None
    blocks = attnkit.BlockMask.from_dense(kinds, q_block=block, kv_block=block, mask=mask)
    *qkv, cotangent = _tensors(dtype, seed)
    q, k, v = (t.requires_grad_(backward) for t in qkv)
    calls: dict[str, Callable[[], Any]] = {OWN: lambda: attnkit.block_sparse_attention(q, k, v, blocks)}
    if not backward:
        flex = compiled(q, k, v, blocks.to_torch())
        calls["flex"] = flex

    def errors() -> dict[str, float]:
        rows = torch.randperm(_LENGTH, generator=torch.Generator().manual_seed(seed))[:_SAMPLED]
        seen = layout[:, rows // block].repeat_interleave(block, -1)
        if causal:
            seen = seen & (torch.arange(_LENGTH) <= rows[:, None])
        exact = _exact(qkv, cotangent, seen, rows, backward)

        def results(call: Callable[[], Tensor]) -> list[Tensor]:
            o = call()
            of_q = torch.autograd.grad(o, [q], cotangent) if backward else ()
            return [x[:, :, rows] for x in (o, *of_q)]

        return {rival: distance(results(call), exact) for rival, call in calls.items()}

    calls_beside = calls | {"dense": lambda: attnkit.dense_attention(q, k, v)}
    rivals = {
        rival: both(call, [q, k, v], cotangent) if backward else forward(call)
        for rival, call in calls_beside.items()
    }
    density = float(layout.float().mean()) - causal * 0.5 * block / _LENGTH
    return Prepared(rivals, errors, wrong=_WRONG[dtype], dtype=dtype, facts={"density": density})


def _exact(qkv: list[Tensor], cotangent: Tensor, seen: Tensor, rows: Tensor, backward: bool) -> list[Tensor]:
    """o and the gradient of q in float64, of some queries."""
    q, k, v, g = (t.detach().double() for t in (*qkv, cotangent))
    z = (q[:, :, rows] @ k.mT * _DIM**-0.5).masked_fill(~seen, float("-inf"))
    p = z.softmax(-1)
    o = p @ v
    if not backward:
        return [o]
    of_p = g[:, :, rows] @ v.mT
    of_z = p * (of_p - (of_p * p).sum(-1, keepdim=True))
    return [o, of_z @ k * _DIM**-0.5]


CHOICES = {
    "moba block 128 k 8": lambda: attnkit.top_k_blocks(128, 8),
    "moba block 128 k 8 by 128 queries": lambda: attnkit.top_k_blocks(128, 8, q_block=128),
}


def _prepare_choice(name: str, dtype: str, way: str, seed: int) -> Prepared:
    *qkv, cotangent = _tensors(dtype, seed)
    q, k, v = (t.requires_grad_(way == "fwdbwd") for t in qkv)
    calls: dict[str, Callable[[], Any]] = {
        OWN: lambda: attnkit.attention(q, k, v, select=CHOICES[name]()),
        "dense": lambda: attnkit.dense_attention(q, k, v, causal=True),
    }
    return Prepared({
        rival: both(call, [q, k, v], cotangent) if way == "fwdbwd" else forward(call)
        for rival, call in calls.items()
    })  # fmt: skip
