"""``--mask "causal & window(128)"``: Python's syntax over the ready-made masks and the variables of the IR."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from attnkit.ir.mods import Mask, causal, prefix, window
from attnkit.ir.optable import CALLS

_MASKS: dict[str, Callable[..., Mask]] = {"causal": causal, "window": window, "prefix": prefix}
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.BitXor: operator.xor, ast.Invert: operator.invert, ast.USub: operator.neg, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_VARIABLES = ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len")
_NAMES = ", ".join((*_MASKS, *_VARIABLES, *CALLS))


def parse_mask(text: str) -> Callable[..., Any]:
    """The mask function ``(b, h, q_idx, kv_idx)`` that an expression spells.

    Raises:
        ValueError: it is no such expression; the message says where.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as exc:
        raise ValueError(f"{text!r} is not an expression: {exc.msg}") from exc
    for node in ast.walk(tree):
        _check(node)
    return lambda b, h, q_idx, kv_idx: _evaluate(tree, (b, h, q_idx, kv_idx))


def _check(node: ast.AST) -> None:
    known = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.Load, ast.keyword)
    if type(node) not in (*known, *_OPERATORS):
        raise ValueError(f"{type(node).__name__} cannot be used; there are operators, numbers and {_NAMES}")
    if isinstance(node, ast.Compare) and len(node.ops) > 1:
        raise ValueError("comparisons do not chain: write (a < b) & (b < c)")
    if isinstance(node, ast.Name) and node.id not in (*_MASKS, *CALLS, *_VARIABLES):
        raise ValueError(f"unknown name {node.id!r}; there are {_NAMES}")
    if isinstance(node, ast.Call) and not (
        isinstance(node.func, ast.Name) and node.func.id in {*_MASKS, *CALLS}
    ):
        raise ValueError(f"only these can be called: {', '.join((*_MASKS, *CALLS))}")


def _evaluate(node: Any, index: tuple[Any, Any, Any, Any]) -> Any:
    """The value of a node on traced indices."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        given = dict(zip(_VARIABLES, index, strict=False))
        if node.id in _MASKS:
            return _MASKS[node.id]()(*index)
        return given[node.id] if node.id in given else index[0].context.variable(node.id)
    if isinstance(node, ast.Call):
        args = [_evaluate(arg, index) for arg in node.args]
        keywords = {str(k.arg): _evaluate(k.value, index) for k in node.keywords}
        name = node.func.id if isinstance(node.func, ast.Name) else ""  # it is one: checked
        if name in _MASKS:
            return _MASKS[name](*args, **keywords)(*index)
        return index[0].context.emit(CALLS[name].name, *args)
    if isinstance(node, ast.Compare):
        return _OPERATORS[type(node.ops[0])](
            _evaluate(node.left, index), _evaluate(node.comparators[0], index)
        )
    operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    return _OPERATORS[type(node.op)](*(_evaluate(each, index) for each in operands))
