"""A row of suite variants: rivals that compute the same, or what is worth knowing beside it, timed in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit.bench.measure import Contender
from attnkit.bench.rows import Bar

OWN = "attnkit"
BEYOND = "bytes beyond inputs and results"  # a fact; on a curve it is to be the same at any length
CEILING = "ceiling"  # a bar against it asks for a share of the multiply-adds probed in the same rounds


@dataclass(frozen=True)
class Prepared:
    """A job with its tensors.

    ``rivals`` are by name, attnkit's own first. ``errors`` gives the relative error of a rival's results, by name; beyond
    ``wrong`` nothing is judged. ``flops`` are what a share of the ceiling counts, of products of ``dtype``. ``facts`` are
    noted beside the times: a density, a number of bytes.
    """

    rivals: Mapping[str, Contender]
    errors: Callable[[], dict[str, float]] = dict
    wrong: float = 1e-4
    flops: float | None = None
    dtype: str = "float32"
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One row. ``prepare`` takes a seed. ``bars`` are ratios to rivals: a rival's time over ours, ``least``; where only
    ``most`` is given, ours over the rival's.

    ``curve`` names the line over ``length`` that a row is a point of.
    """

    title: str
    prepare: Callable[[int], Prepared]
    bars: tuple[Bar, ...] = ()
    curve: str | None = None
    length: int = 0


def forward(call: Callable[[], Any]) -> Contender:
    """Without gradients."""
    return Contender(call, torch.no_grad)


def both(call: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor) -> Contender:
    """A call and the gradients of all ``leaves``."""
    return Contender(lambda: torch.autograd.grad(call(), leaves, cotangent), torch.enable_grad)


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative distance of any of them, in the Frobenius norm."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(map(Tensor.detach, found), map(Tensor.detach, exact), strict=True)
    )
