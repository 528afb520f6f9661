"""The printer of expressions for the CPU engine: straight-line code in static single assignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attnkit.errors import error
from attnkit.ir.expr import Expr, topological
from attnkit.ir.optable import OPS
from attnkit.ir.program import Attend, Program

ROW = 8  # opcode, attr, nargs, a0 .. a4


@dataclass(frozen=True, eq=False)
class Bytecode:
    """Code for the engine: ``code`` is int32 ``[n, 8]``, rows ``[opcode, attr, nargs, a0, a1, a2, a3, a4]``.

    Row i defines value i; its arguments are values before i. ``attr`` is the bits of a float32 constant, an
    int or bool constant, the index of a param, or the buffer of a load. ``score`` and ``mask`` are values;
    ``score`` is -1 if it is ``s`` itself, ``mask`` is -1 if every pair exists.
    """

    code: npt.NDArray[np.int32]
    score: int
    mask: int
    num_buffers: int
    num_params: int


def emit(attend: Attend, program: Program, opcodes: Mapping[str, int]) -> Bytecode:
    """Code for score and mask of ``attend``, with the opcode numbers that the engine gives.

    Raises:
        AttnkitNotImplementedError: AK502 if the engine lacks an opcode.
    """
    roots = [] if _is_s(attend.score) else [attend.score]
    if attend.mask is not None:
        roots.append(attend.mask)
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
    )


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
