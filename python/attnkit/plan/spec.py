"""What a kernel is asked to do, apart from the sizes of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnkit.ir.program import Program

FieldKind = Literal["numeric", "schedule"]


@dataclass(frozen=True)
class KernelSpec:
    """The problem a kernel is built for: everything that may change its code, nothing that may not.

    ``dtype`` is torch's name of the element type (``"float32"``), ``device`` its device type, ``precision`` torch's word for how
    exact products of float32 are to be on a GPU.
    """

    program: Program
    dtype: str
    head_dim: int
    v_head_dim: int
    device: str = "cpu"
    precision: str = "highest"


@dataclass(frozen=True)
class Field:
    """One number a tuner may choose.

    ``numeric`` fields change the order of sums and so the last bits of a result; ``schedule`` fields never do.
    """

    kind: FieldKind
    default: int
    values: tuple[int, ...]


Space = dict[str, Field]
Config = dict[str, int]
