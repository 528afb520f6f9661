"""The op table: everything the project knows about a scalar operator, one row each.

Arithmetic follows Python: integer ``//`` and ``%`` floor, ``/`` is always float, ints become floats where a
float meets them, bools become ints in arithmetic. Float ``a // b`` is ``floor(a / b)`` and ``a % b`` is
``a - floor(a / b) * b``. ``min`` and ``max`` propagate NaN. Integer division by zero gives 0 in the reference,
and so does the remainder; a backend may refuse a program where it cannot rule that out. ``int(x)`` truncates;
what it makes of NaN or of values beyond 32 bits is unspecified. ``& | ^`` of ints are those of two's complement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from attnkit.ir import intervals as iv

DType = Literal["float", "int", "bool"]
TypeRule = Callable[[tuple[DType, ...]], tuple[tuple[DType, ...], DType] | None]

# Variables of a scalar expression; `ir.program` says which operation has which. Lengths and indices are those of
# the sequence that b names.
VARIABLES: dict[str, DType] = {
    "s": "float",  # the scaled logit
    "b": "int",
    "h": "int",
    "q_idx": "int",
    "kv_idx": "int",
    "q_len": "int",
    "kv_len": "int",
    "f": "float",  # what earlier queries carried onto the key
    "x": "float",  # the operands of a map
    "y": "float",
    "z": "float",
    "w": "float",
}


@dataclass(frozen=True)
class OpInfo:
    """One operator.

    ``rule`` maps operand dtypes to (dtypes to cast the operands to, result dtype), or None if illegal.
    ``symbol`` and ``precedence`` spell it: infix or prefix where precedence > 0, else a call. ``numpy``
    computes it on float64, int64 and bool arrays. ``interval`` bounds it. ``derivative`` gives its partial
    derivatives by each float operand, as text in the operands ``x, y, z`` and the result ``w``; none: it is
    flat. Where it has a corner the derivative is the mean of its sides. ``cpu`` is the opcode's base name,
    ``ulp`` the error bound of a float32 implementation (inf for floor division and remainder of floats: they step, and
    a quotient's last bit decides on which side). ``torch`` names the functions and methods that trace
    to it; a name that starts with ``__r`` takes its operands swapped. ``triton`` spells it in a Triton kernel, with its
    operands as ``{0} {1} {2}`` and its integers as ``{int}``; names without ``tl.`` are functions of `attnkit.plan.triton`.
    """

    name: str
    arity: int
    rule: TypeRule
    symbol: str
    precedence: int
    numpy: Callable[..., Any]
    interval: iv.Rule
    cpu: str
    ulp: float
    torch: tuple[str, ...]
    derivative: tuple[str, ...] = ()
    triton: str = ""


# --- type rules -----------------------------------------------------------------------------------------


def _join(dtypes: tuple[DType, ...]) -> DType:
    """The dtype that all operands fit in."""
    if "float" in dtypes:
        return "float"
    return "int" if "int" in dtypes else "bool"


def _arithmetic(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType]:
    joined: DType = "float" if "float" in dtypes else "int"
    return (joined,) * len(dtypes), joined


def _floating(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType]:
    joined: DType = "float"
    return (joined,) * len(dtypes), joined


def _order(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType]:
    return _arithmetic(dtypes)[0], "bool"


def _equality(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType]:
    return (_join(dtypes),) * 2, "bool"


def _bitwise(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType] | None:
    joined = _join(dtypes)
    return None if joined == "float" else ((joined,) * len(dtypes), joined)


def _logic(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType] | None:
    return (dtypes, "bool") if _join(dtypes) == "bool" else None


def _select(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType] | None:
    joined = _join(dtypes[1:])
    return (("bool", joined, joined), joined) if dtypes[0] == "bool" else None


def _to_float(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType]:
    return dtypes, "float"


def _to_int(dtypes: tuple[DType, ...]) -> tuple[tuple[DType, ...], DType]:
    return dtypes, "int"


# --- numpy, where it has no function of that meaning -------------------------------------------------------


def _floordiv(x: Any, y: Any) -> Any:
    return np.floor_divide(x, y) if np.asarray(x).dtype.kind == "i" else np.floor(np.divide(x, y))


def _mod(x: Any, y: Any) -> Any:
    return np.mod(x, y) if np.asarray(x).dtype.kind == "i" else x - np.floor(np.divide(x, y)) * y


def _sigmoid(x: Any) -> Any:
    return np.divide(1.0, 1.0 + np.exp(np.negative(x)))


def _rsqrt(x: Any) -> Any:
    return np.divide(1.0, np.sqrt(x))


def _to_float64(x: Any) -> Any:
    return np.asarray(x, dtype=np.float64)


def _to_int64(x: Any) -> Any:
    return np.asarray(x).astype(np.int64)


_erf = np.vectorize(math.erf, otypes=[np.float64])


# --- the table ------------------------------------------------------------------------------------------


def _row(
    name: str,
    arity: int,
    rule: TypeRule,
    symbol: str,
    precedence: int,
    numpy: Callable[..., Any],
    interval: iv.Rule,
    ulp: float,
    torch: str,
    cpu: str = "",
    derivative: tuple[str, ...] = (),
    triton: str = "",
) -> OpInfo:
    names = tuple(torch.split())
    if not triton:
        operands = [f"{{{i}}}" for i in range(arity)]
        infix = f"({f' {symbol} '.join(operands)})" if arity == 2 else f"({symbol}{operands[0]})"
        triton = infix if precedence else f"tl.{name}({', '.join(operands)})"
    return OpInfo(
        name, arity, rule, symbol, precedence, numpy, interval, cpu or name, ulp, names, derivative, triton
    )


COMPARISON, PREFIX = 1, 7  # precedences: as in Python, comparisons bind weakest and do not chain

# fmt: off
_ROWS = (
    # name arity rule     symbol prec   numpy             interval           ulp  torch names
    _row("neg", 1, _arithmetic, "-", PREFIX, np.negative, iv.neg, 0, "neg negative __neg__",
         derivative=("-1.0",)),
    _row("abs", 1, _arithmetic, "abs", 0, np.abs, iv.absolute, 0, "abs absolute __abs__",
         derivative=("where(x > 0.0, 1.0, where(x < 0.0, -1.0, 0.0))",)),
    _row("add", 2, _arithmetic, "+", 5, np.add, iv.add, 0.5, "add __add__ __radd__",
         derivative=("1.0", "1.0")),
    _row("sub", 2, _arithmetic, "-", 5, np.subtract, iv.sub, 0.5, "sub subtract __sub__ __rsub__",
         derivative=("1.0", "-1.0")),
    _row("mul", 2, _arithmetic, "*", 6, np.multiply, iv.mul, 0.5, "mul multiply __mul__ __rmul__",
         derivative=("y", "x")),
    _row("div", 2, _floating, "/", 6, np.divide, iv.div, 0.5,
         "div divide true_divide __div__ __rdiv__ __truediv__ __rtruediv__",
         derivative=("1.0 / y", "-w / y")),
    _row("floordiv", 2, _arithmetic, "//", 6, _floordiv, iv.floordiv, math.inf,
         "floor_divide __floordiv__ __rfloordiv__",
         triton="floor_div({0}, {1})"),
    _row("mod", 2, _arithmetic, "%", 6, _mod, iv.mod, math.inf, "remainder __mod__ __rmod__",
         derivative=("1.0", "-floor(x / y)"),
         triton="floor_mod({0}, {1})"),
    _row("min", 2, _arithmetic, "min", 0, np.minimum, iv.minimum, 0, "minimum min clamp_max",
         derivative=("where(x < y, 1.0, where(x == y, 0.5, 0.0))", "where(y < x, 1.0, where(x == y, 0.5, 0.0))"),
         triton="tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    _row("max", 2, _arithmetic, "max", 0, np.maximum, iv.maximum, 0, "maximum max clamp_min",
         derivative=("where(x > y, 1.0, where(x == y, 0.5, 0.0))", "where(y > x, 1.0, where(x == y, 0.5, 0.0))"),
         triton="tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    _row("pow", 2, _floating, "pow", 0, np.power, iv.power, 16, "pow float_power __pow__ __rpow__",
         derivative=("where(y == 0.0, 0.0, y * pow(x, y - 1.0))", "where((x == 0.0) & (y >= 0.0), 0.0, w * log(x))"),
         triton="power({0}, {1})"),
    _row("exp", 1, _floating, "exp", 0, np.exp, iv.monotone(np.exp), 2, "exp",
         derivative=("w",)),
    _row("exp2", 1, _floating, "exp2", 0, np.exp2, iv.monotone(np.exp2), 2, "exp2",
         derivative=("0.6931471805599453 * w",)),
    _row("log", 1, _floating, "log", 0, np.log, iv.from_zero(np.log), 2, "log",
         derivative=("1.0 / x",)),
    _row("log2", 1, _floating, "log2", 0, np.log2, iv.from_zero(np.log2), 2, "log2",
         derivative=("1.4426950408889634 / x",)),
    _row("sqrt", 1, _floating, "sqrt", 0, np.sqrt, iv.from_zero(np.sqrt), 0.5, "sqrt",
         derivative=("0.5 / w",),
         triton="tl.sqrt_rn({0})"),
    _row("rsqrt", 1, _floating, "rsqrt", 0, _rsqrt, iv.rsqrt, 2, "rsqrt",
         derivative=("-0.5 * w / x",)),
    _row("tanh", 1, _floating, "tanh", 0, np.tanh, iv.monotone(np.tanh), 4, "tanh",
         derivative=("1.0 - w * w",),
         triton="tanh({0})"),
    _row("sigmoid", 1, _floating, "sigmoid", 0, _sigmoid, iv.monotone(_sigmoid), 4, "sigmoid expit",
         derivative=("w * (1.0 - w)",)),
    _row("erf", 1, _floating, "erf", 0, _erf, iv.monotone(math.erf), 4, "erf",
         derivative=("1.1283791670955126 * exp(-(x * x))",)),
    _row("sin", 1, _floating, "sin", 0, np.sin, iv.wave, 4, "sin",
         derivative=("cos(x)",)),
    _row("cos", 1, _floating, "cos", 0, np.cos, iv.wave, 4, "cos",
         derivative=("-sin(x)",)),
    _row("floor", 1, _floating, "floor", 0, np.floor, iv.monotone(np.floor), 0, "floor"),
    _row("eq", 2, _equality, "==", COMPARISON, np.equal, iv.eq, 0, "eq __eq__"),
    _row("ne", 2, _equality, "!=", COMPARISON, np.not_equal, iv.ne, 0, "ne not_equal __ne__"),
    _row("lt", 2, _order, "<", COMPARISON, np.less, iv.lt, 0, "lt less __lt__"),
    _row("le", 2, _order, "<=", COMPARISON, np.less_equal, iv.le, 0, "le less_equal __le__"),
    _row("gt", 2, _order, ">", COMPARISON, np.greater, iv.gt, 0, "gt greater __gt__"),
    _row("ge", 2, _order, ">=", COMPARISON, np.greater_equal, iv.ge, 0, "ge greater_equal __ge__"),
    _row("and", 2, _bitwise, "&", 4, np.bitwise_and, iv.bitwise_and, 0,
         "logical_and bitwise_and __and__ __rand__"),
    _row("or", 2, _bitwise, "|", 2, np.bitwise_or, iv.bitwise_or, 0, "logical_or bitwise_or __or__ __ror__"),
    _row("xor", 2, _bitwise, "^", 3, np.bitwise_xor, iv.bitwise_xor, 0,
         "logical_xor bitwise_xor __xor__ __rxor__"),
    _row("not", 1, _logic, "~", PREFIX, np.logical_not, iv.logical_not, 0,
         "logical_not bitwise_not __invert__"),
    _row("where", 3, _select, "where", 0, np.where, iv.where, 0, "where",
         derivative=("", "where(x, 1.0, 0.0)", "where(x, 0.0, 1.0)")),
    _row("float", 1, _to_float, "float", 0, _to_float64, iv.to_float, 0.5, "float", cpu="to_f",
         triton="{0}.to(tl.float32)"),
    _row("int", 1, _to_int, "int", 0, _to_int64, iv.to_int, 0, "int long", cpu="to_i",
         triton="{0}.to({int})"),
)
# fmt: on

OPS: dict[str, OpInfo] = {row.name: row for row in _ROWS}
LEAVES = ("const", "var", "param", "load")  # their meaning is in attr and dtype: see `ir.expr`
CALLS: dict[str, OpInfo] = {row.symbol: row for row in _ROWS if row.precedence == 0}
INFIX: dict[str, OpInfo] = {row.symbol: row for row in _ROWS if row.precedence > 0 and row.arity == 2}
PREFIXES: dict[str, OpInfo] = {row.symbol: row for row in _ROWS if row.precedence > 0 and row.arity == 1}
