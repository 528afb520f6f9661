"""Factorizable attention of order 2 beside our own dense attention, and its step beside a copy of its state."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import attnkit
from attnkit.bench.rows import Bar
from attnkit.bench.variants.jobs import CEILING, OWN, Job, Prepared, distance, forward
from attnkit.plan.recurrence import operations

_HEADS, _CHUNK = 8, 64
_LENGTHS = {32: (512, 1024, 2048, 4096, 8192, 16384), 64: (2048, 4096, 8192, 16384)}  # by head_dim
_BATCHES = {32: (1, 16), 64: (1, 4)}  # of a step, by head_dim: one sequence, and some MB of states
COPY = "copy of the state"


def jobs() -> list[Job]:
    """Each head_dim over lengths, and steps of generation."""
    found = []
    for dim, lengths in _LENGTHS.items():
        # Causal dense attention does half of 4 S^2 D, this 2 S D^3: they meet at S = D^2.
        ahead_from = 2 * dim**2
        for length in lengths:
            share = [Bar(CEILING, least=0.5)] if length == 4096 else []
            ahead = [Bar("dense", least=1.0)] if length >= ahead_from else []
            title = f"factorizable b1 h{_HEADS} s{length} d{dim} fwd"
            prepare = partial(_prepare, dim, length)
            found.append(Job(title, prepare, (*share, *ahead), curve=f"factorizable d{dim}", length=length))
        for batch in _BATCHES[dim]:
            step = f"factorizable b{batch} h{_HEADS} d{dim} decode"
            found.append(Job(step, partial(_step, dim, batch), (Bar(COPY, most=1.3),)))
    return found


def _tokens(dim: int, length: int, seed: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, _HEADS, length, dim, generator=generator) for _ in range(3))
    return q, k, v


def _prepare(dim: int, length: int, seed: int) -> Prepared:
    q, k, v = _tokens(dim, length, seed)

    def errors() -> dict[str, float]:
        """Of one head, against the matrix of weights in float64."""
        few = min(length, 4096)
        x, y, z = (t[0, 0, :few].double() for t in (q, k, v))
        product = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT
        weights = (1 + product + product**2 / 2).tril()
        exact = weights @ z / weights.sum(-1, keepdim=True)
        return {OWN: distance([_causal(q, k, v)[0, 0, :few]], [exact])}

    rivals = {
        OWN: forward(lambda: _causal(q, k, v)),
        "dense": forward(lambda: attnkit.dense_attention(q, k, v, causal=True)),
    }
    return Prepared(rivals, errors, flops=length * _HEADS * operations(dim, dim, _CHUNK, order=2))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = attnkit.factorizable_attention(q, k, v, causal=True)
    assert isinstance(o, Tensor)
    return o


def _step(dim: int, batch: int, seed: int) -> Prepared:
    """One token of each sequence, from the states of 256."""
    q, k, v = _tokens(dim, 257, seed, batch)
    past, new = [t[:, :, :-1] for t in (q, k, v)], [t[:, :, -1:] for t in (q, k, v)]
    _, state = attnkit.factorizable_attention(*past, causal=True, return_state=True)

    def step() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return attnkit.factorizable_attention(*new, causal=True, initial_state=state, return_state=True)  # type: ignore[return-value]

    def errors() -> dict[str, float]:
        return {OWN: distance([step()[0]], [_causal(q, k, v)[:, :, -1:]])}

    rivals = {OWN: forward(step), COPY: forward(lambda: [t.clone() for t in state])}
    return Prepared(rivals, errors, facts={"bytes of the state": float(sum(t.nbytes for t in state))})
