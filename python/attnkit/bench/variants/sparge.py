"""Sparge attention beside our own dense attention: predicted tiles, prediction included, and int8 by itself."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attnkit
from attnkit.bench.rows import Bar
from attnkit.bench.variants.jobs import OWN, Job, Prepared, distance, forward

_HEADS, _LENGTH = 8, 8192
_DIMS = (64, 128)
# How much is kept, and how many times faster than dense attention that is to be.
_KEPT = {"half": (0.5, 1.7), "quarter": (0.25, 3.0), "int8 alone": (1.0, 1.15)}
_TOPICS = 32  # tokens of a stretch resemble each other, or there would be nothing to predict
_WRONG = 0.1  # relative error: what is kept is to be what is needed


def jobs() -> list[Job]:
    """bfloat16 forwards, full and causal; bars are promised of full ones."""
    found = []
    for dim in _DIMS:
        for name, (share, least) in _KEPT.items():
            for causal in (False, True):
                title = (
                    f"sparge {name} b1 h{_HEADS} s{_LENGTH} d{dim} bfloat16{' causal' if causal else ''} fwd"
                )
                bars = () if causal else (Bar("dense", least=least),)
                found.append(Job(title, partial(_prepare, share, dim, causal), bars))
    return found


def inputs(length: int, dim: int, seed: int) -> list[Tensor]:
    """Stretches of tokens about one topic each, of which queries look for a few; bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, _HEADS, *shape, generator=generator)

    stretch = -(-length // _TOPICS)
    topics = normal(_TOPICS, dim)
    k = topics.repeat_interleave(stretch, 2)[:, :, :length] + normal(length, dim)
    wanted = topics[:, :, torch.randperm(_TOPICS, generator=generator)]
    q = wanted.repeat_interleave(stretch, 2)[:, :, :length] + normal(length, dim)
    return [x.to(torch.bfloat16) for x in (q, k, normal(length, dim))]


def _prepare(share: float, dim: int, causal: bool, seed: int) -> Prepared:
    warnings.filterwarnings("ignore", message="sparge_attention")
    q, k, v = inputs(_LENGTH, dim, seed)

    def sparge(int8: bool = True) -> Any:
        return attnkit.sparge_attention(q, k, v, causal=causal, topk=share, similarity=-1.0, int8=int8)

    def dense() -> Any:
        return attnkit.dense_attention(q, k, v, causal=causal)

    def errors() -> dict[str, float]:
        """Relative to attention in float32."""
        exact: Any = attnkit.dense_attention(q.float(), k.float(), v.float(), causal=causal)
        return {name: distance([rival()], [exact]) for name, rival in calls.items()}

    calls = {OWN: sparge, "dense": dense}
    if share < 1:
        calls["bfloat16"] = partial(sparge, int8=False)
    _, density = attnkit.sparge_attention(
        q, k, v, causal=causal, topk=share, similarity=-1.0, return_density=True
    )
    rivals = {name: forward(call) for name, call in calls.items()}
    return Prepared(rivals, errors, wrong=_WRONG, facts={"density": float(density.mean())})
