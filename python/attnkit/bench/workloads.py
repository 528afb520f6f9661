"""What is measured: frozen descriptions of a problem, and their inputs. (`rows` has the suites.)"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from attnkit.variants import dense, kv_quant

Direction = Literal["fwd", "bwd", "fwdbwd", "decode"]
DIRECTIONS: tuple[Direction, ...] = ("fwd",)  # those that the CPU engine has today
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
    """One problem to be measured. ``variant`` is a name in `attnkit.variants.dense.CASES`.

    Direction ``fwdbwd`` is a call and the gradients of q, k and v; ``decode`` reads another KV cache at every call, so
    that none is warm. ``grad``: forward alone, but of inputs that want gradients. ``pages``: keys and values are in an
    `ak.KVCache`, of pages of so many tokens, ``shuffled`` or in turn; or (0) without pages. ``codec``: the cache's, where it keeps
    codes.
    """

    variant: str
    shape: Shape
    direction: Direction = "fwd"
    dtype: str = "float32"
    seed: int = 0
    grad: bool = False
    pages: int | None = None
    shuffled: bool = False
    codec: str | None = None

    @property
    def name(self) -> str:
        """Unique within a suite: variant and shape, and what is not forward in float32."""
        s = self.shape
        heads = f"h{s.hq}" if s.hq == s.hkv else f"h{s.hq}/{s.hkv}"
        lengths = f"s{s.sq}" if s.sq == s.skv else f"s{s.sq}x{s.skv}"
        dims = f"d{s.d}" if s.d == s.dv else f"d{s.d}/{s.dv}"
        rest = [x for x, usual in ((self.direction, "fwd"), (self.dtype, "float32")) if x != usual]
        rest += ["grad"] if self.grad else []
        if self.pages is not None:
            rest += [f"pages of {self.pages}" if self.pages else "cache"]
        rest += ["shuffled"] if self.shuffled else []
        rest += [self.codec] if self.codec else []
        return " ".join([self.variant, f"b{s.b}", heads, lengths, dims, *rest])

    @property
    def needs_grad(self) -> bool:
        """Whether q, k and v want gradients."""
        return self.grad or self.direction == "fwdbwd"

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
        if self.parameters in ({}, {"causal": True}):  # without a look at every pair: these get long
            seen = np.clip(np.arange(s.sq) + s.skv - s.sq + 1, 0, s.skv) if self.parameters else s.skv
            return s.b * s.hq * int(np.sum(np.broadcast_to(seen, s.sq)))
        chunks = np.array_split(np.arange(s.sq), max(1, s.sq * s.skv // (1 << 24)))
        return (
            s.b
            * s.hq
            * sum(int(dense.visible(s.sq, s.skv, rows, **self.parameters).sum()) for rows in chunks)
        )

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products over live pairs; everything else is overhead.

        Two products forward; backward five, one of which the forward had already done.
        """
        forward = 2 * self.live_pairs * (self.shape.d + self.shape.dv)
        return forward * 7 // 2 if self.direction == "fwdbwd" else forward

    @property
    def min_bytes(self) -> int:
        """The least traffic: q, k, v read once, o written once; backward these and do are read, dq, dk, dv written."""
        s = self.shape
        q, k, v, o = s.hq * s.sq * s.d, s.hkv * s.skv * s.d, s.hkv * s.skv * s.dv, s.hq * s.sq * s.dv
        elements = q + k + v + o
        if self.codec is not None:
            of_codes = kv_quant.CACHE_BITS[self.codec] * (k + v) // 8
            return s.b * (int(of_codes) + (q + o) * ITEM_BYTES[self.dtype])
        if self.direction == "fwdbwd":
            elements += (q + k + v + 2 * o) + (q + k + v)
        return s.b * elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a workload (torch, CPU); ``do`` is the cotangent of its output."""

    workload: Workload
    q: Any
    k: Any
    v: Any
    do: Any


def make_inputs(workload: Workload) -> Inputs:
    """Standard normal q, k, v, do from the workload's seed: the same numbers on every machine and thread count."""
    import torch

    s = workload.shape
    rng = np.random.default_rng(workload.seed)
    shapes = (
        (s.b, s.hq, s.sq, s.d), (s.b, s.hkv, s.skv, s.d), (s.b, s.hkv, s.skv, s.dv), (s.b, s.hq, s.sq, s.dv),
    )  # fmt: skip
    q, k, v, do = (
        torch.from_numpy(rng.standard_normal(shape, np.float32)).to(getattr(torch, workload.dtype))
        for shape in shapes
    )
    for leaf in (q, k, v):
        leaf.requires_grad_(workload.needs_grad)
    return Inputs(workload, q, k, v, do)
