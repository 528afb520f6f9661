"""The program a command is about: read from a file of text or built from a named variant, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import click
import numpy as np

from attnkit.backends.cpu.backend import CpuKernel
from attnkit.backends.cpu.engine import engine
from attnkit.bench.workloads import Shape, Workload
from attnkit.ir.expr import topological
from attnkit.ir.text import parse
from attnkit.runtime import Prepared, prepare
from attnkit.variants import dense

if TYPE_CHECKING:
    from attnkit.ir.program import Buffer, Program

_MAX_TEXT = 256 * 1024 + 1  # one more than the parser allows, so that it is the parser that complains
_NUMPY = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "bool": np.bool_}
_ENGINE = {np.dtype(t): i for i, t in enumerate((np.float32, np.int32, np.int64, np.bool_))}
BLOCKS = ("empty", "partial", "full")


@dataclass(frozen=True)
class Target:
    """A program for a problem. ``buffers`` are its captured arrays, None where only their types are known."""

    name: str
    program: Program
    shape: Shape
    buffers: list[Any] | None

    def prepared(self, dtype: str = "float32", backend: str = "auto") -> Prepared:
        """The kernel that would run, and why.

        Raises:
            AttnkitError: AK5xx, none can.
        """
        return prepare(self.program.text, dtype, self.shape.d, self.shape.dv, "cpu", backend)

    def blocks_unknown(self) -> str | None:
        """Why the block structure cannot be told from the program alone, or None."""
        mask = self.program.attend.mask
        ops = set() if mask is None else {node.op for node in topological([mask])}
        if "load" in ops and self.buffers is None:
            return "the mask reads a buffer, and a program text does not hold its contents"
        return (
            "the mask reads a param, and a program text does not hold its value" if "param" in ops else None
        )

    def block_map(self, q_block: int, kv_block: int, b: int = 0, h: int = 0) -> Any:
        """uint8 ``[q blocks, kv blocks]``, indices into `BLOCKS`: the CPU engine's own analysis."""
        kernel = self.prepared(backend="cpu").kernel
        assert isinstance(kernel, CpuKernel)
        buffers = [_placeholder(x) for x in self.program.buffers] if self.buffers is None else self.buffers
        tuples = [
            (a.ctypes.data, _ENGINE[a.dtype], a.shape, [stride // a.itemsize for stride in a.strides])
            for a in buffers
        ]
        params = [0.0] * self.program.num_params
        return engine().block_map(
            kernel.program, self.shape.sq, self.shape.skv, b, h, q_block, kv_block, tuples, params
        )


def resolve(file: IO[bytes] | None, variant: str | None, shape: Shape) -> Target:
    """The target that FILE or ``--variant`` names; exactly one of them, or it is a usage error.

    Raises:
        AttnkitError: AK1xx or AK2xx, the text is not a legal program.
    """
    if (file is None) == (variant is None):
        raise click.UsageError("give a FILE with a program text, or --variant NAME (one of them)")
    if file is not None:
        text = file.read(_MAX_TEXT).decode("utf-8", errors="replace")
        program = parse(text)
        return Target(str(getattr(file, "name", "<stdin>")), program, shape, None if program.buffers else [])
    text, buffers = dense.program(**Workload(str(variant), shape).parameters)
    return Target(str(variant), parse(text), shape, buffers)


def _placeholder(buffer: Buffer) -> Any:
    """An array of the right type for a buffer that the mask does not read."""
    return np.zeros((1,) * buffer.rank, _NUMPY[buffer.dtype])
