"""The torch half of tracing: score and mask functions that use torch, in eager mode and under dynamo alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache, wraps
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from attnkit.errors import AttnkitError, error
from attnkit.ir.functions import FUNCTIONS, METHODS, Function
from attnkit.ir.optable import DType
from attnkit.ir.trace import NEEDS_VALUE, Context, Param, Traced, needs_value, trace
from attnkit.ops import rows
from attnkit.ops.proxies import AskedFirst, TorchProxy, TorchRow, apply, call_in, make_proxy, unseen


class TorchParam(Param):
    """A param that also keeps its value in a 0-d tensor, which a compiled graph can take as an input."""

    def __init__(self, name: str, value: float | None = None) -> None:
        super().__init__(name, value)
        self.tensor = torch.tensor(math.nan if self._value is None else self._value, dtype=torch.float32)

    def changed(self) -> None:
        """Keep the tensor in step."""
        self.tensor.fill_(self.current())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch functions take a param beside traced numbers."""
        return apply(func, args, kwargs)


P = ParamSpec("P")
T = TypeVar("T")


def param(name: str, value: float | None = None) -> Param:
    """A run-time scalar for score and mask functions; a new value compiles nothing.

    ``cap = ak.param("cap", 30.0)``, used like a number inside the function; ``cap.value = 50.0`` between calls. ``name`` is
    for messages. A call without a value is AK401.
    """
    return TorchParam(name, value)


def assume_constant(function: Callable[..., T]) -> Callable[..., T]:
    """`torch.compiler.assume_constant_result`, which imports the compiler, and with it a Triton that may be broken."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """`lru_cache`, whose results `torch.compile` takes for constants; of the bare one it would warn."""
    found = lru_cache(maxsize=1024)(function)

    @wraps(function)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
        return found(*args, **kwargs)  # type: ignore[arg-type]

    return assume_constant(look_up)


# --- what torch's functions do to traced numbers ----------------------------------------------------------


def _in_place(function: Function) -> Function:
    """``x += y``: the traced number x takes on the result, wherever else it is held."""

    def write(context: TorchContext, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, TorchProxy):
            raise error("AK308", where=context.location(), given="a captured tensor")
        result = function(context, x, *args, **kwargs)
        kind = context.operand(result)[1]
        if kind != x.kind:
            if x.kind != "float":
                raise error("AK308", where=context.location(), given=f"a {kind} into a traced {x.kind}")
            result = context.emit("float", result)
        x.text = context.operand(result)[0]
        return x

    return write


def _set_item(context: TorchContext, x: Any, *args: Any) -> None:
    raise error("AK308", where=context.location(), given="an assignment to elements")


def _needing(name: str) -> Function:
    return lambda context, x, *args, **kwargs: needs_value(context, name, x)


def _embedding(
    context: TorchContext,
    at: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    *gradients: Any,
    **others: Any,
) -> Any:
    """A row of ``weight``; the other options are about gradients."""
    if max_norm is not None:
        raise error("AK302", where=context.location(), given="embedding with max_norm")
    return rows.index(context, weight, at)


def _take(context: TorchContext, table: Any, at: Any) -> Any:
    if table.dim() != 1:
        raise error("AK304", where=context.location(), given="take of a tensor with several dimensions")
    return rows.index(context, table, at)


_CPU = torch.device("cpu")
_DTYPES = {"float": torch.float32, "int": torch.int32, "bool": torch.bool}
# What a function may ask of a tensor of no dimension without needing its value.
_QUERIES: dict[Any, Function] = {
    Tensor.dtype.__get__: lambda context, x: context.dtype_of(x),  # type: ignore[attr-defined]
    Tensor.device.__get__: lambda context, x: context.device,
    Tensor.shape.__get__: lambda context, x: torch.Size(()),  # type: ignore[attr-defined]
    Tensor.size: lambda context, x: torch.Size(()),
    Tensor.ndim.__get__: lambda context, x: 0,  # type: ignore[attr-defined]
    Tensor.dim: lambda context, x: 0,
    Tensor.numel: lambda context, x: 1,
    Tensor.requires_grad.__get__: lambda context, x: False,  # type: ignore[attr-defined]
    Tensor.is_floating_point: lambda context, x: x.kind == "float",
    torch.is_floating_point: lambda context, x: x.kind == "float",
    Tensor.__repr__: lambda context, x, **unused: f"<traced {x.kind} {x.text}>",
    Tensor.__format__: lambda context, x, spec: f"<traced {x.kind} {x.text}>",
    Tensor.__hash__: lambda context, x: id(x),
}


def _methods() -> list[tuple[str, Any]]:
    """Tensor's methods; and Python's operators, which is what torch.export sees instead of Tensor's."""
    return [(name, getattr(home, name)) for home in (Tensor, operator) for name in dir(home)]


def _torch_functions() -> dict[Any, Function]:
    """What each torch function does to traced numbers, found by the names of `ir.functions`."""
    table: dict[Any, Function] = {}
    for module in (torch, torch.nn.functional, torch.special):
        for name, function in FUNCTIONS.items():
            if callable(target := vars(module).get(name)):
                table[target] = function
    for name, target in _methods():
        written = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")  # __iadd__, add_
        if name in METHODS:
            table[target] = METHODS[name]
        elif written in METHODS:
            table[target] = _in_place(METHODS[written])
        elif name in NEEDS_VALUE:
            table[target] = _needing(name)
    others: dict[Any, Function] = {
        Tensor.__getitem__: rows.index,
        operator.getitem: rows.index,
        Tensor.__setitem__: _set_item,
        operator.setitem: _set_item,
        torch.nn.functional.embedding: _embedding,
        torch.embedding: lambda context, weight, at, *args: _embedding(context, at, weight),
        torch.take: _take,
        Tensor.take: _take,
    }
    return table | _QUERIES | others


