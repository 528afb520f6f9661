"""Inputs, buffers and params for the programs of `testing.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnkit.backends.reference.codec import encode
from attnkit.backends.reference.values import cuts
from attnkit.ir.program import Attend, Buffer, LayoutKind, Program, Recur, Select
from attnkit.ir.rules import Type
from attnkit.ir.verify import infer

# No index of three segments leaves a buffer of EXTENT.
BATCH, HEADS, LENGTH, SHARED, WIDTH, EXTENT = 2, 2, 8, 3, 3, 32


def random_inputs(program: Program, rng: np.random.Generator) -> tuple[list[Any], list[Any], list[float]]:
    """Inputs, buffers and params that a program of `random_program` runs with, float64."""
    ends = np.sort(rng.integers(0, LENGTH + 1, BATCH))
    buffers: list[Any] = [_captured(buffer, rng) for buffer in program.buffers]
    for layout in program.inputs:
        if layout.lengths is not None:
            packed = layout.kind == "packed"
            buffers[layout.lengths] = np.array([0, *ends] if packed else rng.permutation(ends), np.int32)
        if layout.table is not None:
            buffers[layout.table] = rng.permutation(BATCH * LENGTH // 2).reshape(BATCH, -1).astype(np.int32)
    types = infer(program)
    sizes: dict[int, int] = {}  # of states: their rows; of carries: their keys
    for op in program.ops:
        if isinstance(op, Attend) and op.normalizer.sink is not None:
            buffers[op.normalizer.sink] = rng.standard_normal(HEADS)
        if isinstance(op, Attend) and op.initial is not None:
            sizes[op.initial] = _carried([types[i] for i in op.operands[1::2]])
        if isinstance(op, Recur):
            sizes |= {i: state_rows(op.coefficients) for i in (op.initial, op.initial_norm) if i is not None}
    cut, heads = cuts(program, types), _heads(program, rng)
    inputs: list[Any] = []
    for i, layout in enumerate(program.inputs):
        batch = BATCH if cut[i] is None else 1
        x = rng.standard_normal(_shape(layout.kind, batch, heads[i], sizes.get(i)))
        inputs.append(x if layout.codec is None else encode(x, layout.codec))
    return inputs, buffers, rng.uniform(0.2, 0.8, program.num_params).tolist()


def state_rows(coefficients: tuple[float, ...] | None) -> int:
    """How many rows the state of a recurrence has over keys of WIDTH."""
    return WIDTH if coefficients is None else sum(WIDTH**i for i in range(len(coefficients)))


def _carried(keys: Sequence[Type]) -> int:
    """How many numbers an initial carry of such segments has."""
    kinds = [t.axis.layout.kind for t in keys if t.axis is not None]
    shared = SHARED * (BATCH if "packed" in kinds else 1)  # the keys of packed sequences follow each other
    return sum(shared if kind == "hsd" else LENGTH for kind in kinds)


def _captured(buffer: Buffer, rng: np.random.Generator) -> Any:
    shape = (EXTENT,) * buffer.rank
    if buffer.dtype == "f32":
        return rng.standard_normal(shape)
    return rng.integers(0, 2 if buffer.dtype == "bool" else 9, shape).astype(buffer.dtype.replace("i", "int"))


def _heads(program: Program, rng: np.random.Generator) -> list[int]:
    """How many heads each input has: not always as many, where that goes together."""
    for _ in range(4):
        heads: list[int] = rng.integers(1, HEADS + 1, len(program.inputs)).tolist()
        if _fit(program, list(heads)):
            return heads
    return [HEADS] * len(program.inputs)


def _fit(program: Program, heads: list[int]) -> bool:
    """Whether inputs with so many heads go together in every operation; ``heads`` grows by those of its results."""
    for op in program.ops[:-1]:
        q, *others = (heads[i] for i in op.operands)
        given, fits = q, all(n == q for n in others)
        if isinstance(op, Select):
            given, fits = others[0] if op.heads == "group" else max(q, *others), True
        elif isinstance(op, Attend):
            relations = [heads[i] for i in (op.blocks, *(op.groups or ())) if i is not None]
            fits = len(set(others)) == 1 and all(q % n == 0 for n in (*others, *relations))
            fits = fits and op.head < q and (op.normalizer.sink is None or q == HEADS)
        elif isinstance(op, Recur):
            k, v = others
            beside = [i for i in (op.gate, op.beta, op.bonus, op.initial, op.initial_norm) if i is not None]
            given, fits = max(q, v), v % k == 0 and all(heads[i] == v for i in beside)
            fits = fits and (q % v == 0 or v % q == 0)
        if not fits:
            return False
        states = [others[1]] * 2 if isinstance(op, Recur) else [given] * (len(op.results) - 1)
        heads += [given, *states]
    return True


def _shape(kind: LayoutKind, batch: int, heads: int, size: int | None) -> tuple[int, ...]:
    rows = size or WIDTH
    shapes: dict[LayoutKind, tuple[int, ...]] = {
        "bhsd": (BATCH, heads, LENGTH, WIDTH), "packed": (1, heads, LENGTH, WIDTH),
        "padded": (BATCH, heads, LENGTH, WIDTH), "paged": (BATCH * LENGTH // 2, heads, 2, WIDTH),
        "hsd": (heads, SHARED, WIDTH), "bhs": (batch, heads, LENGTH), "bs": (batch, size or LENGTH), "h": (heads,),
        "hd": (heads, WIDTH), "bhd": (BATCH, heads, rows), "bhdv": (BATCH, heads, rows, WIDTH),
    }  # fmt: skip
    return shapes[kind]
