"""Programs: the tensor level of the IR. Frozen, interned, and a function of their text alone.

Values are numbered: the inputs first, then the results of the operations in order. docs/ir.md says what every
operation means. Its attributes are the fields of its dataclass, each tagged with a kind that the printer, the
parser and the verifier read, so that none of them knows the operations one by one.
"""

# ruff: noqa: RUF009 -- _attribute makes dataclass fields
from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

from attnkit.errors import error
from attnkit.ir.expr import Expr, var
from attnkit.ir.optable import DType

LayoutKind = Literal[
    "bhsd", "packed", "padded", "paged", "hsd", "bhs", "bs", "h", "hd", "bhd", "bhdv"
]  # fmt: skip
BufferDType = Literal["f32", "i32", "i64", "bool"]

# What a load from a buffer is, as an expression.
ELEMENT: dict[BufferDType, DType] = {"f32": "float", "i32": "int", "i64": "int", "bool": "bool"}
# The buffers that a layout names (type of each), beside the tensor itself.
LAYOUT_BUFFERS: dict[LayoutKind, tuple[tuple[BufferDType, int], ...]] = {
    "bhsd": (), "packed": (("i32", 1),), "padded": (("i32", 1),), "paged": (("i32", 2), ("i32", 1)),
    "hsd": (), "bhs": (), "bs": (), "h": (), "hd": (), "bhd": (), "bhdv": (),
}  # fmt: skip
TOKENS = frozenset(["bhsd", "packed", "padded", "paged", "hsd"])
CODECS = ("int8", "int4", "int2", "fp8")
CODEC_AXES = ("token", "channel", "tile", "head")


@dataclass(frozen=True)
class Codec:
    """How tokens are quantised: the code, what shares a scale, and how many elements of it (0: all)."""

    name: str
    axis: str
    group: int


@dataclass(frozen=True)
class Layout:
    """How an input lies in memory; the letters of a kind are its shape, see docs/ir.md.

    ``lengths`` is the index of an i32 rank-1 buffer: cu_seqlens ``[N + 1]`` if packed, the lengths ``[B]`` if padded
    or paged. ``table`` is the page table of a paged input, an i32 rank-2 buffer.
    """

    kind: LayoutKind = "bhsd"
    lengths: int | None = None
    table: int | None = None
    codec: Codec | None = None

    @property
    def buffers(self) -> tuple[int, ...]:
        """The buffers it names, in the order of the text."""
        return tuple(i for i in (self.table, self.lengths) if i is not None)


@dataclass(frozen=True)
class Buffer:
    """A small captured tensor that expressions load from."""

    dtype: BufferDType
    rank: int


@dataclass(frozen=True)
class Rules:
    """What a normaliser allows: an lse (and so merging), a sink, an epsilon; whether keys may be split."""

    lse: bool = False
    sink: bool = False
    epsilon: bool = False
    splits_keys: bool = True


NORMALIZERS: dict[str, Rules] = {
    "softmax": Rules(lse=True, sink=True),
    "signed_softmax": Rules(lse=True),
    "softmax_over_queries": Rules(epsilon=True, splits_keys=False),
    "sum": Rules(epsilon=True),
    "none": Rules(),
}


@dataclass(frozen=True)
class Normalizer:
    """How scores become weights; ``sink`` is an f32 rank-1 buffer: one extra logit per query head."""

    kind: str = "softmax"
    sink: int | None = None
    epsilon: float | None = None

    @property
    def rules(self) -> Rules:
        """What it allows; nothing, if there is no such normaliser (the verifier refuses it)."""
        return NORMALIZERS.get(self.kind, Rules())


# --- operations -------------------------------------------------------------------------------------------


