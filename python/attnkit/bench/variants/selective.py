"""Selective attention beside our own dense attention, and beside the naive computation in torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attnkit
from attnkit.bench.memory import peak_bytes
from attnkit.bench.rows import Bar
from attnkit.bench.variants.jobs import OWN, Job, Prepared, both, distance, forward

_HEADS, _DIM, _LENGTH = 8, 64, 4096
_LENGTHS = (1024, 2048, 4096, 8192, 16384)
_NAIVE_TO = 4096  # of the lengths: it takes memory that grows with the square
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The equation with every matrix materialised, of as many heads as there are queries and keys."""
    length = q.shape[2]
    logits = (q @ k.mT * q.shape[3] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    added = logits[:, 0].relu().masked_fill(later, 0.0)
    added = added - torch.diag_embed(added.diagonal(dim1=1, dim2=2))
    added[:, :, 0] = 0.0
    f = added.cumsum(1) - added
    weights = (logits - f[:, None]).masked_fill(later, -torch.inf).softmax(-1)
    o: Tensor = weights.to(v.dtype) @ v
    return o


CALLS: dict[str, Callable[..., Any]] = {
    OWN: attnkit.selective_attention,
    "dense": partial(attnkit.dense_attention, causal=True),
    "torch": naive,
}


def jobs() -> list[Job]:
    """Forward and in training, also where no key is ever forgotten; and the memory that both take, over lengths."""
    found = []
    for name in _DTYPES:
        title = f"selective {name} b1 h{_HEADS} s{_LENGTH} d{_DIM}"
        for backward, most in ((False, 1.35), (True, 1.5)):
            way = "fwdbwd" if backward else "fwd"
            dense = (Bar("dense", most=most),) if name == "f32" else ()
            found += [
                Job(f"{title} {way}", partial(_prepare, name, backward), (*dense, Bar("torch", least=20))),
                Job(
                    f"{title} {way}, all remembered", partial(_prepare, name, backward, remembers=True), dense
                ),
            ]
    return found + [
        Job(f"selective memory b1 h{_HEADS} s{length} d{_DIM}", partial(_memory, length), length=length)
        for length in _LENGTHS
    ]


def _inputs(length: int, dtype: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, _HEADS, length, _DIM, generator=generator).to(_DTYPES[dtype]) for _ in range(3)]


def _prepare(dtype: str, backward: bool, seed: int, *, remembers: bool = False) -> Prepared:
    """With ``remembers`` no logit of the selecting head is above 0."""
    inputs = _inputs(_LENGTH, dtype, seed)
    if remembers:
        inputs[0][:, 0], inputs[1][:, 0] = -inputs[0][:, 0].abs(), inputs[1][:, 0].abs()
    given = [t.requires_grad_(backward) for t in inputs]
    cotangent = torch.ones_like(given[0])
    calls = {name: partial(call, *given) for name, call in CALLS.items() if name != "torch" or not remembers}

    def errors() -> dict[str, float]:
        """Of results, and of gradients, against the same with fewer tokens in float64."""
        few = [t.detach()[:, :, :512] for t in given]

        def results(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
            inputs = [t.clone().requires_grad_(backward) for t in inputs]
            o = call(*inputs)
            return [o.detach(), *(torch.autograd.grad(o, inputs, torch.ones_like(o)) if backward else ())]

        exact = results(naive, [t.double() for t in few])
        return {name: distance(results(CALLS[name], few), exact) for name in (OWN, "torch")}

    wrong = 1e-4 if dtype == "f32" else 3e-2
    if backward:
        return Prepared(
            {name: both(call, given, cotangent) for name, call in calls.items()}, errors, wrong, dtype=dtype
        )
    return Prepared({name: forward(call) for name, call in calls.items()}, errors, wrong, dtype=dtype)


def _memory(length: int, seed: int) -> Prepared:
    """Its facts are how far memory rises in the first call of a process, result and gradients included."""
    facts: dict[str, float] = {}
    for name in CALLS:
        if name == "torch" and length > _NAIVE_TO:
            continue
        for direction in ("fwd", "fwdbwd"):
            code = f"from {__name__} import peak; print(peak({name!r}, {direction!r}, {length}))"
            command = [sys.executable, "-c", code]
            said = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603 -- this file
            facts[f"{name} {direction} bytes"] = float(said)
    given = _inputs(length, "f32", seed)
    return Prepared({OWN: forward(partial(CALLS[OWN], *given))}, facts=facts)


def peak(name: str, direction: str, length: int) -> int | None:
    """How far memory rises in a call, of the first of its size in this process."""
    call, few = CALLS[name], [t.requires_grad_() for t in _inputs(64, "f32", 0)]
    call(*few).sum().backward()  # what is loaded and traced once
    given = [t.requires_grad_(direction != "fwd") for t in _inputs(length, "f32", 0)]

    def run() -> Any:
        o = call(*given)
        return o, torch.autograd.grad(o, given, o.detach()) if direction != "fwd" else None

    return peak_bytes(run)
