"""What each operation asks of its operands, and the types of what it gives: variants.md's legality rules.

One function an operation: ``(op, types of its operands, types of all values so far) -> types of its results``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from attnkit.errors import error
from attnkit.ir.expr import Expr
from attnkit.ir.program import (
    NORMALIZERS,
    Attend,
    Codec,
    Encode,
    Layout,
    Map,
    Merge,
    Operation,
    Pool,
    Recur,
    Select,
)


class Axis(NamedTuple):
    """Which tokens: those of an input, ``block`` of them pooled into one, and how that input lies in memory."""

    root: int
    block: int
    layout: Layout

    def matches(self, wanted: Axis, other: Axis) -> bool:
        """Whether these are the wanted tokens, pooled or not, or an input that lies like them; but not the other."""
        alike = self.layout == wanted.layout and self.layout.kind != "hsd" and self.root != other.root
        return self.root == wanted.root or alike

    def pools(self, other: Axis) -> bool:
        """Whether each of these tokens stands for one or, of the same input, more of the other's."""
        if self.root == other.root:
            return self.block % other.block == 0
        return (self.layout, self.block) == (other.layout, other.block)


@dataclass(frozen=True)
class Type:
    """What a value is: tokens, a relation, attention weights, or the kind of a layout (docs/ir.md)."""

    kind: str
    axis: Axis | None = None
    codec: Codec | None = None
    columns: Axis | None = None  # of a relation, whose rows are `axis`
    prefix: int | None = None  # of a relation
    pooled: bool = False  # straight from a pool
    sinks: int = 0  # of an lse: how many sinks are in it
    fold: int | None = None  # of an o and its lse, and of what is made of one: which operation gave it


Types = Sequence[Type]


def _wrong(op: Operation, what: str, allowed: str) -> Any:
    return error("AK217", where=op.NAME, given=what, allowed=allowed)


def _tokens(op: Operation, types: Types, count: int | None = None) -> list[Axis]:
    """The token axes of operands that must all be tokens, and lie alike: all packed, or none."""
    if count is not None and len(types) != count:
        raise _wrong(op, f"{len(types)} operands", f"{count}")
    axes = [t.axis for t in types if t.kind == "tokens" and t.axis is not None]
    if len(axes) != len(types):
        raise _wrong(op, ", ".join(t.kind for t in types), "tokens")
    packed = {axis.layout.kind == "packed" for axis in axes if axis.layout.kind != "hsd"}
    if len(packed) > 1:
        kinds = ", ".join(axis.layout.kind for axis in axes)
        raise error("AK211", what="packed and other tokens in one operation", where=op.NAME, given=kinds)
    return axes


def _alike(op: Operation, types: Types) -> None:
    """Operands that go together token by token: of one layout and pooling. How many they are, only a call can tell."""
    axes = {(t.axis.layout, t.axis.block) for t in types if t.axis is not None}
    if len(axes) > 1:
        kinds = ", ".join(sorted(f"{lay.kind}, {block} pooled into one" for lay, block in axes))
        raise error("AK219", where=op.NAME, given=kinds, allowed="tokens that lie alike")


def _number(op: Operation, name: str, lowest: float, highest: float, integer: bool = False) -> None:
    """Check a keyword that is a constant; a param is checked when it has a value."""
    held: Expr | int | None = getattr(op, name)
    value: Any = held.attr if isinstance(held, Expr) and held.op == "const" else held
    if value is None or isinstance(value, Expr):
        return
    if not lowest <= value <= highest or (integer and not isinstance(value, int)):
        allowed = f"{'an integer ' if integer else ''}from {lowest} to {highest}"
        raise error("AK218", where=f"{name} of {op.NAME}", given=str(value), allowed=allowed)


# What an operand of a map has beside heads: it broadcasts to a first operand that has as much.
_AXES_OF = {"h": set(""), "hd": set("d"), "bhs": set("s"), "tokens": set("sd")}


