"""The torch half of tracing: torch functions applied to proxies, and ``tensor[proxy]``.

Works in eager mode and under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attnkit.errors import error
from attnkit.ir.optable import DType
from attnkit.ir.trace import FUNCTIONS, METHODS, Context, Function, Param, Proxy, Traced, trace


def _torch_functions() -> dict[Any, Function]:
    """What each torch function does to proxies, found by the names that the op table gives."""
    table: dict[Any, Function] = {}
    for module in (torch, torch.nn.functional, torch.special):
        for name, function in FUNCTIONS.items():
            if callable(target := vars(module).get(name)):
                table[target] = function
    for name, function in METHODS.items():
        if callable(target := getattr(torch.Tensor, name, None)):
            table[target] = function
    table[torch.Tensor.__getitem__] = Context.load
    return table


_TABLE = _torch_functions()
# Tensor's operators that are Python functions, such as __rsub__: dynamo finds those in no table.
_OPERATORS = [
    (f, _TABLE[f]) for f in vars(torch.Tensor).values() if isinstance(f, FunctionType) and f in _TABLE
]


class TorchParam(Param):
    """A param that also keeps its value in a 0-d tensor, which a compiled graph can take as an input."""

    def __init__(self, name: str, value: float | None = None) -> None:
        super().__init__(name, value)
        self.tensor = torch.tensor(math.nan if value is None else float(value))

    def changed(self) -> None:
        """Keep the tensor in step."""
        self.tensor.fill_(self.current())


def param(name: str, value: float | None = None) -> Param:
    """A run-time scalar for score and mask functions; a new value compiles nothing.

    ``cap = ak.param("cap", 30.0)``, used like a number inside the function; ``cap.value = 50.0`` between calls.
    """
    return TorchParam(name, value)


class TorchProxy(Proxy):
    """A proxy that torch functions accept."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(func, args, kwargs)


class TorchContext(Context):
    """A trace of torch code."""

    proxy_class = TorchProxy

    def operand(self, value: Any) -> tuple[str, DType]:
        """As in `Context`, but refuses Python bools under dynamo.

        Dynamo takes ``proxy == n`` for False if ``n`` is symbolic, without asking the proxy.
        """
        if isinstance(value, TorchParam) and torch.compiler.is_dynamo_compiling():
            value = value.tensor  # a float would become a constant of the graph
        if isinstance(value, bool) and torch.compiler.is_dynamo_compiling():
            raise error("AK307", given=f"{value}")
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


class _ProxyIndexing(TorchFunctionMode):
    """Also catches calls where proxies hide in an argument, as in ``tensor[proxy, proxy]``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _context(args) is None and _context(tuple((kwargs or {}).values())) is None:
            return func(*args, **(kwargs or {}))
        return _apply(func, args, kwargs)


def trace_mods(score: Callable[..., Any] | None, mask: Callable[..., Any] | None) -> Traced:
    """`ir.trace.trace` for functions that use torch: FlexAttention's score and mask functions run unchanged.

    Captured tensors are float32, int32, int64 or bool; 0-d ones act as scalars.

    Raises:
        AttnkitError: AK3xx and AK201, as `ir.trace.trace`.
    """
    with _ProxyIndexing():
        return trace(score, mask, TorchContext())


def _apply(func: Any, args: Any, kwargs: Any) -> Any:
    kwargs = kwargs or {}
    context = _context(args) or _context(tuple(kwargs.values()))
    assert context is not None  # else torch would not have called us
    function = _lookup(func)
    if function is None:
        name = getattr(func, "__name__", "a torch function")
        raise error("AK302", where=context.location(), given=f"torch function {name}")
    return function(context, *args, **kwargs)


def _lookup(func: Any) -> Function | None:
    for operator, function in _OPERATORS:
        if func is operator:
            return function
    return _TABLE.get(func)


def _context(args: Any) -> Context | None:
    """The context of the first proxy in nested arguments."""
    for arg in args:
        if isinstance(arg, Proxy):
            return arg.context
        if isinstance(arg, (tuple, list)):
            context = _context(arg)
            if context is not None:
                return context
    return None
