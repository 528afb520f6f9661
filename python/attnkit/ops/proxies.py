"""Traced numbers as tensors: of no dimension and without contents, they hand over whatever is done to them.

Being tensors, they meet everything that a function may do with a tensor, and dynamo lets them decide a comparison with
a number that changes between calls, which it does for no other object.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.optable import DType

if TYPE_CHECKING:
    from attnkit.ops.tracing import TorchContext


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
    """A traced number."""
    if torch.compiler.is_dynamo_compiling():  # the comment is part of what dynamo says of `if traced:`
        traced = torch.empty(()).as_subclass(TorchProxy)  # AK301, no value yet: use torch.where for if
    else:
        traced = torch.Tensor._make_wrapper_subclass(WrappedProxy, ())
    traced.context, traced.text, traced.kind = context, text, kind
    return traced


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
        row = torch.empty(sizes).as_subclass(TorchRow)
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
