"""Tracing: run a Python ``score`` or ``mask`` function once, on proxies, and write down what it does.

Proxies are plain objects that append lines of program text to a context. Nothing is interned or checked for
identity here, because this code is itself traced by ``torch.compile(fullgraph=True)``; the text is parsed
when the operator runs. The torch half (functions such as ``torch.where``, and ``tensor[proxy]``) is
`ops.tracing`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from attnkit.errors import error
from attnkit.ir.optable import OPS, VARIABLES, DType
from attnkit.ir.program import ELEMENT, BufferDType
from attnkit.ir.verify import MAX_RANK

# A captured buffer is anything with a dtype and a shape: a torch tensor, a numpy array.
_BUFFER_DTYPES: dict[str, BufferDType] = {"float32": "f32", "int32": "i32", "int64": "i64", "bool": "bool"}
CASTS: dict[str, DType] = {"float32": "float", "int32": "int", "int64": "int", "bool": "bool"}
_IDENTITY = {"and": "true", "or": "false"}


class Param:
    """A run-time scalar: a number that may change from call to call without compiling anything anew."""

    def __init__(self, name: str, value: float | None = None) -> None:
        self.name = name
        self.reads = 0  # how often its value was asked for: a trace that did is not to be kept
        self._value = None if value is None else float(value)

    @property
    def value(self) -> float:
        """The number that the next call uses; may be assigned. AK401 if it was never given."""
        self.reads += 1
        return self.current()

    @value.setter
    def value(self, value: float) -> None:
        self._value = float(value)
        self.changed()

    def changed(self) -> None:
        """Called after the value was assigned."""

    def current(self) -> float:
        """The value for a call, which is no read by the traced function."""
        if self._value is None:
            raise error("AK401", what="param has no value", where=self.name, hint="assign param.value")
        return self._value


def param(name: str, value: float | None = None) -> Param:
    """A run-time scalar for use in score and mask functions: ``cap = ak.param("cap", 30.0)``."""
    return Param(name, value)


class Proxy:
    """A scalar that is not known yet: the name of a line of program text, and its dtype.

    Supports Python's operators, and the methods of the op table and of `FUNCTIONS`.
    """

    def __init__(self, context: Context, name: str, dtype: DType) -> None:
        self.context = context
        self.name = name
        self.dtype = dtype

    __hash__ = object.__hash__

    def _needs_value(self) -> NoReturn:
        raise error("AK301", where=self.context.location(), given=f"a traced {self.dtype}")

    __bool__ = __int__ = __float__ = __index__ = item = _needs_value

    def __pos__(self) -> Proxy:
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols that others probe for
            raise AttributeError(name)
        raise error("AK302", where=self.context.location(), given=f".{name}")


class Context:
    """One trace: the lines written so far, and what they captured."""

    proxy_class: type[Proxy] = Proxy

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.buffers: list[Any] = []
        self.buffer_types: list[str] = []
        self.params: list[Param] = []

    def variable(self, name: str) -> Proxy:
        """One of the variables of the IR, such as ``kv_len``."""
        return self.proxy_class(self, name, VARIABLES[name])

    def emit(self, op: str, *operands: Any) -> Proxy:
        """Apply an operator of the op table to proxies, numbers, params and rank-0 tensors."""
        info = OPS[op]
        if len(operands) != info.arity:
            raise error("AK302", where=self.location(), given=f"{op} of {len(operands)} operands")
        names, dtypes = [], []
        for operand in operands:
            name, dtype = self.operand(operand)
            names.append(name)
            dtypes.append(dtype)
        typed = info.rule(tuple(dtypes))
        if typed is None:
            given = f"{op} of {', '.join(dtypes)}"
            raise error("AK201", where=self.location(), given=given, hint="compare first: x != 0")
        if _IDENTITY.get(op) in names:  # as conjunctions built in a loop begin
            other = names[1] if names[0] == _IDENTITY[op] else names[0]
            return self.proxy_class(self, other, "bool")
        if info.precedence == 0:
            return self._line(f"{info.symbol}({', '.join(names)})", typed[1])
        return self._line(
            info.symbol + names[0] if info.arity == 1 else f" {info.symbol} ".join(names), typed[1]
        )

    def operand(self, value: Any) -> tuple[str, DType]:
        """How to write ``value`` in a line, and its dtype."""
        if isinstance(value, Proxy):
            return value.name, value.dtype
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, bool):
            return ("true" if value else "false"), "bool"
        if isinstance(value, (int, float)):
            return self.number(value), "int" if isinstance(value, int) else "float"
        if isinstance(value, Param):
            return f"p{_position(self.params, value)}", "float"
        if not _is_buffer(value):
            raise error("AK306", where=self.location(), given=type(value).__name__)
        if len(value.shape) > 0:
            given, hint = f"a tensor of rank {len(value.shape)}", "index it: bias[h, q_idx, kv_idx]"
            raise error("AK306", where=self.location(), given=given, hint=hint)
        scalar = self.load(value, ())
        return scalar.name, scalar.dtype

    def load(self, buffer: Any, index: Any) -> Proxy:
        """``buffer[index]``: one element of a captured tensor or array."""
        if not isinstance(index, tuple):
            index = (index,)
        if len(index) != len(buffer.shape) or len(index) > MAX_RANK:
            given = f"{len(index)} indices of a tensor of rank {len(buffer.shape)}"
            raise error("AK304", where=self.location(), given=given, allowed=f"rank at most {MAX_RANK}")
        names = []
        for size, i in zip(buffer.shape, index, strict=True):
            if isinstance(i, int) and not isinstance(i, bool):
                if not -size <= i < size:
                    raise error("AK304", where=self.location(), given=f"{i}", allowed=f"below {size}")
                names.append(self.number(i % size))
                continue
            name, dtype = self.operand(i) if isinstance(i, Proxy) or _is_buffer(i) else ("", "bool")
            if dtype != "int":
                given = f"an index that is a {dtype if name else type(i).__name__}"
                raise error("AK304", where=self.location(), given=given, allowed="ints")
            names.append(name)
        slot, dtype = self.capture(buffer)
        return self._line(f"b{slot}[{', '.join(names)}]", dtype)

    def capture(self, buffer: Any) -> tuple[int, DType]:
        """The slot of a captured tensor, a new one at its first use; and the dtype of its elements."""
        kind = _BUFFER_DTYPES.get(_dtype_name(buffer.dtype))
        if kind is None:
            given, allowed = f"{buffer.dtype}", ", ".join(_BUFFER_DTYPES)
            raise error("AK303", where=self.location(), given=given, allowed=allowed)
        slot = _position(self.buffers, buffer)
        if slot == len(self.buffer_types):
            self.buffer_types.append(f"{kind}[{len(buffer.shape)}]")
        return slot, ELEMENT[kind]

    def number(self, value: int | float) -> str:
        """A number as program text."""
        return f"{value}"

    def location(self) -> str:
        """File and line of the user's code that is being traced, for error messages."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("attnkit", "torch"):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def _line(self, text: str, dtype: DType) -> Proxy:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return self.proxy_class(self, name, dtype)


