"""From tensors to sequences and back: in the reference every value is a list, one entry a sequence, without padding.

Tokens are ``[H, n, D]``, numbers per token ``[H, n]``, a carry ``[n]``; what all sequences share stands in the list
once for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from attnkit.backends.reference.codec import Encoded, decode
from attnkit.backends.reference.tape import Array, Node
from attnkit.errors import error
from attnkit.ir.program import Attend, Layout, Map, Merge, Program, Recur
from attnkit.ir.rules import Type

RANKS = {"bhs": 3, "bs": 2, "h": 1, "hd": 2, "bhd": 3, "bhdv": 4, "hsd": 3}


class Batch(NamedTuple):
    """How the program's tensors make sequences: their number, and per input the token ranges if packed."""

    size: int
    leaves: list[Node]  # one per input, as given
    values: list[list[Node]]  # one list per input


def cuts(program: Program, types: Sequence[Type]) -> list[int | None]:
    """For every value the buffer of offsets that cuts it into sequences, None if it is not packed.

    Numbers per token, and a carry, are packed if the tokens that they go with are.
    """
    found = [t.axis.layout.lengths if t.axis and t.axis.layout.kind == "packed" else None for t in types]
    together, result = list[list[int]](), len(program.inputs)
    for op in program.ops[:-1]:
        if isinstance(op, Map | Recur | Merge):
            used = (*op.uses(), result)
            together.append([i for i in used if types[i].kind in ("tokens", "bhs")])
        elif isinstance(op, Attend) and op.initial is not None:
            together.append([*op.operands[1::2], op.initial])
        result += len(op.results)
    for _ in together:  # numbers go with tokens by way of other numbers, too
        for values in together:
            known = next((found[i] for i in values if found[i] is not None), None)
            for i in values:
                if found[i] is None and types[i].axis is None:
                    found[i] = known
    return found


def split(program: Program, types: Sequence[Type], inputs: Sequence[Any], buffers: Sequence[Any]) -> Batch:
    """The inputs as leaves of the tape, and as sequences. ``types`` are those of all values.

    Raises:
        AttnkitError: AK401 (number of inputs), AK403 (shapes), AK602 (lengths).
    """
    if len(inputs) != len(program.inputs):
        raise error("AK401", where="inputs", given=str(len(inputs)), allowed=str(len(program.inputs)))
    leaves, counts, cut = [], set(), cuts(program, types)
    for i, (given, layout) in enumerate(zip(inputs, program.inputs, strict=True)):
        if isinstance(given, Encoded) != (layout.codec is not None):
            raise error(
                "AK401",
                where=f"input {i}",
                given=type(given).__name__,
                allowed=str(layout.codec or "an array"),
            )
        leaf = Node(decode(given) if isinstance(given, Encoded) else given)
        if leaf.value.ndim != RANKS.get(layout.kind, 4):
            raise error("AK403", where=f"input {i}", given=str(leaf.shape), allowed=layout.kind)
        leaves.append(leaf)
        counts.add(_count(leaf, layout, cut[i], buffers))
    counts.discard(None)
    if len(counts) > 1:
        packed = any(lengths is not None for lengths in cut)
        what = "cu_seqlens of q and of k differ in length" if packed else "inputs differ in batch"
        code = "AK602" if packed else "AK403"
        raise error(code, what=what, given=", ".join(map(str, sorted(map(int, counts)))))  # type: ignore[arg-type]
    count = int(counts.pop() or 0) if counts else 1
    values = []
    for leaf, layout, offsets in zip(leaves, program.inputs, cut, strict=False):
        if layout.kind == "bs" and offsets is not None:  # of several segments, perhaps: see `of_keys`
            values.append([leaf[0]] * count)
        else:
            values.append(_sequences(leaf, layout, offsets, count, buffers))
    return Batch(count, leaves, values)


def _count(leaf: Node, layout: Layout, offsets: int | None, buffers: Sequence[Any]) -> int | None:
    """How many sequences an input holds; None if it says nothing about that."""
    if layout.kind in ("h", "hd", "hsd"):
        return None
    if offsets is not None:
        if leaf.shape[0] != 1:
            raise error("AK403", where="batch of a packed input", given=str(leaf.shape), allowed="1")
        return None if layout.kind == "bs" else len(_offsets(buffers[offsets], leaf.shape[2])) - 1
    if layout.kind == "paged" and layout.lengths is not None:
        return len(np.asarray(buffers[layout.lengths]))
    return leaf.shape[0]


