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

from attnkit.errors import AttnkitError, error
from attnkit.ir.functions import METHODS
from attnkit.ir.optable import OPS, VARIABLES, DType
from attnkit.ir.program import ELEMENT, NORMALIZERS, BufferDType
from attnkit.ir.verify import MAX_RANK

# A captured buffer is anything with a dtype and a shape: a torch tensor, a numpy array. Floats are read as float32.
_BUFFER_DTYPES: dict[str, BufferDType] = {
    "float32": "f32", "bfloat16": "f32", "float16": "f32", "int32": "i32", "int64": "i64", "bool": "bool",
}  # fmt: skip


_INDEX = ("b", "h", "q_idx", "kv_idx")


class Param:
    """A run-time scalar: a number that may change from call to call without compiling anything anew."""

    def __init__(self, name: str, value: float | None = None) -> None:
        self.name = name
        self.reads = 0  # how often its value was asked for: a trace that did is not to be kept
        if not isinstance(name, str):
            raise error("AK402", where="name", given=type(name).__name__, allowed="a str, for messages")
        self._value = None if value is None else _number(value)

    @property
    def value(self) -> float:
        """The number that the next call uses; may be assigned. AK401 if it was never given."""
        self.reads += 1
        return self.current()

    @value.setter
    def value(self, value: float) -> None:
        self._value = _number(value)
        self.changed()

    def changed(self) -> None:
        """Called after the value was assigned."""

    def current(self) -> float:
        """The value for a call, which is no read by the traced function."""
        if self._value is None:
            raise error("AK401", what="param has no value", where=self.name, given="None", allowed="a number",
                        hint="assign param.value")  # fmt: skip
        return self._value


def _number(value: Any) -> float:
    """The value of a `Param`: AK402 if it is no number, AK401 if it is one beyond float."""
    if not isinstance(value, (str, bytes, bool)):
        try:
            return float(value)
        except OverflowError:
            given = "an int beyond float"
            raise error("AK401", where="value", given=given, allowed="a number that fits a float") from None
        except (TypeError, ValueError, RuntimeError):  # the last: tensors without values
            pass
    raise error("AK402", where="value", given=type(value).__name__, allowed="a number")


def param(name: str, value: float | None = None) -> Param:
    """A run-time scalar for use in score and mask functions: ``cap = ak.param("cap", 30.0)``."""
    return Param(name, value)


class Proxy:
    """A scalar that is not known yet: ``text`` is how a line of the program writes it, ``kind`` what sort of number it is.

    Supports Python's operators, and the methods of `functions.METHODS`.
    """

    def __init__(self, context: Context, text: str, kind: DType) -> None:
        self.context = context
        self.text = text
        self.kind = kind

    __hash__ = object.__hash__
    __array_ufunc__ = None  # numpy's numbers leave operators to us

    def __pos__(self) -> Proxy:
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols that others probe for
            raise AttributeError(name)
        raise error("AK302", where=self.context.location(), given=f".{name}")


# Who asks a traced number for its value, and what to write instead.
NEEDS_VALUE = {
    "__bool__": "use torch.where(cond, a, b) for if, & | ~ for and, or, not, torch.minimum and torch.maximum for min and max",
    "__index__": "a loop needs a constant number of turns, and a list a constant index: use a captured tensor",
    "__iter__": "it is one number: there is nothing to iterate over",
    **dict.fromkeys(
        ("__int__", "__float__", "__complex__", "item", "tolist", "numpy", "__array__"),
        "compute with it as it is: torch.exp for math.exp, .to(torch.int32) for int, .float() for float",
    ),
    **dict.fromkeys(("__len__", "__contains__"), "it is one number"),
}


def needs_value(context: Context, name: str, x: Any) -> NoReturn:
    """Raise AK301: Python called ``name`` on a traced number."""
    given = f"{name} of a traced {x.kind}"
    raise error("AK301", where=context.location(), given=given, hint=NEEDS_VALUE[name])


