"""Shared by the tests of the torch face: random tensors, the float64 oracle in torch, the state torch keeps."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak

Randn = Callable[..., Tensor]
Oracle = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def randn(rng: np.random.Generator) -> Randn:
    """``randn(*shape)``: float32, the same for a test whichever others run."""

    def make(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    return make


@pytest.fixture
def qkv(randn: Randn) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``qkv(batch, heads, length, head_dim, kv_heads=, kv_len=, v_head_dim=)``."""

    def make(
        batch: int = 2,
        heads: int = 4,
        length: int = 19,
        head_dim: int = 8,
        *,
        kv_heads: int | None = None,
        kv_len: int | None = None,
        v_head_dim: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads, kv_len = kv_heads or heads, length if kv_len is None else kv_len
        return (
            randn(batch, heads, length, head_dim),
            randn(batch, kv_heads, kv_len, head_dim),
            randn(batch, kv_heads, kv_len, v_head_dim or head_dim),
        )

    return make


@pytest.fixture
def oracle() -> Oracle:
    """The equation in float64. Score and mask functions run on whole index tensors, as Python meant them."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        score: Callable[..., Any] | None = None,
        mask: Callable[..., Any] | None = None,
        scale: float | None = None,
        sink: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        index = [torch.arange(n).view([-1 if i == at else 1 for i in range(4)]) for at, n in enumerate(sizes)]
        z = (q.shape[3] ** -0.5 if scale is None else scale) * (q @ k.mT)
        if score is not None:
            z = score(z, *index).expand(sizes)
        if mask is not None:
            z = z.masked_fill(~torch.as_tensor(mask(*index)).expand(sizes), -torch.inf)
        if sink is not None:  # one more column, without a value
            z = torch.cat([z, sink.double().view(1, -1, 1, 1).expand(*sizes[:3], 1)], dim=-1)
        lse = z.logsumexp(-1)
        weights = (z - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
        return weights[..., : sizes[3]] @ v, lse

    return attend


@pytest.fixture(autouse=True)
def _leaves_torch_as_it_was() -> Iterator[None]:
    """Nothing stays installed or compiled from one test to the next."""
    yield
    assert not ak.installed_report().active, "a test left attnkit installed"
    torch.compiler.reset()
