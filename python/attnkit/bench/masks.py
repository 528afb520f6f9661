"""How long the block structure of very large masks takes to find, and how much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attnkit
from attnkit.bench.measure import Contender, Interval, interval, measure
from attnkit.bench.memory import peak_bytes

LENGTH = 1 << 20
BLOCK = 128
DOCUMENTS = 64


@dataclass(frozen=True)
class Analysis:
    """One mask of `LENGTH` x `LENGTH` pairs in blocks of `BLOCK`."""

    mask: str
    ms: Interval
    peak_mb: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        ms = {"median": self.ms.median, "lo": self.ms.lo, "hi": self.ms.hi, "n": self.ms.n}
        return {"mask": self.mask, "length": LENGTH, "block": BLOCK, "time_ms": ms, "peak_mb": self.peak_mb}


def masks(seed: int = 0) -> dict[str, Callable[..., Any]]:
    """What is measured: bands, and documents of random lengths whose ids the analysis must read at every call."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(LENGTH - 1, generator=generator)[: DOCUMENTS - 1].sort().values + 1
    ids = torch.searchsorted(cuts, torch.arange(LENGTH), right=True)
    return {
        "causal": attnkit.causal(),
        "window and sinks": attnkit.causal() & (attnkit.prefix(4) | attnkit.window(4096)),
        f"{DOCUMENTS} documents": attnkit.document(ids),
        f"{DOCUMENTS} documents, causal": attnkit.document(ids) & attnkit.causal(),
    }


def analyse(*, seconds: float = 4.0) -> list[Analysis]:
    """Time `attnkit.block_mask` on every mask, in interleaved rounds; and the memory that a call adds."""

    def call(mask: Callable[..., Any]) -> Callable[[], object]:
        return lambda: attnkit.block_mask(mask, 1, 1, LENGTH, LENGTH, q_block=BLOCK, kv_block=BLOCK)

    calls = {name: call(mask) for name, mask in masks().items()}
    times = measure({name: Contender(run) for name, run in calls.items()}, seconds=seconds)
    found = []
    for name, run in calls.items():
        peak = peak_bytes(run)
        found.append(Analysis(name, interval(times[name]).scaled(1e3), None if peak is None else peak / 1e6))
    return found
