"""Which instructions the engine runs as one, and that what others need is still there."""

import pytest

from attnkit import _engine
from attnkit.ir.text import parse
from attnkit.plan.bytecode import Bytecode, emit

OPCODES = _engine.opcodes()


def code_of(score: str, mask: str = "true", gradients: frozenset[int] | None = None) -> Bytecode:
    program = parse(
        "attnkit 1 program (q: bhsd, k: bhsd, v: bhsd) buffers(b0: f32[1], b1: f32[2]) params(p0: f32) {"
        f"o, lse = attend(q, k, v, scale = default) {{ score = {score} mask = {mask} }} return o }}"
    )
    return emit(program.attend, program, OPCODES, gradients)


def passes(code: Bytecode) -> list[tuple[int, str, list[int]]]:
    return _engine.Program(
        code.code, code.score, code.mask, code.num_buffers, code.num_params, code.slope, code.loads
    ).passes


GAP = "float(abs(q_idx - kv_idx))"
RAMP = "float(q_idx - kv_idx)"
CASES = {
    # softcap, by a constant, a param, a load
    "tanh(s / 10.0) * 10.0": "softcap",
    "p0 * tanh(s / p0)": "softcap",
    "b0[h] * tanh(s / b0[h])": "softcap",
    "10.0 * tanh(s / 5.0)": "div_f tanh_f mul_f",
    "10.0 * tanh(10.0 / s)": "div_f tanh_f mul_f",
    "tanh(s / 10.0) * 10.0 + s / 10.0": "div_f tanh_f mul_add",
    # ALiBi
    f"s - b0[h] * {GAP}": "sub_gap",
    f"s + {GAP} * b0[h]": "add_gap",
    f"b0[h] * {GAP} + s": "add_gap",
    f"b0[h] * {GAP} - s": "sub_i abs_i i_to_f mul_f sub_f",
    f"s + 0.5 * {RAMP}": "add_ramp",
    f"s - {RAMP} * 0.5": "add_ramp",
    f"s + {RAMP}": "sub_i i_to_f add_f",
    f"tanh(s / 10.0) * 10.0 - b0[h] * {GAP}": "softcap sub_gap",
    f"s - {GAP} * {GAP}": "sub_i abs_i i_to_f mul_sub_from",
    # products and sums
    "s * p0 + 1.0": "mul_add",
    "1.0 - p0 * s": "mul_sub_from",
    "s * p0 - 1.0": "mul_f sub_f",
    "s * 2.0 + s * 3.0": "mul_f mul_add",
    "s + 2.0 * float(q_idx)": "add_f",  # the product is not of a tile
}


@pytest.mark.parametrize("score", CASES)
def test_what_becomes_one(score: str) -> None:
    assert " ".join(name for _, name, _ in passes(code_of(score))) == CASES[score]


MASKS = {
    "(kv_idx >= q_idx - 3) & (kv_idx <= q_idx)": "within",
    "(kv_idx <= q_idx) & (kv_idx >= q_idx - 3)": "within",
    "(kv_idx >= q_idx - 3) & (q_idx >= kv_idx)": "ge_i ge_i and_b",
    "(kv_idx >= q_idx - 3) & (q_idx <= kv_idx)": "ge_i le_i and_b",  # of two values
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_become_one(mask: str) -> None:
    assert " ".join(name for _, name, _ in passes(code_of("s", mask))) == MASKS[mask]


def test_operands() -> None:
    code = code_of(f"tanh(s / 10.0) * 10.0 - {RAMP} * b0[h]")
    (cap, _, of_cap), (ramp, _, of_ramp) = passes(code)
    names = {number: name for name, number in OPCODES.items()}
    assert [names[code.code[a, 0]] for a in of_cap] == ["var_s", "const_f"]
    assert [names[code.code[a, 0]] for a in of_ramp] == ["mul_f", "load_f", "var_kv_idx", "var_q_idx"]
    assert of_ramp[0] == cap
    assert ramp == code.score


def test_what_the_mask_needs_stays() -> None:
    found = [name for _, name, _ in passes(code_of(f"s - b0[h] * {GAP}", f"b0[h] * {GAP} < 3.0"))]
    assert found == ["sub_i", "abs_i", "i_to_f", "mul_f", "lt_f", "sub_f"]


def test_what_derivatives_need_stays() -> None:
    score = "tanh(s / 10.0) * 10.0 + s * b1[q_idx, kv_idx]"
    assert [name for _, name, _ in passes(code_of(score))] == ["softcap", "load_f", "mul_add"]
    code = code_of(score, gradients=frozenset({1}))
    found = {value: name for value, name, _ in passes(code)}
    assert "softcap" not in found.values()  # its slope has a use for the tanh
    assert {code.score, code.slope, *(number for load in code.loads for number in load)} <= {*found, 0}


def test_no_program_holds_a_fused_opcode() -> None:
    assert not {"softcap", "mul_add", "add_gap", "exp_weight"} & set(OPCODES)
