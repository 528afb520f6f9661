"""The verifier: what a program must satisfy before anything looks at it further. Codes AK2xx.

It gives every value a type (`infer`), because most rules are about which tokens a value holds: a relation between
pooled queries and keys says nothing about other keys. What each operation asks for is in `ir.rules`.
"""

from __future__ import annotations

import math

from attnkit.errors import error
from attnkit.ir.expr import Expr, topological
from attnkit.ir.intervals import INT32_MAX, INT32_MIN
from attnkit.ir.parser import MAX_SLOTS, MAX_TEXT
from attnkit.ir.program import (
    CODEC_AXES,
    CODECS,
    ELEMENT,
    LAYOUT_BUFFERS,
    TOKENS,
    Attend,
    Buffer,
    Codec,
    Layout,
    Operation,
    Program,
    Return,
    attributes,
)
from attnkit.ir.rules import RULES, Axis, Type

MAX_NODES = 4096
MAX_RANK = 5
MAX_OPS = 64
# The axes on which each code keeps its scales.
_AXES = {
    "int8": ("token", "channel", "tile"),
    "int4": ("token", "channel"),
    "int2": ("token", "channel"),
    "fp8": ("token", "head"),
}


def verify(program: Program) -> None:
    """Raise the typed error of the first rule that ``program`` breaks; return if it breaks none."""
    infer(program)
    if len(program.text) > MAX_TEXT:  # else the program could be printed, but not parsed again
        raise error("AK101", given=f"{len(program.text)} characters", allowed=f"{MAX_TEXT}")


def infer(program: Program) -> list[Type]:
    """The type of every value: the inputs, then the results in order. Raises as `verify`."""
    _verify_declarations(program)
    types = [_type_of_input(i, layout) for i, layout in enumerate(program.inputs)]
    for op in program.ops[:-1]:
        if type(op) not in RULES:
            raise error("AK216", given=", ".join(each.NAME for each in program.ops))
        _verify_operation(op, program, types)
        types += RULES[type(op)](op, [types[i] for i in op.operands], types)
    result = program.ops[-1] if program.ops else None
    if not isinstance(result, Return) or len(program.ops) < 2:
        raise error("AK216", given=", ".join(each.NAME for each in program.ops))
    first = len(program.inputs)
    values = result.operands
    if not values or len(set(values)) != len(values) or any(not first <= i < len(types) for i in values):
        raise error("AK214", given=", ".join(map(str, values)), allowed="results of operations, each once")
    return types


def _type_of_input(index: int, layout: Layout) -> Type:
    if layout.kind in TOKENS:
        return Type("tokens", Axis(index, 1, Layout(layout.kind, layout.lengths, layout.table)), layout.codec)
    return Type(layout.kind)


# --- declarations -----------------------------------------------------------------------------------------


def _verify_declarations(program: Program) -> None:
    if max(len(program.buffers), program.num_params, len(program.inputs)) > MAX_SLOTS:
        given = f"{len(program.inputs)} inputs, {len(program.buffers)} buffers, {program.num_params} params"
        raise error("AK106", given=given)
    if not program.inputs or len(program.ops) > MAX_OPS:
        raise error("AK216", given=f"{len(program.inputs)} inputs, {len(program.ops)} operations")
    for index, buffer in enumerate(program.buffers):
        if buffer.dtype not in ELEMENT or not 0 <= buffer.rank <= MAX_RANK:
            allowed = f"{', '.join(ELEMENT)} of rank 0 to {MAX_RANK}"
            raise error("AK207", what="buffer has an unsupported type", where=f"b{index}",
                        given=f"{buffer.dtype}[{buffer.rank}]", allowed=allowed)  # fmt: skip
    for index, layout in enumerate(program.inputs):
        where = "qkv"[index] if index < 3 else f"x{index}"
        named, wanted = layout.buffers, LAYOUT_BUFFERS.get(layout.kind)
        if wanted is None or len(named) != len(wanted) or (layout.lengths is None) != (not wanted):
            what = "packed and padded layouts name their lengths, paged ones their table too, no others do"
            raise error("AK211", what=what, where=where, given=layout.kind)
        for slot, (dtype, rank) in zip(named, wanted, strict=True):
            if _buffer(program, slot, where) != Buffer(dtype, rank):
                raise error(
                    "AK210", where=where, given=_type(program.buffers[slot]), allowed=f"{dtype}[{rank}]"
                )
        if layout.codec is not None:
            if layout.kind not in TOKENS:
                raise error("AK225", where=where, given=layout.kind, allowed="tokens")
            _verify_codec(layout.codec, where)