def _map(op: Map, types: Types, all_types: Types) -> tuple[Type, ...]:
    if not 1 <= len(types) <= 4:
        raise _wrong(op, f"{len(types)} operands", "1 to 4")
    if any(t.kind not in ("tokens", "bhs", "h", "hd") for t in types):
        raise _wrong(op, ", ".join(t.kind for t in types), "tokens, bhs, h, hd")
    first = types[0]
    if any(not _AXES_OF[t.kind] <= _AXES_OF[first.kind] for t in types):
        raise _wrong(op, ", ".join(t.kind for t in types), f"nothing larger than the first, {first.kind}")
    if any(t.axis is not None and (first.axis is None or not t.axis.pools(first.axis)) for t in types[1:]):
        allowed = "the tokens of the first, or a pool of them"
        raise error("AK219", where=op.NAME, given="operands of different tokens", allowed=allowed)
    if op.norm != "none" and first.kind != "tokens":
        raise _wrong(op, f"norm = {op.norm} of {first.kind}", "tokens")
    folds = {t.fold for t in types if t.fold is not None}
    return (Type(first.kind, first.axis, fold=folds.pop() if len(folds) == 1 else None),)


def _pool(op: Pool, types: Types, all_types: Types) -> tuple[Type, ...]:
    (axis,) = _tokens(op, types, 1)
    _number(op, "size", 1, 2**31 - 1)
    return (Type("tokens", axis._replace(block=axis.block * op.size), pooled=True),)


def _encode(op: Encode, types: Types, all_types: Types) -> tuple[Type, ...]:
    (axis,) = _tokens(op, types, 1)
    if op.codec is None or types[0].codec is not None:
        raise error("AK225", where=op.NAME, given="no codec" if op.codec is None else "tokens encoded before",
                    allowed="plain tokens and a codec")  # fmt: skip
    return (Type("tokens", axis, op.codec, fold=types[0].fold),)


def _select(op: Select, types: Types, all_types: Types) -> tuple[Type, ...]:
    rows, columns = _tokens(op, types, 2)
    given = [name for name in op.RULES if getattr(op, name) is not None]
    if len(given) != 1:
        raise error(
            "AK218",
            where=op.NAME,
            given=", ".join(given) or "no rule",
            allowed=f"one of {', '.join(op.RULES)}",
        )
    _number(op, "top_k", 0, 2**31 - 1, integer=True)
    _number(op, "top_fraction", 5e-324, 1)
    _number(op, "top_cdf", 5e-324, math.inf)
    _number(op, "threshold", -math.inf, math.inf)
    _number(op, "incoherent", -math.inf, math.inf)
    _number(op, "prefix", 1, 2**31 - 1)
    if op.incoherent is not None and not all(t.pooled for t in types):
        raise error(
            "AK219",
            where="incoherent of select",
            given="tokens that are not pooled",
            allowed="results of pool",
        )
    if op.heads == "group" and op.per == "column":
        raise error("AK218", where=op.NAME, given="heads = group, per = column", allowed="one of them")
    if op.prefix is not None and (op.per == "column" or columns.block != 1):
        raise error(
            "AK218", where="prefix of select", given="pooled columns or per = column", allowed="neither"
        )
    return (Type("relation", rows, columns=columns, prefix=op.prefix),)


