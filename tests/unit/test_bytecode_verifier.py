"""The gate in front of the engine: code that does not verify is refused, and whatever passes it can be run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from attnkit import _engine
from attnkit.ir.program import Program
from attnkit.plan.bytecode import emit
from attnkit.testing.strategies import programs

OPCODES = _engine.opcodes()
MAX_INSTRUCTIONS = 4096
INT_EXTREMES = [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]


def rows(*instructions: tuple[Any, ...]) -> np.ndarray:
    """``(opcode name or number, attr, arguments...)``, one each, as rows of the code."""
    code = np.zeros((len(instructions), 8), np.int32)
    for row, (opcode, attr, *args) in zip(code, instructions, strict=True):
        row[:3] = OPCODES.get(opcode, opcode), attr, len(args)
        row[3 : 3 + len(args)] = args
    return code


def edited(code: np.ndarray, row: int, column: int, value: int) -> np.ndarray:
    code = code.copy()
    code[row, column] = value
    return code


def many_tiles(count: int) -> np.ndarray:
    """``count`` tiles that all live until they are added up, beside the first sum."""
    tiles: list[tuple[Any, ...]] = [("var_s", 0), *(("neg_f", 0, i) for i in range(count))]
    sums: list[tuple[Any, ...]] = [("add_f", 0, count - 1, count)]
    sums += [("add_f", 0, i, count + count - 1 - i) for i in range(count - 2, 0, -1)]
    return rows(*tiles, *sums)


S, TRUE, KEY, ZERO = ("var_s", 0), ("const_b", 1), ("var_kv_idx", 0), ("const_f", 0)

# message: (code, score, mask, buffers, params). The messages are those of csrc/cpu/bytecode.cc.
REFUSED: dict[str, tuple[np.ndarray, int, int, int, int]] = {
    "implausible number of buffers or parameters": (rows(), -1, -1, -1, 0),
    "the code is not a whole number of instructions": (rows(S, S).reshape(-1)[:-1], 0, -1, 0, 0),
    "more than 4096 instructions": (rows(*[ZERO] * (MAX_INSTRUCTIONS + 1)), 0, -1, 0, 0),
    "instruction 1: unknown opcode 250": (rows(S, (250, 0)), 0, -1, 0, 0),
    "instruction 0: implausible number of arguments": (edited(rows(S), 0, 2, 6), 0, -1, 0, 0),
    "instruction 1: buffer number out of range": (rows(KEY, ("load_f", 2, 0)), 1, -1, 2, 0),
    "instruction 1: wrong number of arguments for neg_f": (rows(S, ("neg_f", 0, 0, 0)), 1, -1, 0, 0),
    "instruction 0: parameter number out of range": (rows(("param", 1)), 0, -1, 0, 1),
    "instruction 0: a bool constant is 0 or 1": (rows(("const_b", 2)), -1, 0, 0, 0),
    "instruction 1: argument is not an earlier value": (rows(S, ("neg_f", 0, 1)), 1, -1, 0, 0),
    "instruction 1: argument of the wrong type for neg_i": (rows(S, ("neg_i", 0, 0)), -1, -1, 0, 0),
    "instruction 2: a buffer is read with two ranks or types": (
        rows(KEY, ("load_f", 0, 0), ("load_f", 0, 0, 0)), 1, -1, 1, 0,
    ),
    "instruction 0: nothing is carried that f could be": (rows(("var_f", 0)), 0, -1, 0, 0),
    "the score is not a float value": (rows(KEY), 0, -1, 0, 0),
    "the mask is not a bool value": (rows(KEY), -1, 0, 0, 0),
    "instruction 0: the mask reads the score": (rows(S, ZERO, ("lt_f", 0, 0, 1)), -1, 2, 0, 0),
    "the slope of the score is not a float value": (rows(KEY), -1, -1, 0, 0, 0),
    "what has a gradient is not a load of floats": (rows(KEY, ("load_i", 0, 0)), -1, -1, 1, 0, -1, [(1, 1)]),
    "the slope of a load is not a float value": (rows(KEY, ("load_f", 0, 0)), 1, -1, 1, 0, -1, [(1, 0)]),
    "the expression keeps 17 tiles alive at once, at most 16 fit": (many_tiles(16), 31, -1, 0, 0),
}  # fmt: skip

# The same messages, by other ways to get them.
ALSO_REFUSED = {
    "too many buffers": ("implausible number of buffers", (rows(), -1, -1, 4097, 0)),
    "params below zero": ("implausible number of buffers", (rows(), -1, -1, 0, -1)),
    "too many params": ("implausible number of buffers", (rows(), -1, -1, 0, 4097)),
    "opcode below zero": ("unknown opcode -1", (rows((-1, 0)), -1, -1, 0, 0)),
    "opcode one past the last": (f"unknown opcode {len(OPCODES)}", (rows((len(OPCODES), 0)), -1, -1, 0, 0)),
    "arguments below zero": ("implausible number of arguments", (edited(rows(S), 0, 2, -1), 0, -1, 0, 0)),
    "no buffers": ("buffer number out of range", (rows(("load_f", 0)), 0, -1, 0, 0)),
    "buffer below zero": ("buffer number out of range", (rows(("load_f", -1)), 0, -1, 1, 0)),
    "leaf with an argument": ("wrong number of arguments for var_s", (rows(S, ("var_s", 0, 0)), 0, -1, 0, 0)),
    "operator without": ("wrong number of arguments for neg_f", (rows(("neg_f", 0)), 0, -1, 0, 0)),
    "param below zero": ("parameter number out of range", (rows(("param", -1)), 0, -1, 0, 1)),
    "argument below zero": ("argument is not an earlier value", (rows(S, ("neg_f", 0, -1)), 1, -1, 0, 0)),
    "float index": ("argument of the wrong type for load_f", (rows(S, ("load_f", 0, 0)), 1, -1, 1, 0)),
    "int condition": (
        "argument of the wrong type for where_f", (rows(S, KEY, ("where_f", 0, 1, 0, 0)), 2, -1, 0, 0),
    ),
    "buffer of two types": (
        "read with two ranks or types", (rows(KEY, ("load_f", 0, 0), ("load_i", 0, 0)), 1, -1, 1, 0),
    ),
    "score past the end": ("the score is not a float value", (rows(S), 1, -1, 0, 0)),
    "slope below -1": ("the slope of the score is not", (rows(S), -1, -1, 0, 0, -2)),
    "gradient of a load past the end": ("is not a load of floats", (rows(S), -1, -1, 0, 0, -1, [(1, 0)])),
    "gradient of a load below zero": ("is not a load of floats", (rows(S), -1, -1, 0, 0, -1, [(-1, 0)])),
    "slope of a load past the end": (
        "the slope of a load is not", (rows(KEY, ("load_f", 0, 0)), 1, -1, 1, 0, -1, [(1, 2)]),
    ),
    "no slope of a load": ("the slope of a load is not", (rows(KEY, ("load_f", 0, 0)), 1, -1, 1, 0, -1, [(1, -1)])),
    "score below -1": ("the score is not a float value", (rows(S), -2, -1, 0, 0)),
    "mask past the end": ("the mask is not a bool value", (rows(TRUE), -1, 1, 0, 0)),
    "mask below -1": ("the mask is not a bool value", (rows(TRUE), -1, -2, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_and_said_why(message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _engine.Program(*REFUSED[message])


@pytest.mark.parametrize("name", ALSO_REFUSED)
def test_refused_by_other_ways(name: str) -> None:
    message, arguments = ALSO_REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        _engine.Program(*arguments)


def test_every_message_of_the_verifier_is_provoked() -> None:
    source = Path(__file__).parents[2] / "csrc/cpu/bytecode.cc"
    literals = re.findall(r'return [^;]*?"([^"]{4,})"', source.read_text())
    assert len(literals) >= 15
    missing = [text for text in literals if not any(text in message for message in REFUSED)]
    assert not missing


@pytest.mark.parametrize(
    ("code", "score"),
    [
        (rows(), -1),
        (rows(S), 0),
        (many_tiles(15), 29),
        (rows(*[ZERO] * MAX_INSTRUCTIONS), MAX_INSTRUCTIONS - 1),
    ],
    ids=["empty", "s itself", "the most tiles", "the most instructions"],
)
def test_accepted_and_run_at_the_limits(code: np.ndarray, score: int) -> None:
    program = _engine.Program(code, score, -1, 0, 0)
    assert program.num_instructions == len(program.ranks) == len(code)
    assert run(program) == (0, -1)


def test_ranks_are_what_a_value_varies_with() -> None:
    code = rows(("var_b", 0), ("var_q_idx", 0), KEY, ("add_i", 0, 0, 1), ("add_i", 0, 1, 2), S, ("var_h", 0))
    assert _engine.Program(code, -1, -1, 0, 0).ranks == [0, 1, 2, 1, 3, 3, 1]


# --- whatever is accepted runs ---------------------------------------------------------------------------

WORDS = st.one_of(st.integers(-2, 80), st.sampled_from(INT_EXTREMES), st.integers(-(2**31), 2**31 - 1))


@st.composite
def mutants(draw: st.DrawFn) -> tuple[Program, np.ndarray, int, int, int, int]:
    """The code of a valid program with a few words, rows or numbers changed, and the program."""
    program = draw(programs(max_ops=12))
    good = emit(program.attend, program, OPCODES)
    code, n = good.code.copy(), len(good.code)
    for _ in range(draw(st.integers(1, 3)) if n else 0):
        row, how = draw(st.integers(0, n - 1)), draw(st.sampled_from(("word", "near", "swap", "copy")))
        column, other = draw(st.integers(0, 7)), draw(st.integers(0, n - 1))
        if how == "word":
            code[row, column] = draw(WORDS)
        elif how == "near":
            code[row, column] = np.clip(
                int(code[row, column]) + draw(st.integers(-2, 2)), -(2**31), 2**31 - 1
            )
        elif how == "swap":
            code[[row, other]] = code[[other, row]]
        else:
            code[row] = code[other]
    roots = [draw(st.one_of(st.just(root), st.integers(-2, n))) for root in (good.score, good.mask)]
    counts = [draw(st.one_of(st.just(c), st.integers(-1, 5))) for c in (good.num_buffers, good.num_params)]
    return program, code, roots[0], roots[1], counts[0], counts[1]


@given(mutants())
def test_changed_code_is_refused_or_runs(mutant: tuple[Program, np.ndarray, int, int, int, int]) -> None:
    source, code, score, mask, num_buffers, num_params = mutant
    try:
        program = _engine.Program(code, score, mask, num_buffers, num_params)
    except ValueError:
        return
    dtypes = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "bool": np.bool_}
    declared = [np.ones((3,) * b.rank, dtypes[b.dtype]) for b in source.buffers]
    arrays = (declared + [np.ones(3, np.float32)] * num_buffers)[:num_buffers]
    try:
        fault, _ = run(program, arrays, [0.5] * num_params)
    except ValueError as refused:
        if "does not match the program" not in str(refused):
            raise
    else:
        assert 0 <= fault <= 4


@given(st.lists(WORDS, max_size=64), WORDS, WORDS)
def test_noise_is_refused_or_runs(words: list[int], score: int, mask: int) -> None:
    try:
        program = _engine.Program(np.array(words, np.int32), score, mask, 0, 0)
    except ValueError:
        return
    run(program)


def run(program: Any, buffers: list[np.ndarray] | None = None, params: list[float] | None = None) -> Any:
    """(fault, instruction) of attention over two heads, five queries and nineteen keys."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 4), dtype=np.float32) for n in (5, 19, 19))
    o = np.empty_like(q)
    return _engine.attend(program, *call(q, k, v, o, buffers or [], params or []))


