"""Arguments that are wrong now and then: numbers, lists, addresses, tensors and programs for the fuzzer of the binding."""

from typing import Any

import numpy as np

from attnkit import _engine

OPCODES = _engine.opcodes()
FAULTS = range(1, 8)  # csrc/cpu/problem.h

Rng = np.random.Generator


def of(rng: Rng, choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


HUGE_SIZES = [2**31, 2**32, 2**40, 2**62, 2**63 - 1]
HUGE_STRIDES = [2**56, 2**62, 2**63 - 1]
NOT_INTS: list[Any] = [
    None,
    "1",
    1.5,
    (),
    [1],
    {},
    2**63,
    -(2**63) - 1,
    2**64,
    b"x",
    object(),
    np.float32(2),
    1j,
]


def integer(rng: Rng, huge: list[int] = HUGE_SIZES) -> Any:
    return of(rng, [*range(-2, 9), *huge, *(-n for n in huge), *NOT_INTS, True, np.int64(3), np.int32(-1)])


def integers(rng: Rng, length: int, huge: list[int] = HUGE_SIZES) -> Any:
    """A list of sizes or strides: of another length, with an odd member, or no list."""
    how = rng.integers(6)
    if how == 0:
        return of(
            rng,
            [None, 4, "four", b"four", 1.5, range(4), np.ones(4, np.int64), {1, 2}, (x for x in range(4))],
        )
    values = [int(rng.integers(0, 4)) for _ in range(length if how > 1 else rng.integers(0, 7))]
    if values and how < 5:
        values[rng.integers(len(values))] = integer(rng, huge)
    return values


S, KEY = ("var_s", 0), ("var_kv_idx", 0)


def rows(*instructions: tuple[Any, ...]) -> np.ndarray:
    code = np.zeros((len(instructions), 8), np.int32)
    for row, (opcode, attr, *args) in zip(code, instructions, strict=True):
        row[:3] = OPCODES[opcode], attr, len(args)
        row[3 : 3 + len(args)] = args
    return code


# (program, its buffers' dtype numbers and shapes): nothing; a bias; ids in a mask beside a param.
PROGRAMS: list[tuple[Any, list[tuple[int, tuple[int, ...]]]]] = [
    (_engine.Program(rows(), -1, -1, 0, 0), []),
    (
        _engine.Program(rows(S, ("var_q_idx", 0), KEY, ("load_f", 0, 1, 2), ("add_f", 0, 0, 3)), 4, -1, 1, 0),
        [(0, (8, 8))],
    ),
    (
        _engine.Program(
            rows(KEY, ("load_i", 0, 0), ("var_b", 0), ("le_i", 0, 2, 1), ("load_b", 1, 0), ("and_b", 0, 3, 4),
                 S, ("param", 0), ("mul_f", 0, 6, 7)), 8, 5, 2, 1),
        [(2, (8,)), (3, (8,))],
    ),
]  # fmt: skip
# Seed, threshold and factor.
DROPOUTS = [None, None, (0, 1, 1.0), (2**64 - 1, 2**32 - 1, 0.0), (3, 2**31, 2.0)]
DTYPES: list[Any] = [0, 0, 0, 4, 5, 4, 5, 1, 6, -1, None]  # of q, k, v and o
ARENA = np.zeros(1 << 20, np.uint8)  # every address lies in its middle
MIDDLE = ARENA.ctypes.data + (ARENA.size // 2 & -64)


def address(rng: Rng) -> Any:
    near = [MIDDLE + n for n in (0, 4, 64, 4096, 1, 2)]
    return of(rng, [*near, 0, 0, -1, 2**64, 2**70, None, "1", 1.5, [1], object()])


def contiguous(shape: tuple[int, ...]) -> list[int]:
    return [int(np.prod(shape[d + 1 :], dtype=int)) for d in range(len(shape))]


def buffer_tuple(rng: Rng, dtype: int, shape: tuple[int, ...]) -> Any:
    if rng.integers(4):
        return (MIDDLE + 1024, dtype, shape, contiguous(shape))
    whole: Any = [MIDDLE, dtype, list(shape), contiguous(shape)]
    at, rank = rng.integers(6), len(shape)
    if at == 4:
        return of(rng, [None, (), tuple(whole[:3]), "buffer", (*whole, 1), 3])
    if at < 4:
        whole[at] = (address(rng), integer(rng), integers(rng, rank), integers(rng, rank, HUGE_STRIDES))[at]
    return tuple(whole)


def valid_tensors(dtype: Any, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int) -> list[Any]:
    """q, k, v and o of this dtype, and lse."""
    kv = batch, kv_heads, kv_len
    shapes = (batch, heads * kv_heads, q_len, 4), (*kv, 4), (*kv, 3), (batch, heads * kv_heads, q_len, 3)
    tensors = [(MIDDLE + 8192 * i, dtype, shape, contiguous(shape)) for i, shape in enumerate(shapes)]
    return [*tensors, (MIDDLE + 8192 * 4, 0, shapes[0][:3], contiguous(shapes[0][:3]))]


def damaged(rng: Rng, tensor: Any) -> Any:
    """The tensor with another address, another dtype, sizes or strides; or none."""
    at = rng.integers(6)
    if at > 3:
        return of(rng, [None, (), tensor[:3], "tensor", np.ones(3, np.float32), tensor, list(tensor)])
    rank = len(tensor[2])
    part = (address(rng), of(rng, DTYPES), integers(rng, rank), integers(rng, rank, HUGE_STRIDES))[at]
    return (*tensor[:at], part, *tensor[at + 1 :])


def sequences(rng: Rng) -> Any:
    if rng.integers(3) == 0:
        return of(rng, [(), [], 3, "x", [()], [(0, 0, 1, 0)], [None], [(0, 0, 1, 0, 1, 2)]])
    return [
        tuple(int(rng.integers(0, 5)) if rng.integers(4) else integer(rng) for _ in range(5))
        for _ in range(rng.integers(1, 4))
    ]
