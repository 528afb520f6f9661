"""Recurrences as people write them in torch: in chunks, all chunks at once where the state allows it."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64


def _cut(x: Tensor, size: int) -> Tensor:
    """``[B, H, S, ...]`` as ``[B, H, S / size, size, ...]``."""
    return x.unflatten(2, (-1, size))  # type: ignore[no-any-return, no-untyped-call]


def _lower(size: int, diagonal: int = 0) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril(diagonal)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No decay: the states are running sums of the chunks' own."""
    q, k, v = _cut(q * q.shape[-1] ** -0.5, CHUNK), _cut(k, CHUNK), _cut(v, CHUNK)
    written = k.mT @ v
    before = written.cumsum(2) - written
    inside = (q @ k.mT).masked_fill(~_lower(CHUNK), 0) @ v
    return (inside + q @ before).flatten(2, 3)


def scalar_gate(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A decay for each token: chunks at once but for the states, which follow each other."""
    q, k, v = _cut(q * q.shape[-1] ** -0.5, CHUNK), _cut(k, CHUNK), _cut(v, CHUNK)
    b = _cut(gate, CHUNK).cumsum(-1)
    between = (b[..., :, None] - b[..., None, :]).masked_fill(~_lower(CHUNK), -torch.inf).exp()
    written = (k * (b[..., -1:] - b).exp()[..., None]).mT @ v
    before = _states(written, b[..., -1, None, None].exp())
    return (((q @ k.mT) * between) @ v + (q * b.exp()[..., None]) @ before).flatten(2, 3)


def channel_gate(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A decay for each channel, as factors of queries and keys: chunks are short, or these would overflow."""
    size = 16
    q, k, v = _cut(q * q.shape[-1] ** -0.5, size), _cut(k, size), _cut(v, size)
    b = _cut(gate, size).cumsum(-2)
    reads, last = q * b.exp(), b[..., -1:, :]
    inside = (reads @ (k * (-b).exp()).mT).masked_fill(~_lower(size), 0) @ v
    before = _states((k * (last - b).exp()).mT @ v, last.mT.exp())
    return (inside + reads @ before).flatten(2, 3)


def gated_delta(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
    """Gated DeltaNet: a triangular system for each chunk, all at once, and the states one after the other."""
    k_whole = k
    q, k, v = _cut(q * q.shape[-1] ** -0.5, CHUNK), _cut(k, CHUNK), _cut(v, CHUNK)
    b, weight = _cut(gate, CHUNK).cumsum(-1), _cut(beta, CHUNK)[..., None]
    between = (b[..., :, None] - b[..., None, :]).masked_fill(~_lower(CHUNK), -torch.inf).exp()
    system = (weight * (k @ k.mT) * between).masked_fill(~_lower(CHUNK, -1), 0) + torch.eye(
        CHUNK, dtype=q.dtype
    )
    wanted = torch.cat([weight * v, weight * b.exp()[..., None] * k], -1)
    u, w = torch.linalg.solve_triangular(system, wanted, upper=False).split([v.shape[-1], k.shape[-1]], -1)
    inside, reads = (q @ k.mT) * between, q * b.exp()[..., None]
    kept, total = (k * (b[..., -1:] - b).exp()[..., None]).mT, b[..., -1, None, None].exp()
    state, rows = k_whole.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        written = u[:, :, i] - w[:, :, i] @ state
        rows.append(reads[:, :, i] @ state + inside[:, :, i] @ written)
        state = total[:, :, i] * state + kept[:, :, i] @ written
    return torch.cat(rows, 2)


def _states(written: Tensor, decay: Tensor) -> Tensor:
    """The state before each chunk."""
    state, states = torch.zeros_like(written[:, :, 0]), []
    for i in range(written.shape[2]):
        states.append(state)
        state = decay[:, :, i] * state + written[:, :, i]
    return torch.stack(states, 2)