def _sequences(
    leaf: Node, layout: Layout, offsets: int | None, count: int, buffers: Sequence[Any]
) -> list[Node]:
    if layout.kind in ("h", "hd", "hsd"):
        return [leaf] * count
    if offsets is not None:
        return [leaf[0, :, a:b] for a, b in pairwise(_offsets(buffers[offsets], leaf.shape[2]))]
    if layout.lengths is None:
        return [leaf[b] for b in range(count)]
    held = np.asarray(buffers[layout.lengths])
    if layout.kind == "padded":
        _check_lengths(held, leaf.shape[0], leaf.shape[2])
        return [leaf[b, :, : int(n)] for b, n in enumerate(held)]
    table, page = np.asarray(buffers[layout.table or 0]), leaf.shape[2]
    _check_lengths(held, table.shape[0], table.shape[1] * page)
    result = []
    for b, n in enumerate(held):
        j = np.arange(int(n))
        pages = table[b, j // max(page, 1)]
        if np.any((pages < 0) | (pages >= leaf.shape[0])):
            raise error("AK602", where=f"page table, sequence {b}", given=str(pages.tolist()[:8]),
                        allowed=f"pages 0..{leaf.shape[0] - 1}")  # fmt: skip
        heads = np.arange(leaf.shape[1])[:, None]
        result.append(leaf[pages[None, :], heads, (j % max(page, 1))[None, :]])
    return result


def _check_lengths(lengths: Array, count: int, most: int) -> None:
    if len(lengths) != count or np.any(lengths < 0) or np.any(lengths > most):
        allowed = f"{count} lengths from 0 to {most}"
        raise error("AK602", where="kv_lens", given=str(lengths), allowed=allowed)


def _offsets(cu_seqlens: Any, total: int) -> list[int]:
    ends = np.asarray(cu_seqlens).tolist()
    if not ends or ends[0] != 0 or ends[-1] > total or any(a > b for a, b in pairwise(ends)):
        allowed = f"from 0, never falling, to at most {total}"
        raise error("AK602", where="cu_seqlens", given=str(ends), allowed=allowed)
    return list(ends)


def of_keys(carry: Node, lengths: Sequence[int], b: int, packed: bool, ragged: bool) -> Node:
    """The part of a carry that belongs to the keys of sequence ``b``, there being ``lengths`` keys in each."""
    first = sum(lengths[:b]) if packed else 0
    last = first + lengths[b]
    if carry.shape[0] < last or (carry.shape[0] > last and not packed and not ragged):
        raise error(
            "AK403", where="initial of attend", given=str(carry.shape), allowed=f"{last} numbers, one a key"
        )
    return carry[first:last]


def join(
    values: Sequence[Any], packed: tuple[int, ...] | None, fill: float = 0.0, keys: int = 0
) -> tuple[Array, list[Any]]:
    """The sequences of a result as one array, and where in it each lies.

    Packed ones follow each other along the tokens, the result having the shape ``packed`` but for heads and channels.
    Others are stacked, short ones padded with ``fill``; the last axis has at least ``keys`` entries.
    """
    arrays = [np.asarray(v.value if isinstance(v, Node) else v) for v in values]
    if packed is not None:
        along = min(1, len(packed) - 2)  # tokens stand behind heads, if there are heads
        ends = np.cumsum([0, *(array.shape[along] for array in arrays)])
        parts: list[Any] = [(0, *[slice(None)] * along, slice(a, b)) for a, b in pairwise(ends.tolist())]
        like = arrays[0].shape if arrays else packed[1:]
        total = max(packed[along + 1], int(ends[-1]))
        shape = (1, *like[:along], total, *like[along + 1 :])
    else:
        largest = np.max([array.shape for array in arrays], axis=0).tolist() if arrays else [0, 0, 0]
        largest[-1] = max(largest[-1], keys)
        parts = [(b, *(slice(0, n) for n in array.shape)) for b, array in enumerate(arrays)]
        shape = (len(arrays), *largest)
    out = np.full(shape, fill, arrays[0].dtype if arrays else np.float64)
    for part, array in zip(parts, arrays, strict=True):
        out[part] = array
    return out, parts
