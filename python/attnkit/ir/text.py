"""The text form: `print_program` and `parse`, so that ``parse(print_program(p)) is p``.

The printed text is canonical: names are positional (``q k v``, ``b0``, ``p0``, ``t0``), and how a program was
written leaves no trace in it. Operators have Python's precedence, except that comparisons do not chain.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from attnkit.ir.expr import Expr, topological
from attnkit.ir.optable import OPS, PREFIX
from attnkit.ir.parser import Parser
from attnkit.ir.program import Attend, Layout, Op, Program
from attnkit.ir.verify import verify

VERSION = 1
MAX_INLINE = 24  # nesting of a printed expression; a deeper part gets a line of its own

_ATOM = PREFIX + 1
_VALUES = ("q", "k", "v", "o", "lse")


@lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The program that ``text`` describes, verified.

    Any names may be used in the text. Takes time linear in the length of the text.

    Raises:
        AttnkitError: AK1xx with line and column if the text is malformed, AK2xx if the program is not legal.
    """
    program = Parser(text).program()
    verify(program)
    return program


def print_program(program: Program) -> str:
    """The canonical text of a program."""
    inputs = ", ".join(f"{_value(i)}: {_layout(x)}" for i, x in enumerate(program.inputs))
    head = f"program ({inputs})"
    if program.buffers:
        buffers = (f"b{i}: {x.dtype}[{x.rank}]" for i, x in enumerate(program.buffers))
        head += f" buffers({', '.join(buffers)})"
    if program.num_params:
        head += f" params({', '.join(f'p{i}: f32' for i in range(program.num_params))})"
    lines = [f"attnkit {VERSION}", head + " {"]
    value = len(program.inputs)
    for op in program.ops:
        lines += _print_op(op, value)
        value += len(op.results) if isinstance(op, Attend) else 0
    return "\n".join([*lines, "}", ""])


def print_expr(expr: Expr, limit: int = 200) -> str:
    """An expression for a person to read, cut off after ``limit`` characters."""
    text = "; ".join(_print_expressions({"": expr})).removeprefix(" = ")
    return text if len(text) <= limit else text[:limit] + "..."


def _value(index: int) -> str:
    return _VALUES[index] if 0 <= index < len(_VALUES) else f"x{index}"


def _layout(layout: Layout) -> str:
    return layout.kind if layout.lengths is None else f"{layout.kind}[b{layout.lengths}]"


def _print_op(op: Op, value: int) -> list[str]:
    if not isinstance(op, Attend):
        return [f"  return {', '.join(map(_value, op.values))}"]
    results = ", ".join(_value(value + i) for i in range(len(op.results)))
    scale = "default" if op.scale is None else repr(float(op.scale))
    roots = {} if (op.score.op, op.score.attr) == ("var", "s") else {"score": op.score}
    if op.mask is not None:
        roots["mask"] = op.mask
    sink = op.normalizer.sink
    normalizer = "softmax" if sink is None else f"softmax(sink = b{sink})"
    return [
        f"  {results} = attend({_value(op.q)}, {_value(op.k)}, {_value(op.v)}, scale = {scale}) {{",
        *(f"    {line}" for line in _print_expressions(roots)),
        f"    normalizer = {normalizer}",
        "  }",
    ]


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
