"""Traces kept between calls: a function is known by its code and by what it captured, never by its name or source.

Captured numbers count by value, captured tensors by dtype and shape (their contents arrive as buffers), captured
functions likewise in turn. Whatever else a function captured, or anything it asked of a tensor but its shape, could
change unseen: such a function is traced again at every call.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnkit.errors import error
from attnkit.ir import mods
from attnkit.ir.mods import Mask
from attnkit.ir.trace import Param, Traced, build_text
from attnkit.ops.proxies import call_in
from attnkit.ops.tracing import TorchParam, trace_mods

_MAX_ENTRIES = 4096
_STATELESS = (torch, math, operator, np, builtins, torch.nn.functional, torch.special)
_STATELESS_IDS = frozenset(map(id, _STATELESS))
_NUMBERS = frozenset((bool, int, float, str, type(None), torch.dtype))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))


class Traceable(NamedTuple):
    """Everything that decides a program's text."""

    score: Callable[..., Any] | None
    mask: Callable[..., Any] | None
    scale: float | None = None
    normalizer: str = "softmax"
    sink: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    kv_lens: Tensor | None = None
    page_table: Tensor | None = None
    dropout_p: float = 0.0
    codecs: tuple[str, str] | None = None
    approximation: tuple[str, str, float | None] | None = None


class Bound(NamedTuple):
    """A program text with the tensors and params that this call gives it."""

    text: str
    buffers: list[Tensor]
    params: list[Param]


class SettledMask(Mask):
    """A mask that captured nothing which changes while it lives: it is traced once, however many layers it serves."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.bound: dict[Any, Bound] = {}


class _Entry(NamedTuple):
    text: str
    buffers: tuple[int, ...]  # slots of the fingerprint
    params: tuple[int, ...]


_cache: dict[Any, _Entry] = {}


class _Unknown(Exception):
    """The function captured something whose changes we could not see."""


class _Fingerprint:
    """What a set of functions captured, in the order in which it is met."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.params: list[Param] = []
        self._open: list[
            Any
        ] = []  # what is being looked into: something that contains itself has no stand-in

    def of(self, value: Any) -> Any:
        """A hashable stand-in for ``value``: equal stand-ins trace to equal texts."""
        kind = type(value)  # exactly: a subclass could hold more than it seems to
        if kind in _NUMBERS:
            return (kind, repr(value) if kind is float else value)  # 0.0 and -0.0 are equal
        if _is_known_tensor(value):
            return ("tensor", _slot(self.tensors, value), value.dtype, value.shape)
        if kind in (Param, TorchParam):
            return ("param", _slot(self.params, value))
        if id(value) in _STATELESS_IDS:
            return ("stateless", id(value))
        if kind is types.BuiltinFunctionType and (value.__self__ is None or value.__self__ in _STATELESS):
            return ("stateless", id(value))
        if (kind in _COMPOSITE or _is_our_mask(value)) and not any(value is other for other in self._open):
            self._open.append(value)
            try:
                return self._composite(value)
            finally:
                self._open.pop()
        raise _Unknown

    def _composite(self, value: Any) -> Any:
        if isinstance(value, Mask):
            if "function" in vars(value):
                return ("mask", self.of(value.function))
            return (type(value), *((name, self.of(held)) for name, held in vars(value).items()))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            ours = getattr(value.func, "__module__", None) == mods.__name__
            args = tuple(map(self._loaded if ours else self.of, value.args))
            keywords = tuple((k, self.of(v)) for k, v in value.keywords.items())
            return ("partial", self.of(value.func), args, keywords, self.of(tuple(value.__dict__)))
        return (type(value), *map(self.of, value))

    def _loaded(self, value: Any) -> Any:
        """What `attnkit.ir.mods` is applied to: of a tensor's shape it asks where it broadcasts. A decoder's bias grows at every step."""
        if not _is_known_tensor(value):
            return self.of(value)
        return ("loaded", _slot(self.tensors, value), value.dtype, tuple([n == 1 for n in value.shape]))

    def _function(self, function: types.FunctionType) -> Any:
        if function.__dict__:
            raise _Unknown
        ours = (function.__module__ or "").startswith("attnkit.")  # whose globals do not change
        if ours and "<locals>" not in function.__qualname__:
            return function
        cells = tuple(self.of(cell.cell_contents) for cell in function.__closure__ or ())
        defaults = self.of(function.__defaults__ or ())
        keywords = tuple((k, self.of(v)) for k, v in (function.__kwdefaults__ or {}).items())
        if ours:
            return (function.__code__, cells, defaults, keywords)
        used = _global_names(function.__code__)
        known = tuple((n, self.of(function.__globals__[n])) for n in used if n in function.__globals__)
        return (function.__code__, cells, defaults, keywords, known)


