"""Traced numbers as tensors: of no dimension and without contents, they hand over whatever is done to them.

Being tensors, they meet everything that a function may do with a tensor, and dynamo lets them decide a comparison with
a number that changes between calls, which it does for no other object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnkit.errors import error
from attnkit.ir.optable import DType

if TYPE_CHECKING:
    from attnkit.ops.tracing import TorchContext

_T = TypeVar("_T")


class TorchProxy(Tensor):
    """A traced number. ``text`` is how a line of the program writes it, ``kind`` what sort of number it is."""

    context: TorchContext
    text: str
    kind: DType

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the call to the context."""
        return apply(func, args, kwargs)


class TorchRow(Tensor):
    """``table[h]``, not yet a number: ``buffer`` is indexed by ``at`` so far; or the traced ``numbers`` of a vector.

    ``sizes`` are the dimensions that are left.
    """

    context: TorchContext
    buffer: Tensor | None
    at: tuple[Any, ...]
    numbers: list[Any] | None
    sizes: tuple[int, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the call to the context."""
        return apply(func, args, kwargs)


# Outside dynamo, whose rules forbid __torch_dispatch__: nothing may take their contents for numbers unseen.


class WrappedProxy(TorchProxy):
    """A traced number in eager mode."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse: the call came past ``__torch_function__``."""
        _refuse(func, args)


class WrappedRow(TorchRow):
    """A row in eager mode."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse: the call came past ``__torch_function__``."""
        _refuse(func, args)


def make_proxy(context: TorchContext, text: str, kind: DType) -> TorchProxy:
    """A traced number.

    Under dynamo it is on "meta", so that nobody takes it for a number; complex and as long as its place in
    ``context.blanks``, so that `unseen` knows what Python's ``abs`` made of it, which dynamo hands to nobody.
    """
    if torch.compiler.is_dynamo_compiling():  # the next comment is part of what dynamo says of `if traced:`
        size = len(context.blanks)
        blank = torch.empty(size, dtype=_BLANK, device="meta")  # AK301: use torch.where for if
        traced = blank.as_subclass(TorchProxy)
        context.blanks.append(traced)
    else:
        traced = torch.Tensor._make_wrapper_subclass(WrappedProxy, ())
    traced.context, traced.text, traced.kind = context, text, kind
    return traced


def unseen(context: TorchContext, value: Any) -> Any:
    """``value``; or the traced number that it must be if dynamo computed it from one without asking."""
    if not isinstance(value, Tensor) or isinstance(value, (TorchProxy, TorchRow)):
        return value
    if not value.is_meta or context.device.type == "meta":
        return value
    if value.dtype != _ABSOLUTE or value.dim() != 1:
        given, hint = (
            "an operator that torch computed itself",
            "use torch's function for it, such as torch.abs",
        )
        raise error("AK302", where=context.location(), given=given, hint=hint)
    return context.emit("abs", context.blanks[value.shape[0]])


_BLANK, _ABSOLUTE = torch.complex64, torch.float32  # what abs makes of it


def make_row(
    context: TorchContext,
    sizes: tuple[int, ...],
    *,
    buffer: Tensor | None = None,
    at: tuple[Any, ...] = (),
    numbers: list[Any] | None = None,
) -> TorchRow:
    """What is left of ``buffer[at]``, or the vector of ``numbers``."""
    if torch.compiler.is_dynamo_compiling():
        row = torch.empty(sizes, dtype=torch.float64, device="meta").as_subclass(TorchRow)
    else:
        row = torch.Tensor._make_wrapper_subclass(WrappedRow, sizes)
    row.context, row.sizes, row.buffer, row.at, row.numbers = context, sizes, buffer, at, numbers
    return row


def apply(func: Any, args: Any, kwargs: Any) -> Any:
    """A torch function was called on traced numbers, rows or params.

    Raises:
        AttnkitError: AK306, on a param alone, which has no trace to be part of; else as `TorchContext.apply`.
    """
    kwargs = kwargs or {}
    context = find_context(args) or find_context(tuple(kwargs.values()))
    if context is None:
        hint = "combine it with a traced number first, or use its value outside"
        raise error("AK306", where=str(getattr(func, "__name__", func)), given="an ak.param alone", hint=hint)
    return context.apply(func, args, kwargs)


class AskedFirst(TorchFunctionMode):
    """Takes what is done to traced numbers before any other mode does, such as torch.export's, which wants their values.

    Dynamo needs it too: it looks for traced numbers in no tuple, as in ``tensor[q_idx, kv_idx]``, and forgets what
    ``abs`` returned.
    """

    def __init__(self, context: TorchContext) -> None:
        super().__init__()
        self.context = context

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty or func is Tensor.as_subclass:  # `make_proxy`: dynamo takes all steps itself
            return func(*args, **kwargs)
        dynamo = torch.compiler.is_dynamo_compiling()
        if _concerns_us(args, dynamo) or _concerns_us(tuple(kwargs.values()), dynamo):
            return self.context.apply(func, args, kwargs)
        return func(*args, **kwargs)


def call_in(mode: TorchFunctionMode, function: Callable[..., _T], *args: Any) -> _T:
    """``function(*args)`` in a mode that is left whatever happens, also if Ctrl-C strikes while it is entered or left."""
    depth = torch._C._len_torch_function_stack()
    try:
        with mode:
            return function(*args)
    finally:
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()


def _concerns_us(args: Iterable[Any], dynamo: bool) -> bool:
    """Whether there are traced numbers in nested arguments, or what may be their absolute values."""
    for arg in args:
        if isinstance(arg, (TorchProxy, TorchRow)):
            return True
        if dynamo and isinstance(arg, Tensor) and arg.is_meta and arg.dtype == _ABSOLUTE:
            return True
        if isinstance(arg, (tuple, list)) and _concerns_us(arg, dynamo):
            return True
    return False


def find_context(args: Iterable[Any]) -> TorchContext | None:
    """The context of the first traced number in nested arguments."""
    for arg in args:
        if isinstance(arg, (TorchProxy, TorchRow)):
            return arg.context
        if isinstance(arg, (tuple, list)):
            context = find_context(arg)
            if context is not None:
                return context
    return None


def _refuse(func: Any, args: Any) -> None:
    context = find_context(args)
    raise error("AK302", where=context.location() if context else "", given=f"{func}")