_TABLE = _torch_functions()
# Functions written in Python, such as Tensor.__rsub__ and F.silu: dynamo finds those by their names alone.
_IN_PYTHON = {f.__name__: (f, function) for f, function in _TABLE.items() if isinstance(f, FunctionType)}


def _lookup(func: Any) -> Function | None:
    if isinstance(func, FunctionType):
        known, function = _IN_PYTHON.get(func.__name__, (None, None))
        return function if known is func else None
    return _TABLE.get(func)


def _operator(func: Any) -> Callable[..., Any]:
    return lambda self, *args: self.context.apply(func, (self, *args), {})


# Tensor's own operators take a TypeError from __torch_function__, ours too, to mean that the other operand has the method.
for _name in dir(Tensor):
    if _name.startswith("__") and callable(_func := getattr(Tensor, _name)) and _func in _TABLE:
        setattr(TorchProxy, _name, _operator(_func))


# --- a trace of torch code ----------------------------------------------------------------------------------


class TorchContext(Context):
    """A trace of torch code for a query tensor of ``dtype`` on ``device``."""

    proxy_class = TorchProxy

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device
        self.varying: list[tuple[Any, Tensor]] = []
        self.blanks: list[Any] = []

    def proxy(self, text: str, kind: DType) -> TorchProxy:
        """As in `Context`."""
        return make_proxy(self, text, kind)

    def dtype_of(self, x: Any) -> torch.dtype:
        """The dtype that a traced number would have as a tensor."""
        return self.dtype if x.kind == "float" else _DTYPES[x.kind]

    def apply(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A torch function or method was called on traced numbers.

        Raises:
            AttnkitError: AK302, it means nothing here; and what its meaning raises.
        """
        if torch.compiler.is_dynamo_compiling():
            args = [self.settled(x) for x in args]
            kwargs = {name: self.settled(x) for name, x in kwargs.items()}
        function = _lookup(func)
        if any(isinstance(x, TorchRow) for x in args) and function is not rows.index:
            of_rows = rows.ROW_FUNCTIONS.get(func)
            if of_rows is not None:
                return of_rows(self, *args, **kwargs)
            if function is not None:
                return rows.elementwise(self, function, args, kwargs)
        name = getattr(func, "__name__", func)
        if function is None:
            raise error("AK302", where=self.location(), given=f"torch function {name}")
        try:
            return function(self, *args, **kwargs)
        except TypeError as exc:
            if isinstance(exc, AttnkitError):
                raise
            raise error("AK302", where=self.location(), given=f"torch function {name}: {exc}") from exc

    def settled(self, value: Any) -> Any:
        """``value``; but a number that dynamo knows only as a symbol becomes a traced one, read from a tensor.

        As a constant it would compile anew for each value.
        """
        # Known to the compiler, who has it; it brings sympy, which takes as long to import as all of attnkit.
        from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true

        if isinstance(value, TorchProxy):
            return value
        if not isinstance(value, (int, float)):
            return unseen(self, value)
        if isinstance(value, bool) or has_static_value(value):
            return value
        for known, tensor in self.varying:
            if type(known) is type(value) and statically_known_true(known == value):
                return self.load(tensor, ())
        dtype = torch.int64 if isinstance(value, int) else torch.float32
        tensor = torch.full((), value, dtype=dtype, device=self.device)
        self.varying.append((value, tensor))
        return self.load(tensor, ())

    def operand(self, value: Any) -> tuple[str, DType]:
        """As in `Context`; under dynamo, what may vary without compiling anew is read from tensors."""
        if isinstance(value, TorchProxy):
            if value.context is self:
                return value.text, value.kind
        elif torch.compiler.is_dynamo_compiling():
            value = value.tensor if isinstance(value, TorchParam) else self.settled(value)
        if isinstance(value, TorchRow):
            given, hint = (
                f"{list(value.sizes)} elements of a tensor",
                "index its other dimensions, or reduce them",
            )
            raise error("AK306", where=self.location(), given=given, hint=hint)
        return super().operand(value)

    def number(self, value: int | float) -> str:
        """As in `Context`; under dynamo a symbolic number becomes a constant first, with a guard."""
        if torch.compiler.is_dynamo_compiling():  # only a method's result is known to be a constant there
            exact = float.fromhex(float(value).hex())
            value = int(exact) if isinstance(value, int) else exact
        return f"{value}"

    def capture(self, buffer: Any) -> tuple[int, DType]:
        """As in `Context`, of tensors alone."""
        if not isinstance(buffer, torch.Tensor):
            given = f"a captured {type(buffer).__name__}"
            raise error("AK306", where=self.location(), given=given, hint="torch.from_numpy(array)")
        if buffer.is_nested:
            raise error(
                "AK306", where=self.location(), given="a nested tensor", hint="capture one of its parts"
            )
        return super().capture(buffer)

    def location(self) -> str:
        """As in `Context`; empty under dynamo, which cannot read frames and names the user's line itself."""
        return "" if torch.compiler.is_dynamo_compiling() else super().location()


def trace_mods(
    score: Callable[..., Any] | None, mask: Callable[..., Any] | None, like: Tensor | None = None
) -> Traced:
    """`ir.trace.trace` for functions that use torch: FlexAttention's score and mask functions run unchanged.

    Captured tensors are float32, int32, int64 or bool; 0-d ones act as scalars. ``like`` is the query tensor, whose
    dtype and device the functions may ask for.

    Raises:
        AttnkitError: AK3xx and AK201, as `ir.trace.trace`.
    """
    context = TorchContext() if like is None else TorchContext(like.dtype, like.device)
    return call_in(AskedFirst(context), trace, score, mask, context)
