"""Programs: the tensor level of the IR. Frozen, interned, and a function of their text alone.

Values are numbered: the inputs first, then the results of the operations in order.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

from attnkit.ir.expr import Expr
from attnkit.ir.optable import DType

LayoutKind = Literal["bhsd", "packed", "padded"]
BufferDType = Literal["f32", "i32", "i64", "bool"]

# What a load from a buffer is, as an expression.
ELEMENT: dict[BufferDType, DType] = {"f32": "float", "i32": "int", "i64": "int", "bool": "bool"}


@dataclass(frozen=True)
class Layout:
    """How an input lies in memory: ``[B, H, S, D]``, packed ``[1, H, total, D]``, or padded ``[B, H, S, D]``.

    ``lengths`` is the index of an i32 rank-1 buffer: cu_seqlens ``[N + 1]`` if packed, kv_lens ``[B]`` if
    padded, None for bhsd.
    """

    kind: LayoutKind = "bhsd"
    lengths: int | None = None


@dataclass(frozen=True)
class Buffer:
    """A small captured tensor that expressions load from."""

    dtype: BufferDType
    rank: int


@dataclass(frozen=True)
class Softmax:
    """Softmax over the visible keys; ``sink`` is an f32 rank-1 buffer: one extra logit per query head."""

    sink: int | None = None


@dataclass(frozen=True)
class Attend:
    """Attention of value ``q`` over values ``k`` and ``v``; results ``(o, lse)``.

    ``scale`` None means ``head_dim ** -0.5``; ``mask`` None means that every pair exists.
    """

    q: int
    k: int
    v: int
    scale: float | None
    score: Expr
    mask: Expr | None = None
    normalizer: Softmax = field(default_factory=Softmax)
    results: ClassVar[tuple[str, ...]] = ("o", "lse")

    @property
    def roots(self) -> tuple[Expr, ...]:
        """The expressions of this operation: score, and mask if there is one."""
        return (self.score,) if self.mask is None else (self.score, self.mask)


@dataclass(frozen=True)
class Return:
    """The results of the program, as values."""

    values: tuple[int, ...]


Op = Attend | Return


@dataclass(frozen=True, eq=False, init=False)
class Program:
    """A whole variant. Equal programs are the same object. Check a new one with `ir.verify.verify`."""

    inputs: tuple[Layout, ...]
    buffers: tuple[Buffer, ...]
    num_params: int
    ops: tuple[Op, ...]

    def __new__(
        cls, inputs: tuple[Layout, ...], buffers: tuple[Buffer, ...], num_params: int, ops: tuple[Op, ...]
    ) -> Program:
        key = (inputs, buffers, num_params, ops)
        with _lock:
            program = _interned.get(key)
            if program is None:
                program = super().__new__(cls)
                for name, value in zip(("inputs", "buffers", "num_params", "ops"), key, strict=True):
                    object.__setattr__(program, name, value)
                _interned[key] = program
            return program

    @cached_property
    def attend(self) -> Attend:
        """The attention of the program (a verified program has exactly one)."""
        return next(op for op in self.ops if isinstance(op, Attend))

    @cached_property
    def text(self) -> str:
        """The canonical text: the program's identity, and the pre-image of every cache key."""
        from attnkit.ir.text import print_program  # text is written in terms of programs

        return print_program(self)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical text, in hex."""
        return hashlib.sha256(self.text.encode("ascii")).hexdigest()

    def __repr__(self) -> str:
        return f"<Program {self.key[:12]}>"

    def __reduce__(self) -> tuple[Callable[[str], Program], tuple[str]]:
        from attnkit.ir.text import parse

        return parse, (self.text,)


_interned: weakref.WeakValueDictionary[object, Program] = weakref.WeakValueDictionary()
_lock = threading.Lock()
