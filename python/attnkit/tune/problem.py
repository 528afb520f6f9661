"""A problem to be tuned: a program and the sizes it is measured at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from attnkit.errors import error
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.plan.space import Direction
from attnkit.plan.spec import KernelSpec
from attnkit.testing.inputs import Dims
from attnkit.tune.key import Lengths
from attnkit.variants import dense


@dataclass(frozen=True, eq=False)
class Problem:
    """What is measured. ``dims`` are those of the tensors; ``variant`` is a name in `dense.CASES`, or empty.

    ``buffers`` and ``params`` are what the program captured.
    """

    spec: KernelSpec
    direction: Direction
    dims: Dims
    variant: str = ""
    buffers: list[Any] = field(default_factory=list)
    params: list[float] = field(default_factory=list)
    threads: int = 1

    @property
    def name(self) -> str:
        """In words, for people."""
        d, s = self.dims, self.spec
        heads = f"h{d.q_heads}" if d.q_heads == d.kv_heads else f"h{d.q_heads}/{d.kv_heads}"
        lengths = f"s{d.q_len}" if d.q_len == d.kv_len else f"s{d.q_len}x{d.kv_len}"
        dims = f"d{s.head_dim}" if s.head_dim == s.v_head_dim else f"d{s.head_dim}/{s.v_head_dim}"
        return f"{self.variant or 'program'} b{d.batch} {heads} {lengths} {dims} {s.dtype} {self.direction}"

    @property
    def lengths(self) -> Lengths:
        """Of queries and keys."""
        return self.dims.q_len, self.dims.kv_len

    @property
    def facts(self) -> dict[str, str | int]:
        """What an entry keeps of it: enough to measure it again."""
        return {"variant": self.variant, "shape": ",".join(map(str, self.dims)), "threads": self.threads}

    def cropped(self) -> Problem:
        """A small part of it: one group of heads, some tiles of queries and of keys, with tails."""
        d = self.dims
        small = d._replace(
            batch=1, q_heads=d.q_heads // d.kv_heads, kv_heads=1, q_len=min(d.q_len, 209), kv_len=min(d.kv_len, 1283)
        )  # fmt: skip
        return replace(self, dims=small, buffers=with_lengths(self.spec.program, small, self.buffers))


def problem(
    variant: str, dims: Dims, *, dtype: str = "float32", direction: Direction = "forward", threads: int = 1,
    device: str = "cpu",
) -> Problem:  # fmt: skip
    """The problem of a named variant.

    Raises:
        AttnkitValueError: AK401, there is no such variant.
    """
    if variant not in dense.CASES:
        raise error("AK401", where="variant", given=repr(variant), allowed=", ".join(dense.CASES))
    text, buffers = _program(variant, dims.q_heads, dims.q_len, dims.kv_len)
    spec = KernelSpec(parse(text), dtype, dims.head_dim, dims.v_head_dim, device)
    return Problem(spec, direction, dims, variant, buffers, [], threads)


def of_text(
    text: str, dims: Dims, *, name: str = "", dtype: str = "float32", direction: Direction = "forward", threads: int = 1
) -> Problem:  # fmt: skip
    """The problem of a program that captures nothing but lengths.

    Raises:
        AttnkitValueError: AK401, it captures more; AK1xx, AK2xx, the text is no program.
    """
    spec = KernelSpec(parse(text), dtype, dims.head_dim, dims.v_head_dim)
    found = bare(spec, direction, dims, name, threads)
    if found is None:
        allowed = "programs that capture nothing but lengths, or named variants"
        raise error("AK401", where=f"program {name!r}", given="buffers, pages or params", allowed=allowed)
    return found


def bare(spec: KernelSpec, direction: Direction, dims: Dims, name: str, threads: int) -> Problem | None:
    """The problem of a program without what it captured; None where that matters."""
    program = spec.program
    lengths = {layout.lengths for layout in program.inputs} - {None}
    paged = any(layout.table is not None for layout in program.inputs)
    if program.num_params or paged or len(lengths) != len(program.buffers):
        return None
    buffers = with_lengths(program, dims, [None] * len(program.buffers))
    return Problem(spec, direction, dims, name, buffers, [], threads)


def with_lengths(program: Program, dims: Dims, buffers: list[Any]) -> list[Any]:
    """The buffers, with lengths that are those of the tensors: every sequence fills its place."""
    found = list(buffers)
    for layout, n in zip(program.inputs, (dims.q_len, dims.kv_len, dims.kv_len), strict=True):
        if layout.kind == "packed" and layout.lengths is not None:
            found[layout.lengths] = np.array([0, n], np.int32)
        elif layout.lengths is not None:
            found[layout.lengths] = np.full(dims.batch, n, np.int32)
    return found


@lru_cache(maxsize=64)
def _program(variant: str, heads: int, q_len: int, kv_len: int) -> tuple[str, list[Any]]:
    parameters = dense.CASES[variant](heads, q_len, kv_len, np.random.default_rng(0))
    text, buffers = dense.program(**parameters)
    return text, [np.ascontiguousarray(x) for x in buffers]


def recalled(spec: KernelSpec, direction: Direction, facts: Mapping[str, str | int]) -> Problem | None:
    """The problem that an entry was measured with; None where that took tensors that nobody kept."""
    try:
        dims = Dims(*(int(n) for n in str(facts["shape"]).split(",")))
        threads, variant = int(facts["threads"]), str(facts["variant"])
    except (KeyError, TypeError, ValueError):
        return None
    if variant in dense.CASES:
        found = problem(variant, dims, dtype=spec.dtype, direction=direction, threads=threads)
        return replace(found, spec=spec)
    return bare(spec, direction, dims, variant, threads)
