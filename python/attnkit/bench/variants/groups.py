"""Attention within groups of tokens: routing beside dense attention and beside the same in torch; windows of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attnkit
import attnkit.ops  # defines torch.ops.attnkit
from attnkit.bench.peers import groups as peer
from attnkit.bench.rows import Bar
from attnkit.bench.variants.jobs import OWN, Job, Prepared, both, distance, forward
from attnkit.variants import vision

_HEADS, _DIM = 8, 64
_LENGTH, _CLUSTERS, _SIZE = 8192, 16, 512
_SIDE, _WINDOW = 64, 8
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def jobs() -> list[Job]:
    """Both directions of routing, forward also causal and strictly causal; windows without and with Swin's bias."""
    title = f"routing b1 h{_HEADS} s{_LENGTH} d{_DIM} {_CLUSTERS} x {_SIZE}"
    of_dense = Bar("dense", least=8)
    found = []
    for dtype in _DTYPES:
        found += [
            Job(
                f"{title} {dtype} fwd",
                partial(_routing, {}, dtype, False),
                (of_dense, Bar("torch", least=1.0)),
            ),
            Job(
                f"{title} {dtype} causal fwd",
                partial(_routing, {"causal": True}, dtype, False),
                (Bar("torch", least=1.0),),
            ),
            Job(f"{title} {dtype} fwdbwd", partial(_routing, {}, dtype, True), (of_dense,)),
            Job(f"{title} {dtype} prefix fwd", partial(_routing, {"membership": "prefix"}, dtype, False)),
        ]
        for biased in (False, True):
            name = f"windows b1 h{_HEADS} {_SIDE}x{_SIDE} window {_WINDOW} d{_DIM}{' bias' if biased else ''} {dtype}"
            bars = (Bar("torch", least=1.2),)
            found += [
                Job(f"{name} {direction}", partial(_windows, biased, dtype, direction == "fwdbwd"), bars)
                for direction in ("fwd", "fwdbwd")
            ]
    return found


def _tokens(count: int, dtype: str, seed: int, grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, _HEADS, count, _DIM)
    return [torch.randn(shape, generator=generator).to(_DTYPES[dtype]).requires_grad_(grad) for _ in range(3)]


def _prepared(
    calls: dict[str, Callable[[], Any]],
    leaves: list[Tensor],
    backward: bool,
    dtype: str,
    errors: Callable[[], dict[str, float]],
) -> Prepared:
    cotangent = torch.ones_like(leaves[0])
    rivals = {
        name: both(call, leaves, cotangent) if backward else forward(call) for name, call in calls.items()
    }
    return Prepared(rivals, errors, wrong=1e-4 if dtype == "f32" else 3e-2)


def _routing(form: dict[str, Any], dtype: str, backward: bool, seed: int) -> Prepared:
    q, k, v = _tokens(_LENGTH, dtype, seed, backward)
    centroids = torch.randn(_HEADS, _CLUSTERS, _DIM, generator=torch.Generator().manual_seed(seed + 1))
    centroids = torch.nn.functional.normalize(centroids, dim=-1)
    causal, prefix = form.get("causal", False), "membership" in form

    def ours() -> Any:
        return attnkit.routing_attention(q, k, v, centroids, cluster_size=_SIZE, **form)

    def errors() -> dict[str, float]:
        """Given who is in which cluster: near ties may fall either way."""
        if prefix:
            return {}
        queries, keys = (x.long() for x in torch.ops.attnkit.route(q, k, centroids, _SIZE, "l2", 0))
        a, b, c = (x.detach().double() for x in (q, k, v))
        exact = peer.within(a, b, c, queries, keys, causal)
        return {OWN: distance([ours()], [exact])}

    calls: dict[str, Callable[[], Any]] = {
        OWN: ours,
        "dense": lambda: attnkit.dense_attention(q, k, v, causal=causal or prefix),
    }
    if not prefix:
        calls["torch"] = lambda: peer.routing(q, k, v, centroids.to(q.dtype), _SIZE, causal)
    return _prepared(calls, [q, k, v], backward, dtype, errors)


def _windows(biased: bool, dtype: str, backward: bool, seed: int) -> Prepared:
    q, k, v = _tokens(_SIDE**2, dtype, seed, backward)
    pattern = vision.Windows((_SIDE, _SIDE), (_WINDOW, _WINDOW), (0, 0))
    table = torch.randn(
        _HEADS, 2 * _WINDOW - 1, 2 * _WINDOW - 1, generator=torch.Generator().manual_seed(seed + 1)
    )
    table.requires_grad_(backward and biased)
    y, x = (torch.arange(_WINDOW**2) // _WINDOW, torch.arange(_WINDOW**2) % _WINDOW)
    offsets = [a[:, None] - a[None] + _WINDOW - 1 for a in (y, x)]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = table[:, offsets[0], offsets[1]].to(q.dtype) if biased else None
        return peer.windows(q, k, v, _SIDE, _WINDOW, bias)

    calls: dict[str, Callable[[], Any]] = {
        OWN: lambda: attnkit.attention(
            q, k, v, select=pattern, score=attnkit.window_bias(table, pattern) if biased else None
        ),
        "torch": lambda: torchs(q, k, v),
    }

    def errors() -> dict[str, float]:
        exact = torchs(*(t.detach().double() for t in (q, k, v)))
        return {name: distance([call()], [exact]) for name, call in calls.items()}

    return _prepared(calls, [q, k, v, *([table] if table.requires_grad else [])], backward, dtype, errors)