def _verify_codec(codec: Codec, where: str) -> None:
    axes = _AXES.get(codec.name, ())
    fewest = {"channel": 1, "tile": 1}.get(codec.axis, 0)
    most = 0 if codec.axis == "head" else INT32_MAX
    if codec.axis not in axes or not fewest <= codec.group <= most:
        known = axes or CODEC_AXES
        allowed = ", ".join(f"{codec.name if axes else '|'.join(CODECS)}({axis}, group)" for axis in known)
        raise error("AK225", where=where, given=f"{codec.name}({codec.axis}, {codec.group})", allowed=allowed)


# --- what all operations have in common -------------------------------------------------------------------


def _verify_operation(op: Operation, program: Program, types: list[Type]) -> None:
    for value in op.uses():
        if not 0 <= value < len(types):
            raise error("AK206", where=op.NAME, given=str(value))
    for f in attributes(type(op)):
        held, kind, where = getattr(op, f.name), f.metadata["kind"], f"{f.name} of {op.NAME}"
        if held is None or kind in op.BODY:
            continue
        if kind == "scale" and not (held > 0 and math.isfinite(held)):
            raise error("AK212", where="scale", given=str(held))
        if kind == "int" and type(held) is not int:
            raise error("AK218", where=where, given=repr(held), allowed="an integer")
        choices = f.metadata["choices"]
        words = held if kind == "words" else (held,) if kind == "word" else ()
        if any(word not in choices for word in words) or len(set(words)) != len(words):
            raise error("AK218", where=where, given=", ".join(words), allowed=", ".join(choices))
        if kind == "number":
            _verify_number(held, where, program)
        elif kind == "codec":
            _verify_codec(held, where)
    if isinstance(op, Attend):
        _verify_normalizer(op, program)
    _verify_expressions(op, program)


def _verify_number(held: Expr, where: str, program: Program) -> None:
    if held.op not in ("const", "param") or held.dtype == "bool":
        raise error("AK218", where=where, given=repr(held), allowed="a number or a param")
    _verify_node(held, program)


def _verify_normalizer(op: Attend, program: Program) -> None:
    normalizer = op.normalizer
    sink, epsilon = normalizer.sink, normalizer.epsilon
    if sink is not None:
        if not normalizer.rules.sink:
            raise error(
                "AK226", where="normalizer", given=f"{normalizer.kind} with a sink", allowed="softmax"
            )
        if _buffer(program, sink, "sink") != Buffer("f32", 1):
            raise error("AK209", where="normalizer", given=_type(program.buffers[sink]))
    if epsilon is not None and not (normalizer.rules.epsilon and 0 <= epsilon < math.inf):
        raise error("AK226", where="normalizer", given=f"{normalizer.kind}(epsilon = {epsilon})")


def _verify_expressions(op: Operation, program: Program) -> None:
    nodes = topological(op.roots)
    if len(nodes) > MAX_NODES:
        raise error("AK215", given=f"{len(nodes)} nodes", allowed=f"{MAX_NODES}")
    for node in nodes:
        _verify_node(node, program)
    for name, root in op.expressions.items():
        is_mask = name in ("mask", "force")
        if root.dtype != ("bool" if is_mask else "float"):
            raise error("AK204" if is_mask else "AK203", where=name, given=root.dtype)
        read = {str(node.attr) for node in topological([root]) if node.op == "var"}
        if is_mask and "s" in read and "s" in op.VARIABLES:
            raise error("AK205", where=name, given=repr(root))
        if "f" in read and isinstance(op, Attend) and (name != "score" or op.carry is None):
            raise error("AK223", where=name, given=repr(root), allowed="f in the score, beside a carry")
        if not read <= op.VARIABLES:
            given = ", ".join(sorted(read - op.VARIABLES))
            raise error(
                "AK224", where=f"{name} of {op.NAME}", given=given, allowed=", ".join(sorted(op.VARIABLES))
            )


def _verify_node(node: Expr, program: Program) -> None:
    if node.op == "load":
        _verify_load(node, program)
    elif node.op == "param" and not (isinstance(node.attr, int) and 0 <= node.attr < program.num_params):
        raise error("AK206", what="no such param", given=f"p{node.attr}")
    elif node.op == "const" and node.dtype == "int" and not INT32_MIN <= int(node.attr or 0) <= INT32_MAX:
        raise error("AK213", given=str(node.attr))


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
