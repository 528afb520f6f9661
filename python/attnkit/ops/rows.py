"""Vectors inside score and mask functions: rows of captured tensors, unrolled into traced numbers where they are used.

``table[h]`` reads nothing yet; ``table[h][kv_idx]`` is a load. ``torch.dot(q_rope[b, h, q_idx], k_rope[b, kv_idx])`` and
``(blocks[h, q_idx] == kv_idx // 64).any()`` become sums and "or"s over all elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.proxies import TorchRow, make_row

if TYPE_CHECKING:
    from attnkit.ops.tracing import TorchContext

MAX_UNROLLED = 512


def index(context: TorchContext, table: Tensor, at: Any) -> Any:
    """``table[at]``: a traced number, or a row if dimensions are left."""
    at = list(at) if isinstance(at, tuple) else [at]
    while at and (at[-1] is Ellipsis or _is_whole(at[-1])):  # [h, :] is [h]
        at.pop()
    for i in at:
        if i is None or isinstance(i, (slice, list, tuple)) or i is Ellipsis:
            given, hint = (
                "an index with slices or new dimensions",
                "slice or transpose it outside the function",
            )
            raise error("AK304", where=context.location(), given=given, hint=hint)
    if isinstance(table, TorchRow):
        if table.buffer is None:
            return _element(context, table, at)
        buffer, at = table.buffer, (*table.at, *at)
    else:
        buffer = table
    if len(at) >= len(buffer.shape):
        return context.load(buffer, tuple(at))
    return make_row(context, tuple(buffer.shape[len(at) :]), buffer=buffer, at=tuple(at))


def _is_whole(i: Any) -> bool:
    return isinstance(i, slice) and i.start is None and i.stop is None and i.step is None


def _element(context: TorchContext, row: TorchRow, at: list[Any]) -> Any:
    assert row.numbers is not None
    if len(at) == 1 and isinstance(at[0], int):
        return row.numbers[at[0]]
    given, hint = "a traced index into computed numbers", "index the captured tensors first, then compute"
    raise error("AK304", where=context.location(), given=given, hint=hint)


def numbers(row: Any) -> list[Any]:
    """The traced numbers of a vector."""
    context = row.context
    if row.numbers is not None:
        return row.numbers  # type: ignore[no-any-return]
    if len(row.sizes) != 1:
        raise error("AK309", where=context.location(), given=f"what is left has shape {list(row.sizes)}")
    if row.sizes[0] > MAX_UNROLLED:
        raise error(
            "AK309", where=context.location(), given=f"{row.sizes[0]} elements", allowed=f"{MAX_UNROLLED}"
        )
    return [context.load(row.buffer, (*row.at, i)) for i in range(row.sizes[0])]


def elementwise(context: TorchContext, function: Callable[..., Any], args: Any, kwargs: Any) -> TorchRow:
    """A function of numbers, applied to the elements of the rows among its arguments."""
    columns = [numbers(arg) if isinstance(arg, TorchRow) else None for arg in args]
    lengths = [len(column) for column in columns if column is not None]
    if not lengths or any(n != lengths[0] for n in lengths):
        given = f"vectors of {', '.join(map(str, lengths))} elements" if lengths else "a vector as a keyword"
        raise error("AK309", where=context.location(), given=given)
    results = []
    for i in range(lengths[0]):
        row = [arg if column is None else column[i] for arg, column in zip(args, columns, strict=True)]
        results.append(function(context, *row, **kwargs))
    return make_row(context, (len(results),), numbers=results)


def _reduction(op: str, empty: Any) -> Callable[..., Any]:
    def function(
        context: TorchContext, row: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None
    ) -> Any:
        if keepdim or (dim if dim is not None else axis) not in (None, 0, -1):
            raise error("AK309", where=context.location(), given="a reduction that leaves dimensions")
        return _reduce(context, op, numbers(row), empty)

    return function


def _reduce(context: TorchContext, op: str, operands: list[Any], empty: Any) -> Any:
    total = None
    for x in operands:
        total = x if total is None else context.emit(op, total, x)
    return context.constant(empty) if total is None else total


def _dot(context: TorchContext, x: Any, y: Any) -> Any:
    products = elementwise(context, lambda c, a, b: c.emit("mul", a, b), (x, y), {})
    return _reduce(context, "add", numbers(products), 0.0)


def _sum(context: TorchContext, row: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(row, TorchRow) and row.numbers and row.numbers[0].kind == "bool":
        ones = [context.emit("int", x) for x in row.numbers]  # counts, where x + y would be "or"
        row = make_row(context, row.sizes, numbers=ones)
    return _total(context, row, *args, **kwargs)


_total = _reduction("add", 0.0)

ROW_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            torch.dot,
            Tensor.dot,
            torch.inner,
            Tensor.inner,
            torch.matmul,
            Tensor.matmul,
            Tensor.__matmul__,
            torch.vdot,
        ),
        _dot,
    ),
    **dict.fromkeys((torch.sum, Tensor.sum), _sum),
    **dict.fromkeys((torch.any, Tensor.any), _reduction("or", False)),
    **dict.fromkeys((torch.all, Tensor.all), _reduction("and", True)),
    **dict.fromkeys((torch.amax, Tensor.amax), _reduction("max", 0)),
    **dict.fromkeys((torch.amin, Tensor.amin), _reduction("min", 0)),
    **dict.fromkeys(
        (torch.unbind, Tensor.unbind), lambda context, row, dim=0: tuple(numbers(row))
    ),  # for x in row
    Tensor.__len__: lambda context, row: row.sizes[0],
    Tensor.shape.__get__: lambda context, row: torch.Size(row.sizes),  # type: ignore[attr-defined]
    Tensor.size: lambda context, row, dim=None: torch.Size(row.sizes) if dim is None else row.sizes[dim],
    Tensor.ndim.__get__: lambda context, row: len(row.sizes),  # type: ignore[attr-defined]
    Tensor.dim: lambda context, row: len(row.sizes),
}