def _attribute(kind: str, default: Any = None, choices: tuple[str, ...] = ()) -> Any:
    """A keyword of an operation. Kinds: scale, float, floats, int, bool, number (a const or param expression),
    value, pair, word, words, codec; in the body: expr, normalizer."""
    metadata = {"kind": kind, "choices": choices}
    if kind == "expr" and default is not None:
        return field(default_factory=lambda: var(default), metadata={**metadata, "default": default})
    if kind == "normalizer":
        return field(default_factory=Normalizer, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Operation:
    """What all operations share. ``RESULTS`` names what they give, ``VARIABLES`` what their expressions may read."""

    NAME: ClassVar[str]
    RESULTS: ClassVar[tuple[str, ...]] = ()
    VARIABLES: ClassVar[frozenset[str]] = frozenset()
    BODY: ClassVar[frozenset[str]] = frozenset(["expr", "normalizer"])
    operands: tuple[int, ...]

    @property
    def results(self) -> tuple[str, ...]:
        """The names of its results, in order."""
        return self.RESULTS

    @property
    def expressions(self) -> dict[str, Expr]:
        """Its expressions by name, those that say nothing left out."""
        named = {
            f.name: getattr(self, f.name) for f in attributes(type(self)) if f.metadata["kind"] == "expr"
        }
        return {name: expr for name, expr in named.items() if expr is not None}

    @property
    def roots(self) -> tuple[Expr, ...]:
        """Its expressions."""
        return tuple(self.expressions.values())

    def uses(self) -> tuple[int, ...]:
        """Every value it reads."""
        used = list(self.operands)
        for f in attributes(type(self)):
            held = getattr(self, f.name)
            if f.metadata["kind"] == "value" and held is not None:
                used.append(held)
            elif f.metadata["kind"] == "pair" and held is not None:
                used.extend(held)
        return tuple(used)


_attributes: dict[str, tuple[Field[Any], ...]] = {}


def attributes(operation: type[Operation]) -> tuple[Field[Any], ...]:
    """The fields of an operation that are written as keywords or in its body."""
    found = _attributes.get(operation.NAME)
    if found is None:
        found = _attributes[operation.NAME] = tuple(f for f in fields(operation) if "kind" in f.metadata)
    return found


_PAIRS = frozenset(["s", "b", "h", "q_idx", "kv_idx", "q_len", "kv_len"])


@dataclass(frozen=True)
class Map(Operation):
    """Element by element over ``x, y, z, w``."""

    NAME = "map"
    RESULTS = ("mapped",)
    VARIABLES = frozenset(["x", "y", "z", "w", "b", "h", "q_idx", "q_len"])
    norm: str = _attribute("word", "none", ("none", "l2", "layer"))
    value: Expr = _attribute("expr", "x")


@dataclass(frozen=True)
class Pool(Operation):
    """One token for every ``size``."""

    NAME = "pool"
    RESULTS = ("pooled",)
    size: int = _attribute("int", 1)
    how: str = _attribute("word", "mean", ("mean", "sum", "max"))


@dataclass(frozen=True)
class Encode(Operation):
    """Quantise."""

    NAME = "encode"
    RESULTS = ("encoded",)
    codec: Codec | None = _attribute("codec")
    center: str = _attribute("word", "none", ("none", "mean"))


@dataclass(frozen=True)
class Select(Operation):
    """A relation between the rows and the columns of two values of tokens; ``RULES`` are alternatives."""

    NAME = "select"
    RESULTS = ("chosen",)
    VARIABLES = _PAIRS
    RULES = ("top_k", "top_fraction", "top_cdf", "threshold")
    scale: float | None = _attribute("scale")
    top_k: Expr | None = _attribute("number")
    top_fraction: Expr | None = _attribute("number")
    top_cdf: Expr | None = _attribute("number")
    threshold: Expr | None = _attribute("number")
    per: str = _attribute("word", "row", ("row", "column"))
    heads: str = _attribute("word", "each", ("each", "group"))
    incoherent: Expr | None = _attribute("number")
    prefix: int | None = _attribute("int")
    score: Expr = _attribute("expr", "s")
    mask: Expr | None = _attribute("expr")
    force: Expr | None = _attribute("expr")

    @property
    def rule(self) -> str:
        """The one rule that is given (of a verified program)."""
        return next(name for name in self.RULES if getattr(self, name) is not None)


@dataclass(frozen=True)
class Attend(Operation):
    """Attention of ``operands[0]`` over segments of keys and values, the pairs that follow it.

    ``scale`` None means ``head_dim ** -0.5``; ``mask`` None means that every pair exists.
    """

    NAME = "attend"
    VARIABLES = _PAIRS | {"f"}
    OUTPUTS = (
        "o", "lse", "carry", "density", "weights", "column_sum", "column_max", "row_max", "entropy",
    )  # fmt: skip
    scale: float | None = _attribute("scale")
    blocks: int | None = _attribute("value")
    groups: tuple[int, ...] | None = _attribute("pair")
    initial: int | None = _attribute("value")
    head: int = _attribute("int", 0)
    budget: int | None = _attribute("int")
    dropout: Expr | None = _attribute("number")
    skip: Expr | None = _attribute("number")
    outputs: tuple[str, ...] = _attribute("words", (), OUTPUTS)
    score: Expr = _attribute("expr", "s")
    mask: Expr | None = _attribute("expr")
    carry: Expr | None = _attribute("expr")
    normalizer: Normalizer = _attribute("normalizer")

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", self.usual_outputs)

    @property
    def usual_outputs(self) -> tuple[str, ...]:
        """What it gives if nothing is said: o, and lse where there is one."""
        has_lse = self.normalizer.rules.lse and self.groups is None
        return ("o", "lse") if has_lse else ("o",)

    @property
    def results(self) -> tuple[str, ...]:
        """Its outputs."""
        return self.outputs

    @property
    def q(self) -> int:
        """The queries."""
        return self.operands[0]

    @property
    def k(self) -> int:
        """The keys of the first segment."""
        return self.operands[1]

    @property
    def v(self) -> int:
        """The values of the first segment."""
        return self.operands[2]

    @property
    def plain(self) -> bool:
        """Whether it is softmax attention of one segment, and no more than score, mask, sink, dropout and lse."""
        return self.normalizer.kind == "softmax" and self.single

    @property
    def unnormalized(self) -> bool:
        """Whether its scores are the weights themselves."""
        return self.normalizer.kind == "none"

    @property
    def single(self) -> bool:
        """The same with any normaliser."""
        return len(self.operands) == 3 and self == Attend(
            self.operands,
            self.scale,
            dropout=self.dropout,
            score=self.score,
            mask=self.mask,
            normalizer=self.normalizer,
        )


@dataclass(frozen=True)
class Recur(Operation):
    """A linear recurrence over tokens ``q, k, v``."""

    NAME = "recur"
    RESULTS = ("o", "state", "norm")
    scale: float | None = _attribute("scale")
    gate: int | None = _attribute("value")
    beta: int | None = _attribute("value")
    bonus: int | None = _attribute("value")
    initial: int | None = _attribute("value")
    initial_norm: int | None = _attribute("value")
    coefficients: tuple[float, ...] | None = _attribute("floats")
    normalize: bool = _attribute("bool", False)
    epsilon: float = _attribute("float", 0.0)
    causal: bool = _attribute("bool", True)


@dataclass(frozen=True)
class Merge(Operation):
    """One result of several: operands are ``o, lse`` pairs."""

    NAME = "merge"
    RESULTS = ("o", "lse")


@dataclass(frozen=True)
class Return(Operation):
    """The results of the program."""

    NAME = "return"


OPERATIONS: dict[str, type[Operation]] = {
    op.NAME: op for op in (Map, Pool, Encode, Select, Attend, Recur, Merge)
}


@dataclass(frozen=True, eq=False, init=False)
class Program:
    """A whole variant. Equal programs are the same object. Check a new one with `ir.verify.verify`."""

    inputs: tuple[Layout, ...]
    buffers: tuple[Buffer, ...]
    num_params: int
    ops: tuple[Operation, ...]

    def __new__(
        cls,
        inputs: tuple[Layout, ...],
        buffers: tuple[Buffer, ...],
        num_params: int,
        ops: tuple[Operation, ...],
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
        """The first attention of the program. AK502 if there is none."""
        found = next((op for op in self.ops if isinstance(op, Attend)), None)
        if found is None:
            raise error("AK502", where="program", given="no attention", allowed="a program that attends")
        return found

    @cached_property
    def encoded(self) -> dict[int, Encode]:
        """What encodes tokens, by the value that it gives."""
        found, value = {}, len(self.inputs)
        for op in self.ops:
            if isinstance(op, Encode):
                found[value] = op
            value += len(op.results)
        return found

    def layout(self, value: int) -> Layout:
        """How an input lies, or what is encoded of one."""
        op = self.encoded.get(value)
        return self.inputs[value if op is None else op.operands[0]]

    @cached_property
    def scale(self) -> float | None:
        """The scale of its first attention or recurrence; None means ``head_dim ** -0.5``, or that it has neither."""
        return next((op.scale for op in self.ops if isinstance(op, (Attend, Recur))), None)

    @cached_property
    def is_attention(self) -> bool:
        """Whether it is one attention over three inputs q, k, v: what ``torch.ops.attnkit.attend`` runs."""
        return (
            len(self.inputs) == 3
            and len(self.ops) == 2
            and isinstance(self.ops[0], Attend)
            and set(self.ops[0].operands) <= {0, 1, 2}
            and self.ops[0].outputs == self.ops[0].usual_outputs
        )

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