class Context:
    """One trace: the lines written so far, and what they captured."""

    proxy_class: type = Proxy

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.buffers: list[Any] = []
        self.buffer_types: list[str] = []
        self.params: list[Param] = []

    def variable(self, name: str) -> Any:
        """One of the variables of the IR, such as ``kv_len``."""
        return self.proxy(name, VARIABLES[name])

    def proxy(self, text: str, kind: DType) -> Any:
        """The traced number that is written as ``text``: a variable, a line, or a literal."""
        return self.proxy_class(self, text, kind)

    def is_traced(self, value: Any) -> bool:
        """Whether ``value`` is a traced number."""
        return isinstance(value, self.proxy_class)

    def constant(self, value: Any) -> Any:
        """A number as a traced number."""
        return self.proxy(*self.operand(value))

    def emit(self, op: str, *operands: Any) -> Any:
        """Apply an operator of the op table to traced numbers, numbers, params and rank-0 tensors."""
        info = OPS[op]
        if len(operands) != info.arity:
            raise error("AK302", where=self.location(), given=f"{op} of {len(operands)} operands")
        names: list[str] = []
        kinds: list[DType] = []
        # No comprehensions here, nor calls that can be spared: dynamo takes all steps itself.
        for operand in operands:
            name, kind = self.operand(operand)
            names.append(name)
            kinds.append(kind)
        typed = info.rule(tuple(kinds))
        if typed is None:
            given = f"{op} of {', '.join(kinds)}"
            raise error("AK201", where=self.location(), given=given, hint="compare first: x != 0")
        if typed[1] == "bool" and op in _NEUTRAL and _NEUTRAL[op] in names:
            return self.proxy(names[1] if names[0] == _NEUTRAL[op] else names[0], "bool")
        if info.precedence == 0:
            text = f"{info.symbol}({', '.join(names)})"
        else:
            text = info.symbol + names[0] if info.arity == 1 else f" {info.symbol} ".join(names)
        result = f"t{len(self.lines)}"
        self.lines.append(f"{result} = {text}")
        return self.proxy(result, typed[1])

    def operand(self, value: Any) -> tuple[str, DType]:
        """How to write ``value`` in a line, and what kind of number it is."""
        if self.is_traced(value):
            if value.context is not self:
                hint = "keep none from one call of the function to the next, nor use one in a function inside"
                raise error("AK306", where=self.location(), given="a number of another trace", hint=hint)
            return value.text, value.kind
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
        return scalar.text, scalar.kind

    def load(self, buffer: Any, index: Any) -> Any:
        """``buffer[index]``: one element of a captured tensor or array."""
        if not isinstance(index, tuple):
            index = (index,)
        if len(index) != len(buffer.shape) or len(index) > MAX_RANK:
            given = f"{len(index)} indices of a tensor of rank {len(buffer.shape)}"
            raise error("AK304", where=self.location(), given=given, allowed=f"rank at most {MAX_RANK}")
        names = []
        for size, i in zip(buffer.shape, index, strict=True):
            name, kind = self._index(i, size)
            if kind != "int":
                given = f"an index that is a {kind}"
                raise error("AK304", where=self.location(), given=given, allowed="ints")
            names.append(name)
        slot, kind = self.capture(buffer)
        return self._line(f"b{slot}[{', '.join(names)}]", kind)

    def _index(self, i: Any, size: int) -> tuple[str, str]:
        if isinstance(i, (int, np.integer)) and not isinstance(i, bool):
            if not -size <= i < size:
                raise error("AK304", where=self.location(), given=f"{i}", allowed=f"below {size}")
            return self.operand(i if i >= 0 else i + size)
        return self.operand(i) if self.is_traced(i) or _is_buffer(i) else ("", type(i).__name__)

    def capture(self, buffer: Any) -> tuple[int, DType]:
        """The slot of a captured tensor, a new one at its first use; and the kind of its elements."""
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

    def _line(self, text: str, kind: DType) -> Any:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return self.proxy(name, kind)


_NEUTRAL = {"and": "true", "or": "false"}


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Proxy, *operands: Any, **keywords: Any) -> Any:
        return function(self.context, self, *operands, **keywords)

    return method


for _name, _function in METHODS.items():
    setattr(Proxy, _name, _method(_function))