# --- functions and methods ------------------------------------------------------------------------------

Function = Callable[..., Proxy]  # (context, *operands, **keywords)


def _operator(op: str, swapped: bool = False) -> Function:
    def function(context: Context, *operands: Any, **keywords: Any) -> Proxy:
        if keywords:
            raise error("AK302", where=context.location(), given=f"{op} with {', '.join(keywords)}=")
        return context.emit(op, *(reversed(operands) if swapped else operands))

    return function


def _clamp(context: Context, x: Any, min: Any = None, max: Any = None) -> Proxy:
    if min is not None:
        x = context.emit("max", x, min)
    return x if max is None else context.emit("min", x, max)


def _div(context: Context, x: Any, y: Any, *, rounding_mode: str | None = None) -> Proxy:
    if rounding_mode not in (None, "floor"):
        raise error("AK302", where=context.location(), given=f"div with rounding_mode={rounding_mode!r}")
    return context.emit("floordiv" if rounding_mode else "div", x, y)


def _pow(context: Context, x: Any, y: Any) -> Proxy:
    if isinstance(y, int) and not isinstance(y, bool) and 2 <= y <= 4:  # cheaper, and ints stay ints
        product = context.emit("mul", x, x)
        for _ in range(y - 2):
            product = context.emit("mul", product, x)
        return product
    return context.emit("pow", x, y)


def _to(context: Context, x: Any, dtype: Any) -> Proxy:
    """``dtype`` is a torch dtype, or another traced number's."""
    wanted = dtype if isinstance(dtype, str) else CASTS.get(_dtype_name(dtype))
    if wanted not in ("float", "int", "bool"):
        raise error("AK302", where=context.location(), given=f"to({dtype})", allowed=", ".join(CASTS))
    return _bool(context, x) if wanted == "bool" else context.emit(wanted, x)


def _bool(context: Context, x: Any) -> Proxy:
    return x if isinstance(x, Proxy) and x.dtype == "bool" else context.emit("ne", x, 0)


FUNCTIONS: dict[str, Function] = {
    **{name: _operator(op.name, name.startswith("__r")) for op in OPS.values() for name in op.torch},
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("div", "divide"), _div),
    **dict.fromkeys(("pow", "__pow__"), _pow),
    "bool": _bool,
    "masked_fill": lambda context, x, condition, value: context.emit("where", condition, value, x),
    "reciprocal": lambda context, x: context.emit("div", 1.0, x),
    "relu": lambda context, x, inplace=False: context.emit("max", x, 0),
    "rsub": lambda context, x, y: context.emit("sub", y, x),
    "square": lambda context, x: context.emit("mul", x, x),
    "to": _to,
}
METHODS: dict[str, Function] = {
    **FUNCTIONS,
    "where": lambda context, x, condition, y: context.emit("where", condition, x, y),
}


