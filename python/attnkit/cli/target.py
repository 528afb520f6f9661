"""The program a command is about: a file of text, a named variant, an expression, or a function in a Python file."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from attnkit.analysis.structure import Sizes, Structure
from attnkit.backends.cpu.backend import CpuKernel
from attnkit.bench.workloads import Shape, Workload
from attnkit.cli.expression import parse_mask
from attnkit.cli.options import Source
from attnkit.errors import AttnkitError
from attnkit.ir.expr import topological
from attnkit.ir.text import parse
from attnkit.ir.trace import build_text, trace
from attnkit.runtime import Prepared, prepare
from attnkit.variants import dense

if TYPE_CHECKING:
    from attnkit.ir.program import Buffer, Program

_MAX_TEXT = 256 * 1024 + 1  # one more than the parser allows, so that it is the parser that complains
_NUMPY = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "bool": np.bool_}
_ENGINE = {np.dtype(t): i for i, t in enumerate((np.float32, np.int32, np.int64, np.bool_))}


@dataclass(frozen=True)
class Target:
    """A program for a problem. ``buffers`` are its captured arrays and ``params`` its numbers, None if unknown."""

    name: str
    program: Program
    shape: Shape
    buffers: list[Any] | None
    params: list[float] | None = None

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
        if "param" in ops and self.params is None:
            return "the mask reads a param, and a program text does not hold its value"
        return None

    def structure(self, q_block: int, kv_block: int) -> Structure:
        """The block structure of its mask: the CPU engine's own analysis."""
        kernel = self.prepared(backend="cpu").kernel
        assert isinstance(kernel, CpuKernel)
        buffers = [_placeholder(x) for x in self.program.buffers] if self.buffers is None else self.buffers
        tuples = [
            (a.ctypes.data, _ENGINE[a.dtype], a.shape, tuple(stride // a.itemsize for stride in a.strides))
            for a in buffers
        ]
        sizes = Sizes(self.shape.b, self.shape.hq, self.shape.sq, self.shape.skv, q_block, kv_block)
        return kernel.structure(sizes, tuples, self.params or [0.0] * self.program.num_params)


def resolve(source: Source, shape: Shape) -> Target:
    """The target that FILE, ``--variant`` or ``--mask`` names; exactly one of them, or it is a usage error.

    Raises:
        AttnkitError: AK1xx or AK2xx, the text is not a legal program; AK3xx, the function cannot be traced.
    """
    if sum(given is not None for given in source) != 1:
        raise click.UsageError("give a FILE, --variant NAME or --mask EXPRESSION (one of them)")
    if source.variant is not None:
        text, buffers = dense.program(**Workload(source.variant, shape).parameters)
        return Target(source.variant, parse(text), shape, buffers)
    if source.mask is not None:
        try:
            traced = trace(None, parse_mask(source.mask))
        except (ValueError, TypeError, ArithmeticError) as exc:
            if isinstance(exc, AttnkitError):
                raise
            raise click.BadParameter(str(exc), param_hint="--mask") from exc
        return Target(source.mask, parse(build_text(traced)), shape, traced.buffers)
    if isinstance(source.file, str):
        return _from_python(source.file, shape)
    assert source.file is not None
    text = source.file.read(_MAX_TEXT).decode("utf-8", errors="replace")
    program = parse(text)
    return Target(
        str(getattr(source.file, "name", "<stdin>")), program, shape, None if program.buffers else []
    )


def _from_python(target: str, shape: Shape) -> Target:
    """``path.py:function``, a score or mask function (or a mask object) of the user's."""
    from attnkit.ops.traced import bind_function  # needs torch, as such functions do

    path, _, name = target.rpartition(":")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise click.UsageError(f"{path} has no function {name}")
    bound = bind_function(function)
    params = [p.current() for p in bound.params]
    return Target(target, parse(bound.text), shape, [t.detach().cpu().numpy() for t in bound.buffers], params)


def _placeholder(buffer: Buffer) -> Any:
    """An array of the right type for a buffer that the mask does not read."""
    return np.zeros((1,) * buffer.rank, _NUMPY[buffer.dtype])