def _attend(op: Attend, types: Types, all_types: Types) -> tuple[Type, ...]:
    if len(types) < 3 or len(types) % 2 == 0:
        raise _wrong(op, f"{len(types)} operands", "q, and k and v of one or more segments")
    axes = _tokens_of_attend(op, types)
    q, k = axes[0], axes[1]
    _related(op, q, k, all_types)
    rules = op.normalizer.rules
    if op.normalizer.kind not in NORMALIZERS:
        raise error("AK226", where="normalizer", given=op.normalizer.kind, allowed=", ".join(NORMALIZERS))
    segments = len(types) // 2
    if not rules.splits_keys and (segments > 1 or op.carry is not None or op.groups is not None):
        raise error(
            "AK226",
            given=f"{op.normalizer.kind} with segments, a carry or groups",
            allowed="one whole segment",
        )
    if op.groups is not None and op.normalizer.sink is not None:
        raise error("AK226", where="normalizer", given="groups with a sink", allowed="softmax without a sink")
    _stochastic(op)
    _carried(op, all_types)
    needs_lse = {"lse", "row_max", "entropy"} & set(op.outputs)
    if needs_lse and (not rules.lse or op.groups is not None):
        given = f"{', '.join(sorted(needs_lse))} of {'groups' if op.groups else op.normalizer.kind}"
        raise error("AK221", where="outputs of attend", given=given)
    if op.groups is not None and set(op.outputs) != {"o"}:
        raise error(
            "AK221", where="outputs of attend", given=", ".join(op.outputs), allowed="o, beside groups"
        )
    fold = len(all_types)  # no other operation's: it is the number of the first result
    lse = Type("bhs", q, sinks=int(op.normalizer.sink is not None), fold=fold)
    # The keys of several segments are the tokens of no value: such sums can only be returned.
    row, column = Type("bhs", q), Type("bhs", k) if segments == 1 else Type("weights")
    kinds = {
        "o": Type("tokens", q, fold=fold), "lse": lse, "carry": Type("bs", k), "density": Type("bh"), "weights": Type("weights"),
        "column_sum": column, "column_max": column, "row_max": row, "entropy": row,
    }  # fmt: skip
    return tuple(kinds[name] for name in op.outputs)


def _tokens_of_attend(op: Attend, types: Types) -> list[Axis]:
    axes = _tokens(op, types)
    q, *keys = axes
    if q.layout.kind in ("padded", "paged"):
        raise error(
            "AK211",
            what=f"q is not {q.layout.kind}, only k and v are",
            where="q",
            allowed="bhsd, packed, hsd",
        )
    for k, v in zip(keys[::2], keys[1::2], strict=True):
        if (k.layout, k.block) != (v.layout, v.block):
            given = f"{k.layout.kind} and {v.layout.kind}"
            raise error("AK211", what="k and v lie in different layouts", where=op.NAME, given=given)
    return axes


def _related(op: Attend, q: Axis, k: Axis, all_types: Types) -> None:
    """Blocks and groups are relations of these queries and these keys."""
    if op.blocks is None and op.groups is None:
        return
    if (
        len(op.operands) != 3
        or (op.blocks is not None and op.groups is not None)
        or (op.groups is not None and len(op.groups) != 2)
    ):
        raise error("AK217", where=op.NAME, given="blocks or groups", allowed="one of them, of one segment")
    named = (op.blocks,) if op.blocks is not None else op.groups or ()
    held = [all_types[i] for i in named]
    for relation in held:
        if relation.kind != "relation":
            raise _wrong(op, relation.kind, "relations, which select gives")
    (rows, columns), (rows_k, columns_k) = [
        (t.axis, t.columns) for t in (held[0], held[-1]) if t.axis and t.columns
    ]
    if op.blocks is not None:
        fits = (
            rows.matches(q, k)
            and columns.matches(k, q)
            and held[0].prefix is None
            and q.block == k.block == 1
        )
    else:
        fits = rows.root == rows_k.root and columns.matches(q, k) and columns_k.matches(k, q)
        fits = fits and held[0].prefix is None and columns.block == columns_k.block == q.block == k.block == 1
    if not fits:
        allowed = "blocks = select(pooled q, pooled k); groups = (select(c, q), select(c, k))"
        raise error("AK219", where=op.NAME, given="a relation of other tokens", allowed=allowed)


def _stochastic(op: Attend) -> None:
    _number(op, "dropout", 0, 1)
    _number(op, "skip", 0, math.inf)
    if op.dropout is not None and not op.normalizer.rules.splits_keys:
        raise error("AK226", where="dropout", given=op.normalizer.kind, allowed="weights of a row by itself")
    if op.skip is not None and (
        op.normalizer.kind != "softmax"
        or op.normalizer.sink is not None
        or op.dropout
        or op.carry
        or op.groups
    ):
        raise error("AK226", where="skip", given="a sink, dropout, a carry, groups or another normalizer",
                    allowed="plain softmax")  # fmt: skip


