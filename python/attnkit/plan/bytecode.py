"""The printer of expressions for the CPU engine: straight-line code in static single assignment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attnkit.analysis.canonical import fold
from attnkit.analysis.derivative import derivative, gradient
from attnkit.errors import error
from attnkit.ir.expr import Expr, const, make, topological, var
from attnkit.ir.optable import OPS
from attnkit.ir.program import Attend, Program

ROW = 8  # opcode, attr, nargs, a0 .. a4


@dataclass(frozen=True, eq=False)
class Bytecode:
    """Code for the engine: ``code`` is int32 ``[n, 8]``, rows ``[opcode, attr, nargs, a0, a1, a2, a3, a4]``.

    Row i defines value i; its arguments are values before i. ``attr`` is the bits of a float32 constant, an
    int or bool constant, the index of a param, or the buffer of a load. ``score`` and ``mask`` are values;
    ``score`` is -1 if it is ``s`` itself, ``mask`` is -1 if every pair exists.

    Code that goes backwards also has ``slope``, the value d score / d s (-1: it is 1), and ``loads``: each load that
    has a gradient, with the value d score / d load. Where something is carried, ``slope_f`` is d score / d f (-1: it is -1).
    """

    code: npt.NDArray[np.int32]
    score: int
    mask: int
    num_buffers: int
    num_params: int
    slope: int = -1
    loads: tuple[tuple[int, int], ...] = ()
    slope_f: int = -1


def emit(
    attend: Attend, program: Program, opcodes: Mapping[str, int], gradients: Collection[int] | None = None
) -> Bytecode:
    """Code for score and mask of ``attend``, with the opcode numbers that the engine gives.

    Args:
        attend: the operation; its program; the numbers of the opcodes.
        program: see attend.
        opcodes: see attend.
        gradients: the buffers whose loads need derivatives, for code that goes backwards; None for code that does not.

    Raises:
        AttnkitNotImplementedError: AK502 if the engine lacks an opcode.
    """
    roots = [] if _is_s(attend.score) else [attend.score]
    if attend.mask is not None:
        roots.append(attend.mask)
    slope, slopes = (None, {}) if gradients is None else _slopes(attend.score, gradients)
    slope_f = None if gradients is None or attend.carry is None else _slope_f(attend.score)
    roots += [root for root in (slope, *slopes.values(), slope_f) if root is not None]
    order = topological(roots)
    number = {node: i for i, node in enumerate(order)}
    code = np.zeros((len(order), ROW), dtype=np.int32)
    for row, node in zip(code, order, strict=True):
        name = opcode_name(node)
        if name not in opcodes:
            raise error("AK502", what="the CPU engine lacks an opcode", where="cpu backend", given=name)
        row[:3] = opcodes[name], _attr(node), len(node.args)
        row[3 : 3 + len(node.args)] = [number[arg] for arg in node.args]
    return Bytecode(
        code,
        -1 if _is_s(attend.score) else number[attend.score],
        -1 if attend.mask is None else number[attend.mask],
        len(program.buffers),
        program.num_params,
        -1 if slope is None else number[slope],
        tuple((number[load], number[of_load]) for load, of_load in slopes.items()),
        -1 if slope_f is None else number[slope_f],
    )


def _slopes(score: Expr, buffers: Collection[int]) -> tuple[Expr | None, dict[Expr, Expr]]:
    """d score / d s, None if it is 1, and the derivatives by loads of ``buffers``."""
    loads = [n for n in topological([score]) if n.op == "load" and n.dtype == "float" and n.attr in buffers]
    slope, *of_loads = (fold(root) for root in gradient(score, [var("s"), *loads]))
    # The engine overwrites s with the weights before it uses a derivative: one that is s itself must be a copy.
    kept = [make("mul", root, const(1.0)) if _is_s(root) else root for root in (slope, *of_loads)]
    return None if slope is const(1.0) else kept[0], dict(zip(loads, kept[1:], strict=True))


def _slope_f(score: Expr) -> Expr | None:
    """d score / d f, None if it is -1."""
    slope = fold(derivative(score, var("f")))
    return None if slope is const(-1.0) else make("mul", slope, const(1.0)) if _is_s(slope) else slope


def opcode_name(node: Expr) -> str:
    """The opcode of a node: the base name, and a suffix for the type of its arguments (leaves: its own)."""
    if node.op == "var":
        return f"var_{node.attr}"
    if node.op == "param":
        return "param"
    if node.op in ("const", "load"):
        return f"{node.op}_{node.dtype[0]}"
    suffix = node.args[-1].dtype[0]  # the last: where's branches, not its condition
    base = OPS[node.op].cpu
    return f"{suffix}_{base}" if base.startswith("to_") else f"{base}_{suffix}"


def disassemble(bytecode: Bytecode, opcodes: Mapping[str, int]) -> str:
    """The code for a person to read, one instruction a line."""
    names = {number: name for name, number in opcodes.items()}
    lines = []
    for i, (opcode, attr, nargs, *args) in enumerate(bytecode.code.tolist()):
        name = names.get(opcode, f"?{opcode}")
        operands = [f"%{a}" for a in args[:nargs]]
        if name == "const_f":
            operands.append(str(np.int32(attr).view(np.float32)))
        elif name in ("const_i", "const_b"):
            operands.append(str(attr))
        elif name == "param":
            operands.append(f"p{attr}")
        elif name.startswith("load_"):
            operands.insert(0, f"b{attr}")
        lines.append(f"%{i} = {' '.join([name, *operands])}")
    lines.append(f"score = {'s' if bytecode.score < 0 else f'%{bytecode.score}'}")
    if bytecode.mask >= 0:
        lines.append(f"mask = %{bytecode.mask}")
    return "\n".join(lines)


def _is_s(node: Expr) -> bool:
    return node.op == "var" and node.attr == "s"


def _attr(node: Expr) -> Any:
    if node.op == "const" and isinstance(node.attr, float):
        with np.errstate(over="ignore"):  # a double beyond float32 becomes infinity
            return np.float32(node.attr).view(np.int32)
    return 0 if node.op == "var" or node.attr is None else int(node.attr)
