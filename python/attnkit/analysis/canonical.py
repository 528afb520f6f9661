"""The canonical form of a program: what a kernel is built from, and so what decides that two programs share one.

Only what is exact is folded: constants of ints and bools, sums of ints with 0, and the identities of logic. Floats stay as written, because
a backend may round them otherwise than float64 does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from attnkit.ir.expr import Expr, const, load, make, topological
from attnkit.ir.intervals import INT32_MAX, INT32_MIN
from attnkit.ir.optable import OPS
from attnkit.ir.program import Operation, Program, attributes

_TRUE, _FALSE, _ZERO = const(True), const(False), const(0)


@lru_cache(maxsize=1024)
def canonical(program: Program) -> Program:
    """The same program with its expressions folded; itself if there is nothing to fold."""
    return Program(program.inputs, program.buffers, program.num_params, tuple(map(_operation, program.ops)))


def _operation(op: Operation) -> Operation:
    folded: dict[str, Any] = {name: fold(root) for name, root in op.expressions.items()}
    if folded.get("mask") is _TRUE:
        folded["mask"] = None  # every pair exists
    names = {f.name for f in attributes(type(op))}
    changed = {name: new for name, new in folded.items() if name in names and new is not getattr(op, name)}
    return replace(op, **changed) if changed else op


def fold(root: Expr) -> Expr:
    """An expression of the same value, without the parts that are known."""
    done: dict[Expr, Expr] = {}
    for node in topological([root]):
        args = tuple(done[arg] for arg in node.args)
        done[node] = _fold(node, args)
    return done[root]


def substitute(root: Expr, new: Mapping[Expr, Expr]) -> Expr:
    """The expression with other nodes in the places of some."""
    done: dict[Expr, Expr] = {}
    for node in topological([root]):
        done[node] = new[node] if node in new else _over(node, tuple(done[arg] for arg in node.args))
    return done[root]


def _fold(node: Expr, args: tuple[Expr, ...]) -> Expr:
    if node.op not in OPS:
        return _over(node, args)
    if all(arg.op == "const" and arg.dtype != "float" for arg in args) and node.dtype != "float":
        with np.errstate(all="ignore"):
            value = np.asarray(OPS[node.op].numpy(*(np.asarray(arg.attr) for arg in args)))
        if node.dtype == "bool":
            return const(bool(value))
        if INT32_MIN <= int(value) <= INT32_MAX:
            return const(int(value))
    identity = _IDENTITIES.get(node.op)
    found = identity(*args) if identity is not None else None
    if found is not None:
        return found
    return _over(node, args)


def _over(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operator over these arguments."""
    if args == node.args:
        return node
    return load(int(node.attr or 0), *args, dtype=node.dtype) if node.op == "load" else make(node.op, *args)


def _and(a: Expr, b: Expr) -> Expr | None:
    if a is _FALSE or b is _FALSE:
        return _FALSE
    if b is _TRUE or (a.op == "and" and b in a.args):
        return a
    return b if a is _TRUE or a is b or (b.op == "and" and a in b.args) else None


def _or(a: Expr, b: Expr) -> Expr | None:
    if a is _TRUE or b is _TRUE:
        return _TRUE
    return b if a is _FALSE or a is b else a if b is _FALSE else None


def _where(condition: Expr, a: Expr, b: Expr) -> Expr | None:
    return a if condition is _TRUE or a is b else b if condition is _FALSE else None


def _add(a: Expr, b: Expr) -> Expr | None:
    if b is _ZERO and a.dtype == "int":
        return a
    return b if a is _ZERO and b.dtype == "int" else None


_IDENTITIES: dict[str, Callable[..., Expr | None]] = {"and": _and, "or": _or, "where": _where, "add": _add}
