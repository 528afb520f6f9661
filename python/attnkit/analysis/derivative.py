"""Symbolic derivatives of expressions, by the derivative column of the op table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from attnkit.ir.expr import Expr, const, make, topological
from attnkit.ir.optable import OPS
from attnkit.ir.text import parse_expr

_OPERANDS = ("x", "y", "z")
_ZERO, _ONE = const(0.0), const(1.0)


def derivative(root: Expr, leaf: Expr) -> Expr:
    """d root / d leaf, where ``leaf`` is a float variable, param or load."""
    return gradient(root, [leaf])[0]


def gradient(root: Expr, leaves: Sequence[Expr]) -> list[Expr]:
    """The derivatives of a float expression by several leaves, in one sweep from the root.

    Comparisons, floor and ints have none. Where an operator has a corner, its derivative is the mean of both sides.
    """
    adjoint: dict[Expr, Expr] = {root: _ONE}
    for node in reversed(topological([root])):
        above = adjoint.get(node)
        if above is None or node.op not in OPS:
            continue
        for arg, text in zip(node.args, OPS[node.op].derivative, strict=False):
            if arg.dtype == "float" and text:
                names = dict(zip(_OPERANDS, node.args, strict=False))
                partial = _substitute(_template(text, node.op), {**names, "w": node})
                adjoint[arg] = _add(adjoint.get(arg, _ZERO), _multiply(above, partial))
    return [adjoint.get(leaf, _ZERO) for leaf in leaves]


@cache
def _template(text: str, op: str) -> Expr:
    # The condition of a where is a bool: it takes the place of a comparison.
    return parse_expr(text.replace("where(x,", "where(x != 0.0,") if op == "where" else text)


def _substitute(template: Expr, operands: dict[str, Expr]) -> Expr:
    done: dict[Expr, Expr] = {}
    for node in topological([template]):
        if node.op == "var":
            done[node] = operands[str(node.attr)]
        elif node.op == "const":
            done[node] = node
        elif node.op == "ne" and done[node.args[0]].dtype == "bool":
            done[node] = done[node.args[0]]
        else:
            done[node] = make(node.op, *(done[arg] for arg in node.args))
    return done[template]


def _multiply(a: Expr, b: Expr) -> Expr:
    if a is _ONE or b is _ZERO:
        return b
    return a if b is _ONE or a is _ZERO else make("mul", a, b)


def _add(a: Expr, b: Expr) -> Expr:
    if a is _ZERO:
        return b
    return a if b is _ZERO else make("add", a, b)


def float_leaves(root: Expr) -> list[Expr]:
    """The leaves that a root has derivatives by: float variables, params and loads."""
    return [n for n in topological([root]) if n.op in ("var", "param", "load") and n.dtype == "float"]
