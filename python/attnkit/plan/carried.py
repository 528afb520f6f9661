"""What a program must look like for a kernel of attention that carries: one `attend` over q, k, v, and what was carried before."""

from __future__ import annotations

from functools import reduce

from attnkit.ir.expr import Expr, const, make, topological, var
from attnkit.ir.program import Attend, Program

RESULTS = ("o", "lse", "carry")


def carries(program: Program) -> bool:
    """Whether an attention of the program carries something from query to query."""
    return any(isinstance(op, Attend) and op.carry is not None for op in program.ops)


def reasons(program: Program) -> tuple[str, ...]:
    """Why no kernel runs a program that carries; empty if one may."""
    op = program.ops[0]
    if not isinstance(op, Attend) or len(program.ops) != 2 or op.operands != (0, 1, 2):
        return ("the program is more than one attention that carries, over q, k and v",)
    plain = Attend(
        op.operands, op.scale, initial=op.initial, head=op.head, budget=op.budget, outputs=op.outputs, score=op.score,
        mask=op.mask, carry=op.carry, normalizer=op.normalizer,
    )  # fmt: skip
    found = []
    if op != plain or op.normalizer.kind != "softmax":
        found.append("beside a carry there is only softmax with a score, a mask and a sink")
    if op.outputs not in (RESULTS, RESULTS[:2]) or op.initial not in (None, 3):
        found.append("an attention that carries returns o, lse and the carry, and starts with an input")
    if len(program.inputs) != (3 if op.initial is None else 4):
        found.append("the program has inputs that its attention does not read")
    if op.mask is None:
        found.append("queries see keys that come after them: there is no mask")
    return tuple(found)


def selecting(attend: Attend) -> Attend:
    """The attention whose score is what a pair adds to the carry.

    Pairs that add nothing, whatever s is, need not exist; but a budget counts all.
    """
    assert attend.carry is not None
    score, mask = attend.carry, attend.mask
    if attend.budget is None and score.op == "where" and score.args[2] is const(0.0):
        condition, added, nothing = score.args
        parts = _conjuncts(condition)
        of_pair = [part for part in parts if var("s") not in topological([part])]
        of_score = [part for part in parts if part not in of_pair]
        for part in of_pair:
            mask = part if mask is None else make("and", mask, part)
        score = added
        if of_score:
            score = make("where", reduce(lambda a, b: make("and", a, b), of_score), added, nothing)
    return Attend(attend.operands, attend.scale, score=score, mask=mask)


def _conjuncts(condition: Expr) -> list[Expr]:
    if condition.op != "and":
        return [condition]
    return [part for arg in condition.args for part in _conjuncts(arg)]
