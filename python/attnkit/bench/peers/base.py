"""What a peer is, and what adapters share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from attnkit.bench.workloads import Inputs, Workload


@dataclass(frozen=True)
class Call:
    """A prepared call. ``run`` is what is timed; ``output`` makes o ``[B, Hq, Sq, Dv]`` of what it returned, untimed.

    ``run`` alone outlives its preparation: it holds all memory that it reads and writes. ``config`` is what it runs
    with, for the record. ``meant`` gives keys and values as the call sees them, where it keeps codes of its own.
    """

    run: Callable[[], Any]
    output: Callable[[Any], Any] = lambda raw: raw
    config: dict[str, Any] = field(default_factory=dict)
    meant: Callable[[], tuple[Any, Any]] | None = None


@dataclass(frozen=True)
class Peer:
    """Somebody who computes attention.

    ``installed()`` is the version or None; ``refuses(workload)`` says why a workload cannot be expressed, or None;
    ``prepare(inputs)`` gives the call to be timed. ``extra`` is the extra of attnkit that installs it.
    """

    name: str
    installed: Callable[[], str | None]
    refuses: Callable[[Workload], str | None]
    prepare: Callable[[Inputs], Call]
    extra: str | None = None


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, None if it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def beyond_plain(workload: Workload, *dtypes: str) -> str | None:
    """Why an inference library that takes no more than full and square causal attention cannot run this, or None."""
    s = workload.shape
    if workload.needs_grad:
        return "inference only"
    if workload.dtype not in dtypes:
        return f"not in {workload.dtype}"
    if workload.parameters == {"causal": True}:
        if s.sq != s.skv:
            return "its causal mask is another where there are more keys than queries"
        return "grouped heads under a causal mask" if s.hq != s.hkv else None
    return "full and causal attention only" if workload.parameters else None


def folded(inputs: Inputs) -> Inputs:
    """Grouped heads as queries of their kv head: ``q [B, Hq, Sq, D]`` as ``[B, Hkv, G * Sq, D]``, without a copy.

    The same problem where every query sees every key; `unfolded` undoes it on the output.
    """
    s = inputs.workload.shape
    return replace(inputs, q=inputs.q.reshape(s.b, s.hkv, s.hq // s.hkv * s.sq, s.d))


def unfolded(o: Any, workload: Workload) -> Any:
    """``o [B, Hkv, G * Sq, Dv]`` as ``[B, Hq, Sq, Dv]``."""
    s = workload.shape
    return o.reshape(s.b, s.hq, s.sq, s.dv)
