"""Calls of the engine's functions of attention with wrong arguments now and then, and how each ended."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import recorded_calls
import torch
from arguments import (
    DROPOUTS,
    DTYPES,
    FAULTS,
    KEY,
    MIDDLE,
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

from attnkit import _engine

# --- attend ----------------------------------------------------------------------------------------------

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
        is_list = argument[1] == recorded_calls.NUMBERS[torch.int32]
        return (argument[0], *bad[1:]) if is_list and recorded_calls.is_tensor(bad) else bad
    if isinstance(argument, (list, tuple)):
        if not argument or rng.integers(4) == 0:
            return of(rng, [None, (), [], argument[:-1], "x", 3, [None]])
        at = int(rng.integers(len(argument)))
        return type(argument)([*argument[:at], worse(rng, argument[at]), *argument[at + 1 :]])
    if isinstance(argument, int):  # and bool
        return integer(rng, [64, 10**6, 2**31])
    return of(rng, [None, "x", 0.5, np.nan, 10**400, PROGRAMS[0][0], PROGRAMS[1][0], 3, []])
