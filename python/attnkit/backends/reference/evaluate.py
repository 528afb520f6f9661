"""Expressions on numpy arrays: float64, int64 and bool, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnkit.analysis.derivative import float_leaves, gradient
from attnkit.backends.reference.tape import Array, Node, pointwise
from attnkit.ir.expr import Expr, topological
from attnkit.ir.optable import OPS, DType

_NUMPY: dict[DType, type[np.generic]] = {"float": np.float64, "int": np.int64, "bool": np.bool_}


class Evaluation:
    """The values of all nodes under some roots, and whether a load left its buffer.

    Reads ``variables`` (arrays that broadcast against each other), captured ``buffers`` and ``params``. An
    index outside its buffer is clamped, and `outside` tells where that happened.
    """

    def __init__(
        self,
        roots: Sequence[Expr],
        variables: Mapping[str, Any],
        buffers: Sequence[Any] = (),
        params: Sequence[float] = (),
    ) -> None:
        self._values: dict[Expr, Any] = {}
        self._outside: dict[Expr, Any] = {}
        with np.errstate(all="ignore"):
            for node in topological(roots):
                args = [self._values[arg] for arg in node.args]
                outside: Any = np.False_
                for arg in node.args:
                    outside = outside | self._outside[arg]
                if node.op == "load":
                    value, left = _load(buffers[int(node.attr or 0)], args)
                    outside = outside | left
                elif node.op == "const":
                    value = node.attr
                elif node.op == "var":
                    value = variables[str(node.attr)]
                elif node.op == "param":
                    value = params[int(node.attr or 0)]
                else:
                    value = OPS[node.op].numpy(*args)
                self._values[node] = np.asarray(value, dtype=_NUMPY[node.dtype])
                self._outside[node] = outside

    def __getitem__(self, node: Expr) -> Any:
        return self._values[node]

    def outside(self, node: Expr) -> Any:
        """A bool array: where the value of ``node`` depends on an element outside its buffer."""
        return self._outside[node]


def evaluate(
    roots: Sequence[Expr],
    variables: Mapping[str, Any],
    buffers: Sequence[Any] = (),
    params: Sequence[float] = (),
) -> list[Any]:
    """The values of the roots, as numpy arrays."""
    evaluation = Evaluation(roots, variables, buffers, params)
    return [evaluation[root] for root in roots]


class Scope:
    """What the expressions of a program read beside their variables: buffers and params, as nodes of the tape."""

    def __init__(self, buffers: Sequence[Any], params: Sequence[float]) -> None:
        self.buffers = [Node(b) if np.asarray(b).dtype.kind == "f" else np.asarray(b) for b in buffers]
        self.params = [Node(p) for p in params]
        self.arrays = [b.value if isinstance(b, Node) else b for b in self.buffers]

    def number(self, expr: Expr) -> float:
        """The value of a constant or a param."""
        return float(self.params[int(expr.attr or 0)].value if expr.op == "param" else expr.attr or 0)

    def plain(self, root: Expr, variables: Mapping[str, Any]) -> tuple[Array, Array]:
        """The value of an expression without derivatives, and where it read outside a buffer."""
        numbers = [float(p.value) for p in self.params]
        held = {name: v.value if isinstance(v, Node) else v for name, v in variables.items()}
        values = Evaluation([root], held, self.arrays, numbers)
        return values[root], np.asarray(values.outside(root))

    def apply(self, root: Expr, variables: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Node, Array]:
        """The value of a float expression, broadcast to ``shape``, with the derivatives of the op table."""
        leaves = float_leaves(root)
        partials = gradient(root, leaves)
        indices = [arg for leaf in leaves for arg in leaf.args]
        numbers = [float(p.value) for p in self.params]
        held = {name: v.value if isinstance(v, Node) else v for name, v in variables.items()}
        values = Evaluation([root, *partials, *indices], held, self.arrays, numbers)
        parents = []
        for leaf, partial in zip(leaves, partials, strict=True):
            node = self._leaf(leaf, variables, values, shape)
            if node is not None:
                parents.append((node, np.broadcast_to(values[partial], shape)))
        return pointwise(np.broadcast_to(values[root], shape), *parents), np.asarray(values.outside(root))

    def _leaf(
        self, leaf: Expr, variables: Mapping[str, Any], values: Evaluation, shape: tuple[int, ...]
    ) -> Node | None:
        if leaf.op == "param":
            return self.params[int(leaf.attr or 0)]
        if leaf.op == "var":
            variable = variables[str(leaf.attr)]
            return variable if isinstance(variable, Node) else None
        buffer = self.buffers[int(leaf.attr or 0)]
        if not isinstance(buffer, Node) or 0 in buffer.shape:
            return None
        index = [np.clip(values[arg], 0, size - 1) for arg, size in zip(leaf.args, buffer.shape, strict=True)]
        return buffer[tuple(np.broadcast_to(i, shape) for i in index)] if index else buffer


def _load(buffer: Any, index: list[Any]) -> tuple[Any, Any]:
    array = np.asarray(buffer)
    outside: Any = np.False_
    for i, size in zip(index, array.shape, strict=True):
        outside = outside | (i < 0) | (i >= size)
    if 0 in array.shape:
        return np.zeros(np.broadcast_shapes(*[i.shape for i in index])), np.True_
    inside = tuple(np.clip(i, 0, size - 1) for i, size in zip(index, array.shape, strict=True))
    return array[inside], outside
