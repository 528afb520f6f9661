"""Bitwise operators on traced ints, as ``//``, ``%`` and ``*``: exact, and nothing that a backend must learn.

What makes that affordable is knowing which bits may be set. That is an int of its own, in two's complement without end:
255 for what was masked by 255, -1 for what may be anything. Bits that two operands do not share need no logic: their
"or" is their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnkit.errors import error

if TYPE_CHECKING:
    from attnkit.ir.trace import Context

ANY = -1
NOT_NEGATIVE = 2**31 - 1
_WIDTH = 31  # bits of an int that is not negative


def possible(op: str, operands: Sequence[int], divisor: int | None) -> int:
    """The bits that ``op`` of ints may set, from those of its operands; ``divisor`` is the last one, if that is known."""
    if op == "where":
        return operands[1] | operands[2]
    if divisor is not None and divisor > 0:
        if op == "mod":
            return (1 << (divisor - 1).bit_length()) - 1
        if op == "floordiv":
            exact = divisor & (divisor - 1) == 0
            return operands[0] >> (divisor.bit_length() - 1) if exact else _ones(operands[0])
    some = operands[0] | operands[-1]
    longest = some.bit_length()
    if op == "max" and (operands[0] >= 0 or operands[1] >= 0):
        return some if some >= 0 else NOT_NEGATIVE
    if some < 0:
        return NOT_NEGATIVE if op == "abs" else ANY
    if op == "add":
        return some if operands[0] & operands[1] == 0 else (1 << (longest + 1)) - 1
    if op == "mul":
        for x, factor in (operands, operands[::-1]):
            if factor & (factor - 1) == 0:  # one bit: a shift
                return x << max(factor.bit_length() - 1, 0)
        return (1 << (operands[0].bit_length() + operands[1].bit_length())) - 1
    return some if op in ("min", "abs", "int") else ANY


def _ones(x: int) -> int:
    return ANY if x < 0 else (1 << x.bit_length()) - 1


def conjunction(context: Context, x: Any, y: Any) -> Any:
    """``x & y``."""
    if _is_literal(x):
        x, y = y, x
    shared = context.bits(x) & context.bits(y)
    if shared == 0:
        return context.constant(0)
    if _is_literal(y):
        result = context.emit("sub", x, conjunction(context, x, ~y)) if y < 0 else _masked(context, x, shared)
    elif shared < 0:
        given, hint = "a bitwise operator of two ints of either sign", "mask one of them first: x & 0xffff"
        raise error("AK302", where=context.location(), given=given, hint=hint)
    else:
        result = _digit_by_digit(context, x, y, shared)
    return context.learn(result, shared)


def disjunction(context: Context, x: Any, y: Any) -> Any:
    """``x | y``."""
    result = context.emit("add", x, y)
    if context.bits(x) & context.bits(y):
        result = context.emit("sub", result, conjunction(context, x, y))
    return context.learn(result, context.bits(x) | context.bits(y))


def exclusive(context: Context, x: Any, y: Any) -> Any:
    """``x ^ y``."""
    result = context.emit("add", x, y)
    if context.bits(x) & context.bits(y):
        result = context.emit("sub", result, context.emit("mul", conjunction(context, x, y), 2))
    return context.learn(result, context.bits(x) | context.bits(y))


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
        bit = context.emit("eq", _digits(context, y, level, 1), 1)
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
        bit = context.emit("eq", _digits(context, y, level, 1), 1)
        product = context.emit("mul", product, context.emit("where", bit, square, 1))
        square = square * square if _is_literal(square) else context.emit("mul", square, square)
        if _is_literal(square) and square > NOT_NEGATIVE:
            levels = level + 1
            break
    beyond = context.emit("or", context.emit("lt", y, 0), context.emit("ge", y, 1 << levels))
    for _ in range(2):
        product = context.emit("mul", product, context.emit("where", beyond, NOT_NEGATIVE, 1))
    return product


def _is_literal(x: Any) -> bool:
    return isinstance(x, int)


def _digit_by_digit(context: Context, x: Any, y: Any, shared: int) -> Any:
    total = None
    for at in range(shared.bit_length()):
        if shared >> at & 1:
            both = context.emit("mul", _digits(context, x, at, 1), _digits(context, y, at, 1))
            placed = context.emit("mul", both, 1 << at) if at else both
            total = placed if total is None else context.emit("add", total, placed)
    return total


def _masked(context: Context, x: Any, mask: int) -> Any:
    """``x & mask``, the sum over the runs of ones in the mask."""
    total, at = None, 0
    while mask >> at:
        if not mask >> at & 1:
            at += 1
            continue
        run = mask >> at
        length = (~run & (run + 1)).bit_length() - 1  # trailing ones
        digits = _digits(context, x, at, length)
        placed = context.emit("mul", digits, 1 << at) if at else digits
        total = placed if total is None else context.emit("add", total, placed)
        at += length
    return total


def _digits(context: Context, x: Any, at: int, length: int) -> Any:
    """``length`` bits of ``x``, from bit ``at`` up, as a number."""
    above = context.bits(x) >> at
    if at:
        x = context.emit("floordiv", x, 1 << at)
    return x if 0 <= above < 1 << length else context.emit("mod", x, 1 << length)
