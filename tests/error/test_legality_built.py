"""Illegal programs that only Python can build, since the text has no words for them, and illegal declarations."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from attnkit.ir.expr import const, param
from attnkit.ir.program import (
    CODECS,
    LAYOUT_BUFFERS,
    Attend,
    Buffer,
    Codec,
    Encode,
    Layout,
    LayoutKind,
    Map,
    Merge,
    Normalizer,
    Operation,
    Pool,
    Program,
    Recur,
    Return,
    Select,
)  # fmt: skip
from attnkit.ir.verify import verify


def declarations() -> Iterator[tuple[str, Program]]:
    """Layouts and what they name."""
    rest = (Attend((0, 1, 2)), Return((3,)))
    buffers = (Buffer("i32", 1), Buffer("i32", 2), Buffer("f32", 1), Buffer("i64", 1), Buffer("i32", 0))

    def of(layout: Layout) -> Program:
        return Program((Layout(), layout, layout), buffers, 0, rest)

    for kind, wanted in LAYOUT_BUFFERS.items():
        for lengths, table in ((None, None), (0, None), (None, 1), (0, 1)):
            if len(wanted) != (lengths is not None) + (table is not None) or (wanted and lengths is None):
                yield "AK211", of(Layout(kind, lengths, table))
        if kind not in ("bhsd", "packed", "padded", "paged", "hsd"):
            for name in CODECS:
                yield "AK225", of(Layout(kind, codec=Codec(name, "token", 0)))
    one: tuple[LayoutKind, ...] = ("packed", "padded")
    for kind, held in itertools.product(one, (-1, 1, 2, 3, 4, 5)):
        yield "AK206" if held in (-1, 5) else "AK210", of(Layout(kind, held))
    for lengths, table in ((1, 1), (0, 0), (0, 2), (2, 1), (4, 1), (0, 4)):
        yield "AK210", of(Layout("paged", lengths, table))
    for lengths, table in ((0, 5), (5, 1), (-1, 1), (0, -2)):
        yield "AK206", of(Layout("paged", lengths, table))
    for codec in (
        Codec("int3", "token", 0),
        Codec("int8", "tile", 0),
        Codec("int4", "token", -1),
        Codec("fp8", "", 0),
    ):
        yield "AK225", of(Layout(codec=codec))


def built() -> Iterator[tuple[str, Program]]:
    """What only Python can say, since the text has no words for it."""
    three = (Layout(),) * 3
    sink, cut = (Buffer("f32", 1), Buffer("i32", 1)), Normalizer("tanh")
    wrong: list[tuple[str, Operation]] = [
        ("AK226", Attend((0, 1, 2), normalizer=cut)),
        ("AK226", Attend((0, 1, 2), normalizer=Normalizer("", sink=0))),
        ("AK226", Attend((0, 1, 2), normalizer=Normalizer("softmax", epsilon=0.5))),
        ("AK223", Attend((0, 1, 2), head=-1)),
        ("AK218", Attend((0, 1, 2), carry=const(1.0), head=-1)),
        ("AK218", Attend((0, 1, 2), carry=const(1.0), budget=-3)),
        ("AK218", Attend((0, 1, 2), carry=const(1.0), head=1.5)),  # type: ignore[arg-type]
        ("AK218", Attend((0, 1, 2), outputs=("o", "tiles"))),
        ("AK206", Attend((0, 1, -1))),
        ("AK206", Attend((0, 1, 2), blocks=3)),
        ("AK206", Attend((0, 1, 2), groups=(0, 7))),
        ("AK206", Attend((0, 1, 2), initial=-2)),
        ("AK206", Attend((0, 1, 2), dropout=param(0))),
        ("AK206", Attend((0, 1, 2), normalizer=Normalizer(sink=2))),
        ("AK206", Attend((0, 1, 2), normalizer=Normalizer(sink=-1))),
        ("AK206", Recur((0, 1, 2), gate=5)),
        ("AK206", Recur((0, 1, 2), initial_norm=-1, normalize=True)),
        ("AK206", Merge((3, 4))),
        ("AK206", Select((0, 1), threshold=param(3))),
        ("AK218", Map((0,), norm="l1")),
        ("AK218", Pool((0,), size=-4)),
        ("AK218", Pool((0,), size=2.5)),  # type: ignore[arg-type]
        ("AK218", Pool((0,), size=2**31)),
        ("AK218", Pool((0,), how="median")),
        ("AK218", Select((0, 1), top_k=const(1), per="tile")),
        ("AK218", Select((0, 1), top_k=const(1), heads="all")),
        ("AK218", Select((0, 1), top_k=const(1), prefix=-1)),
        ("AK218", Encode((0,), Codec("int8", "tile", 64), center="median")),
        ("AK225", Encode((0,), Codec("int3", "tile", 64))),
        ("AK225", Encode((0,), Codec("int8", "tile", -64))),
    ]
    for code, op in wrong:
        values = tuple(range(3, 3 + len(op.results)))
        yield code, Program(three, sink, 0, (op, Return(values)))
    attend = Attend((0, 1, 2))
    for values in ((), (0,), (2, 3), (3, 3), (4, 3, 4), (5,), (-1,), (3, 4, 5)):
        yield "AK214", Program(three, (), 0, (attend, Return(values)))
    shapes: list[tuple[Operation, ...]] = [
        (), (Return((0,)),), (attend,), (attend, attend), (Return((3,)), attend), (attend, Return((3,)), Return((3,))),
        (attend,) * 70, (attend,) * 64 + (Return((3,)),),
    ]  # fmt: skip
    for ops in shapes:
        yield "AK216", Program(three, (), 0, ops)
    yield "AK216", Program((), (), 0, (Map((0,)), Return((1,))))
    yield "AK106", Program((Layout(),) * 65, (), 0, (attend, Return((65,))))


BUILT = [(group.__name__, code, program) for group in (declarations, built) for code, program in group()]


@pytest.mark.parametrize("group", dict.fromkeys(name for name, _, _ in BUILT))
def test_the_verifier_refuses_the_program(group: str, misjudged: Any) -> None:
    assert misjudged(verify, [(code, program) for name, code, program in BUILT if name == group]) == []


def test_no_program_is_there_twice() -> None:
    assert len({program for _, _, program in BUILT}) == len(BUILT) > 100
