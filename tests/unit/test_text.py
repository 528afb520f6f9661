"""The text form: canonical printing, parsing back to the same object, limits, and time."""

import contextlib
import copy
import pickle  # noqa: TID251 -- programs must survive it, we store none
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, strategies as st

from attnkit.errors import AttnkitError
from attnkit.ir.expr import const, load, make, param, var
from attnkit.ir.program import Attend, Buffer, Layout, Normalizer, Program, Return
from attnkit.ir.text import parse, print_program
from attnkit.testing.strategies import programs

CANONICAL = """\
attnkit 1
program (q: bhsd, k: padded[b1], v: padded[b1]) buffers(b0: f32[1], b1: i32[1]) params(p0: f32) {
  o, lse = attend(q, k, v, scale = default) {
    t0 = q_idx + (kv_len - q_len)
    score = 30.0 * tanh(s / 30.0) + b0[h] * float(kv_idx - t0)
    mask = kv_idx <= t0
    normalizer = softmax
  }
  return o, lse
}
"""


def program(
    score: Any,
    mask: Any = None,
    buffers: Any = (),
    num_params: int = 0,
    scale: float | None = None,
    sink: int | None = None,
) -> Any:
    attend = Attend((0, 1, 2), scale, score=score, mask=mask, normalizer=Normalizer(sink=sink))
    return Program((Layout(),) * 3, tuple(buffers), num_params, (attend, Return((3, 4))))


def text_of(body: Any, buffers: Any = "b0: f32[1]", params: Any = "p0: f32") -> str:
    return (
        f"attnkit 1 program (q: bhsd, k: bhsd, v: bhsd) buffers({buffers}) params({params}) {{"
        f" o, lse = attend(q, k, v, scale = default) {{ {body} }} return o, lse }}"
    )


def score_of(text: str) -> Any:
    return parse(text_of(f"score = {text}")).attend.score


@given(programs())
def test_parse_of_print_is_the_same_object(p: Program) -> None:
    parse.cache_clear()
    assert parse(print_program(p)) is p


@given(programs())
def test_printing_is_canonical(p: Program) -> None:
    text = print_program(p)
    text.encode("ascii")
    assert print_program(parse(text)) == text


@given(st.text(alphabet="attnki1program(q:bhsd,k)v{=}oleb0[]+-*/ \n.<>&|~^%#", max_size=200))
def test_any_text_is_parsed_or_refused_with_a_typed_error(text: str) -> None:
    for candidate in (text, text_of("score = " + text)):
        with contextlib.suppress(AttnkitError):
            parse(candidate)


def test_canonical_text() -> None:
    assert parse(CANONICAL).text == CANONICAL


def test_names_order_and_layout_are_not_part_of_identity() -> None:
    text = """attnkit 1  # a comment
    program(query:bhsd,key:padded[lens],value:padded[lens]) buffers(slope:f32[1],lens:i32[1]) params(number:f32) {
      out, l = attend(query, key, value, scale=default) {
        mask = kv_idx <= (q_idx + (kv_len - q_len))
        here = q_idx + (kv_len - q_len)
        score = ((30 * tanh(s / 30)) + slope[h] * (kv_idx - here)) unused = 3
      }
      return out, l }"""
    assert parse(text) is parse(CANONICAL)


def test_identity_survives_copy_and_pickle() -> None:
    p = parse(CANONICAL)
    assert copy.deepcopy(p) is p
    assert pickle.loads(pickle.dumps(p)) is p  # noqa: S301