def _carried(op: Attend, all_types: Types) -> None:
    if op.carry is None:
        if op.initial is not None or op.budget is not None or op.head != 0 or "carry" in op.outputs:
            raise error("AK223", where=op.NAME, given="initial, budget, head or outputs without a carry")
        return
    if op.groups is not None:
        raise error("AK223", where=op.NAME, given="a carry beside groups", allowed="queries in their order")
    if op.initial is not None and all_types[op.initial].kind != "bs":
        raise error("AK223", where="initial of attend", given=all_types[op.initial].kind, allowed="bs")
    _number(op, "head", 0, 2**31 - 1)
    _number(op, "budget", 2, 2**31 - 1)


_STATE_KINDS: dict[str, tuple[str, ...]] = {
    "gate": ("h", "bhs", "tokens"),
    "beta": ("bhs",),
    "bonus": ("hd",),
    "initial": ("bhdv",),
    "initial_norm": ("bhd",),
}


def _recur(op: Recur, types: Types, all_types: Types) -> tuple[Type, ...]:
    axes = _tokens(op, types, 3)
    q = axes[0]
    for name, wanted in _STATE_KINDS.items():
        value = getattr(op, name)
        if value is not None and all_types[value].kind not in wanted:
            raise _wrong(op, f"{name} = {all_types[value].kind}", " or ".join(wanted))
    numbers = [all_types[i].axis for i in (op.gate, op.beta) if i is not None]
    axes += [axis for axis in numbers if axis is not None]
    if any(axis.layout != q.layout or axis.block != q.block for axis in axes) or q.layout.kind not in (
        "bhsd",
        "packed",
    ):
        kinds = ", ".join(axis.layout.kind for axis in axes)
        raise error("AK211", what="q, k, v and gates lie in different layouts", where=op.NAME, given=kinds,
                    allowed="all bhsd, or all packed alike")  # fmt: skip
    delta, decayed, bonus = op.beta is not None, op.gate is not None, op.bonus is not None
    illegal = {
        "coefficients with gate, beta or bonus": op.coefficients is not None and (delta or decayed or bonus),
        "normalize with beta or bonus": op.normalize and (delta or bonus),
        "beta with bonus": delta and bonus,
        "causal = false with gate, beta or bonus": not op.causal and (delta or decayed or bonus),
        "epsilon or initial_norm without normalize": not op.normalize
        and (op.epsilon != 0 or op.initial_norm is not None),
    }
    for given, present in illegal.items():
        if present:
            raise error("AK220", where=op.NAME, given=given)
    if not 0 <= op.epsilon < math.inf:
        raise error("AK218", where="epsilon of recur", given=str(op.epsilon), allowed="finite, not negative")
    if op.coefficients is not None and (
        len(op.coefficients) not in (2, 3) or not all(map(math.isfinite, op.coefficients))
    ):
        raise error(
            "AK218", where="coefficients of recur", given=str(op.coefficients), allowed="two or three numbers"
        )
    return Type("tokens", q), Type("bhdv"), Type("bhd")


def _merge(op: Merge, types: Types, all_types: Types) -> tuple[Type, ...]:
    if len(types) < 2 or len(types) % 2:
        raise _wrong(op, f"{len(types)} operands", "pairs of o and lse")
    for o, lse in zip(types[::2], types[1::2], strict=True):
        if o.kind != "tokens" or lse.kind != "bhs":
            raise _wrong(op, f"{o.kind}, {lse.kind}", "pairs of o and lse")
    _alike(op, types)
    for o, lse in zip(types[::2], types[1::2], strict=True):
        if o.fold != lse.fold:
            raise error("AK227", where=op.NAME)
    sinks = sum(t.sinks for t in types[1::2])
    if sinks > 1:
        raise error("AK222", where=op.NAME, given=f"{sinks} sinks")
    axis = types[0].axis
    fold = len(all_types)
    return Type("tokens", axis, fold=fold), Type("bhs", axis, sinks=sinks, fold=fold)


RULES: dict[type[Operation], Callable[..., tuple[Type, ...]]] = {
    Map: _map, Pool: _pool, Encode: _encode, Select: _select, Attend: _attend, Recur: _recur, Merge: _merge,
}  # fmt: skip
