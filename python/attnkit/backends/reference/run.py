"""Whole programs in float64, forwards and backwards: the meaning of the IR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from attnkit.backends.reference.attend import Related, attend
from attnkit.backends.reference.codec import decode, encode
from attnkit.backends.reference.evaluate import Scope
from attnkit.backends.reference.recur import recur
from attnkit.backends.reference.select import Relation, coherence, select
from attnkit.backends.reference.tape import Array, Node, backward, concatenate, exp, log, sqrt, where
from attnkit.backends.reference.values import Batch, join, of_keys, split
from attnkit.errors import error
from attnkit.ir.program import Attend, Encode, Map, Merge, Operation, Pool, Program, Recur, Select
from attnkit.ir.rules import Type
from attnkit.ir.verify import infer


class Gradients(NamedTuple):
    """Cotangents of inputs, buffers and params, in their order; None for a buffer of ints or bools."""

    inputs: list[Array]
    buffers: list[Array | None]
    params: list[float]


def run(
    program: Program, inputs: Sequence[Any], buffers: Sequence[Any] = (), params: Sequence[float] = (),
    seed: int | None = None,
) -> list[Array]:  # fmt: skip
    """The values that a program returns, float64 (relations: bool ``[B, H, P, rows, columns]``).

    Args:
        program: a verified program.
        inputs: one array per input, in the shape its layout says; `Encoded` where the layout has a codec.
        buffers: the captured arrays, in the order of the program's buffers.
        params: the run-time scalars.
        seed: the 64-bit key of dropout.

    Raises:
        AttnkitError: AK401 (number of inputs, buffers or params), AK403 and AK407 (shapes), AK601 (a load leaves its
            buffer at a pair that exists), AK602 (lengths).
    """
    return _Run(program, inputs, buffers, params, seed).results()


def gradients(
    program: Program, inputs: Sequence[Any], cotangents: Sequence[Any], buffers: Sequence[Any] = (),
    params: Sequence[float] = (), seed: int | None = None,
) -> Gradients:  # fmt: skip
    """The cotangents of everything a program reads, given those of what it returns (None: zero).

    A relation has no gradient. Quantisation passes it straight through.

    Raises:
        AttnkitError: as `run`; AK503, the program skips tiles, which has no backward.
    """
    if any(isinstance(op, Attend) and op.skip is not None for op in program.ops):
        raise error(
            "AK503", where="skip of attend", given="an approximate program", allowed="programs without skip"
        )
    return _Run(program, inputs, buffers, params, seed).gradients(cotangents)


@dataclass
class _Value:
    """A value: one node a sequence, its type, and for pooled tokens what they were made from."""

    parts: list[Any]
    type: Type
    source: tuple[list[Array], int] | None = None  # and how many make one


class _Run:
    def __init__(
        self,
        program: Program,
        inputs: Sequence[Any],
        buffers: Sequence[Any],
        params: Sequence[float],
        seed: int | None,
    ) -> None:
        if len(buffers) != len(program.buffers) or len(params) != program.num_params:
            allowed = f"{len(program.buffers)} buffers, {program.num_params} params"
            raise error("AK401", given=f"{len(buffers)} buffers, {len(params)} params", allowed=allowed)
        self.program, self.seed = program, seed
        self.types = infer(program)
        self.scope = Scope(buffers, params)
        self.batch: Batch = split(program, self.types, inputs, self.scope.arrays)
        self.values = [_Value(parts, t) for parts, t in zip(self.batch.values, self.types, strict=False)]
        self.names = [""] * len(self.values)
        with np.errstate(all="ignore"):
            for op in program.ops[:-1]:
                per_sequence = [_RUN[type(op)](self, op, b) for b in range(self.batch.size)]
                for i, name in enumerate(op.results):
                    parts = [results[i] for results in per_sequence]
                    value = _Value(parts, self.types[len(self.values)])
                    if isinstance(op, Pool):
                        value.source = [p.value for p in self.values[op.operands[0]].parts], op.size
                    self.values.append(value)
                    self.names.append(name)

    def part(self, index: int | None, b: int) -> Any:
        return None if index is None else self.values[index].parts[b]

    def _returned(self, index: int) -> tuple[Array, list[Any]]:
        value = self.values[index]
        parts = [p.array if isinstance(p, Relation) else p for p in value.parts]
        axis, kind, packed, keys = value.type.axis, value.type.kind, None, 0
        if axis is not None and axis.block == 1 and kind != "relation":
            shape = self.batch.leaves[axis.root].shape
            if axis.layout.kind == "packed":
                packed = {"tokens": shape, "bhs": shape[:3], "bs": (1, shape[2])}[kind]
            elif axis.layout.kind == "padded" and kind != "tokens":
                keys = shape[2]  # a number for each key, also for those that do not exist
        return join(parts, packed, -np.inf if self.names[index] == "lse" else 0.0, keys)

    def results(self) -> list[Array]:
        result = self.program.ops[-1]
        return [self._returned(i)[0] for i in result.operands]

    def gradients(self, cotangents: Sequence[Any]) -> Gradients:
        roots, seeds = [], []
        with np.errstate(all="ignore"):
            for index, cotangent in zip(self.program.ops[-1].operands, cotangents, strict=True):
                if cotangent is None or self.values[index].type.kind == "relation":
                    continue
                _, where_ = self._returned(index)
                for node, at in zip(self.values[index].parts, where_, strict=True):
                    roots.append(node)
                    # An lse of -inf does not move: whatever comes down to it stops there.
                    seeds.append(np.where(np.isfinite(node.value), np.asarray(cotangent)[at], 0.0))
            leaves = [*self.batch.leaves, *self.scope.params]
            floats = [b for b in self.scope.buffers if isinstance(b, Node)]
            found = backward(roots, seeds, [*leaves, *floats])
        count = len(self.batch.leaves)
        of_floats = iter(found[len(leaves) :])
        of_buffers = [next(of_floats) if isinstance(b, Node) else None for b in self.scope.buffers]
        return Gradients(found[:count], of_buffers, [float(g) for g in found[count : len(leaves)]])


# --- one sequence of each operation -----------------------------------------------------------------------


def _map(run: _Run, op: Map, b: int) -> list[Any]:
    first, *others = (run.part(i, b) for i in op.operands)
    kinds = [run.values[i].type.kind for i in op.operands]
    operands = [first, *(_spread(run, op, i + 1, x, first.shape) for i, x in enumerate(others))]
    nodes = [x.reshape(*_ALONG_TOKENS[kind](x.shape)) for x, kind in zip(operands, kinds, strict=True)]
    (heads, n), width = nodes[0].shape[:2], max(x.shape[2] for x in nodes)
    for x, kind in zip(nodes, kinds, strict=True):
        tokens = n if kind in ("tokens", "bhs") else x.shape[1]
        if x.shape[:2] != (heads, tokens) or x.shape[2] not in (1, width):
            given = " ".join(str(operand.shape) for operand in operands)
            raise error(
                "AK403", where="map", given=given, allowed="equal heads and tokens; equal widths, or 1"
            )
    shape = (heads, n, width)
    variables: dict[str, Any] = dict(zip("xyzw", [_norm(op.norm, nodes[0]), *nodes[1:]], strict=False))
    variables |= {
        "b": b,
        "h": np.arange(shape[0])[:, None, None],
        "q_idx": np.arange(shape[1])[:, None],
        "q_len": shape[1],
    }
    value, outside = run.scope.apply(op.value, variables, shape)
    if np.any(outside):
        raise error("AK601", where="map", given=repr(op.value))
    return [value if kinds[0] == "tokens" else value.reshape(*first.shape)]


def _spread(run: _Run, op: Map, operand: int, x: Node, shape: tuple[int, ...]) -> Node:
    """An operand of ``map`` with an entry for every token of the first: a pooled one stands for all of its tokens."""
    own, first = (run.values[op.operands[i]].type.axis for i in (operand, 0))
    if own is None or first is None or own.block == first.block:
        return x
    return x[:, np.arange(shape[1]) // (own.block // first.block)]


# How each kind of operand lies beside [H, n, D].
_ALONG_TOKENS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "tokens": lambda shape: shape,
    "bhs": lambda shape: (*shape, 1),
    "hd": lambda shape: (shape[0], 1, shape[1]),
    "h": lambda shape: (shape[0], 1, 1),
}


def _norm(norm: str, x: Node) -> Node:
    if norm == "none":
        return x
    if norm == "l2":
        length = sqrt((x * x).sum(2))
        return x / where(length.value == 0, 1.0, length)  # the zero token stays what it is
    centred = x - x.sum(2) / max(x.shape[2], 1)
    return centred / sqrt((centred * centred).sum(2) / max(x.shape[2], 1) + LAYER_EPSILON)


LAYER_EPSILON = 1e-6


def _pool(run: _Run, op: Pool, b: int) -> list[Any]:
    x = run.part(op.operands[0], b)
    blocks = [x[:, i : i + op.size] for i in range(0, x.shape[1], op.size)]
    if not blocks:
        return [Node(np.zeros((x.shape[0], 0, x.shape[2])))]
    if op.how == "max":
        parts = [_largest(block) for block in blocks]
    else:
        parts = [block.sum(1) / (block.shape[1] if op.how == "mean" else 1) for block in blocks]
    return [concatenate(parts, axis=1)]


def _largest(block: Node) -> Node:
    best = np.argmax(block.value, axis=1)[:, None]
    heads, channels = np.arange(block.shape[0])[:, None, None], np.arange(block.shape[2])
    return block[heads, best, channels]


def _encode(run: _Run, op: Encode, b: int) -> list[Any]:
    x = run.part(op.operands[0], b)
    assert op.codec is not None
    decoded = decode(encode(x.value, op.codec, op.center == "mean"))
    return [Node(decoded, ((x, lambda g: g),))]


def _select(run: _Run, op: Select, b: int) -> list[Any]:
    rows, columns = (run.values[i] for i in op.operands)
    sizes = [value.type.axis.block for value in (rows, columns) if value.type.axis is not None]
    coherent = None
    if op.incoherent is not None:
        least = run.scope.number(op.incoherent)
        sources = [value.source for value in (rows, columns) if value.source is not None]
        similar = [coherence(tokens[b], size) > least for tokens, size in sources]
        coherent = (similar[0], similar[1])
    found = select(
        op, rows.parts[b].value, columns.parts[b].value, coherent, b, run.scope, (sizes[0], sizes[1])
    )
    return [found]


def _attend(run: _Run, op: Attend, b: int) -> list[Any]:
    q, *rest = (run.part(i, b) for i in op.operands)
    segments = list(zip(rest[::2], rest[1::2], strict=True))
    for k, v in segments:
        if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
            given = " ".join(str(x.shape) for x in (q, k, v))
            raise error(
                "AK403", where="q, k, v", given=given, allowed="q [.., n, D], k [.., m, D], v [.., m, Dv]"
            )
        if (k.shape[0], v.shape[2]) != (rest[0].shape[0], rest[1].shape[2]):
            given = " ".join(str(x.shape) for x in rest)
            raise error(
                "AK403",
                where="segments of attend",
                given=given,
                allowed="equal heads; values of equal widths",
            )
        if (q.shape[0] and not k.shape[0]) or q.shape[0] % max(k.shape[0], 1):
            raise error("AK407", where="q, k", given=f"{q.shape[0]} and {k.shape[0]} heads")
    if op.normalizer.sink is not None and run.scope.arrays[op.normalizer.sink].shape != (q.shape[0],):
        given = str(run.scope.arrays[op.normalizer.sink].shape)
        raise error("AK403", where="sink", given=given, allowed=f"[{q.shape[0]}], one logit a head")
    groups = None if op.groups is None else (run.part(op.groups[0], b), run.part(op.groups[1], b))
    blocks = run.part(op.blocks, b)
    _check_relations(blocks, groups, q.shape, segments[0][0].shape[1])
    related = Related(b, blocks, groups, _initial(run, op, b), run.seed)
    return attend(op, q, segments, related, run.scope)


def _initial(run: _Run, op: Attend, b: int) -> Any:
    """The carry that the keys of sequence ``b`` start with."""
    if op.initial is None:
        return None
    keys = [run.values[i] for i in op.operands[1::2]]
    lengths = [sum(segment.parts[n].shape[1] for segment in keys) for n in range(run.batch.size)]
    kinds = {segment.type.axis.layout.kind for segment in keys if segment.type.axis is not None}
    packed = "packed" in kinds and op.initial < len(run.program.inputs)  # results are sequences already
    return of_keys(run.part(op.initial, b), lengths, b, packed, bool(kinds & {"padded", "paged"}))


def _check_relations(
    blocks: Relation | None, groups: tuple[Relation, Relation] | None, q: Any, kv_len: int
) -> None:
    """Relations of other inputs than q and k have as many tokens, all the same."""
    sizes = []
    if blocks is not None:
        sizes.append((blocks, (-(-q[1] // blocks.row_block), -(-kv_len // blocks.column_block))))
    if groups is not None:
        sizes += [
            (groups[0], (groups[0].array.shape[2], q[1])),
            (groups[1], (groups[0].array.shape[2], kv_len)),
        ]
    for relation, (rows, columns) in sizes:
        heads, *found = relation.array.shape[0], *relation.array.shape[2:]
        if found != [rows, columns] or q[0] % max(heads, 1):
            given = f"{heads} heads of {found[0]} x {found[1]}"
            raise error(
                "AK403",
                where="relation of attend",
                given=given,
                allowed=f"{q[0]} heads of {rows} x {columns}",
            )


def _recur(run: _Run, op: Recur, b: int) -> list[Any]:
    q, k, v = (run.part(i, b) for i in op.operands)
    (heads, n, width), d = v.shape, k.shape[2]
    if (
        q.shape[1:] != k.shape[1:]
        or k.shape[1] != n
        or heads % max(k.shape[0], 1)
        or _unshared(q.shape[0], heads)
    ):
        given = " ".join(str(x.shape) for x in (q, k, v))
        allowed = "q [Hq, n, D], k [Hk, n, D], v [H, n, Dv], H a multiple of Hk, and Hq of H or H of Hq"
        raise error("AK403", where="q, k, v of recur", given=given, allowed=allowed)
    features = d if op.coefficients is None else sum(d**i for i in range(len(op.coefficients)))
    shapes = {
        "gate": ((heads,), (heads, n), (heads, n, d)), "beta": ((heads, n),), "bonus": ((heads, d),),
        "initial": ((heads, features, width),), "initial_norm": ((heads, features),),
    }  # fmt: skip
    others = [run.part(getattr(op, name), b) for name in shapes]
    for node, (name, allowed_shapes) in zip(others, shapes.items(), strict=True):
        if node is not None and node.shape not in allowed_shapes:
            raise error(
                "AK403",
                where=f"{name} of recur",
                given=str(node.shape),
                allowed=" or ".join(map(str, allowed_shapes)),
            )
    return list(recur(op, q, k, v, *others))


def _unshared(q_heads: int, heads: int) -> bool:
    """Whether neither count of heads is a multiple of the other."""
    return bool(q_heads % max(heads, 1) and heads % max(q_heads, 1))


def _merge(run: _Run, op: Merge, b: int) -> list[Any]:
    parts = [run.part(i, b) for i in op.operands]
    outputs, sums = parts[::2], parts[1::2]
    if any(
        o.shape != outputs[0].shape or lse.shape != o.shape[:2] for o, lse in zip(outputs, sums, strict=True)
    ):
        given = " ".join(str(x.shape) for x in parts)
        raise error("AK403", where="merge", given=given, allowed="o [.., n, Dv] and lse [.., n], all alike")
    top = np.max([lse.value for lse in sums], axis=0)
    pivot = np.where(top == -np.inf, 0.0, top)
    weights = [
        where(lse.value == -np.inf, 0.0, exp(where(lse.value == -np.inf, 0.0, lse) - pivot)) for lse in sums
    ]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    dead = total.value == 0
    safe = where(dead, 1.0, total)
    o = Node(np.zeros(outputs[0].shape))
    for part, weight in zip(outputs, weights, strict=True):
        share = (weight / safe).reshape(*weight.shape, 1)
        o = o + where(share.value == 0, 0.0, part) * share
    return [o, where(dead, -np.inf, log(safe) + pivot)]


_RUN: dict[type[Operation], Callable[..., list[Any]]] = {
    Map: _map, Pool: _pool, Encode: _encode, Select: _select, Attend: _attend, Recur: _recur, Merge: _merge,
}  # fmt: skip
