"""Every function of ``attnkit._engine`` with wrong arguments: ValueError or TypeError, or a result; never a crash.

What the binding cannot know is whether the memory behind an address is as large as the sizes say. Sizes here are
therefore small enough for the tensors that are there, or so large that no tensor has them.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnkit import _engine
from attnkit.testing import isolated

sys.path.insert(0, str(Path(__file__).parent))
import recorded_calls
import wrong_caches
import wrong_calls
from arguments import KEY, NOT_INTS, OPCODES, PROGRAMS, Rng, S, buffer_tuple, integer, of, rows

HALF = ("const_f", int(np.float32(0.5).view(np.int32)))


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


NO_ARGUMENTS = ("opcodes", "isa_levels", "current_isa", "last_isa", "cores")


def no_arguments(rng: Rng) -> str:
    function = getattr(_engine, of(rng, NO_ARGUMENTS))
    return type(function(*(integer(rng) for _ in range(rng.integers(0, 2))))).__name__


FUZZERS: dict[str, Callable[[Rng], str]] = {
    "attend": wrong_calls.attend, "attend_backward": wrong_calls.attend_backward,
    "Launch": wrong_calls.launch, "LaunchBackward": wrong_calls.launch_backward, "Seen": wrong_calls.seen,
    "recur": wrong_calls.recur, "recur_backward": wrong_calls.recur_backward, "select": wrong_calls.select,
    "attend_cache": wrong_caches.attend_cache, "kv_append": wrong_caches.kv_append,
    "Program": program, "block_runs": block_runs, "gathered_tiles": gathered_tiles, "evaluate": evaluate,
    "set_isa": set_isa, "set_poison": set_poison, "most_tokens": most_tokens, "read_gbytes_per_s": read_gbytes_per_s,
    "fma_gflops": partial(gflops, _engine.fma_gflops), "bf16_gflops": partial(gflops, _engine.bf16_gflops),
    **{name: partial(wrong_calls.recorded, name) for name in recorded_calls.NAMES},
    **dict.fromkeys(NO_ARGUMENTS, no_arguments),
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
