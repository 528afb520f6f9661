"""The text form: `print_program` and `parse`, so that ``parse(print_program(p)) is p``.

The printed text is canonical: names are positional (``q k v``, ``b0``, ``p0``, ``t0``), and how a program was
written leaves no trace in it. Operators have Python's precedence, except that comparisons do not chain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from attnkit.ir.expr import Expr, topological
from attnkit.ir.optable import OPS, PREFIX
from attnkit.ir.parser import Parser
from attnkit.ir.program import Codec, Layout, Normalizer, Operation, Program, attributes
from attnkit.ir.verify import verify

VERSION = 1
MAX_INLINE = 24  # nesting of a printed expression; a deeper part gets a line of its own

_ATOM = PREFIX + 1


@lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The program that ``text`` describes, verified.

    Any names may be used in the text. Takes time linear in the length of the text.

    Raises:
        AttnkitError: AK1xx with line and column if the text is malformed, AK2xx if the program is not legal, AK402 if it is
            no str.
    """
    program = Parser(text).program()
    verify(program)
    return program


def parse_expr(text: str) -> Expr:
    """An expression by itself, in the variables alone: the derivatives of the op table are written so."""
    return Parser(text).expression()


def print_program(program: Program) -> str:
    """The canonical text of a program."""
    names = value_names(program)
    inputs = ", ".join(f"{name}: {_layout(x)}" for name, x in zip(names, program.inputs, strict=False))
    head = f"program ({inputs})"
    if program.buffers:
        buffers = (f"b{i}: {x.dtype}[{x.rank}]" for i, x in enumerate(program.buffers))
        head += f" buffers({', '.join(buffers)})"
    if program.num_params:
        head += f" params({', '.join(f'p{i}: f32' for i in range(program.num_params))})"
    lines = [f"attnkit {VERSION}", head + " {"]
    first = len(program.inputs)
    for op in program.ops:
        results = names[first : first + len(op.results)]
        lines += _print_op(op, results, names)
        first += len(results)
    return "\n".join([*lines, "}", ""])


def value_names(program: Program) -> list[str]:
    """The canonical names of all values: ``q, k, v, x3, x4 ...``, then each result's own name, numbered."""
    names = ["qkv"[i] if i < 3 else f"x{i}" for i in range(len(program.inputs))]
    seen: Counter[str] = Counter()
    for op in program.ops:
        for result in op.results:
            names.append(f"{result}{seen[result] or ''}")
            seen[result] += 1
    return names


def print_expr(expr: Expr, limit: int = 200) -> str:
    """An expression for a person to read, cut off after ``limit`` characters."""
    text = "; ".join(_print_expressions({"": expr})).removeprefix(" = ")
    return text if len(text) <= limit else text[:limit] + "..."


def _layout(layout: Layout) -> str:
    buffers = ", ".join(f"b{i}" for i in layout.buffers)
    codec = "" if layout.codec is None else f" {_codec(layout.codec)}"
    return layout.kind + (f"[{buffers}]" if buffers else "") + codec


def _codec(codec: Codec) -> str:
    return f"{codec.name}({codec.axis}, {codec.group})"


def _print_op(op: Operation, results: Sequence[str], names: Sequence[str]) -> list[str]:
    def name(value: int) -> str:
        return names[value] if 0 <= value < len(names) else f"x{value}"

    operands = ", ".join(map(name, op.operands))
    if op.NAME == "return":
        return [f"  return {operands}"]
    keywords = [operands]
    body: list[str] = []
    for f in attributes(type(op)):
        kind, held = f.metadata["kind"], getattr(op, f.name)
        if kind == "normalizer":
            body.append(f"normalizer = {_normalizer(held)}")
        elif kind not in op.BODY and (
            kind == "scale" or held != (_usual(op) if kind == "words" else f.default)
        ):
            keywords.append(f"{f.name} = {_attribute(kind, held, name)}")
    roots = {
        key: expr
        for key, expr in op.expressions.items()
        if not (key in ("score", "value") and (expr.op, expr.attr) in (("var", "s"), ("var", "x")))
    }
    body = _print_expressions(roots) + body
    line = f"  {', '.join(results)} = {op.NAME}({', '.join(keywords)})"
    return [line + " {", *(f"    {each}" for each in body), "  }"] if body else [line]


def _usual(op: Any) -> Any:
    return op.usual_outputs


def _normalizer(normalizer: Normalizer) -> str:
    if normalizer.sink is not None:
        return f"{normalizer.kind}(sink = b{normalizer.sink})"
    if normalizer.epsilon is not None:
        return f"{normalizer.kind}(epsilon = {_float(normalizer.epsilon)})"
    return normalizer.kind


def _attribute(kind: str, held: Any, name: Any) -> str:
    if kind == "scale":
        return "default" if held is None else _float(held)
    if kind == "float":
        return _float(held)
    if kind == "floats":
        return f"({', '.join(map(_float, held))})"
    if kind == "number":
        return print_expr(held)
    if kind == "value":
        return str(name(held))
    if kind == "pair":
        return f"({', '.join(map(name, held))})"
    if kind == "words":
        return f"({', '.join(held)})"
    return _codec(held) if kind == "codec" else str(held).lower()


def _float(value: float) -> str:
    return repr(float(value) + 0.0)  # -0.0 is 0.0


def _print_expressions(roots: dict[str, Expr]) -> list[str]:
    """Lines that define the named roots; what is shared or too deep becomes ``tN = ...``."""
    order = topological(roots.values())
    uses = Counter(arg for node in order for arg in node.args) + Counter(roots.values())
    rendered: dict[Expr, tuple[str, int]] = {}  # text and the precedence with which it binds
    depth: dict[Expr, int] = {}
    lines: list[str] = []
    for node in order:
        text, precedence = _render(node, rendered)
        depth[node] = 1 + max((depth[arg] for arg in node.args), default=-1)
        if node.args and (uses[node] > 1 or depth[node] > MAX_INLINE):
            name = f"t{len(lines)}"
            lines.append(f"{name} = {text}")
            text, precedence, depth[node] = name, _ATOM, 0
        rendered[node] = text, precedence
    return lines + [f"{name} = {rendered[root][0]}" for name, root in roots.items()]


def _render(node: Expr, rendered: dict[Expr, tuple[str, int]]) -> tuple[str, int]:
    info = OPS.get(node.op)
    if info is None:
        return _render_leaf(node, [rendered[arg][0] for arg in node.args])
    if info.precedence == 0:
        return f"{info.symbol}({', '.join(rendered[arg][0] for arg in node.args)})", _ATOM

    def operand(arg: Expr, at_least: int) -> str:
        text, precedence = rendered[arg]
        return text if precedence >= at_least else f"({text})"

    if info.arity == 1:
        # -3.0 is a constant; the negation of a constant is -(3.0)
        inner = node.args[0]
        return info.symbol + operand(inner, _ATOM + 1 if inner.op == "const" else PREFIX), PREFIX
    left, right = node.args
    # Left-associative; but a comparison never stands bare inside another.
    left_text = operand(left, info.precedence + (info.precedence == 1))
    return f"{left_text} {info.symbol} {operand(right, info.precedence + 1)}", info.precedence


def _render_leaf(node: Expr, args: list[str]) -> tuple[str, int]:
    if node.op == "load":
        return f"b{node.attr}[{', '.join(args)}]", _ATOM
    if node.op == "param":
        return f"p{node.attr}", _ATOM
    text = str(node.attr).lower() if node.dtype == "bool" else str(node.attr)
    return text, PREFIX if text.startswith("-") else _ATOM
