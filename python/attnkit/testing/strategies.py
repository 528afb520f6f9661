"""Hypothesis strategies for programs and expressions, for tests of attnkit and of what is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from hypothesis import strategies as st

from attnkit.errors import AttnkitError
from attnkit.ir.expr import Expr, const, load, make, param, var
from attnkit.ir.intervals import INT32_MAX, INT32_MIN
from attnkit.ir.optable import OPS, DType
from attnkit.ir.program import ELEMENT, Attend, Buffer, BufferDType, Layout, Normalizer, Program, Return
from attnkit.ir.verify import verify
from attnkit.testing.generate import random_program

_BUFFER_DTYPES: tuple[BufferDType, ...] = ("f32", "i32", "i64", "bool")
PAIR_VARIABLES = ("s", "b", "h", "q_idx", "kv_idx", "q_len", "kv_len")
_KINDS: tuple[tuple[Any, Any], ...] = (("bhsd", "bhsd"), ("bhsd", "padded"), ("packed", "packed"))


def constants() -> st.SearchStrategy[Expr]:
    """Constants of every dtype, infinities, NaN and both zeros among them; ints fit 32 bits."""
    ints = st.one_of(st.integers(-4, 70), st.integers(INT32_MIN, INT32_MAX))
    floats = st.one_of(st.sampled_from([0.0, -0.0, 0.5, -1.0, 30.0]), st.floats())
    return st.one_of(ints, floats, st.booleans()).map(const)


def buffers(max_size: int = 4, max_rank: int = 5) -> st.SearchStrategy[list[Buffer]]:
    """Types of captured tensors."""
    one = st.builds(Buffer, st.sampled_from(_BUFFER_DTYPES), st.integers(0, max_rank))
    return st.lists(one, max_size=max_size)


@st.composite
def expressions(
    draw: st.DrawFn,
    dtype: DType = "float",
    variables: Sequence[str] = PAIR_VARIABLES,
    buffers: Sequence[Buffer] = (),
    num_params: int = 0,
    max_ops: int = 30,
    ops: Sequence[str] = tuple(OPS),
) -> Expr:
    """An expression of a given dtype: up to ``max_ops`` operators from ``ops`` over shared operands."""
    pool = [var(name) for name in variables] + [param(i) for i in range(num_params)]
    pool += draw(st.lists(constants(), min_size=1, max_size=4))
    pool.append(make("lt", pool[0], pool[-1]))  # a bool, for what takes only bools
    loadable = [-1] * (len(ops) // 8) + list(range(len(buffers))) if buffers else []
    for _ in range(draw(st.integers(0, max_ops))):
        slot = draw(st.sampled_from(loadable)) if loadable else -1
        if slot >= 0:
            ints = [node for node in pool if node.dtype == "int"] or [const(0)]
            index = [_recent(draw, ints) for _ in range(buffers[slot].rank)]
            pool.append(load(slot, *index, dtype=ELEMENT[buffers[slot].dtype]))
            continue
        info = OPS[draw(st.sampled_from(ops))]
        bools = [node for node in pool if node.dtype == "bool"]
        args = [_recent(draw, pool) for _ in range(info.arity)]
        try:
            pool.append(make(info.name, *args))
        except AttnkitError:  # it takes bools
            args = [bools[-1] if arg.dtype != "bool" and info.name != "where" else arg for arg in args]
            pool.append(make(info.name, _recent(draw, bools), *args[1:]))
    root = pool[-1]
    if dtype == root.dtype:
        return root
    return make("ne", root, const(0)) if dtype == "bool" else make(dtype, root)


def _recent(draw: st.DrawFn, pool: Sequence[Expr]) -> Expr:
    """A member of the pool; often one of the last, so that expressions become deep."""
    recent = pool[-3:] if draw(st.booleans()) else pool
    return draw(st.sampled_from(recent))


@st.composite
def programs(draw: st.DrawFn, max_ops: int = 30) -> Program:
    """A verified program: any layouts, buffers, params, score, mask, scale and sink."""
    declared = draw(buffers())
    q_kind, kv_kind = draw(st.sampled_from(_KINDS))
    inputs = []
    for kind in (q_kind, kv_kind):
        lengths = None
        if kind != "bhsd":
            lengths = len(declared)
            declared.append(Buffer("i32", 1))
        inputs.append(Layout(kind, lengths))
    sink = None
    if draw(st.booleans()):
        sink = len(declared)
        declared.append(Buffer("f32", 1))
    num_params = draw(st.integers(0, 2))
    shared: dict[str, Any] = {"buffers": declared, "num_params": num_params, "max_ops": max_ops}
    score = draw(st.one_of(st.just(var("s")), expressions("float", **shared)))
    indices = PAIR_VARIABLES[1:]
    mask = draw(st.one_of(st.none(), expressions("bool", indices, **shared)))
    scale = draw(st.one_of(st.none(), st.floats(1e-30, 1e30)))
    attend = Attend((0, 1, 2), scale, score=score, mask=mask, normalizer=Normalizer(sink=sink))
    values = draw(st.sampled_from([(3,), (3, 4)]))
    program = Program(
        (inputs[0], inputs[1], inputs[1]), tuple(declared), num_params, (attend, Return(values))
    )
    verify(program)
    return program


def any_programs(max_ops: int = 4, tame: bool = False) -> st.SearchStrategy[Program]:
    """A verified program of any operations; `arrays.random_inputs` makes inputs for it."""

    def build(rng: Random) -> Program:
        program = random_program(rng, max_ops, tame)
        verify(program)
        return program

    return st.randoms(use_true_random=False).map(build)
