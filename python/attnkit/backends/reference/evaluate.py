"""Expressions on numpy arrays: float64, int64 and bool, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def _load(buffer: Any, index: list[Any]) -> tuple[Any, Any]:
    array = np.asarray(buffer)
    outside: Any = np.False_
    for i, size in zip(index, array.shape, strict=True):
        outside = outside | (i < 0) | (i >= size)
    if 0 in array.shape:
        return np.zeros(np.broadcast_shapes(*[i.shape for i in index])), np.True_
    inside = tuple(np.clip(i, 0, size - 1) for i, size in zip(index, array.shape, strict=True))
    return array[inside], outside
