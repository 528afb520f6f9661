"""Bytecode: well-formed rows, and the same values as the reference when interpreted row by row."""

import numpy as np
import pytest
from hypothesis import given

from attnkit.backends.reference import evaluate
from attnkit.errors import AttnkitNotImplementedError
from attnkit.ir.expr import topological, var
from attnkit.ir.optable import OPS, VARIABLES
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.plan.bytecode import disassemble, emit, opcode_name
from attnkit.testing.strategies import PAIR_VARIABLES, programs

TYPED = {
    "fi": "neg abs add sub mul floordiv mod min max lt le gt ge eq ne where",
    "f": "div pow exp exp2 log log2 sqrt rsqrt tanh sigmoid erf sin cos floor",
    "i": "and or xor",
    "b": "and or xor not eq ne where",
}
NAMES = [
    *(f"{leaf}_{t}" for leaf in ("const", "load") for t in "fib"),
    *(f"var_{name}" for name in (*PAIR_VARIABLES, "f")),
    "param",
    *sorted({f"{base}_{t}" for types, bases in TYPED.items() for base in bases.split() for t in types}),
    *("i_to_f", "b_to_f", "b_to_i", "f_to_i"),
]
OPCODES = {name: number for number, name in enumerate(NAMES)}


def test_the_engine_has_the_opcodes_of_the_table() -> None:
    engine = pytest.importorskip("attnkit._engine")
    assert set(engine.opcodes()) == set(NAMES)


@given(programs())
def test_rows_are_well_formed(p: Program) -> None:
    bytecode = emit(p.attend, p, OPCODES)
    assert bytecode.code.dtype == np.int32
    assert bytecode.code.shape[1] == 8
    assert (bytecode.score == -1) == (p.attend.score is var("s"))
    assert (bytecode.mask == -1) == (p.attend.mask is None)
    for i, (opcode, attr, nargs, *args) in enumerate(bytecode.code.tolist()):
        name = NAMES[opcode]
        assert all(0 <= arg < i for arg in args[:nargs])
        assert not any(args[nargs:])
        if name.startswith("load_"):
            assert nargs == p.buffers[attr].rank
        if name == "param":
            assert 0 <= attr < bytecode.num_params


@given(programs(max_ops=12))
def test_running_the_code_gives_what_the_reference_gives(p: Program) -> None:
    rng = np.random.default_rng(0)
    variables = {name: 1.5 if dtype == "float" else 2 for name, dtype in VARIABLES.items()}
    kinds = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "bool": np.bool_}
    buffers = [rng.integers(0, 3, (3,) * b.rank).astype(kinds[b.dtype]) for b in p.buffers]
    params = rng.standard_normal(p.num_params).astype(np.float32).tolist()
    bytecode = emit(p.attend, p, OPCODES)
    by_opcode = {opcode_name(node): node for node in topological(p.attend.roots)}
    values = []
    with np.errstate(all="ignore"):
        for opcode, attr, nargs, *args in bytecode.code.tolist():
            name = NAMES[opcode]
            node = by_opcode[name]
            operands = [values[a] for a in args[:nargs]]
            if name == "const_f":
                value = np.float64(np.int32(attr).view(np.float32))
            elif name.startswith("const_"):
                value = bool(attr) if name[-1] == "b" else np.int64(attr)
            elif name.startswith("var_"):
                value = variables[name[4:]]
            elif name == "param":
                value = params[attr]
            elif name.startswith("load_"):
                value = buffers[attr][tuple(np.clip(i, 0, 2) for i in operands)]
            else:
                value = OPS[node.op].numpy(*operands)
            kind = {"float": np.float64, "int": np.int64, "bool": np.bool_}[node.dtype]
            values.append(np.asarray(value, dtype=kind))
    rounded = all(
        node.op != "const" or node.dtype != "float" or np.float32(node.attr) == node.attr
        for node in topological(p.attend.roots)
    )
    if rounded:  # else the constants of the code are those of float32
        for index, root in ((bytecode.score, p.attend.score), (bytecode.mask, p.attend.mask)):
            if index >= 0:
                np.testing.assert_array_equal(values[index], evaluate([root], variables, buffers, params)[0])


def test_disassembly() -> None:
    p = parse(
        "attnkit 1 program (q: bhsd, k: bhsd, v: bhsd) buffers(b0: f32[1]) params(p0: f32) {"
        "o, lse = attend(q, k, v, scale = default) {"
        "score = p0 * s + b0[h] * 0.5 mask = kv_idx <= q_idx + 3 } return o }"
    )
    listing = disassemble(emit(p.attend, p, OPCODES), OPCODES)
    assert listing.splitlines()[:3] == ["%0 = param p0", "%1 = var_s", "%2 = mul_f %0 %1"]
    assert "load_f b0 %3" in listing
    assert "const_f 0.5" in listing
    assert "const_i 3" in listing
    assert listing.endswith("score = %7\nmask = %12")


def test_plain_softmax_needs_no_code() -> None:
    p = parse(
        "attnkit 1 program (q: bhsd, k: bhsd, v: bhsd) {"
        "o, lse = attend(q, k, v, scale = default) { normalizer = softmax } return o }"
    )
    bytecode = emit(p.attend, p, {})
    assert bytecode.code.shape == (0, 8)
    assert disassemble(bytecode, {}) == "score = s"


def test_constants_beyond_float32_become_infinite() -> None:
    p = parse(
        "attnkit 1 program (q: bhsd, k: bhsd, v: bhsd) {"
        "o, lse = attend(q, k, v, scale = default) { score = s * 1e300 } return o }"
    )
    assert "const_f inf" in disassemble(emit(p.attend, p, OPCODES), OPCODES)


def test_an_engine_without_an_opcode_is_a_typed_error() -> None:
    p = parse(
        "attnkit 1 program (q: bhsd, k: bhsd, v: bhsd) {"
        "o, lse = attend(q, k, v, scale = default) { score = erf(s) } return o }"
    )
    with pytest.raises(AttnkitNotImplementedError, match="erf_f"):
        emit(p.attend, p, {"var_s": 0})
