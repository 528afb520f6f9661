"""Calls of the engine's functions of caches that keep codes with wrong arguments now and then, and how each ended."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from arguments import DROPOUTS, FAULTS, MIDDLE, PROGRAMS, Rng, buffer_tuple, contiguous, damaged, integer, of
from recorded_calls import NUMBERS

import attnkit as ak
from attnkit import _engine
from attnkit.ops import kv_codes

CODECS = ("int8", "int4", "int2", "fp8")


def cache_of_codes(rng: Rng) -> tuple[list[Any], Any, Any, tuple[int, int, int]]:
    """The stores of k and v, the page table and the state of a small cache; its batch, heads and head dim."""
    batch, heads, dim = *(int(n) for n in rng.integers(1, 3, 2)), of(rng, [8, 32])
    codecs = str(of(rng, CODECS)), str(of(rng, CODECS))
    paged = rng.integers(3) == 0
    cache = ak.KVCache(
        batch, heads, dim, max_len=64, codec=codecs, residual=32, page_size=32 if paged else None
    )
    count = iter(range(100))

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return (MIDDLE + 16384 * next(count), NUMBERS[x.dtype], tuple(x.shape), list(x.stride()))

    scheme, storage = cache.segment.codes.scheme, cache.segment.codes.storage  # type: ignore[union-attr]
    parts = kv_codes.parts_of(scheme, storage)
    stores = [
        tuple(moved(x) for x in kv_codes.store(part, codec, dim, scheme.group))
        for part, codec in zip((parts.k, parts.v), codecs, strict=True)
    ]
    table = moved(parts.table)
    return stores, table, moved(parts.state), (batch, heads, dim)


def damaged_store(rng: Rng, store: tuple[Any, ...]) -> Any:
    at = int(rng.integers(len(store) + 1))
    if at == len(store):
        return of(rng, [None, (), store[:3], "store", 3])
    part = damaged(rng, store[at]) if isinstance(store[at], tuple) else integer(rng)
    return (*store[:at], part, *store[at + 1 :])


def int32s(*values: int) -> Any:
    """A tensor of these lengths in memory of its own, which is kept for as long as the process lives."""
    held = np.array(values, np.int32)
    KEPT.append(held)
    return (held.ctypes.data, 1, (len(values),), [1])


KEPT: list[Any] = []


def damage(
    rng: Rng, arguments: list[Any], stores: tuple[int, int], tensors: Sequence[int], numbers: Sequence[int]
) -> None:
    """Up to two arguments become wrong."""
    for at in rng.choice(len(arguments), rng.integers(0, 3), replace=False):
        if at in stores:
            arguments[at] = damaged_store(rng, arguments[at])
        elif at in tensors and arguments[at] is not None:
            arguments[at] = damaged(rng, arguments[at])
        elif at in numbers:
            arguments[at] = integer(rng)


def attend_cache(rng: Rng) -> str:
    KEPT.clear()
    program, declared = of(rng, PROGRAMS)
    stores, table, state, (batch, heads, dim) = cache_of_codes(rng)
    q_len, dtype = int(rng.integers(1, 3)), of(rng, [0, 4, 5])
    shape = batch, heads * int(rng.integers(1, 3)), q_len, dim
    q, o = ((MIDDLE + 8192 * at, dtype, shape, contiguous(shape)) for at in (-1, -2))
    lengths = [int(rng.integers(0, 65)) for _ in range(batch)]
    coded = None if state is None else int32s(*(max(n - 32, 0) // 32 * 32 for n in lengths))
    arguments = [
        q, *stores, o, None, 0.5, None, int32s(*lengths), coded, [buffer_tuple(rng, *d) for d in declared],
        [1.0] * (len(declared) - 1 if declared else 0), of(rng, DROPOUTS), int(rng.integers(1, 4)), 96, 64, 1024, table,
    ]  # fmt: skip
    damage(rng, arguments, (1, 2), (0, 3, 7, 8, 16), (12, 13, 14, 15))
    fault, about = _engine.attend_cache(program if rng.integers(50) else None, *arguments)
    assert fault in (0, *FAULTS)
    assert fault != 0 or about == -1
    return f"fault {fault}" if fault else "computed"


def kv_append(rng: Rng) -> str:
    KEPT.clear()
    stores, table, state, (batch, heads, dim) = cache_of_codes(rng)
    count, dtype = int(rng.integers(0, 4)), of(rng, [0, 4, 5])
    shape = batch, heads, count, dim
    k, v = ((MIDDLE + 8192 * at, dtype, shape, contiguous(shape)) for at in (-1, -2))
    lengths = int32s(*(int(n) for n in rng.integers(0, 64, batch)))
    counts = of(rng, [None, int32s(*[count] * batch), int32s(*[int(rng.integers(-1, 5))] * batch)])
    if state is not None:
        held = int32s(*[0] * (3 * batch))
        state = (held[0], 1, (3, batch), [batch, 1])
    arguments = [*stores, k, v, lengths, counts, state, 32, table, int(rng.integers(1, 4))]
    damage(rng, arguments, (0, 1), (2, 3, 4, 5, 6, 8), (7, 9))
    fault, about = _engine.kv_append(*arguments)
    assert fault in (0, *FAULTS)
    assert fault != 0 or about == -1
    return f"fault {fault}" if fault else "computed"
