"""The verifier accepts what is legal. What it refuses, code by code, is in tests/error/test_ir_errors.py."""

from hypothesis import given

from attnkit.ir.expr import const, load, make, topological, var
from attnkit.ir.program import Attend, Buffer, Layout, Normalizer, Program, Return
from attnkit.ir.verify import MAX_NODES, verify
from attnkit.testing.strategies import programs


@given(programs())
def test_generated_programs_are_legal(p: Program) -> None:
    verify(p)


def test_a_program_with_everything() -> None:
    lengths = Layout("packed", 1)
    mask = make("eq", *(load(2, var(name), dtype="int") for name in ("q_idx", "kv_idx")))
    attend = Attend(
        (0, 1, 2),
        0.5,
        score=make("add", var("s"), load(0, var("h"))),
        mask=mask,
        normalizer=Normalizer(sink=0),
    )
    buffers = (Buffer("f32", 1), Buffer("i32", 1), Buffer("i64", 1))
    verify(Program((lengths, lengths, lengths), buffers, 0, (attend, Return((3,)))))


def test_v_may_be_k() -> None:
    layouts = (Layout(), Layout(), Layout())
    verify(Program(layouts, (), 0, (Attend((0, 1, 1)), Return((3, 4)))))


def test_the_largest_program() -> None:
    score = var("s")
    for i in range((MAX_NODES - 2) // 2):
        score = make("add", score, const(i + 0.5))
    score = make("neg", score)
    assert len(topological([score])) == MAX_NODES
    verify(Program((Layout(),) * 3, (), 0, (Attend((0, 1, 2), score=score), Return((3,)))))
