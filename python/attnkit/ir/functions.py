"""What torch's functions and methods do to traced numbers, by name: rows of the op table, or composed of them.

Each takes the context first, then its operands as torch does. What has no row here is AK302.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnkit.errors import AttnkitError, error
from attnkit.ir import bits
from attnkit.ir.optable import OPS, DType

if TYPE_CHECKING:
    from attnkit.ir.trace import Context

Function = Callable[..., Any]  # (context, *operands, **keywords) -> proxy

_CASTS: dict[str, DType] = {"float32": "float", "int32": "int", "int64": "int", "bool": "bool"}
_DEVICES = ("cpu", "cuda", "xpu", "mps", "meta")


def _kind(context: Context, x: Any) -> DType:
    return context.operand(x)[1]


def _unsupported(context: Context, given: str, **details: str) -> AttnkitError:
    return error("AK302", where=context.location(), given=given, **details)


def _row(op: str, swapped: bool = False) -> Function:
    def function(context: Context, *operands: Any, **keywords: Any) -> Any:
        if keywords:
            raise _unsupported(context, f"{op} with {', '.join(keywords)}=")
        return context.emit(op, *(reversed(operands) if swapped else operands))

    return function


# --- arithmetic -----------------------------------------------------------------------------------------


def _sum(context: Context, x: Any, y: Any, alpha: Any = 1) -> Any:
    return context.emit("add", x, y if alpha == 1 else context.emit("mul", y, alpha))


def _difference(context: Context, x: Any, y: Any, alpha: Any = 1) -> Any:
    return context.emit("sub", x, y if alpha == 1 else context.emit("mul", y, alpha))


def _clamp(context: Context, x: Any, min: Any = None, max: Any = None) -> Any:
    if min is not None:
        x = context.emit("max", x, min)
    return x if max is None else context.emit("min", x, max)


def _quotient(context: Context, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return context.emit("floordiv", x, y)
    if rounding_mode is None:
        return context.emit("div", x, y)
    if rounding_mode != "trunc":
        raise _unsupported(context, f"div with rounding_mode={rounding_mode!r}")
    if _kind(context, x) == "float" or _kind(context, y) == "float":
        return _trunc(context, context.emit("div", x, y))
    magnitude = context.emit("floordiv", context.emit("abs", x), context.emit("abs", y))
    same_sign = context.emit("eq", context.emit("lt", x, 0), context.emit("lt", y, 0))
    return context.emit("where", same_sign, magnitude, context.emit("neg", magnitude))


def _fmod(context: Context, x: Any, y: Any) -> Any:
    return context.emit("sub", x, context.emit("mul", _quotient(context, x, y, rounding_mode="trunc"), y))


def _pow(context: Context, x: Any, y: Any) -> Any:
    ints = _kind(context, x) != "float"
    if isinstance(y, int) and 2 <= y <= (64 if ints else 4):  # cheaper than pow, and ints stay ints
        product = x
        for _ in range(y - 1):
            product = context.emit("mul", product, x)
        return product
    return bits.power(context, x, y) if ints and _kind(context, y) != "float" else context.emit("pow", x, y)


def _whole(of_float: Function) -> Function:
    """Rounding: whole numbers are what they are."""

    def function(context: Context, x: Any) -> Any:
        return x if _kind(context, x) == "int" else of_float(context, x)

    return function


def _ceil(context: Context, x: Any) -> Any:
    return context.emit("neg", context.emit("floor", context.emit("neg", x)))


def _trunc(context: Context, x: Any) -> Any:
    return context.emit("where", context.emit("lt", x, 0), _ceil(context, x), context.emit("floor", x))


def _round(context: Context, x: Any) -> Any:
    """Halves go to the even neighbour."""
    below = context.emit("floor", x)
    rest = context.emit("sub", x, below)
    odd = context.emit("eq", context.emit("mod", below, 2), 1)
    up = context.emit(
        "or", context.emit("gt", rest, 0.5), context.emit("and", context.emit("eq", rest, 0.5), odd)
    )
    return context.emit("where", up, context.emit("add", below, 1), below)


def _sign(context: Context, x: Any) -> Any:
    sign = context.emit(
        "where", context.emit("gt", x, 0), 1, context.emit("where", context.emit("lt", x, 0), -1, 0)
    )
    return _cast(context, sign, _kind(context, x))


def _log1p(context: Context, x: Any) -> Any:
    """``log(u) * x / (u - 1)`` with ``u = 1 + x`` undoes the rounding of u."""
    u = context.emit("add", x, 1.0)
    exact = context.emit("div", context.emit("mul", context.emit("log", u), x), context.emit("sub", u, 1.0))
    rounded = context.emit("or", context.emit("eq", u, 1.0), context.emit("eq", u, math.inf))
    return context.emit("where", rounded, x, exact)


def _expm1(context: Context, x: Any) -> Any:
    half = context.emit("tanh", context.emit("mul", x, 0.5))
    return context.emit("mul", half, context.emit("add", context.emit("exp", x), 1.0))


def _logaddexp(context: Context, x: Any, y: Any) -> Any:
    apart = context.emit("abs", context.emit("sub", x, y))
    more = _log1p(context, context.emit("exp", context.emit("neg", apart)))
    top = context.emit("max", x, y)
    return context.emit(
        "where",
        context.emit("eq", x, y),
        context.emit("add", x, math.log(2.0)),
        context.emit("add", top, more),
    )


def _lerp(context: Context, x: Any, y: Any, weight: Any) -> Any:
    return context.emit("add", x, context.emit("mul", weight, context.emit("sub", y, x)))


def _addcmul(context: Context, x: Any, y: Any, z: Any, *, value: Any = 1) -> Any:
    return _sum(context, x, context.emit("mul", y, z), value)


# --- activations ----------------------------------------------------------------------------------------


def _softplus(context: Context, x: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    scaled = x if beta == 1 else context.emit("mul", x, beta)
    soft = _log1p(context, context.emit("exp", scaled))
    soft = soft if beta == 1 else context.emit("div", soft, beta)
    return context.emit("where", context.emit("gt", scaled, threshold), x, soft)


def _logsigmoid(context: Context, x: Any) -> Any:
    tail = _log1p(context, context.emit("exp", context.emit("neg", context.emit("abs", x))))
    return context.emit("sub", context.emit("min", x, 0.0), tail)


def _gelu(context: Context, x: Any, *, approximate: str = "none") -> Any:
    if approximate == "tanh":
        cubic = context.emit("mul", _pow(context, x, 3), 0.044715)
        inner = context.emit("mul", context.emit("add", x, cubic), math.sqrt(2 / math.pi))
        bend = context.emit("tanh", inner)
    else:
        bend = context.emit("erf", context.emit("mul", x, math.sqrt(0.5)))
    return context.emit("mul", context.emit("mul", x, 0.5), context.emit("add", bend, 1.0))


def _silu(context: Context, x: Any, inplace: bool = False) -> Any:
    return context.emit("mul", x, context.emit("sigmoid", x))


def _elu(context: Context, x: Any, alpha: Any = 1.0, inplace: bool = False) -> Any:
    bent = context.emit("mul", _expm1(context, context.emit("min", x, 0.0)), alpha)
    return context.emit("where", context.emit("gt", x, 0), x, bent)


def _leaky_relu(context: Context, x: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Any:
    return context.emit("where", context.emit("ge", x, 0), x, context.emit("mul", x, negative_slope))


def _hardtanh(
    context: Context, x: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False
) -> Any:
    return _clamp(context, x, min_val, max_val)


# --- truth ----------------------------------------------------------------------------------------------


def _bool(context: Context, x: Any) -> Any:
    return x if _kind(context, x) == "bool" else context.emit("ne", x, 0)


def _logical(op: str) -> Function:
    def function(context: Context, *operands: Any) -> Any:
        return context.emit(op, *[_bool(context, x) for x in operands])

    return function


def _bitwise(op: str, of_ints: Function) -> Function:
    """Bools have a row; ints may be arithmetic (`ir.bits`)."""

    def function(context: Context, *operands: Any) -> Any:
        kinds = [_kind(context, x) for x in operands]
        if "int" not in kinds or "float" in kinds:
            return context.emit(op, *operands)  # or the row's own refusal
        return of_ints(
            context,
            *[
                context.emit("int", x) if kind == "bool" else x
                for x, kind in zip(operands, kinds, strict=True)
            ],
        )

    return function


def _swapped(function: Function) -> Function:
    return lambda context, x, y: function(context, y, x)


def _or_bools(op: str, arithmetic: Function) -> Function:
    """In arrays the sum of two bools is their "or", the product their "and"."""

    def function(context: Context, x: Any, y: Any, **keywords: Any) -> Any:
        if _kind(context, x) == _kind(context, y) == "bool" and not keywords:
            return context.emit(op, x, y)
        return arithmetic(context, x, y, **keywords)

    return function


# --- casts and constants --------------------------------------------------------------------------------


def _to(context: Context, x: Any, *target: Any, dtype: Any = None, other: Any = None, **unused: Any) -> Any:
    """To a dtype, or to that of another traced number; a device, ``copy`` and the like change nothing."""
    for wanted in (*target, dtype, other):
        kind = _kind_of_dtype(context, wanted)
        if kind is not None:
            return _cast(context, x, kind)
    return x


def _kind_of_dtype(context: Context, wanted: Any) -> DType | None:
    """What kind a dtype stands for, or a traced number is; None for a device and for flags."""
    if context.is_traced(wanted):
        return wanted.kind  # type: ignore[no-any-return]
    name = str(wanted).removeprefix("torch.")
    if name in _CASTS:
        return _CASTS[name]
    if wanted is not None and not isinstance(wanted, bool) and name.partition(":")[0] not in _DEVICES:
        raise _unsupported(context, f"to({name})", allowed=", ".join(_CASTS))
    return None


_LARGEST = 2147483520.0  # the last float32 before 2 ** 31


def _cast(context: Context, x: Any, kind: DType) -> Any:
    if kind == "bool":
        return _bool(context, x)
    if kind == "int" and _kind(context, x) == "float":
        x = _clamp(
            context, x, -_LARGEST, _LARGEST
        )  # torch leaves it open what log(0).long() is: a very small number
    return context.emit(kind, x)


_PYTHON: dict[DType, type] = {"float": float, "int": int, "bool": bool}


def _constant(context: Context, like: Any, value: Any, dtype: Any) -> Any:
    """A constant of no dimension: ``dtype`` of None is that of ``like``."""
    kind = _kind_of_dtype(context, like if dtype is None else dtype)
    assert kind is not None
    return _cast(context, value, kind) if context.is_traced(value) else context.constant(_PYTHON[kind](value))


def _like(value: Any) -> Function:
    return lambda context, x, *, dtype=None, **unused: _constant(context, x, value, dtype)


def _full_like(context: Context, x: Any, fill_value: Any, *, dtype: Any = None, **unused: Any) -> Any:
    return _constant(context, x, fill_value, dtype)


def _new(value: Any) -> Function:
    def function(context: Context, x: Any, *size: Any, dtype: Any = None, **others: Any) -> Any:
        return _new_full(context, x, others.pop("size", size), value, dtype=dtype)

    return function


def _new_full(
    context: Context, x: Any, size: Any, fill_value: Any, *, dtype: Any = None, **unused: Any
) -> Any:
    if len(size) > 0 and (len(size) > 1 or not isinstance(size[0], (tuple, list)) or len(size[0]) > 0):
        raise _unsupported(context, "a new tensor with dimensions", hint="make it outside and index it")
    return _constant(context, x, fill_value, dtype)


def _nan_to_num(context: Context, x: Any, nan: Any = 0.0, posinf: Any = None, neginf: Any = None) -> Any:
    largest = 3.4028234663852886e38
    x = context.emit("where", context.emit("eq", x, math.inf), largest if posinf is None else posinf, x)
    x = context.emit("where", context.emit("eq", x, -math.inf), -largest if neginf is None else neginf, x)
    return context.emit("where", context.emit("ne", x, x), nan, x)


def _same(context: Context, x: Any, **unused: Any) -> Any:
    return x


# --- the table ------------------------------------------------------------------------------------------

_ROWS = {name: _row(op.name, name.startswith("__r")) for op in OPS.values() for name in op.torch}

FUNCTIONS: dict[str, Function] = {
    **_ROWS,
    **dict.fromkeys(("add", "__add__", "__radd__"), _or_bools("or", _sum)),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _or_bools("and", _ROWS["mul"])),
    **dict.fromkeys(("sub", "subtract"), _difference),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("div", "divide"), _quotient),
    **dict.fromkeys(("pow", "__pow__"), _pow),
    "__rpow__": _swapped(_pow),
    **dict.fromkeys(("trunc", "fix"), _whole(_trunc)),
    "floor": _whole(_ROWS["floor"]),
    "ceil": _whole(_ceil),
    "round": _whole(_round),
    "frac": lambda context, x: context.emit("sub", x, _trunc(context, x)),
    **dict.fromkeys(("sign", "sgn"), _sign),
    "fmod": _fmod,
    "rsub": lambda context, x, y, alpha=1: _difference(context, y, x, alpha),
    "square": lambda context, x: context.emit("mul", x, x),
    "reciprocal": lambda context, x: context.emit("div", 1.0, x),
    "addcmul": _addcmul,
    "lerp": _lerp,
    "log1p": _log1p,
    "log10": lambda context, x: context.emit("mul", context.emit("log2", x), math.log10(2.0)),
    "expm1": _expm1,
    "logaddexp": _logaddexp,
    "tan": lambda context, x: context.emit("div", context.emit("sin", x), context.emit("cos", x)),
    "relu": lambda context, x, inplace=False: context.emit("max", x, 0),
    "relu6": lambda context, x, inplace=False: _clamp(context, x, 0, 6),
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "gelu": _gelu,
    "silu": _silu,
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    "softsign": lambda context, x: context.emit("div", x, context.emit("add", context.emit("abs", x), 1.0)),
    "mish": lambda context, x, inplace=False: context.emit(
        "mul", x, context.emit("tanh", _softplus(context, x))
    ),
    "isnan": lambda context, x: context.emit("ne", x, x),
    "isinf": lambda context, x: context.emit("eq", context.emit("abs", x), math.inf),
    "isfinite": lambda context, x: context.emit("lt", context.emit("abs", x), math.inf),
    "isposinf": lambda context, x: context.emit("eq", x, math.inf),
    "isneginf": lambda context, x: context.emit("eq", x, -math.inf),
    "nan_to_num": _nan_to_num,
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_xor": _logical("xor"),
    "logical_not": _logical("not"),
    **dict.fromkeys(("bitwise_and", "__and__", "__rand__"), _bitwise("and", bits.conjunction)),
    **dict.fromkeys(("bitwise_not", "__invert__"), _bitwise("not", bits.complement)),
    **dict.fromkeys(("bitwise_left_shift", "__lshift__"), bits.left_shift),
    **dict.fromkeys(("bitwise_right_shift", "__rshift__"), bits.right_shift),
    "__rlshift__": _swapped(bits.left_shift),
    "__rrshift__": _swapped(bits.right_shift),
    "masked_fill": lambda context, x, condition, value: context.emit("where", condition, value, x),
    "bool": _bool,
    **dict.fromkeys(("int", "long"), lambda context, x: _cast(context, x, "int")),
    "to": _to,
    "type": _to,
    "type_as": _to,
    **dict.fromkeys(("clone", "contiguous", "positive"), _same),
    "zeros_like": _like(0),
    "ones_like": _like(1),
    "full_like": _full_like,
    "new_zeros": _new(0),
    "new_ones": _new(1),
    "new_full": _new_full,
}
METHODS: dict[str, Function] = {
    **FUNCTIONS,
    "where": lambda context, x, condition, y: context.emit("where", condition, x, y),
}