_COMPOSITE = frozenset((tuple, list, functools.partial, types.FunctionType, Traceable))

_SHAPE_QUERIES = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.ndim.__get__, Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.is_nested.__get__,  # type: ignore[attr-defined]
    Tensor.dim, Tensor.size, Tensor.__len__, Tensor.numel,
}  # fmt: skip


class _Watch(TorchFunctionMode):
    """Notices whether the traced functions computed with tensors, so that values went into the trace."""

    read_values = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SHAPE_QUERIES:
            self.read_values = True
        return func(*args, **(kwargs or {}))


def bind(what: Traceable, like: Tensor | None = None) -> Bound:
    """Trace, or recall the trace of, a program. ``like`` is the query tensor: functions may ask for its dtype and device.

    Raises:
        AttnkitError: AK3xx or AK201, a function does what cannot be traced.
    """
    if torch.compiler.is_compiling():
        return _trace(what, like)
    mask, others = (
        what.mask,
        (
            what.score,
            what.sink,
            what.cu_seqlens_q,
            what.kv_lens,
            what.page_table,
            what.codecs,
            what.approximation,
        ),
    )
    if type(mask) is not SettledMask or any(other is not None for other in others):
        return _recall(what, like)
    key = (None if like is None else (like.dtype, like.device), what.scale, what.normalizer, what.dropout_p)
    if key not in mask.bound:
        mask.bound[key] = _recall(what, like)
    return mask.bound[key]


def _recall(what: Traceable, like: Tensor | None) -> Bound:
    prints = _Fingerprint()
    try:
        key = (
            None if like is None else (like.dtype, like.device),
            *[None if part is None else prints.of(part) for part in what],
        )
    except (_Unknown, ValueError):  # ValueError: an empty cell
        return _trace(what, like)
    entry = _cache.get(key)
    if entry is None:
        reads = sum(p.reads for p in prints.params)
        watch = _Watch()
        bound = call_in(watch, _trace, what, like)
        watch.read_values |= sum(p.reads for p in prints.params) != reads
        entry = None if watch.read_values else _remember(key, bound, prints)
        if entry is None:
            return bound
    return Bound(
        entry.text, [prints.tensors[i] for i in entry.buffers], [prints.params[i] for i in entry.params]
    )


def bind_function(function: Any) -> Bound:
    """The program of one score (five arguments) or mask (four arguments) function.

    Raises:
        AttnkitError: AK3xx, the function cannot be traced; AK402, it takes another number of arguments.
    """
    try:
        arity = len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        arity = 0
    if arity not in (4, 5):
        raise error(
            "AK402",
            where="function",
            given=f"{arity} arguments",
            allowed="(s, b, h, q_idx, kv_idx) or (b, h, q_idx, kv_idx)",
        )
    score, mask = (function, None) if arity == 5 else (None, function)
    return bind(Traceable(score, mask))


def _trace(what: Traceable, like: Tensor | None) -> Bound:
    traced: Traced = trace_mods(what.score, what.mask, like)
    text = build_text(
        traced,
        scale=what.scale,
        normalizer=what.normalizer,
        sink=what.sink,
        cu_seqlens_q=what.cu_seqlens_q,
        cu_seqlens_kv=what.cu_seqlens_kv,
        kv_lens=what.kv_lens,
        page_table=what.page_table,
        dropout_p=what.dropout_p,
        codecs=what.codecs or ("", ""),
        approximation=what.approximation,
    )
    return Bound(text, traced.buffers, traced.params)


def _remember(key: Any, bound: Bound, prints: _Fingerprint) -> _Entry | None:
    buffers = [_find(prints.tensors, t) for t in bound.buffers]
    params = [_find(prints.params, p) for p in bound.params]
    if None in buffers or None in params:
        return None  # a tensor made while tracing: its values may differ next time
    if len(_cache) >= _MAX_ENTRIES:
        _cache.clear()
    entry = _Entry(
        bound.text, tuple(i for i in buffers if i is not None), tuple(i for i in params if i is not None)
    )
    _cache[key] = entry
    return entry


def _is_known_tensor(value: Any) -> bool:
    return type(value) in _TENSORS and not value.__dict__ and not value.is_nested


def _is_our_mask(value: Any) -> bool:
    """What a mask class of ours holds beside its function does not decide what it traces to."""
    return isinstance(value, Mask) and type(value).__module__.startswith("attnkit.")


def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _global_names(constant)
    return tuple(names)


def _find(items: list[Any], item: Any) -> int | None:
    return next((i for i, other in enumerate(items) if other is item), None)


def _slot(items: list[Any], item: Any) -> int:
    found = _find(items, item)
    if found is None:
        items.append(item)
        return len(items) - 1
    return found
