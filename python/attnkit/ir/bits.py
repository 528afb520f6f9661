"""Operators on the bits of traced ints that are ``//``, ``%``, ``*`` and ``where`` in other words: exact, and analyses know
more of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnkit.ir.trace import Context

_MOST = 2**31 - 1
_WIDTH = 31  # bits of an int that is not negative


def conjunction(context: Context, x: Any, y: Any) -> Any:
    """``x & y``. With ones at the end of a literal that is a remainder, with zeros a multiple."""
    if _is_literal(x):
        x, y = y, x
    if _is_literal(y):
        # A power of two, if y is ones at the end alone, or zeros at the end alone.
        size = y + 1 if y >= 0 else -y
        if size <= _MOST and size & (size - 1) == 0:
            if y >= 0:
                return context.emit("mod", x, size)
            return context.emit("mul", context.emit("floordiv", x, size), size)
    return context.emit("and", x, y)


def complement(context: Context, x: Any) -> Any:
    """``~x``."""
    return context.emit("sub", -1, x)


def right_shift(context: Context, x: Any, y: Any) -> Any:
    """``x >> y`` for ``y`` of 0 or more."""
    if _is_literal(y):
        if 0 <= y < _WIDTH:
            return context.emit("floordiv", x, 1 << y) if y else x
        return context.emit("where", context.emit("lt", x, 0), -1, 0)
    for level in range(5):
        bit = context.emit("eq", _digit(context, y, level), 1)
        x = context.emit("where", bit, context.emit("floordiv", x, 1 << (1 << level)), x)
    far = context.emit("ge", y, _WIDTH + 1)
    return context.emit("where", far, context.emit("where", context.emit("lt", x, 0), -1, 0), x)


def left_shift(context: Context, x: Any, y: Any) -> Any:
    """``x << y`` for ``y`` of 0 or more, as long as the result fits."""
    return context.emit("mul", x, 1 << y if _is_literal(y) and y >= 0 else power(context, 2, y))


def power(context: Context, x: Any, y: Any) -> Any:
    """``x ** y`` of ints, exactly: the product of those ``x ** 1, x ** 2, x ** 4 ...`` that the digits of y name.

    A result beyond 32 bits, and a negative y, must not go unnoticed: there the product leaves 32 bits, which a backend
    refuses (AK604) unless it can prove that y does not get there.
    """
    levels, square, product = 5, x, 1
    for level in range(levels):
        bit = context.emit("eq", _digit(context, y, level), 1)
        product = context.emit("mul", product, context.emit("where", bit, square, 1))
        square = square * square if _is_literal(square) else context.emit("mul", square, square)
        if _is_literal(square) and square > _MOST:
            levels = level + 1
            break
    beyond = context.emit("or", context.emit("lt", y, 0), context.emit("ge", y, 1 << levels))
    for _ in range(2):
        product = context.emit("mul", product, context.emit("where", beyond, _MOST, 1))
    return product


def _is_literal(x: Any) -> bool:
    return isinstance(x, int)


def _digit(context: Context, x: Any, at: int) -> Any:
    return context.emit("mod", right_shift(context, x, at), 2)
