"""What is measured: frozen descriptions of a problem, suites of them, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from attnkit.variants import dense

Direction = Literal["fwd", "bwd", "fwdbwd", "decode"]
DIRECTIONS: tuple[Direction, ...] = ("fwd",)  # those that can be measured today
DTYPES = ("float32", "bfloat16", "float16")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """``q [b, hq, sq, d]``, ``k [b, hkv, skv, d]``, ``v [b, hkv, skv, dv]``."""

    b: int
    hq: int
    hkv: int
    sq: int
    skv: int
    d: int
    dv: int

    @classmethod
    def of(cls, b: int, h: int, s: int, d: int, hkv: int | None = None) -> Shape:
        """Self-attention: as many keys as queries, values as wide as keys."""
        return cls(b, h, hkv or h, s, s, d, d)


@dataclass(frozen=True)
class Workload:
    """One problem to be measured. ``variant`` is a name in `attnkit.variants.dense.CASES`."""

    variant: str
    shape: Shape
    direction: Direction = "fwd"
    dtype: str = "float32"
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique within a suite: variant and shape, and what is not forward in float32."""
        s = self.shape
        heads = f"h{s.hq}" if s.hq == s.hkv else f"h{s.hq}/{s.hkv}"
        lengths = f"s{s.sq}" if s.sq == s.skv else f"s{s.sq}x{s.skv}"
        dims = f"d{s.d}" if s.d == s.dv else f"d{s.d}/{s.dv}"
        rest = [x for x, usual in ((self.direction, "fwd"), (self.dtype, "float32")) if x != usual]
        return " ".join([self.variant, f"b{s.b}", heads, lengths, dims, *rest])

    @property
    def mask(self) -> str:
        """The mask (and what is added to scores) in words."""
        return dense.describe(**self.parameters)

    @cached_property
    def parameters(self) -> dense.Parameters:
        """The variant's parameters for this shape: numbers and numpy arrays."""
        s = self.shape
        return dense.CASES[self.variant](s.hq, s.sq, s.skv, np.random.default_rng(self.seed))

    @cached_property
    def live_pairs(self) -> int:
        """Pairs (query, key) that exist, over batch and query heads."""
        s = self.shape
        chunks = np.array_split(np.arange(s.sq), max(1, s.sq * s.skv // (1 << 24)))
        seen = sum(int(dense.visible(s.sq, s.skv, rows, **self.parameters).sum()) for rows in chunks)
        return s.b * s.hq * seen

    @property
    def flops(self) -> int:
        """Multiplications and additions of the two products over live pairs; everything else is overhead."""
        return 2 * self.live_pairs * (self.shape.d + self.shape.dv)

    @property
    def min_bytes(self) -> int:
        """The least traffic: q, k, v read once, o written once."""
        s = self.shape
        elements = s.b * (s.hq * s.sq * (s.d + s.dv) + s.hkv * s.skv * (s.d + s.dv))
        return elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a workload (torch, CPU)."""

    workload: Workload
    q: Any
    k: Any
    v: Any


def make_inputs(workload: Workload) -> Inputs:
    """Standard normal q, k, v from the workload's seed: the same numbers on every machine and thread count."""
    import torch

    s = workload.shape
    rng = np.random.default_rng(workload.seed)
    shapes = ((s.b, s.hq, s.sq, s.d), (s.b, s.hkv, s.skv, s.d), (s.b, s.hkv, s.skv, s.dv))
    q, k, v = (
        torch.from_numpy(rng.standard_normal(shape, np.float32)).to(getattr(torch, workload.dtype))
        for shape in shapes
    )
    return Inputs(workload, q, k, v)


suites: dict[str, list[Workload]] = {
    "quick": [
        Workload("full", Shape.of(1, 8, 4096, 64)),
        Workload("full", Shape.of(1, 8, 4096, 128)),
        Workload("causal", Shape.of(1, 8, 4096, 64)),
        Workload("causal", Shape.of(1, 8, 4096, 128)),
        Workload("alibi_softcap", Shape.of(1, 8, 4096, 64)),
        Workload("window", Shape.of(1, 8, 4096, 64)),
        Workload("causal", Shape.of(1, 16, 1024, 64, hkv=4)),
        Workload("full", Shape.of(1, 12, 128, 64)),
    ],
    "demo": [
        Workload("full", Shape.of(1, 8, 4096, 64)),
        Workload("causal", Shape.of(1, 8, 4096, 64)),
        Workload("window", Shape.of(1, 8, 4096, 64)),
        Workload("alibi_softcap", Shape.of(1, 8, 4096, 64)),
        Workload("causal", Shape.of(1, 16, 1024, 64, hkv=4)),
        Workload("full", Shape.of(1, 12, 128, 64)),
    ],
    # Every named variant on a shape small enough for tests: all paths, no meaningful times.
    "smoke": [Workload(name, Shape(1, 2, 1, 96, 130, 16, 16)) for name in dense.CASES],
}


def select(
    suite: str, *, variants: tuple[str, ...] = (), dtype: str | None = None, seed: int | None = None
) -> list[Workload]:
    """The workloads of a suite, narrowed to some variants, with another dtype or seed."""
    changes: dict[str, Any] = {k: v for k, v in (("dtype", dtype), ("seed", seed)) if v is not None}
    return [replace(w, **changes) for w in suites[suite] if not variants or w.variant in variants]
