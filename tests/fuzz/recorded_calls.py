"""What public functions give the engine, to be made worse: of groups, clusters, what queries carry, and read-outs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

import attnkit as ak
from attnkit import _engine
from attnkit.plan.readouts import WANT

NUMBERS = {
    torch.float32: 0, torch.int32: 1, torch.int64: 2, torch.bool: 3, torch.uint8: 3, torch.bfloat16: 4, torch.float16: 5,
}  # fmt: skip
NAMES = (
    "attend_carried", "attend_carried_backward", "attend_groups", "attend_groups_backward", "look_at_lists",
    "readout", "route", "route_prefix", "sum_rows",
)  # fmt: skip


def _calls() -> Iterator[Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    q, k, v, centroids = randn(1, 2, 7, 4), randn(1, 2, 7, 4), randn(1, 2, 7, 3), randn(2, 3, 4).detach()
    bias = randn(7, 7)
    for membership in ("whole", "prefix"):
        yield lambda membership=membership: ak.routing_attention(
            q, k, v, centroids, cluster_size=3, causal=True, membership=membership
        )
    lists = torch.tensor([[[[0, 2, 5], [1, 3, 4]]]], dtype=torch.int32)
    yield lambda: ak.attention(
        q, k, v, select=ak.groups(lists, lists), score=lambda s, b, h, i, j: s + bias[i, j]
    )
    yield lambda: ak.selective_attention(q, k, v)
    yield lambda: ak.selective_attention(q, k, v, budget=3)
    plain, lse = [x.detach() for x in (q, k)], torch.zeros(1, 2, 7)
    yield lambda: ak.readout(
        *plain, lse, WANT, rows=[4, 1], topk=3, score=lambda s, b, h, i, j: s + bias.detach()[i, j]
    )
    yield lambda: ak.readout(*plain, lse, kv_lens=torch.tensor([5], dtype=torch.int32), mask=ak.causal())


@contextmanager
def _recording(found: dict[str, list[tuple[Any, ...]]]) -> Iterator[None]:
    real = {name: getattr(_engine, name) for name in NAMES}

    def recorder(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found[name].append(arguments)
            return real[name](*arguments)

        return call

    for name in NAMES:
        setattr(_engine, name, recorder(name))
    try:
        yield
    finally:
        for name in NAMES:
            setattr(_engine, name, real[name])


@cache
def recorded() -> dict[str, list[tuple[Any, ...]]]:
    """The arguments of every call of the engine's functions, forwards and backwards, with memory of their own."""
    found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in NAMES}
    with _recording(found):
        for call in _calls():
            o = call()
            loss = (o if isinstance(o, torch.Tensor) else o[0]).sum()
            if loss.requires_grad:
                loss.backward()
    return {
        name: [tuple(described(x) for x in arguments) for arguments in calls] for name, calls in found.items()
    }


KEPT: list[torch.Tensor] = []
ROOM = 65536  # elements on both sides of a tensor, for what wrong sizes and strides may reach


def described(x: Any) -> Any:
    """Tensors as (address, dtype, shape, strides), in memory that is kept."""
    if isinstance(x, torch.Tensor):
        room = torch.zeros(x.numel() + 2 * ROOM, dtype=x.dtype)
        room[ROOM : ROOM + x.numel()] = x.detach().reshape(-1)
        KEPT.append(room)
        strides = [int(np.prod(x.shape[d + 1 :], dtype=int)) for d in range(x.dim())]
        return (room[ROOM:].data_ptr(), NUMBERS[x.dtype], tuple(x.shape), strides)
    return type(x)(map(described, x)) if isinstance(x, (list, tuple)) else x


def is_tensor(x: Any) -> bool:
    """Whether this is one that has been described."""
    return isinstance(x, tuple) and len(x) == 4 and isinstance(x[0], int) and isinstance(x[2], tuple)
