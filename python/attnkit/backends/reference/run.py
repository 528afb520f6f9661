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
from attnkit.backends.reference.values import Batch, join, split
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
        self.batch: Batch = split(program, inputs, self.scope.arrays)
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
        axis, packed = value.type.axis, None
        if (
            axis is not None
            and axis.layout.kind == "packed"
            and axis.block == 1
            and value.type.kind != "relation"
        ):
            packed = self.batch.leaves[axis.root].shape
        return join(parts, packed, -np.inf if self.names[index] == "lse" else 0.0)

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
    operands = [run.part(i, b) for i in op.operands]
    first = operands[0]
    kinds = [run.values[i].type.kind for i in op.operands]
    nodes = [x.reshape(*_ALONG_TOKENS[kind](x.shape)) for x, kind in zip(operands, kinds, strict=True)]
    shape = nodes[0].shape
    if any(x.shape[i] not in (1, shape[i]) for x in nodes for i in range(3)):
        given = " ".join(str(x.shape) for x in operands)
        raise error("AK403", where="map", given=given, allowed="shapes that broadcast to the first")
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
    return [value.reshape(*first.shape)]


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
        if (q.shape[0] and not k.shape[0]) or q.shape[0] % max(k.shape[0], 1):
            raise error("AK407", where="q, k", given=f"{q.shape[0]} and {k.shape[0]} heads")
    if op.normalizer.sink is not None and run.scope.arrays[op.normalizer.sink].shape != (q.shape[0],):
        given = str(run.scope.arrays[op.normalizer.sink].shape)
        raise error("AK403", where="sink", given=given, allowed=f"[{q.shape[0]}], one logit a head")
    groups = None if op.groups is None else (run.part(op.groups[0], b), run.part(op.groups[1], b))
    related = Related(b, run.part(op.blocks, b), groups, run.part(op.initial, b), run.seed)
    return attend(op, q, segments, related, run.scope)


def _recur(run: _Run, op: Recur, b: int) -> list[Any]:
    q, k, v = (run.part(i, b) for i in op.operands)
    if q.shape != k.shape or k.shape[1] != v.shape[1] or v.shape[0] % max(k.shape[0], 1):
        given = " ".join(str(x.shape) for x in (q, k, v))
        raise error(
            "AK403", where="q, k, v", given=given, allowed="q, k [Hk, n, D], v [H, n, Dv], H a multiple of Hk"
        )
    names = ("gate", "beta", "bonus", "initial", "initial_norm")
    return list(recur(op, q, k, v, *(run.part(getattr(op, name), b) for name in names)))


def _merge(run: _Run, op: Merge, b: int) -> list[Any]:
    parts = [run.part(i, b) for i in op.operands]
    outputs, sums = parts[::2], parts[1::2]
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
