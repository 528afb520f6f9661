"""The verifier: what a program must satisfy before anything looks at it further. Codes AK2xx."""

from __future__ import annotations

import math

from attnkit.errors import error
from attnkit.ir.expr import Expr, topological
from attnkit.ir.intervals import INT32_MAX, INT32_MIN
from attnkit.ir.parser import MAX_SLOTS, MAX_TEXT
from attnkit.ir.program import ELEMENT, Attend, Buffer, Program, Return

MAX_NODES = 4096
MAX_RANK = 5


def verify(program: Program) -> None:
    """Raise the typed error of the first rule that ``program`` breaks; return if it breaks none."""
    _verify_declarations(program)
    attend, result = program.ops
    if not isinstance(attend, Attend) or not isinstance(result, Return):
        raise error("AK216", given=", ".join(type(op).__name__.lower() for op in program.ops))
    _verify_attend(attend, program)
    first = len(program.inputs)
    if result.values not in ((first,), (first, first + 1)):
        raise error("AK214", given=", ".join(map(str, result.values)), allowed="o, or o and lse")
    if len(program.text) > MAX_TEXT:  # else the program could be printed, but not parsed again
        raise error("AK101", given=f"{len(program.text)} characters", allowed=f"{MAX_TEXT}")


def _verify_declarations(program: Program) -> None:
    if max(len(program.buffers), program.num_params) > MAX_SLOTS:
        raise error("AK106", given=f"{len(program.buffers)} buffers, {program.num_params} params")
    if len(program.inputs) != 3 or len(program.ops) != 2:
        raise error("AK216", given=f"{len(program.inputs)} inputs, {len(program.ops)} operations")
    for index, buffer in enumerate(program.buffers):
        if buffer.dtype not in ELEMENT or not 0 <= buffer.rank <= MAX_RANK:
            allowed = f"{', '.join(ELEMENT)} of rank 0 to {MAX_RANK}"
            raise error("AK207", what="buffer has an unsupported type", where=f"b{index}",
                        given=f"{buffer.dtype}[{buffer.rank}]", allowed=allowed)  # fmt: skip
    for name, layout in zip("qkv", program.inputs, strict=True):
        if (layout.lengths is None) != (layout.kind == "bhsd"):
            raise error(
                "AK211", what="packed and padded layouts, and only they, name their lengths", where=name
            )
        if layout.lengths is not None and _buffer(program, layout.lengths, name) != Buffer("i32", 1):
            raise error("AK210", where=name, given=_type(program.buffers[layout.lengths]))


def _verify_attend(attend: Attend, program: Program) -> None:
    for name in ("q", "k", "v"):
        if not 0 <= getattr(attend, name) < len(program.inputs):
            raise error("AK206", where=f"{name} of attend", given=str(getattr(attend, name)))
    q, k, v = (program.inputs[i] for i in (attend.q, attend.k, attend.v))
    if q.kind == "padded":
        raise error("AK211", what="q is not padded, only k and v are", where="q", allowed="bhsd, packed")
    if k != v:
        raise error("AK211", what="k and v lie in different layouts", given=f"{k.kind} and {v.kind}")
    if (q.kind == "packed") != (k.kind == "packed"):
        raise error("AK211", what="q is packed exactly if k and v are", given=f"{q.kind} and {k.kind}")
    if attend.scale is not None and not (attend.scale > 0 and math.isfinite(attend.scale)):
        raise error("AK212", where="scale", given=str(attend.scale))
    sink = attend.normalizer.sink
    if sink is not None and _buffer(program, sink, "sink") != Buffer("f32", 1):
        raise error("AK209", where="normalizer", given=_type(program.buffers[sink]))
    _verify_expressions(attend, program)


def _verify_expressions(attend: Attend, program: Program) -> None:
    nodes = topological(attend.roots)
    if len(nodes) > MAX_NODES:
        raise error("AK215", given=f"{len(nodes)} nodes", allowed=f"{MAX_NODES}")
    for node in nodes:
        if node.op == "load":
            _verify_load(node, program)
        elif node.op == "param" and not (isinstance(node.attr, int) and 0 <= node.attr < program.num_params):
            raise error("AK206", what="no such param", given=f"p{node.attr}")
        elif node.op == "const" and node.dtype == "int" and not INT32_MIN <= int(node.attr or 0) <= INT32_MAX:
            raise error("AK213", given=str(node.attr))
    if attend.score.dtype != "float":
        raise error("AK203", where="score", given=attend.score.dtype)
    if attend.mask is not None:
        if attend.mask.dtype != "bool":
            raise error("AK204", where="mask", given=attend.mask.dtype)
        if any(node.op == "var" and node.attr == "s" for node in topological([attend.mask])):
            raise error("AK205", where="mask", given=repr(attend.mask))


def _verify_load(node: Expr, program: Program) -> None:
    buffer = _buffer(program, node.attr if isinstance(node.attr, int) else -1, "load")
    if len(node.args) != buffer.rank or ELEMENT[buffer.dtype] != node.dtype:
        raise error("AK207", where=f"b{node.attr}", given=repr(node), allowed=_type(buffer))
    if any(arg.dtype != "int" for arg in node.args):
        raise error("AK208", where=f"b{node.attr}", given=", ".join(arg.dtype for arg in node.args))


def _buffer(program: Program, index: int, where: str) -> Buffer:
    if not 0 <= index < len(program.buffers):
        raise error("AK206", what="no such buffer", where=where, given=f"b{index}")
    return program.buffers[index]


def _type(buffer: Buffer) -> str:
    return f"{buffer.dtype}[{buffer.rank}]"