def test_key_is_the_hash_of_the_text() -> None:
    assert parse(CANONICAL).key == parse(CANONICAL + "\n").key
    assert len(parse(CANONICAL).key) == 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s - s - 1", "s - s - 1.0"),
        ("s - (s - 1)", "s - (s - 1.0)"),
        ("-s * 2", "-s * 2.0"),
        ("-(s * 2)", "-(s * 2.0)"),
        ("-(3.0) * s", "-(3.0) * s"),
        ("-3 * s", "-3.0 * s"),
        ("--3.0 + s", "-(-3.0) + s"),
        ("s - -inf", "s - -inf"),
        ("s + nan", "s + nan"),
        ("1 / s / s", "1.0 / s / s"),
        ("float(h) % 2", "float(h) % 2.0"),
        ("where(h < 2 & 3, s, 0)", "where(h < 2 & 3, s, 0.0)"),
        ("where(h < 2.0 & 3, s, 0)", None),
        ("where((h < 2) == (b < 3), s, 0)", "where((h < 2) == (b < 3), s, 0.0)"),
        ("where(h < 2, s, 0) ^ true", None),
        (
            "where(~(h < 2) ^ true & false | (b == 1), s, 0)",
            "where(~(h < 2) ^ true & false | (b == 1), s, 0.0)",
        ),
        ("pow(s, 2) + b0[h + 1] * p0", "pow(s, 2.0) + b0[h + 1] * p0"),
        ("float(q_idx // 3 - kv_idx % 3)", "float(q_idx // 3 - kv_idx % 3)"),
        ("1e-05 * s + 1.5e+300", "1e-05 * s + 1.5e+300"),
    ],
)
def test_spelling(text: str, expected: Any) -> None:
    if expected is None:
        with pytest.raises(AttnkitError, match="AK201"):
            score_of(text)
    else:
        assert f"score = {expected}\n" in parse(text_of(f"score = {text}")).text


def test_shared_parts_are_named_and_leaves_are_not() -> None:
    shared = make("tanh", var("s"))
    text = program(make("add", make("mul", shared, shared), load(0)), buffers=[Buffer("f32", 0)]).text
    assert "t0 = tanh(s)\n" in text
    assert "score = t0 * t0 + b0[]\n" in text


@pytest.mark.parametrize("op", ["neg", "exp", "where", "load", "right"])
def test_deep_programs_round_trip_without_recursion(op: str) -> None:
    step = {
        "neg": lambda e: make("neg", e),
        "exp": lambda e: make("exp", e),
        "where": lambda e: make("where", make("lt", e, const(0.0)), const(1.0), e),
        "load": lambda e: load(0, make("int", e)),
        "right": lambda e: make("sub", const(1.0), e),
    }[op]
    score = var("s")
    for _ in range(1300):
        score = step(score)
    p = program(score, buffers=[Buffer("f32", 1)])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        assert parse(p.text) is p
    finally:
        sys.setrecursionlimit(limit)


def test_parsing_takes_linear_time() -> None:
    def steps(n: int) -> int:
        """Function calls, of Python's and C's."""
        body = "".join(f"x{i} = x{i - 1} + {i}.5 * s " for i in range(1, n))
        text, events = text_of(f"x0 = s {body} score = x3"), Counter[str]()
        sys.setprofile(lambda frame, event, argument: events.update([event]))
        try:
            parse.__wrapped__(text)
        finally:
            sys.setprofile(None)
        return events["call"] + events["c_call"]

    small, large = steps(200), steps(3200)
    assert small > 200
    assert large < 16 * small * 1.1  # a quadratic parser would take 16 times more


def test_long_flat_expressions_are_fine() -> None:
    assert score_of("s" + " + s" * 2000).op == "add"


def test_sink_scale_and_plain_score() -> None:
    p = program(var("s"), scale=0.125, sink=0, buffers=[Buffer("f32", 1)])
    assert "scale = 0.125" in p.text
    assert "normalizer = softmax(sink = b0)" in p.text
    assert "score" not in p.text
    assert parse(p.text) is p
    assert parse(text_of("normalizer = softmax")) is parse(text_of(""))


def test_params_and_unused_buffers_stay() -> None:
    p = program(make("mul", var("s"), param(1)), num_params=2, buffers=[Buffer("bool", 2), Buffer("i64", 5)])
    assert "buffers(b0: bool[2], b1: i64[5]) params(p0: f32, p1: f32)" in p.text
    assert parse(p.text) is p
