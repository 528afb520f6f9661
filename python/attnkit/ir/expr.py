"""Scalar expressions: interned nodes, and builders that type-check through the op table.

Two expressions are equal exactly if they are the same object, so a common sub-expression exists once, and
comparing or hashing a whole expression costs nothing.
"""

from __future__ import annotations

import math
import struct
import threading
import weakref
from collections.abc import Iterable

from attnkit.errors import error
from attnkit.ir.optable import OPS, VARIABLES, DType

Attr = bool | int | float | str | None


class Expr:
    """One node: ``op`` (a row of the op table or a leaf), ``args``, ``attr`` (leaves only) and ``dtype``.

    ``attr`` is the value of a const, the name of a var, the index of a param, the buffer index of a load.
    Make nodes with `make`, `const`, `var`, `param` and `load`, never directly.
    """

    __slots__ = ("__weakref__", "args", "attr", "dtype", "op")
    op: str
    args: tuple[Expr, ...]
    attr: Attr
    dtype: DType

    def __repr__(self) -> str:
        from attnkit.ir.text import print_expr  # text is written in terms of expressions

        return f"<{self.dtype} {print_expr(self)}>"


_interned: weakref.WeakValueDictionary[object, Expr] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _intern(op: str, args: tuple[Expr, ...], attr: Attr, dtype: DType) -> Expr:
    # Bits, not values: 0.0 and -0.0 are different constants, 1, 1.0 and True are told apart by dtype.
    identity = struct.pack("d", attr) if isinstance(attr, float) else attr
    key = (op, args, identity, dtype)
    with _lock:
        node = _interned.get(key)
        if node is None:
            node = Expr()
            node.op, node.args, node.attr, node.dtype = op, args, attr, dtype
            _interned[key] = node
        return node


def const(value: bool | int | float) -> Expr:
    """A constant; its dtype is that of the Python number. Ints must fit 64 bits (AK107)."""
    if isinstance(value, bool):
        return _intern("const", (), value, "bool")
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise error("AK107", what="integer constant does not fit 64 bits", given=str(value)[:40])
        return _intern("const", (), value, "int")
    if not isinstance(value, float):
        raise error("AK202", what="a constant is a bool, an int or a float", given=type(value).__name__)
    return _intern("const", (), math.nan if value != value else value, "float")  # one NaN only


def var(name: str) -> Expr:
    """One of the variables ``s, b, h, q_idx, kv_idx, q_len, kv_len`` (AK108)."""
    if name not in VARIABLES:
        raise error("AK108", what="unknown variable", given=name, allowed=", ".join(VARIABLES))
    return _intern("var", (), name, VARIABLES[name])


def param(index: int) -> Expr:
    """A run-time scalar, float."""
    return _intern("param", (), index, "float")


def load(buffer: int, *index: Expr, dtype: DType = "float") -> Expr:
    """An element of a buffer; ``dtype`` is that of the buffer's elements as an expression."""
    return _intern("load", index, buffer, dtype)


def make(op: str, *args: Expr) -> Expr:
    """Apply an operator of the op table, with the implicit casts of its type rule.

    Casts of constants are folded, and a cast to the dtype that a value already has is the value itself.
    Raises AK202 (unknown operator, wrong number of operands) and AK201 (operand types).
    """
    info = OPS.get(op)
    if info is None or len(args) != info.arity:
        expected = f"{info.arity} operands" if info else ", ".join(OPS)
        raise error("AK202", given=f"{op} of {len(args)} operands", allowed=expected)
    dtypes = tuple(arg.dtype for arg in args)
    typed = info.rule(dtypes)
    if typed is None:
        raise error(
            "AK201",
            what=f"operand of {info.symbol} has the wrong type",
            given=", ".join(dtypes),
            allowed="bool (compare first: x != 0)",
        )
    wanted, dtype = typed
    if op in ("float", "int"):
        return _cast(args[0], dtype)
    return _intern(op, tuple(map(_cast, args, wanted)), None, dtype)


def _cast(arg: Expr, dtype: DType) -> Expr:
    if arg.dtype == dtype:
        return arg
    if arg.op == "const" and arg.dtype != "float" and arg.attr is not None:
        return const(float(arg.attr) if dtype == "float" else int(arg.attr))
    return _intern(dtype, (arg,), None, dtype)


def topological(roots: Iterable[Expr]) -> list[Expr]:
    """All nodes under ``roots``, operands before users, each once. The order depends on structure only."""
    order: list[Expr] = []
    done: set[Expr] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, operands_done = stack.pop()
        if operands_done:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))
    return order