for _name in NEEDS_VALUE:
    setattr(Proxy, _name, lambda self, *_, name=_name: needs_value(self.context, name, self))


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
        AttnkitError: AK3xx if a function does what cannot be traced, AK201 if it mixes types, AK402 if it takes another
            number of arguments.
    """
    context = context or Context()
    score_text = mask_text = None
    if score is not None:
        result = _call("score", score, *[context.variable(name) for name in ("s", *_INDEX)])
        score_text, kind = _result(context, "score", result, ("float", "int"))
        if kind == "int":
            score_text = f"float({score_text})"
    if mask is not None:  # on proxies of its own: the score may have written to its own
        mask_text, _ = _result(
            context, "mask", _call("mask", mask, *[context.variable(name) for name in _INDEX]), ("bool",)
        )
        if mask_text == "true":
            mask_text = None
    return Traced(context, score_text, mask_text)


def _call(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; AK402 where a function, or one that it is made of, takes another number of arguments."""
    try:
        return function(*args)
    except AttnkitError:
        raise
    except TypeError as exc:
        last: Any = exc.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        if not last.tb_frame.f_globals.get("__name__", "").startswith(
            ("attnkit.ir.", "attnkit.ops.")
        ):  # the user's own
            raise
        allowed = f"a function of ({', '.join(('s', *_INDEX) if name == 'score' else _INDEX)})"
        raise error("AK402", where=name, given=str(exc), allowed=allowed) from exc


def _result(context: Context, name: str, value: Any, allowed: tuple[DType, ...]) -> tuple[str, DType]:
    known = context.is_traced(value) or isinstance(value, (bool, int, float, Param))
    if not known and not (_is_buffer(value) and len(value.shape) == 0):
        raise error("AK305", where=name, given=type(value).__name__, allowed=" or ".join(allowed))
    text, kind = context.operand(value)
    if kind not in allowed:
        hint = "compare with something, or return a bool" if name == "mask" else "use torch.where"
        raise error("AK305", where=name, given=kind, allowed=" or ".join(allowed), hint=hint)
    return text, kind


def build_text(
    traced: Traced,
    *,
    scale: float | None = None,
    normalizer: str = "softmax",
    sink: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    kv_lens: Any = None,
    page_table: Any = None,
    dropout_p: float = 0.0,
    codecs: tuple[str, str] = ("", ""),
    approximation: tuple[str, str, float | None] | None = None,
    return_lse: bool = True,
) -> str:
    """The text of the whole program: ``attend`` with the traced score and mask. Valid, but not canonical.

    ``sink``, ``cu_seqlens_q``, ``cu_seqlens_kv``, ``kv_lens`` and ``page_table`` are tensors; those given are appended to
    ``traced.buffers`` (once each), so that this list is what the program takes. ``codecs`` are those of k and v;
    ``approximation`` is what `encode` makes of q and of k, "" where it leaves them, and ``skip``. Only string operations: works
    under dynamo.
    """
    context = traced.context
    has_lse = NORMALIZERS[normalizer].lse
    if sink is not None:
        normalizer = f"{normalizer}(sink = b{context.capture(sink)[0]})"
    q = kv = "bhsd"
    if cu_seqlens_q is not None:
        q = f"packed[b{context.capture(cu_seqlens_q)[0]}]"
    if cu_seqlens_kv is not None:
        kv = f"packed[b{context.capture(cu_seqlens_kv)[0]}]"
    elif page_table is not None:
        kv = f"paged[b{context.capture(page_table)[0]}, b{context.capture(kv_lens)[0]}]"
    elif kv_lens is not None:
        kv = f"padded[b{context.capture(kv_lens)[0]}]"
    keys, values = [f"{kv} {codec}" if codec else kv for codec in codecs]
    buffers = ", ".join([f"b{i}: {kind}" for i, kind in enumerate(context.buffer_types)])
    params = ", ".join([f"p{i}: f32" for i in range(len(context.params))])
    attributes = f"scale = {'default' if scale is None else context.number(scale)}"
    if dropout_p != 0.0:
        attributes += f", dropout = {context.number(dropout_p)}"
    operands, encodes = "q, k, v", []
    if approximation is not None:
        of_q, of_k, skip = approximation
        if of_q:
            operands, encodes = "q8, k8, v", [f"q8 = encode(q, {of_q})", f"k8 = encode(k, {of_k})"]
        if skip is not None:
            attributes += f", skip = {context.number(skip)}"
    body = list(context.lines)
    if traced.score is not None:
        body.append(f"score = {traced.score}")
    if traced.mask is not None:
        body.append(f"mask = {traced.mask}")
    body.append(f"normalizer = {normalizer}")
    return "\n".join(
        [
            "attnkit 1",
            f"program (q: {q}, k: {keys}, v: {values}) buffers({buffers}) params({params}) {{",
            *encodes,
            f"{'o, lse' if has_lse else 'o'} = attend({operands}, {attributes}) {{",
            *body,
            "}",
            "return o, lse" if return_lse and has_lse else "return o",
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