DTYPES = {"float32": 0, "int32": 1, "int64": 2, "bool": 3}  # as csrc/cpu/problem.h counts them


def call(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, buffers: list[np.ndarray], params: list[float]
) -> list[Any]:
    """The arguments of `_engine.attend` after the program."""
    tensors = [tensor(x) for x in (q, k, v, o)]
    return [
        *tensors,
        None,
        0.5,
        None,
        None,
        [tensor(x) for x in buffers],
        params,
        None,
        1,
        96,
        64,
        1024,
        None,
    ]


def tensor(x: np.ndarray) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return x.ctypes.data, DTYPES[x.dtype.name], x.shape, elements(x)


def elements(x: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // x.itemsize for stride in x.strides)


# --- the binding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (rows(S),),
        (None, 0, -1, 0, 0),
        ("code", 0, -1, 0, 0),
        (rows(S), "0", -1, 0, 0),
        (rows(S), 0.5, -1, 0, 0),
        (rows(S), 0, None, 0, 0),
        (rows(S), 0, -1, 2**40, 0),
        (rows(S), 0, -1, 0, []),
    ],
    ids=repr,
)
def test_program_of_wrong_types(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError)):
        _engine.Program(*arguments)


# Which argument of `_engine.attend` (after the program), what it becomes, and the message for a wrong value; of a tensor
# the part: 0 address, 1 dtype, 2 shape, 3 strides.
WRONG_CALLS: dict[str, tuple[tuple[int, ...], Any, str]] = {
    "address a string": ((0, 0), "q", ""),
    "address below zero": ((0, 0), -1, ""),
    "address None": ((1, 0), None, ""),
    "tensor None": ((1,), None, ""),
    "tensor of three parts": ((1,), (64, 0, (1, 2, 19, 4)), ""),
    "tensor an array": ((1,), np.zeros((1, 2, 19, 4), np.float32), ""),
    "dtypes differ": ((1, 1), 4, "dtype"),
    "dtype of o": ((3, 1), 4, "dtype"),
    "shape an int": ((0, 2), 4, ""),
    "shape of floats": ((0, 2), (1.5, 2.0, 5.0, 4.0), ""),
    "shape of three": ((0, 2), (2, 5, 4), "four dimensions"),
    "stride of three": ((0, 3), (1, 2, 3), "four strides"),
    "batches differ": ((1, 2), (2, 2, 19, 4), "batch"),
    "k and v differ": ((2, 2), (1, 2, 18, 4), "heads or length"),
    "no kv heads": ((1, 2), (1, 0, 19, 4), "heads"),
    "head dims differ": ((1, 2), (1, 2, 19, 3), "head_dim"),
    "shape of o": ((3, 2), (1, 2, 5, 3), "shape of the output"),
    "no strides of o": ((3, 3), (), "four strides"),
    "lse without strides": ((4,), (64, 0, (1, 2, 5), ()), "three strides"),
    "shape of lse": ((4,), (64, 0, (1, 2, 4), (8, 4, 1)), "lse"),
    "dtype of lse": ((4,), (64, 4, (1, 2, 5), (10, 5, 1)), "lse"),
    "scale a string": ((5,), "1", ""),
    "heads of the sink": ((6,), (64, 0, (3,), (1,)), "sink"),
    "stride of the sink": ((6,), (64, 0, (2,), (2,)), "sink"),
    "sequence outside": ((7,), [(0, 0, 5, 1, 19)], "outside the tensors"),
    "sequence of another batch": ((7,), [(1, 0, 5, 0, 19)], "outside the tensors"),
    "sequence below zero": ((7,), [(0, 0, -1, 0, 19)], "outside the tensors"),
    "sequence of four": ((7,), [(0, 0, 5, 0)], ""),
    "a buffer too many": ((8,), [(0, 0, (), ())], "number of buffers"),
    "buffers None": ((8,), None, ""),
    "a param too many": ((9,), [1.0], "number of parameters"),
    "params of strings": ((9,), ["1"], ""),
    "dropout a number": ((10,), 0.5, ""),
    "dropout of two": ((10,), (1, 2), ""),
    "dropout of a negative seed": ((10,), (-1, 2, 1.0), ""),
    "dropout of a large threshold": ((10,), (1, 2**32, 1.0), ""),
    "threads a float": ((11,), 1.5, ""),
    "tile_q 0": ((12,), 0, "tile_q"),
    "tile_q 129": ((12,), 129, "tile_q"),
    "tile_kv 0": ((13,), 0, "tile_kv"),
    "tile_kv 193": ((13,), 193, "tile_kv"),
    "split_kv 0": ((14,), 0, "split_kv"),
    "split_kv 2^31": ((14,), 2**31 - 1, "split_kv"),
    "page table of floats": ((15,), (64, 0, (1, 2), (2, 1)), "page table"),
    "page table of another batch": ((15,), (64, 1, (2, 2), (2, 1)), "page table"),
    "page table of one dimension": ((15,), (64, 1, (1,), (1,)), "page table"),
    "pages of 19 tokens": ((15,), (64, 1, (1, 2), (2, 1)), "power of two"),
    "page table a number": ((15,), 3, ""),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_calls_of_wrong_types_and_values(name: str) -> None:
    where, value, message = WRONG_CALLS[name]
    q, k, v, o = (np.zeros((1, 2, n, 4), np.float32) for n in (5, 19, 19, 5))
    arguments = call(q, k, v, o, [], [])
    at, *part = where
    arguments[at] = (*arguments[at][: part[0]], value, *arguments[at][part[0] + 1 :]) if part else value
    program = _engine.Program(rows(S), 0, -1, 0, 0)
    with pytest.raises(ValueError if message else TypeError, match=message or None):
        _engine.attend(program, *arguments)
    with pytest.raises(TypeError):
        _engine.attend(program, *arguments[:-2])
    with pytest.raises(TypeError):
        _engine.attend(None, *arguments)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([(0, 6, (3,), (1,))], "unknown buffer dtype"),
        ([(0, 0, (3,), ())], "at most five dimensions"),
        ([(0, 0, (1,) * 6, (1,) * 6)], "at most five dimensions"),
        ([(0, 1, (3,), (1,))], "does not match the program"),
        ([(0, 0, (3, 3), (3, 1))], "does not match the program"),
    ],
)
def test_buffers_that_do_not_match(held: list[Any], message: str) -> None:
    program = _engine.Program(rows(KEY, ("load_f", 0, 0)), 1, -1, 1, 0)
    q, k, v, o = (np.zeros((1, 2, n, 4), np.float32) for n in (5, 19, 19, 5))
    arguments = call(q, k, v, o, [], [])
    arguments[8] = held
    with pytest.raises(ValueError, match=message):
        _engine.attend(program, *arguments)


@pytest.mark.parametrize("name", ["no_such", "var_s", "load_f", "const_i"])
def test_opcodes_that_cannot_be_evaluated(name: str) -> None:
    with pytest.raises(ValueError, match="opcode"):
        _engine.evaluate(name, [np.zeros(4, np.float32)])


def test_evaluate_of_wrong_arguments() -> None:
    one = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="differ in length"):
        _engine.evaluate("add_f", [one, np.zeros(5, np.float32)])
    with pytest.raises(ValueError, match="that many arguments"):
        _engine.evaluate("add_f", [one])
    with pytest.raises(TypeError):
        _engine.evaluate("neg_f", one.tolist()[0])
    with pytest.raises(TypeError):
        _engine.evaluate(3, [one])
    with pytest.raises(ValueError, match="instruction set"):
        _engine.set_isa("nonsense")
