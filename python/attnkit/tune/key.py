"""What decides a tuned config: everything that is here, and nothing else.

Batch, heads and threads are not. Results may not depend on them, to the bit, so what orders sums may not be chosen by them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from attnkit.analysis.canonical import canonical
from attnkit.plan.space import Direction
from attnkit.plan.spec import KernelSpec

Names = tuple[tuple[str, str], ...]  # and values, sorted
Lengths = tuple[int, int]  # of queries and of keys
ANY: Lengths = (0, 0)  # the bucket of lengths that are not known


@dataclass(frozen=True)
class Key:
    """The address of an entry: its digest names the file, and all of it is stored and compared."""

    backend: str
    direction: Direction
    program: str  # canonical text
    dtype: str
    head_dim: int
    v_head_dim: int
    precision: str
    q_bucket: int
    kv_bucket: int
    device: Names
    toolchain: Names

    @property
    def digest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(dumps(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "device": dict(self.device), "toolchain": dict(self.toolchain)}


def dumps(value: Any) -> str:
    """JSON in the one form that has a checksum: sorted, without spaces, ASCII. NaN is an error."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(
    backend: str, spec: KernelSpec, direction: Direction, lengths: Lengths,
    device: Mapping[str, str], toolchain: Mapping[str, str],
) -> Key:  # fmt: skip
    """The key of a problem. ``lengths`` are buckets already."""
    return Key(
        backend, direction, canonical(spec.program).text, spec.dtype, spec.head_dim, spec.v_head_dim, spec.precision,
        *lengths, tuple(sorted(device.items())), tuple(sorted(toolchain.items())),
    )  # fmt: skip


def bucket(n: int) -> int:
    """The lengths that share an entry with ``n``: those above the next lower power of two. 0 is unknown."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def buckets(spec: KernelSpec, lengths: Lengths) -> Lengths:
    """The buckets of a call; 0 where sequences have lengths of their own.

    What is beside a sequence may not change a bit of it: the shapes of a batch that holds many lengths decide nothing.
    """
    attend = spec.program.attend
    known = (spec.program.layout(i).lengths is None for i in (attend.q, attend.k))
    q, kv = (bucket(n) if own else 0 for n, own in zip(lengths, known, strict=True))
    return q, kv
