"""Reverse-mode differentiation over float64 numpy: what the reference backend computes with.

A `Node` is an array and how a cotangent of it reaches the nodes it was made from. Only what the reference needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parent = tuple["Node", Callable[[Array], Any]]


class Node:
    """An array, float64, and its parents: (node, what a cotangent of this array is for that node)."""

    __slots__ = ("parents", "value")

    def __init__(self, value: Any, parents: tuple[Parent, ...] = ()) -> None:
        with np.errstate(invalid="ignore"):  # a signalling NaN in a dead slot
            self.value: Array = np.asarray(value, dtype=np.float64)
        self.parents = parents

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.value.shape

    def __add__(self, other: Any) -> Node:
        a, b = self, lift(other)
        return Node(a.value + b.value, ((a, _like(a)), (b, _like(b))))

    def __sub__(self, other: Any) -> Node:
        a, b = self, lift(other)
        return Node(a.value - b.value, ((a, _like(a)), (b, lambda g: _like(b)(-g))))

    def __mul__(self, other: Any) -> Node:
        a, b = self, lift(other)
        return Node(
            a.value * b.value, ((a, lambda g: _like(a)(g * b.value)), (b, lambda g: _like(b)(g * a.value)))
        )

    def __truediv__(self, other: Any) -> Node:
        a, b = self, lift(other)
        y = a.value / b.value
        return Node(y, ((a, lambda g: _like(a)(g / b.value)), (b, lambda g: _like(b)(-g * y / b.value))))

    def __matmul__(self, other: Node) -> Node:
        a, b = self, other
        return Node(
            a.value @ b.value,
            (
                (a, lambda g: _like(a)(g @ b.value.swapaxes(-1, -2))),
                (b, lambda g: _like(b)(a.value.swapaxes(-1, -2) @ g)),
            ),
        )

    def __getitem__(self, index: Any) -> Node:
        """Basic or advanced indexing; positions that are read twice get both cotangents."""

        def back(g: Array) -> Array:
            full = np.zeros_like(self.value)
            np.add.at(full, index, g)
            return full

        return Node(self.value[index], ((self, back),))

    def swap(self) -> Node:
        """The last two axes exchanged."""
        return Node(self.value.swapaxes(-1, -2), ((self, lambda g: g.swapaxes(-1, -2)),))

    def reshape(self, *shape: int) -> Node:
        """The same elements in another shape."""
        return Node(self.value.reshape(shape), ((self, lambda g: g.reshape(self.shape)),))

    def repeat(self, times: int) -> Node:
        """Each entry of axis 0 so many times in a row: kv heads for their query heads."""
        shape = (self.shape[0], times, *self.shape[1:])
        return Node(np.repeat(self.value, times, axis=0), ((self, lambda g: g.reshape(shape).sum(axis=1)),))

    def sum(self, axis: int) -> Node:
        """Over one axis, which stays with length 1."""
        return Node(
            self.value.sum(axis=axis, keepdims=True), ((self, lambda g: np.broadcast_to(g, self.shape)),)
        )

    def before(self) -> Node:
        """Sums over all earlier entries of axis 1, not its own."""
        return Node(_before(self.value), ((self, lambda g: np.flip(_before(np.flip(g, 1)), 1)),))


def _before(x: Array) -> Array:
    """Exclusive sums along axis 1, by adding alone: a large entry does not blur the sum before it."""
    sums = np.zeros_like(x)
    np.cumsum(x[:, :-1], axis=1, out=sums[:, 1:])
    return sums


def lift(x: Any) -> Node:
    """A node of whatever is not one."""
    return x if isinstance(x, Node) else Node(x)


def pointwise(value: Array, *parents: tuple[Node, Array]) -> Node:
    """A node that depends on each parent element by element, with the given derivatives; 0 times infinity is 0."""

    def back(parent: Node, derivative: Array) -> Callable[[Array], Array]:
        return lambda g: _like(parent)(np.where(g == 0, 0.0, g * derivative))

    return Node(value, tuple((parent, back(parent, derivative)) for parent, derivative in parents))


def exp(x: Node) -> Node:
    """Element by element."""
    y = np.exp(x.value)
    return pointwise(y, (x, y))


def log(x: Node) -> Node:
    """Element by element; log 0 is -inf."""
    return pointwise(np.log(x.value), (x, 1 / np.where(x.value == 0, np.inf, x.value)))


def sqrt(x: Node) -> Node:
    """Element by element."""
    y = np.sqrt(x.value)
    return pointwise(y, (x, 0.5 / np.where(y == 0, np.inf, y)))


def where(condition: Array, x: Any, y: Any) -> Node:
    """x where the condition holds, else y; what is not taken does not exist."""
    a, b = lift(x), lift(y)
    return Node(
        np.where(condition, a.value, b.value),
        (
            (a, lambda g: _like(a)(np.where(condition, g, 0))),
            (b, lambda g: _like(b)(np.where(condition, 0, g))),
        ),
    )


def concatenate(nodes: Sequence[Node], axis: int) -> Node:
    """One after the other along an axis."""
    if len(nodes) == 1:
        return nodes[0]
    ends = np.cumsum([node.shape[axis] for node in nodes])

    def back(i: int) -> Callable[[Array], Array]:
        return lambda g: np.take(g, range(ends[i] - nodes[i].shape[axis], ends[i]), axis=axis)

    value = np.concatenate([node.value for node in nodes], axis=axis)
    return Node(value, tuple((node, back(i)) for i, node in enumerate(nodes)))


def weighted(weights: Node, visible: Array, v: Node) -> Node:
    """``weights @ v``, where a value that is not a number reaches only the rows that see it, whatever its weight."""
    finite = np.where(np.isfinite(v.value), v.value, 0.0)
    o = weights.value @ finite
    for h, j in zip(*np.nonzero(~np.isfinite(v.value).all(axis=-1)), strict=True):
        bad = ~np.isfinite(v.value[h, j])
        spoilt = weights.value[h, :, j, None] * v.value[h, j, bad]
        o[h][:, bad] += np.where(visible[h, :, j, None], spoilt, 0.0)
    return Node(
        o,
        (
            (weights, lambda g: np.where(visible, g @ v.value.swapaxes(-1, -2), 0.0)),
            (v, lambda g: weights.value.swapaxes(-1, -2) @ g),
        ),
    )


def backward(roots: Sequence[Node], cotangents: Sequence[Array], leaves: Sequence[Node]) -> list[Array]:
    """The cotangents of the leaves, given those of the roots."""
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.parents)
    gradients: dict[int, Array] = {}
    for root, cotangent in zip(roots, cotangents, strict=True):
        gradients[id(root)] = gradients.get(id(root), 0) + np.asarray(cotangent, np.float64)
    for node in reversed(order):
        g = gradients.get(id(node))
        if g is not None:
            for parent, vjp in node.parents:
                gradients[id(parent)] = gradients.get(id(parent), 0) + vjp(g)
    return [np.broadcast_to(gradients.get(id(leaf), 0.0), leaf.shape).astype(np.float64) for leaf in leaves]


def _like(x: Node) -> Callable[[Array], Array]:
    """A cotangent of something broadcast, summed to the shape of ``x``."""

    def reduce(g: Array) -> Array:
        extra = g.ndim - x.value.ndim
        g = g.sum(axis=tuple(range(extra))) if extra else g
        axes = tuple(i for i, size in enumerate(x.shape) if size == 1 and g.shape[i] != 1)
        return g.sum(axis=axes, keepdims=True) if axes else g

    return reduce
