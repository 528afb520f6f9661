"""Linear attention beside the same in torch, in chunks, and beside our own dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attnkit
from attnkit.bench.memory import peak_bytes
from attnkit.bench.peers import recurrences
from attnkit.bench.rows import Bar
from attnkit.bench.variants.jobs import BEYOND, CEILING, OWN, Job, Prepared, both, distance, forward
from attnkit.plan.recurrence import operations

_HEADS, _DIM, _LENGTH = 8, 64, 4096
_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_DENSE_TO = 16384  # longer, dense attention takes too long to wait for


@dataclass(frozen=True)
class Member:
    """A member of the family: what it is given besides q, k, v, how torch has it, and the least ratios promised.

    ``chunk`` are the tokens that are computed together.
    """

    gate: int  # dimensions; 0: none
    beta: bool
    peer: Callable[..., Tensor]
    forward: float
    both: float
    share: float | None
    chunk: int = 32

    def flops(self, length: int) -> int:
        """Multiplications and additions forward."""
        return length * _HEADS * operations(_DIM, _DIM, self.chunk, delta=self.beta)

    def inputs(self, length: int, seed: int) -> dict[str, Tensor]:
        """Arguments of `attnkit.linear_attention`."""
        generator = torch.Generator().manual_seed(seed)
        tokens = (1, _HEADS, length)
        given = {x: torch.randn(*tokens, _DIM, generator=generator) for x in "qkv"}
        if self.beta:
            given["k"] = torch.nn.functional.normalize(given["k"], dim=-1)
        if self.gate:
            given["gate"] = -0.1 * torch.rand((*tokens, _DIM)[: self.gate], generator=generator)
        if self.beta:
            given["beta"] = torch.rand(tokens, generator=generator)
        return given

    def ours(self, given: dict[str, Any]) -> Any:
        """The same by attnkit."""
        plain: dict[str, Any] = (
            {} if self.gate or self.beta else {"feature_map": "identity", "normalize": False}
        )
        return attnkit.linear_attention(**given, **plain)


MEMBERS = {
    "linear": Member(0, False, recurrences.linear, 10, 8, 0.6),
    "scalar gate": Member(3, False, recurrences.scalar_gate, 10, 8, 0.6),
    "channel gate": Member(4, False, recurrences.channel_gate, 6, 5, None, 16),
    "gated delta": Member(3, True, recurrences.gated_delta, 6, 5, None),
}


def jobs() -> list[Job]:
    """Each member forward and in training, and over lengths."""
    found = []
    for name, member in MEMBERS.items():
        title = f"{name} b1 h{_HEADS} s{_LENGTH} d{_DIM}"
        share = () if member.share is None else (Bar(CEILING, least=member.share),)
        bars = (Bar("torch", least=member.forward), *share)
        found += [
            Job(f"{title} fwd", partial(_prepare, name, False, _LENGTH), bars),
            Job(
                f"{title} fwdbwd", partial(_prepare, name, True, _LENGTH), (Bar("torch", least=member.both),)
            ),
        ]
    return found + [
        Job(
            f"{name} b1 h{_HEADS} s{length} d{_DIM} fwd over lengths",
            partial(_over_lengths, name, length), curve=name, length=length,
        )
        for name in MEMBERS
        for length in _LENGTHS
    ]  # fmt: skip


def _prepare(name: str, backward: bool, length: int, seed: int) -> Prepared:
    member = MEMBERS[name]
    given = member.inputs(length, seed)
    leaves = [t.requires_grad_(backward) for t in given.values()]
    cotangent = torch.ones(1, _HEADS, length, _DIM)
    calls: dict[str, Callable[[], Any]] = {
        OWN: lambda: member.ours(given),
        "torch": lambda: member.peer(**given),
    }

    def errors() -> dict[str, float]:
        """Of results, and of gradients, against torch's formulation in float64."""
        wide = {x: t.detach().double().requires_grad_(backward) for x, t in given.items()}

        def results(o: Tensor, inputs: list[Tensor]) -> list[Tensor]:
            found = torch.autograd.grad(o, inputs, torch.ones_like(o)) if backward else ()
            return [o, *found]

        exact = [t.detach() for t in results(member.peer(**wide), list(wide.values()))]
        return {rival: distance(results(call(), leaves), exact) for rival, call in calls.items()}

    def dense() -> Tensor:
        return attnkit.dense_attention(given["q"], given["k"], given["v"], causal=True)  # type: ignore[return-value]

    if backward:
        rivals = {rival: both(call, leaves, cotangent) for rival, call in calls.items()}
        rivals["dense"] = both(dense, leaves[:3], cotangent)
        return Prepared(rivals, errors)
    rivals = {rival: forward(call) for rival, call in calls.items()} | {"dense": forward(dense)}
    return Prepared(rivals, errors, flops=member.flops(length))


def _over_lengths(name: str, length: int, seed: int) -> Prepared:
    member = MEMBERS[name]
    given = member.inputs(length, seed)
    rivals = {OWN: forward(lambda: member.ours(given))}
    if length <= _DENSE_TO:
        rivals["dense"] = forward(
            lambda: attnkit.dense_attention(given["q"], given["k"], given["v"], causal=True)
        )
    return Prepared(rivals, facts=_beyond(member, given))


def _beyond(member: Member, given: dict[str, Tensor]) -> dict[str, float]:
    """How far memory rises in a call beyond what it returns, forwards and with all gradients."""

    def forwards() -> list[Tensor]:
        with torch.no_grad():
            return [member.ours(given)]

    def backwards() -> list[Tensor]:
        leaves = {x: t.detach().requires_grad_() for x, t in given.items()}
        o = member.ours(leaves)
        return [o, *torch.autograd.grad(o, list(leaves.values()), given["v"])]

    facts = {}
    for direction, run in (("fwd", forwards), ("fwdbwd", backwards)):
        results = [run()]  # once before: what threads keep for all calls
        returned = sum(t.nbytes for t in results.pop())
        if (peak := peak_bytes(run)) is not None:
            facts[f"{BEYOND} {direction}"] = float(peak - returned)
    return facts
