"""Every function of ``attnkit._engine`` with wrong arguments: ValueError or TypeError, or a result; never a crash.

What the binding cannot know is whether the memory behind an address is as large as the sizes say. Sizes here are
therefore small enough for the tensors that are there, or so large that no tensor has them.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import _engine
from attnkit.ops import kv_codes
from attnkit.testing import isolated

sys.path.insert(0, str(Path(__file__).parent))
import recorded_calls
from arguments import (
    DTYPES,
    KEY,
    MIDDLE,
    NOT_INTS,
    OPCODES,
    PROGRAMS,
    Rng,
    S,
    buffer_tuple,
    contiguous,
    damaged,
    integer,
    of,
    rows,
    sequences,
    valid_tensors,
)

CODECS = ("int8", "int4", "int2", "fp8")
FAULTS = range(1, 8)  # csrc/cpu/problem.h
HALF = ("const_f", int(np.float32(0.5).view(np.int32)))


# --- attend ----------------------------------------------------------------------------------------------

# Seed, threshold and factor.
DROPOUTS = [None, None, (0, 1, 1.0), (2**64 - 1, 2**32 - 1, 0.0), (3, 2**31, 2.0)]
WRONG_DROPOUTS = [(), (1, 2), (-1, 2, 1.0), (2**64, 0, 1.0), (0, 2**32, 1.0), (0, -1, 1.0), (0, 1, "1"), (0, 1.5, 1.0),
                  (0, 0, np.nan), (0, 1, np.inf), 0.5, "x", [1, 2, 3.0], [None] * 3]  # fmt: skip


def attend(rng: Rng) -> str:
    program, declared = of(rng, PROGRAMS)
    batch, heads, kv_heads, q_len, kv_len = (int(n) for n in rng.integers(1, 3, 5))
    tensors = valid_tensors(of(rng, DTYPES), batch, heads, kv_heads, q_len, kv_len)
    arguments: list[Any] = [*tensors, 0.5, None, None]
    arguments += [[buffer_tuple(rng, *d) for d in declared], [1.0] * (len(declared) - 1 if declared else 0)]
    arguments += [of(rng, DROPOUTS), int(rng.integers(1, 4)), 96, 64, 1024, None]
    pages = batch, int(rng.integers(1, 4))
    if rng.integers(6) == 0:  # k and v are pages, all of them the same few
        arguments[1:3] = [
            (MIDDLE + 8192 * at, tensors[0][1], (2, kv_heads, 16, 4), (256, 64, 4, 1)) for at in (1, 2)
        ]
        arguments[3] = (*tensors[0][:2], tensors[0][2], tensors[0][3])
        arguments[7] = [(b, 0, q_len, 0, int(rng.integers(0, 16 * pages[1] + 1))) for b in range(batch)]
        arguments[15] = buffer_tuple(rng, 1, pages)
    replace: dict[int, Callable[[], Any]] = {
        **{at: partial(damaged, rng, tensor) for at, tensor in enumerate(tensors)},
        5: lambda: of(rng, [np.nan, np.inf, -1.0, 0.0, 1e300, 1e38, None, "1", 10**400, 1j, 3]),
        6: lambda: of(rng, [None, buffer_tuple(rng, int(rng.integers(-1, 6)), (int(rng.integers(0, 5)),))]),
        7: lambda: sequences(rng),
        8: lambda: [buffer_tuple(rng, int(rng.integers(-1, 6)), (8,)) for _ in range(rng.integers(0, 4))],
        9: lambda: of(rng, [[], [1.0] * 2, [np.nan], [np.inf], [1e300], ["1"], [None], None, [10**400], 1.0]),
        10: lambda: of(rng, WRONG_DROPOUTS),
        11: lambda: of(rng, [-1, 0, 1, 2, 64, 10**6, 2**31, None, 1.5]),
        12: lambda: integer(rng),
        13: lambda: integer(rng),
        14: lambda: integer(rng),
        15: lambda: of(rng, [None, buffer_tuple(rng, of(rng, [1, 1, 0, 2]), pages), buffer_tuple(rng, 1, (3,))]),
    }  # fmt: skip
    for at in rng.choice(len(arguments), rng.integers(0, 4), replace=False):
        arguments[at] = replace[at]()
    if rng.integers(50) == 0:
        arguments = arguments[: rng.integers(len(arguments))]
    fault, about = _engine.attend(program if rng.integers(50) else None, *arguments)
    if fault == 0:
        assert about == -1
        return "computed"
    assert fault in FAULTS
    assert -1 <= about < max(program.num_instructions, 6 + len(declared))
    return f"fault {fault}"


def launch(rng: Rng) -> str:
    program = of(rng, [PROGRAMS[0][0], *(p for p, _ in PROGRAMS), None])
    made = _engine.Launch(program, 0.5, *(of(rng, [64, 64, 64, integer(rng)]) for _ in range(3)))
    tensors = valid_tensors(of(rng, DTYPES), *(int(n) for n in rng.integers(1, 3, 5)))
    arguments: list[Any] = [*tensors, int(rng.integers(1, 4))]
    for at in rng.choice(6, rng.integers(0, 3), replace=False):
        arguments[at] = damaged(rng, tensors[at]) if at < 5 else integer(rng, [64, 10**6, 2**31])
    fault, about = made.run(*arguments)
    assert fault == 0 or fault in FAULTS
    assert -1 <= about < 6
    return f"fault {fault}" if fault else "computed"


def seen(rng: Rng) -> str:
    made = _engine.Seen(of(rng, [np.ndarray, int, None]), of(rng, [tuple, None]), of(rng, [0, 1, 8, "1"]))
    tensors = [
        of(rng, [np.zeros((1, 1, 2, 4)), (MIDDLE, 0, (1, 1, 2, 4), (8, 8, 4, 1)), 3, None]) for _ in range(3)
    ]
    text = of(rng, ["", "a", None, 1])
    made.keep(text, *tensors, made)
    assert made.find(text, *tensors) is None  # none of them speaks DLPack's exchange
    assert not made.plain(tuple(tensors))
    return "refused"


# (program of a backward, its buffers' dtype numbers and shapes): nothing; a bias with a gradient.
BACKWARDS: list[tuple[Any, list[tuple[int, tuple[int, ...]]]]] = [
    PROGRAMS[0],
    (
        _engine.Program(
            rows(S, ("var_q_idx", 0), KEY, ("load_f", 0, 1, 2), ("mul_f", 0, 0, 3)), 4, -1, 1, 0, 3, [(3, 0)]
        ),
        [(0, (8, 8))],
    ),
]  # fmt: skip


def attend_backward(rng: Rng) -> str:
    program, declared = of(rng, BACKWARDS)
    batch, heads, kv_heads, q_len, kv_len = (int(n) for n in rng.integers(1, 3, 5))
    tensors = valid_tensors(0, batch, heads, kv_heads, q_len, kv_len)
    arguments: list[Any] = [*tensors, 0.5, None, None]
    arguments += [[buffer_tuple(rng, *d) for d in declared], [], of(rng, DROPOUTS)]
    wanted = [tensors[at][2] for at in (3, 4, 0, 1, 2)]
    arguments += [(MIDDLE + 8192 * (5 + i), 0, shape, contiguous(shape)) for i, shape in enumerate(wanted)]
    arguments += [None, [buffer_tuple(rng, 0, shape) for _, shape in declared]]
    arguments += [int(rng.integers(1, 4)), 96, 96]
    replace: dict[int, Callable[[], Any]] = {
        **{at: lambda i=i: of(rng, [None, buffer_tuple(rng, int(rng.integers(-1, 6)), wanted[i])])
           for i, at in enumerate(range(11, 16))},
        7: lambda: sequences(rng),
        10: lambda: of(rng, WRONG_DROPOUTS),
        16: lambda: buffer_tuple(rng, 0, (int(rng.integers(0, 5)),)),
        17: lambda: of(rng, [None, [], [None], [buffer_tuple(rng, int(rng.integers(-1, 6)), (8, 8))], 3]),
        18: lambda: integer(rng, [64, 10**6, 2**31]),
        19: lambda: integer(rng),
        20: lambda: integer(rng),
    }  # fmt: skip
    for at in rng.choice(list(replace), rng.integers(0, 4), replace=False):
        arguments[at] = replace[at]()
    fault, about = _engine.attend_backward(program if rng.integers(50) else None, *arguments)
    if fault == 0:
        assert about == -1
        return "computed"
    assert fault in FAULTS
    assert -1 <= about < 12 + 2 * len(declared)
    return f"fault {fault}"


def launch_backward(rng: Rng) -> str:
    program = of(rng, [BACKWARDS[0][0], *(p for p, _ in BACKWARDS), None])
    made = _engine.LaunchBackward(program, 0.5, *(of(rng, [64, 64, 64, integer(rng)]) for _ in range(2)))
    q, k, v, o, lse = valid_tensors(0, *(int(n) for n in rng.integers(1, 3, 5)))
    new = [
        (MIDDLE + 8192 * (5 + i), 0, like[2], contiguous(like[2])) for i, like in enumerate((o, lse, q, k, v))
    ]
    arguments: list[Any] = [q, k, v, o, lse, *new, int(rng.integers(1, 4))]
    for at in rng.choice(11, rng.integers(0, 3), replace=False):
        arguments[at] = damaged(rng, arguments[at]) if at < 10 else integer(rng, [64, 10**6, 2**31])
    fault, about = made.run(*arguments)
    assert fault == 0 or fault in FAULTS
    assert -1 <= about < 12
    return f"fault {fault}" if fault else "computed"


# --- recur -----------------------------------------------------------------------------------------------


def recurrence(rng: Rng) -> tuple[list[Any], list[Any]]:
    """The arguments of a valid call but for its threads, and room for the gradients of what it has beside tokens."""
    batch, heads, length = (int(n) for n in rng.integers(1, 3, 3))
    count = iter(range(100))

    def room(*shape: int, dtype: int = 0) -> Any:
        return (MIDDLE + 4096 * next(count), dtype, shape, contiguous(shape))

    dtype, member = of(rng, [0, 0, 4, 5]), int(rng.integers(4))
    order = 2 if member == 3 else 0
    states = batch, heads, 21 if order else 4
    tokens = [room(batch, heads, length, d, dtype=dtype) for d in (4, 4, 3, 3)]
    beside: list[Any] = [None] * 5
    if member in (1, 2):
        beside[0] = room(batch, heads, length)
    if member == 2:
        beside[1] = room(batch, heads, length)
    if member and rng.integers(2):
        beside[3] = room(*states, 3)
    form = (0, 0, 0.5, True, member == 3, 0.0, 16, [1.0, 1.0, 0.5] if order else [])
    arguments = [*tokens, tuple(beside), room(*states, 3), room(*states) if order else None, None, form]
    return arguments, [None if t is None else room(*t[2]) for t in beside]


def damage_recurrence(rng: Rng, arguments: list[Any]) -> None:
    form = arguments[8]
    at = int(rng.integers(8))
    wrong = of(rng, [None, "x", -1, 3, 2.5, [], 48, [1.0], [np.nan] * 3])
    replace: dict[int, Callable[[], Any]] = {
        **{i: partial(damaged, rng, arguments[i]) for i in (0, 1, 2, 3, 5)},
        4: lambda: of(rng, [None, (), [None] * 5, arguments[4][::-1], (3,) * 5]),
        6: lambda: of(rng, [None, 3, buffer_tuple(rng, 0, (1, 1, 4))]),
        7: lambda: of(
            rng, [None, [], 3, [(0, 0, 1)], [(0, 0, 9)], [(-1, 0, 1)], [(0, 2**62, 2**62)], [(0,)]]
        ),
        8: lambda: of(rng, [None, (), form[:3], (*form[:at], wrong, *form[at + 1 :])]),
        9: lambda: integer(rng, [64, 10**6, 2**31]),
    }
    for i in rng.choice(list(replace), rng.integers(0, 3), replace=False):
        arguments[i] = replace[i]()


def recur(rng: Rng) -> str:
    arguments, _ = recurrence(rng)
    arguments.append(int(rng.integers(1, 4)))
    damage_recurrence(rng, arguments)
    fault, about = _engine.recur(*(arguments if rng.integers(50) else arguments[:3]))
    assert (fault == 0) == (about == -1) or fault == 4
    return f"fault {fault}" if fault else "computed"


def recur_backward(rng: Rng) -> str:
    arguments, beside = recurrence(rng)
    arguments.append(1)
    damage_recurrence(rng, arguments)
    threads = arguments.pop()
    whole = [t for t in arguments[:4] if isinstance(t, tuple) and len(t) == 4]
    if len(whole) < 4:
        return "left out"
    moved = [(MIDDLE + 262144 + 8192 * i, *whole[i][1:]) for i in range(4)]
    given = [moved[3], None, None, *moved[:3], tuple(beside), threads]
    if rng.integers(4) == 0:
        given[rng.integers(7)] = of(rng, [None, 3, (), buffer_tuple(rng, 0, (2, 2))])
    fault, about = _engine.recur_backward(*arguments, *given)
    assert (fault == 0) == (about == -1) or fault == 4
    return f"fault {fault}" if fault else "computed"


# --- select ----------------------------------------------------------------------------------------------


CAUSAL = _engine.Program(rows(KEY, ("var_q_idx", 0), ("le_i", 0, 0, 1)), -1, 2, 0, 0)


def select(rng: Rng) -> str:
    batch, heads, q_len, kv_len = (int(n) for n in rng.integers(1, 6, 4))
    row, column = (int(n) for n in rng.integers(1, 4, 2))
    group, dtype = bool(rng.integers(2)), of(rng, [0, 0, 4, 5])

    def room(at: int, *shape: int, dtype: int = dtype) -> Any:
        return (MIDDLE + 4096 * at, dtype, shape, contiguous(shape))

    q, k = room(0, batch, 2 * heads, q_len, 5), room(1, batch, heads, kv_len, 5)
    chosen = room(2, batch, heads if group else 2 * heads, -(-q_len // row), -(-kv_len // column), dtype=3)
    form = (
        row,
        column,
        0.5,
        bool(rng.integers(2)),
        of(rng, [None, 0.1]),
        int(rng.integers(3)),
        0.7,
        True,
        group,
    )
    arguments = [
        q,
        k,
        chosen,
        form,
        of(rng, [None, CAUSAL]),
        of(rng, [None, CAUSAL]),
        [],
        [],
        int(rng.integers(1, 4)),
    ]
    at, wrong = int(rng.integers(9)), of(rng, [None, "x", -1, 0, 3, 2.5, [], 2**31, np.nan])
    replace: dict[int, Callable[[], Any]] = {
        **{i: partial(damaged, rng, arguments[i]) for i in range(3)},
        3: lambda: of(rng, [None, (), form[:3], (*form[:at], wrong, *form[at + 1 :])]),
        4: lambda: of(rng, [3, "x", [], PROGRAMS[0][0], PROGRAMS[1][0]]),
        6: lambda: of(rng, [None, 3, [buffer_tuple(rng, 0, (2, 2))]]),
        7: lambda: of(rng, [None, [1.0], ["x"]]),
        8: lambda: integer(rng, [64, 10**6, 2**31]),
    }
    for i in rng.choice(list(replace), rng.integers(0, 3), replace=False):
        arguments[i] = replace[i]()
    fault, about = _engine.select(*(arguments if rng.integers(50) else arguments[:3]))
    assert (fault == 0) == (about == -1) or fault == 4
    return f"fault {fault}" if fault else "computed"


# --- groups, and what queries carry ----------------------------------------------------------------------


def recorded(name: str, rng: Rng) -> str:
    """What a public function gave, up to two arguments of it made worse."""
    arguments = list(of(rng, recorded_calls.recorded()[name]))
    for at in rng.choice(len(arguments), rng.integers(0, 3), replace=False):
        arguments[at] = worse(rng, arguments[at])
    found = getattr(_engine, name)(*(arguments if rng.integers(50) else arguments[:2]))
    fault = found[0] if isinstance(found, tuple) else found
    return f"fault {fault}" if isinstance(fault, int) and fault > 0 else "computed"


def worse(rng: Rng, argument: Any) -> Any:
    if recorded_calls.is_tensor(argument):
        bad = damaged(rng, argument)
        # Lists have been looked at before they come here: other ones may hold what is no token.
        is_list = argument[1] == DTYPE_NUMBERS[torch.int32]
        return (argument[0], *bad[1:]) if is_list and recorded_calls.is_tensor(bad) else bad
    if isinstance(argument, (list, tuple)):
        if not argument or rng.integers(4) == 0:
            return of(rng, [None, (), [], argument[:-1], "x", 3, [None]])
        at = int(rng.integers(len(argument)))
        return type(argument)([*argument[:at], worse(rng, argument[at]), *argument[at + 1 :]])
    if isinstance(argument, int):  # and bool
        return integer(rng, [64, 10**6, 2**31])
    return of(rng, [None, "x", 0.5, np.nan, 10**400, PROGRAMS[0][0], PROGRAMS[1][0], 3, []])


# --- caches of codes -------------------------------------------------------------------------------------

DTYPE_NUMBERS = {torch.float32: 0, torch.int32: 1, torch.uint8: 3, torch.bfloat16: 4, torch.float16: 5}


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
        return (MIDDLE + 16384 * next(count), DTYPE_NUMBERS[x.dtype], tuple(x.shape), list(x.stride()))

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


# --- the others ------------------------------------------------------------------------------------------


def program(rng: Rng) -> str:
    code: Any = rng.integers(-2, 80, (rng.integers(0, 12), 8), dtype=np.int32)
    how = rng.integers(8)
    if how == 0:
        code = of(rng, [None, "code", [], [[1, 2], [3]], np.zeros((2, 3, 4)), np.full((1, 8), np.nan), np.zeros(8, object),
                        np.zeros((0, 8)), 3, np.array("x"), np.zeros(2**20, np.int32), [[10**30]]])  # fmt: skip
    elif how < 5:
        code = rows(S, KEY, HALF, ("add_f", 0, 0, 2), ("lt_i", 0, 1, 1))
        code[rng.integers(len(code)), rng.integers(8)] = rng.integers(-(2**31), 2**31)
    elif how == 5:
        code = of(
            rng,
            [
                code[::-1],
                code.T,
                code.astype(np.float64),
                code.astype(np.int64) * 2**40,
                code.ravel(),
                code > 3,
            ],
        )
    numbers = [integer(rng) if rng.integers(3) == 0 else int(rng.integers(-1, 6)) for _ in range(4)]
    made = _engine.Program(code, *numbers)
    assert len(made.ranks) == made.num_instructions
    return "accepted"


def of_a_mask(rng: Rng) -> list[Any]:
    """Arguments of what looks at a mask: a program, sizes, buffers and params."""
    program, declared = of(rng, PROGRAMS)
    sizes: list[Any] = [1, 1, 8, 8, 2, 3]
    for at in rng.choice(6, rng.integers(0, 3), replace=False):
        sizes[at] = integer(rng)
    buffers: Any = [buffer_tuple(rng, *d) for d in declared]
    params: Any = [1.0] * (len(declared) - 1 if declared else 0)
    if rng.integers(8) == 0:
        buffers = of(rng, [None, [], [1], buffers * 2])
    if rng.integers(8) == 0:
        params = of(rng, [None, ["x"], [np.nan], [], [1.0, 2.0]])
    return [program, *sizes, buffers, params]


def gathered_tiles(rng: Rng) -> str:
    found = _engine.gathered_tiles(*of_a_mask(rng))
    assert found is None or min(found) >= 0
    return "counted"


def block_runs(rng: Rng) -> str:
    fault, *_, offsets, runs = _engine.block_runs(*of_a_mask(rng))
    if fault:
        return "fault"
    assert offsets.dtype == np.int64
    assert offsets[-1] == len(runs)
    assert np.all(runs[:, 0] < runs[:, 1])
    return "found"


def evaluate(rng: Rng) -> str:
    name = of(rng, [*OPCODES, "", "add", "add_f\0", None, 3, b"add_f"])
    count, length = rng.integers(0, 5), int(rng.integers(0, 40))
    args: list[Any] = [
        rng.integers(-(2**31), 2**31, length, dtype=np.int32).view(np.float32) for _ in range(count)
    ]
    if args and rng.integers(4) == 0:
        odd = [args[0].astype(np.float64), args[0].view(np.int32), args[0][::2], args[0][:-1], None, "x", 1.0, [1.0],
               np.float32(1), np.empty((2, 3), np.float32), np.broadcast_to(np.float32(1), (length,))]  # fmt: skip
        args[rng.integers(len(args))] = of(rng, odd)
    result = _engine.evaluate(name, args)
    assert result.shape == (next((np.size(a) for a in args if np.size(a) != 1), 1),)
    return "evaluated"


def set_isa(rng: Rng) -> str:
    _engine.set_isa(
        of(rng, [*_engine.isa_levels(), "", "AVX512", "scalar ", "x" * 10_000, None, 3, b"scalar", "\0", "é"])
    )
    return "set"


def most_tokens(rng: Rng) -> str:
    flags = of(rng, [True, False]), of(rng, [True, False, 3])
    assert _engine.most_tokens(integer(rng, [64, 65, 4096]), *flags) in (16, 32, 128)
    return "computed"


def set_poison(rng: Rng) -> str:
    try:
        _engine.set_poison(of(rng, [True, False, None, 3, "x", []]))
    finally:
        _engine.set_poison(True)
    return "set"


def gflops(probe: Callable[..., float | None], rng: Rng) -> str:
    threads = of(rng, [1, 2, 3, 0, -1, -(2**31), *NOT_INTS])
    found = probe(threads, of(rng, [0, 1, 1000, -1, 2**40, *NOT_INTS]))
    assert found is None or found >= 0
    return "measured"


def read_gbytes_per_s(rng: Rng) -> str:
    memory = of(rng, [np.zeros(n, np.float32) for n in (0, 1, 5000)]
                + [np.zeros((3, 4)), None, "x", 1.0, np.zeros(8, np.float32)[::2], np.zeros((2, 3, 4), np.float32)])  # fmt: skip
    _engine.read_gbytes_per_s(of(rng, [1, 2, 3, 0, -1, -(2**31), *NOT_INTS]), memory)
    return "measured"


def no_arguments(rng: Rng) -> str:
    function = getattr(_engine, of(rng, ["opcodes", "isa_levels", "current_isa", "last_isa"]))
    return type(function(*(integer(rng) for _ in range(rng.integers(0, 2))))).__name__


FUZZERS: dict[str, Callable[[Rng], str]] = {
    "attend": attend, "attend_backward": attend_backward, "Launch": launch, "LaunchBackward": launch_backward, "Seen": seen, "recur": recur, "recur_backward": recur_backward,
    "select": select, "attend_cache": attend_cache, "kv_append": kv_append, "Program": program, "block_runs": block_runs, "gathered_tiles": gathered_tiles, "evaluate": evaluate, "set_isa": set_isa,
    "set_poison": set_poison, "most_tokens": most_tokens, "read_gbytes_per_s": read_gbytes_per_s,
    "fma_gflops": partial(gflops, _engine.fma_gflops), "bf16_gflops": partial(gflops, _engine.bf16_gflops),
    **{name: partial(recorded, name) for name in recorded_calls.NAMES},
    **dict.fromkeys(("opcodes", "isa_levels", "current_isa", "last_isa"), no_arguments),
}  # fmt: skip


def case(rng: Rng) -> str:
    # attend has the most arguments to be wrong
    name = "attend" if rng.integers(2) else of(rng, list(FUZZERS))
    try:
        return f"{name}: {FUZZERS[name](rng)}"
    except (ValueError, TypeError) as refused:
        return f"{name}: {type(refused).__name__}"


def test_every_function_is_fuzzed() -> None:
    assert set(FUZZERS) == {
        name for name in dir(_engine) if callable(getattr(_engine, name)) and name[:1] != "_"
    }


def test_wrong_arguments(seed: int, effort: int) -> None:
    count = 10_000 * effort
    tally = isolated.run(__file__, seed=seed, count=count)
    for name in FUZZERS:
        assert tally[f"{name}: TypeError"] > 0, tally
    for name in ("attend", "attend_backward", "Program", "block_runs", "evaluate", "set_isa", "fma_gflops"):
        assert tally[f"{name}: ValueError"] > 0, tally
    assert tally["attend: computed"] > count / 20, tally
    assert tally["attend_backward: computed"] > count / 400, tally
    assert min(tally[f"{name}: computed"] for name in ("recur", "recur_backward", "select")) > count / 1000, (
        tally
    )
    assert tally["attend: fault 5"] > 0, tally  # no memory behind it
    assert tally["attend: fault 6"] > 0, tally  # misaligned


@pytest.mark.parametrize(
    ("stride", "allowed"), [(2**54, True), (2**54 + 1, False), (2**63 - 1, False), (-(2**63), False)]
)
def test_strides_beyond_the_address_space(stride: int, allowed: bool) -> None:
    """Sums of such strides would overflow. One that is never multiplied may be anything."""
    q = np.ones((1, 1, 2, 1), np.float32)
    for far in ((2, 2, stride, 1), (stride, 2, 1, 1)):
        moves = far[2] != 1
        near, other = ((q.ctypes.data, 0, (1, 1, 2, 1), strides) for strides in ((2, 2, 1, 1), far))
        call = [
            PROGRAMS[0][0],
            near,
            other,
            near,
            near,
            None,
            1.0,
            None,
            [(0, 0, 2, 0, 0)],
            [],
            [],
            None,
            1,
            96,
            64,
            1024,
        ]
        if moves and not allowed:
            with pytest.raises(ValueError, match="address space"):
                _engine.attend(*call)
        else:
            assert _engine.attend(*call) == (0, -1)


if __name__ == "__main__":
    _engine.set_poison(True)
    isolated.main(case)
