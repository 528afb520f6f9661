"""What a kernel is asked to do, apart from the sizes of one call."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.ir.program import Program
from attnkit.plan.space import Config, Field, FieldKind, Space

__all__ = ["Config", "Field", "FieldKind", "KernelSpec", "Space"]


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
