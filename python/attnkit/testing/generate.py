"""Random programs of all operations, from any `random.Random`: fast, and the same everywhere.

`arrays.random_inputs` makes inputs for them. `strategies.any_programs` hands a random that hypothesis shrinks, a soak test a seeded one.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from attnkit.errors import AttnkitError
from attnkit.ir.expr import Expr, const, param, var
from attnkit.ir.optable import DType
from attnkit.ir.program import (
    NORMALIZERS,
    TOKENS,
    Attend,
    Buffer,
    BufferDType,
    Codec,
    Encode,
    Layout,
    LayoutKind,
    Map,
    Merge,
    Normalizer,
    Operation,
    Pool,
    Program,
    Recur,
    Return,
    Select,
)  # fmt: skip
from attnkit.ir.rules import RULES, Axis, Type
from attnkit.testing.arrays import HEADS, state_rows
from attnkit.testing.expressions import Expressions

CODECS = (
    Codec("int8", "tile", 4), Codec("int8", "token", 0), Codec("int8", "channel", 3), Codec("int4", "token", 2),
    Codec("int2", "channel", 2), Codec("fp8", "head", 0), Codec("fp8", "token", 0),
)  # fmt: skip


class Generator:
    """Builds one program, an operation at a time, out of values whose shapes fit `arrays.random_inputs`."""

    def __init__(self, rng: Random, tame: bool = False) -> None:
        self.rng, self.tame = rng, tame
        self.buffers: list[Buffer] = []
        self.captured: list[tuple[int, Buffer]] = []
        self.num_params = rng.randint(0, 2)
        self.ops: list[Operation] = []
        self.held: dict[int, Any] = {}  # of states: their rows; of carries: how their keys lie
        self.inputs = self._declare()
        for _ in range(rng.randint(0, 2)):
            dtypes: tuple[BufferDType, ...] = ("f32", "i32", "i64", "bool")
            slot = self._buffer(rng.choice(dtypes), rng.randint(0, 3))
            self.captured.append((slot, self.buffers[slot]))
        self.types = [_type(i, layout) for i, layout in enumerate(self.inputs)]
        self.packed = next((x.lengths for x in self.inputs if x.kind == "packed"), None)

    def program(self, max_ops: int = 4) -> Program:
        """A legal program."""
        steps = (
            self._map,
            self._pool,
            self._encode,
            self._select,
            *(self._attend,) * 3,
            self._recur,
            self._merge,
        )
        wanted = self.rng.randint(1, max_ops)
        while len(self.ops) < wanted:
            self.rng.choice(steps)()
        first = len(self.inputs)
        values = self.rng.sample(
            range(first, len(self.types)), min(self.rng.randint(1, 3), len(self.types) - first)
        )
        return Program(
            tuple(self.inputs), tuple(self.buffers), self.num_params, (*self.ops, Return(tuple(values)))
        )

    # --- declarations -------------------------------------------------------------------------------------

    def _buffer(self, dtype: BufferDType, rank: int) -> int:
        self.buffers.append(Buffer(dtype, rank))
        return len(self.buffers) - 1

    def _declare(self) -> list[Layout]:
        rng = self.rng
        if rng.random() < 0.3:
            cu = self._buffer("i32", 1)
            q = Layout("packed", cu)
            kv = q if rng.random() < 0.5 else Layout("packed", self._buffer("i32", 1))
        else:
            q = Layout()
            kind: LayoutKind = rng.choice(("bhsd", "bhsd", "padded", "paged"))
            table = self._buffer("i32", 2) if kind == "paged" else None
            kv = Layout(kind, self._buffer("i32", 1) if kind != "bhsd" else None, table)
        inputs = [q, kv, kv]
        for i in range(3):
            if rng.random() < 0.1:
                inputs[i] = Layout(inputs[i].kind, inputs[i].lengths, inputs[i].table, rng.choice(CODECS))
        more: tuple[LayoutKind, ...] = ("hsd", "bhs", "bs", "h", "hd", "bhd", "bhdv")
        return inputs + [Layout(kind) for kind in more if rng.random() < 0.4]

    # --- operations ---------------------------------------------------------------------------------------

    def _add(self, op: Operation) -> int | None:
        """The first result of an operation; None if the rules refuse it."""
        try:
            types = RULES[type(op)](op, [self.types[i] for i in op.operands], self.types)
        except AttnkitError:
            return None
        self.ops.append(op)
        self.types += types
        return len(self.types) - len(types)

    def _pick(self, fits: Callable[[int, Type], bool]) -> int | None:
        found = [i for i, t in enumerate(self.types) if fits(i, t)]
        return self.rng.choice(found) if found else None

    def _tokens(self, *kinds: str) -> int | None:
        return self._pick(
            lambda i, t: (
                t.axis is not None and t.kind == "tokens" and (not kinds or t.axis.layout.kind in kinds)
            )
        )

    def _counted(self, axis: Axis, fits: Callable[[Type], bool] = lambda t: True) -> int | None:
        """A number for every one of these tokens, or of others that lie alike."""
        plain = (
            axis.block == 1 and axis.layout.kind in ("bhsd", "packed") and axis.layout.lengths == self.packed
        )
        return self._pick(
            lambda i, t: t.kind == "bhs" and (plain if t.axis is None else t.axis[1:] == axis[1:]) and fits(t)
        )

    def _expr(self, op: type[Operation], dtype: DType, without: str = "") -> Expr:
        names = sorted(op.VARIABLES - set(without))
        return Expressions(self.rng, names, self.captured, self.num_params, self.tame).of(
            dtype, self.rng.randint(1, 3)
        )

    def _number(self, low: float, high: float) -> Expr:
        if self.num_params and self.rng.random() < 0.3:
            return param(self.rng.randrange(self.num_params))
        return const(round(self.rng.uniform(low, high), 3))

    def _maybe(self, chance: float, value: Callable[[], Any]) -> Any:
        return value() if self.rng.random() < chance else None

    def _scale(self) -> float | None:
        scale: float | None = self._maybe(0.3, lambda: self.rng.choice((0.125, 1.0, 0.3)))
        return scale

    def _map(self) -> None:
        first = self._pick(lambda i, t: t.kind in ("tokens", "bhs", "h", "hd"))
        if first is None:
            return
        operands, held = [first], self.types[first]
        smaller = {"tokens": ("h", "hd"), "bhs": ("h",), "hd": ("h", "hd"), "h": ("h",)}[held.kind]
        for _ in range(self.rng.randint(0, 3)):
            other = self._pick(
                lambda i, t: t.kind in smaller or (t.kind == held.kind and _stands_for(t, held))
            )
            if held.kind == "tokens" and held.axis is not None and self.rng.random() < 0.5:
                pooled = Pool((first,), self.rng.randint(1, 4))
                other = self._counted(held.axis) if self.rng.random() < 0.6 else self._add(pooled)
            operands += [] if other is None else [other]
        norm = self.rng.choice(("none", "l2", "layer")) if held.kind == "tokens" else "none"
        value = var("x")
        if self.rng.random() < 0.8:
            value = self._expr(Map, "float", "xyzw"[len(operands) :])
        self._add(Map(tuple(operands), norm, value))

    def _pool(self) -> None:
        operand = self._tokens()
        if operand is not None:
            self._add(Pool((operand,), self.rng.randint(1, 4), self.rng.choice(("mean", "sum", "max"))))

    def _encode(self) -> None:
        operand = self._tokens()
        if operand is not None:
            self._add(Encode((operand,), self.rng.choice(CODECS), self.rng.choice(("none", "mean"))))

    def _select(
        self, rows: int | None = None, columns: int | None = None, groups: bool = False
    ) -> int | None:
        rng = self.rng
        rows = self._tokens() if rows is None else rows
        columns = self._tokens() if columns is None else columns
        if rows is None or columns is None:
            return None
        rule = rng.choice(Select.RULES)
        value = const(rng.randint(0, 4)) if rule == "top_k" else self._number(0.05, 1)
        pooled = self.types[rows].pooled and self.types[columns].pooled
        extra: dict[str, Any] = {rule: value}
        if rng.random() < 0.2:
            extra["per"] = "column"
        elif rng.random() < 0.2:
            extra["heads"] = "group"
        if pooled and rng.random() < 0.4:
            extra["incoherent"] = self._number(-0.5, 1)
        if groups and rng.random() < 0.4 and "per" not in extra:
            extra["prefix"] = rng.randint(1, 5)
        for name in ("mask", "force"):
            extra[name] = self._maybe(0.3, lambda: self._expr(Select, "bool", "s"))
        if rng.random() < 0.3:
            extra["score"] = self._expr(Select, "float")
        return self._add(Select((rows, columns), self._scale(), **extra))

    def _segment(self, like: int | None = None) -> tuple[int, int] | None:
        """Keys and values that lie alike."""
        k = self._tokens() if like is None else like
        axis = None if k is None else self.types[k].axis
        if k is None or axis is None:
            return None
        v = self._pick(lambda i, t: t.axis is not None and t.kind == "tokens" and t.axis[1:] == axis[1:])
        return None if v is None else (k, v)

    def _alike(self, axis: Axis, but: Axis) -> int:
        """These tokens, or others that a relation may be of instead."""
        found = self._pick(
            lambda i, t: (
                t.kind == "tokens" and t.axis is not None and t.axis.block == 1 and t.axis.matches(axis, but)
            )
        )
        assert found is not None
        return found

    def _related(self, q: int, k: int) -> dict[str, Any]:
        """Blocks or groups of these tokens, or of others that lie alike."""
        of_q, of_k = self.types[q].axis, self.types[k].axis
        if of_q is None or of_k is None or (of_q.block, of_k.block) != (1, 1) or self.rng.random() < 0.6:
            return {}
        if self.rng.random() < 0.3:
            q, k = self._alike(of_q, but=of_k), self._alike(of_k, but=of_q)
        shared = self._tokens("hsd")
        if shared is not None and self.rng.random() < 0.5:
            first, second = self._select(shared, q), self._select(shared, k, groups=True)
            return {} if first is None or second is None else {"groups": (first, second)}
        rows = self._add(Pool((q,), self.rng.randint(1, 4)))
        columns = self._add(Pool((k,), self.rng.randint(1, 4)))
        found = self._select(rows, columns)
        return {} if found is None else {"blocks": found}

    def _attend(self) -> None:
        rng = self.rng
        q, first = self._tokens("bhsd", "packed", "hsd"), self._segment()
        if q is None or first is None:
            return
        operands, extra = [q, *first], self._related(q, first[0])
        while not extra and rng.random() < 0.25 and len(operands) < 7:
            operands += self._segment() or ()
        kind = rng.choice(("softmax", "softmax", "softmax", *NORMALIZERS))
        rules = NORMALIZERS[kind]
        epsilon = self._maybe(0.5 * rules.epsilon, lambda: rng.choice((0.5, 1e-3, 2.0)))
        groups, sink = "groups" in extra, None
        lies = [None if axis is None else axis[1:] for axis in (self.types[i].axis for i in operands[1::2])]
        if rules.sink and not groups and rng.random() < 0.3:
            sink = self._buffer("f32", 1)
        extra["normalizer"] = Normalizer(kind, sink, epsilon)
        extra["mask"] = self._maybe(0.4, lambda: self._expr(Attend, "bool", "sf"))
        if rules.splits_keys and not groups and rng.random() < 0.25:
            extra |= {"carry": self._expr(Attend, "float", "f"), "head": rng.randint(0, HEADS - 1)}
            extra["budget"] = self._maybe(0.4, lambda: rng.randint(2, 5))
            if all(axis is not None and axis[0] == 1 for axis in lies):
                extra["initial"] = self._pick(lambda i, t: t.kind == "bs" and self.held.get(i, lies) == lies)
        if rules.splits_keys:
            extra["dropout"] = self._maybe(0.2, lambda: self._number(0, 0.9))
        if rng.random() < 0.1 and not self.tame:
            extra["skip"] = self._number(0, 9)
        if rng.random() < 0.6:
            extra["score"] = self._expr(Attend, "float", "" if "carry" in extra else "f")
        if rng.random() < 0.4 and not groups:
            no_lse = () if rules.lse else ("lse", "row_max", "entropy")
            possible = [x for x in Attend.OUTPUTS if x not in no_lse and (x != "carry" or "carry" in extra)]
            extra["outputs"] = tuple(rng.sample(possible, rng.randint(1, 3)))
        elif "carry" in extra:  # for another attention to go on from
            extra["outputs"] = ("o", "carry")
        result = self._add(op := Attend(tuple(operands), self._scale(), **extra))
        if result is not None and op.carry is not None:
            carries = [result + i for i, name in enumerate(op.outputs) if name == "carry"]
            self.held |= dict.fromkeys([*carries, *([] if op.initial is None else [op.initial])], lies)

    def _bounded(self, t: Type) -> bool:
        """Whether a number is small enough for a state: what is computed, such as an lse, may let it overflow."""
        return not self.tame or t.axis is None

    def _gate(self, axis: Axis) -> int | None:
        if self.rng.random() < 0.5:
            return self._counted(axis, self._bounded)
        given = len(self.inputs) if self.tame else len(self.types)
        return self._pick(
            lambda i, t: (
                t.kind == "h"
                or (i < given and t.kind == "tokens" and t.axis is not None and t.axis[1:] == axis[1:])
            )
        )

    def _recur(self) -> None:
        rng = self.rng
        q = self._tokens("bhsd", "packed")
        axis = None if q is None else self.types[q].axis
        k, v = self._segment(q), self._segment(q)
        if q is None or axis is None or k is None or v is None:
            return
        extra: dict[str, Any] = {}
        if rng.random() < 0.3:
            extra["coefficients"] = tuple(round(rng.uniform(-1, 2), 2) for _ in range(rng.randint(2, 3)))
        elif rng.random() < 0.8:
            extra["gate"] = self._gate(axis)
            name = rng.choice(("beta", "bonus", "none"))
            if name == "beta":
                extra["beta"] = self._counted(axis, self._bounded)
            elif name == "bonus":
                extra["bonus"] = self._pick(lambda i, t: t.kind == "hd")
        if not any(extra.get(name) is not None for name in ("beta", "bonus")):
            if rng.random() < 0.5:
                extra |= {"normalize": True, "epsilon": rng.choice((0.0, 0.5, 4.0))}
            if extra.get("gate") is None:
                extra["causal"] = rng.random() < 0.6
        rows = state_rows(extra.get("coefficients"))
        for name, kind in (("initial", "bhdv"), ("initial_norm", "bhd")):
            if rng.random() < 0.4 and (name == "initial" or "normalize" in extra):
                extra[name] = self._pick(lambda i, t: t.kind == kind and self.held.get(i, rows) == rows)  # noqa: B023
        op = Recur((q, k[1], v[1]), self._scale(), **extra)
        first = self._add(op)
        if first is not None:
            self.held |= {
                i: rows for i in (op.initial, op.initial_norm, first + 1, first + 2) if i is not None
            }

    def _merge(self) -> None:
        like, operands = self._tokens("bhsd", "packed", "hsd"), list[int]()
        axis = None if like is None else self.types[like].axis
        if axis is None:
            return
        for _ in range(self.rng.randint(1, 3)):
            o = self._pick(lambda i, t: t.kind == "tokens" and t.axis is not None and t.axis[1:] == axis[1:])
            fold = None if o is None else self.types[o].fold
            lse = self._counted(axis, lambda t: t.fold == fold)  # noqa: B023
            operands += [] if o is None or lse is None else [o, lse]
        self._add(Merge(tuple(operands)))


def _stands_for(one: Type, other: Type) -> bool:
    """Whether there is one of these, a token or a number, for each of the others."""
    if one.axis is None or other.axis is None:
        return one.axis is other.axis
    return one.axis.pools(other.axis)


def _type(index: int, layout: Layout) -> Type:
    if layout.kind in TOKENS:
        return Type("tokens", Axis(index, 1, Layout(layout.kind, layout.lengths, layout.table)), layout.codec)
    return Type(layout.kind)


def random_program(rng: Random, max_ops: int = 4, tame: bool = False) -> Program:
    """A legal program of up to about ``max_ops`` operations.

    ``tame`` leaves out what grows without bound, jumps or is approximate, so that differences can check gradients.
    """
    return Generator(rng, tame).program(max_ops)