def _method(function: Function) -> Callable[..., Proxy]:
    def method(self: Proxy, *operands: Any, **keywords: Any) -> Proxy:
        return function(self.context, self, *operands, **keywords)

    return method


for _name, _function in METHODS.items():
    setattr(Proxy, _name, _method(_function))


# --- the trace ------------------------------------------------------------------------------------------


@dataclass
class Traced:
    """What `trace` found: a context with the lines written, and the expressions that they lead to.

    ``score`` and ``mask`` are None where there is none.
    """

    context: Context
    score: str | None
    mask: str | None

    @property
    def lines(self) -> list[str]:
        """Lines of program text."""
        return self.context.lines

    @property
    def buffers(self) -> list[Any]:
        """The captured tensors in the order of their slots, each once."""
        return self.context.buffers

    @property
    def params(self) -> list[Param]:
        """The run-time scalars in the order of their slots, each once."""
        return self.context.params


def trace(
    score: Callable[..., Any] | None, mask: Callable[..., Any] | None, context: Context | None = None
) -> Traced:
    """Run ``score(s, b, h, q_idx, kv_idx)`` and ``mask(b, h, q_idx, kv_idx)`` on proxies, once each.

    Raises:
        AttnkitError: AK3xx if a function does what cannot be traced, AK201 if it mixes types.
    """
    context = context or Context()
    index = [context.variable(name) for name in ("b", "h", "q_idx", "kv_idx")]
    score_text = mask_text = None
    if score is not None:
        score_text, dtype = _result(context, "score", score(context.variable("s"), *index), ("float", "int"))
        if dtype == "int":
            score_text = f"float({score_text})"
    if mask is not None:
        mask_text, _ = _result(context, "mask", mask(*index), ("bool",))
        if mask_text == "true":
            mask_text = None
    return Traced(context, score_text, mask_text)


def _result(context: Context, name: str, value: Any, allowed: tuple[DType, ...]) -> tuple[str, DType]:
    if not isinstance(value, (Proxy, bool, int, float, Param)) and not _is_buffer(value):
        raise error("AK305", where=name, given=type(value).__name__, allowed=" or ".join(allowed))
    text, dtype = context.operand(value)
    if dtype not in allowed:
        hint = "compare with something, or return a bool" if name == "mask" else "use torch.where"
        raise error("AK305", where=name, given=dtype, allowed=" or ".join(allowed), hint=hint)
    return text, dtype


def build_text(
    traced: Traced,
    *,
    scale: float | None = None,
    sink: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    kv_lens: Any = None,
    return_lse: bool = True,
) -> str:
    """The text of the whole program: ``attend`` with the traced score and mask. Valid, but not canonical.

    ``sink``, ``cu_seqlens_q``, ``cu_seqlens_kv`` and ``kv_lens`` are tensors; those given are appended to
    ``traced.buffers`` (once each), so that this list is what the program takes. Only string operations: works
    under dynamo.
    """
    context = traced.context
    normalizer = "softmax" if sink is None else f"softmax(sink = b{context.capture(sink)[0]})"
    q = kv = "bhsd"
    if cu_seqlens_q is not None:
        q = f"packed[b{context.capture(cu_seqlens_q)[0]}]"
    if cu_seqlens_kv is not None:
        kv = f"packed[b{context.capture(cu_seqlens_kv)[0]}]"
    elif kv_lens is not None:
        kv = f"padded[b{context.capture(kv_lens)[0]}]"
    buffers = ", ".join([f"b{i}: {kind}" for i, kind in enumerate(context.buffer_types)])
    params = ", ".join([f"p{i}: f32" for i in range(len(context.params))])
    body = list(context.lines)
    if traced.score is not None:
        body.append(f"score = {traced.score}")
    if traced.mask is not None:
        body.append(f"mask = {traced.mask}")
    body.append(f"normalizer = {normalizer}")
    return "\n".join(
        [
            "attnkit 1",
            f"program (q: {q}, k: {kv}, v: {kv}) buffers({buffers}) params({params}) {{",
            f"o, lse = attend(q, k, v, scale = {'default' if scale is None else context.number(scale)}) {{",
            *body,
            "}",
            "return o, lse" if return_lse else "return o",
            "}",
        ]
    )


def _is_buffer(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _position(items: list[Any], item: Any) -> int:
    """Where ``item`` itself is in the list; appended if it is not."""
    for i, other in enumerate(items):
        if other is item:
            return i
    items.append(item)
    return len(items) - 1
