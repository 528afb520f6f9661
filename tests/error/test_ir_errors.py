"""Every error code of the IR (AK1xx text, AK2xx program, AK3xx tracing) is provoked here, with its message."""

import pickle  # noqa: TID251 -- errors cross process boundaries
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnkit.errors import CODES, AttnkitError, AttnkitNotImplementedError, AttnkitTypeError, error
from attnkit.ir.expr import const, load, make, param, var
from attnkit.ir.program import Attend, Buffer, Layout, Normalizer, Program, Return
from attnkit.ir.text import parse
from attnkit.ir.trace import Context, Proxy, trace
from attnkit.ir.verify import verify


def raised(function: Any) -> Any:
    with pytest.raises(AttnkitError) as caught:
        function()
    return caught.value


# --- the class itself -----------------------------------------------------------------------------------


def test_classes_and_message() -> None:
    exc = error("AK204", where="mask", given="float")
    assert isinstance(exc, AttnkitTypeError)
    assert isinstance(exc, TypeError)
    assert str(exc).splitlines() == [
        "AK204: mask is not a bool",
        "  where: mask",
        "  given: float",
        "  hint: compare with something: ... != 0",
    ]
    assert isinstance(error("AK302"), NotImplementedError)
    assert isinstance(error("AK302"), AttnkitNotImplementedError)
    assert isinstance(error("AK101"), ValueError)


def test_errors_pickle() -> None:
    exc = error("AK201", what="w", where="x", given="g", allowed="a", hint="h")
    twin = pickle.loads(pickle.dumps(exc))  # noqa: S301
    assert (type(twin), str(twin), twin.code) == (type(exc), str(exc), "AK201")


def test_codes_are_well_formed() -> None:
    for code, row in CODES.items():
        assert re.fullmatch(r"AK[1-6]\d\d", code)
        assert row.summary
        assert issubclass(row.error, AttnkitError)


def test_every_code_of_the_ir_has_a_test() -> None:
    beside = Path(__file__).with_name("test_legality.py")  # operations of programs
    elsewhere = ("AK308", "AK309")  # of torch functions: see test_tracing_errors.py
    text = Path(__file__).read_text(encoding="utf-8") + beside.read_text(encoding="utf-8")
    codes = [code for code in CODES if code < "AK4" and code not in elsewhere]
    assert [code for code in codes if f'"{code}"' not in text] == []


# --- text -----------------------------------------------------------------------------------------------


def program_text(
    body: Any = "",
    head: str = "(q: bhsd, k: bhsd, v: bhsd) buffers(b0: f32[1]) params(p0: f32)",
    end: str = "return o, lse",
) -> str:
    return (
        f"attnkit 1\nprogram {head} {{\n  o, lse = attend(q, k, v, scale = default) {{ {body} }}\n  {end}\n}}"
    )


def many(kind: str, n: int) -> Any:
    return ", ".join(f"x{i}: {kind}" for i in range(n))


TEXTS = {
    "too long": ("AK101", "#" * 300_000),
    "character": ("AK102", program_text("score = s $ 2")),
    "not ascii": ("AK102", program_text("score = s × 2")),
    "empty": ("AK103", ""),
    "operand missing": ("AK103", program_text("score = s +")),
    "bracket missing": ("AK103", program_text("score = (s + 1")),
    "no call": ("AK103", program_text("score = exp + 1")),
    "score as a value": ("AK103", program_text("score = mask")),
    "buffer without index": ("AK103", program_text("score = s + b0")),
    "power": ("AK103", program_text("score = s ** 2")),
    "one result": ("AK103", program_text().replace("o, lse =", "o =")),
    "trailing": ("AK103", program_text() + " more"),
    "layout": ("AK103", program_text(head="(q: bshd, k: bhsd, v: bhsd)")),
    "buffer type": ("AK103", program_text(head="(q: bhsd, k: bhsd, v: bhsd) buffers(b0: f64[1])")),
    "rank": ("AK103", program_text(head="(q: bhsd, k: bhsd, v: bhsd) buffers(b0: f32[1.5])")),
    "scale": ("AK103", program_text().replace("default", "q")),
    "nesting": ("AK104", program_text(f"score = {'(' * 70}s{')' * 70}")),
    "nested calls": ("AK104", program_text(f"score = {'exp(' * 70}s{')' * 70}")),
    "version": ("AK105", program_text().replace("attnkit 1", "attnkit 2")),
    "buffers": ("AK106", program_text(head=f"(q: bhsd, k: bhsd, v: bhsd) buffers({many('f32[1]', 65)})")),
    "params": ("AK106", program_text(head=f"(q: bhsd, k: bhsd, v: bhsd) params({many('f32', 65)})")),
    "int": ("AK107", program_text(f"score = s + {2**63}")),
    "digits": ("AK107", program_text(f"score = s + {'9' * 5000}")),
    "float": ("AK107", program_text("score = s + 1e999")),
    "name": ("AK108", program_text("score = s + slope")),
    "later name": ("AK108", program_text("score = t0 t0 = s")),
    "value": ("AK108", program_text(end="return p")),
    "buffer": ("AK108", program_text(head="(q: bhsd, k: padded[lens], v: bhsd)")),
    "sink": ("AK108", program_text("normalizer = softmax(sink = q)")),
    "reserved": ("AK109", program_text("exp = s")),
    "taken": ("AK109", program_text("p0 = s")),
    "twice": ("AK109", program_text("t0 = s t0 = s")),
    "score twice": ("AK109", program_text("score = s score = s")),
    "normalizer twice": ("AK109", program_text("normalizer = softmax normalizer = softmax")),
    "input twice": ("AK109", program_text(head="(q: bhsd, q: bhsd, v: bhsd)")),
    "chain": ("AK110", program_text("mask = 0 <= kv_idx < q_idx")),
    "operand": ("AK201", program_text("score = s & q_idx")),
    "arity": ("AK202", program_text("score = exp(s, s)")),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    code, text = TEXTS[name]
    exc = raised(lambda: parse(text))
    assert exc.code == code
    assert code == "AK101" or re.fullmatch(r"line \d+, column \d+", exc.where)


def test_text_errors_point_at_the_token() -> None:
    exc = raised(lambda: parse(program_text("score = s +\n  slope")))
    assert (exc.where, exc.given) == ("line 4, column 3", "slope")
    assert "p0" in exc.allowed


# --- programs -------------------------------------------------------------------------------------------

F32, I32 = Buffer("f32", 1), Buffer("i32", 1)


def program(
    score: Any = None,
    mask: Any = None,
    *,
    inputs: Any = None,
    buffers: Any = (F32, I32),
    num_params: int = 1,
    sink: int | None = None,
    scale: float | None = None,
    **other: Any,
) -> Any:
    attend = Attend(
        other.get("operands", (0, 1, 2)),
        scale,
        score=score or var("s"),
        mask=mask,
        normalizer=Normalizer(sink=sink),
    )
    ops = other.get("ops", (attend, Return(other.get("values", (3, 4)))))
    return Program(inputs or (Layout(),) * 3, tuple(buffers), num_params, ops)


def chain(n: int) -> Any:
    node = var("s")
    for _ in range(n):
        node = make("neg", node)
    return node


def wordy(n: int) -> Any:
    """Few nodes, much text: every node is named, and written with long constants."""
    node, wide = var("h"), const(-(2**31))
    for _ in range(n):
        node = load(0, node, node, wide, wide, wide, dtype="int")
    return make("float", node)


PACKED, PADDED, PLAIN = Layout("packed", 1), Layout("padded", 1), Layout()
PROGRAMS = {
    "score": ("AK203", lambda: program(var("h"))),
    "mask": ("AK204", lambda: program(mask=var("h"))),
    "mask reads s": ("AK205", lambda: program(mask=make("lt", var("s"), const(0.0)))),
    "no such buffer": ("AK206", lambda: program(load(5, var("h")))),
    "no such param": ("AK206", lambda: program(param(1))),
    "no such value": ("AK206", lambda: program(operands=(0, 1, 3))),
    "no such sink": ("AK206", lambda: program(sink=2)),
    "no such lengths": ("AK206", lambda: program(inputs=(PLAIN, Layout("padded", 9), Layout("padded", 9)))),
    "rank of a load": ("AK207", lambda: program(load(0, var("h"), var("b")))),
    "dtype of a load": ("AK207", lambda: program(load(1, var("h")))),
    "rank of a buffer": ("AK207", lambda: program(buffers=[Buffer("f32", 6)])),
    "dtype of a buffer": ("AK207", lambda: program(buffers=[Buffer("f64", 1)])),
    "index": ("AK208", lambda: program(load(0, var("s")))),
    "sink": ("AK209", lambda: program(sink=1)),
    "lengths": ("AK210", lambda: program(inputs=(PLAIN, Layout("padded", 0), Layout("padded", 0)))),
    "padded q": ("AK211", lambda: program(inputs=(PADDED, PADDED, PADDED))),
    "k unlike v": ("AK211", lambda: program(inputs=(PLAIN, PADDED, PLAIN))),
    "q alone packed": ("AK211", lambda: program(inputs=(PACKED, PLAIN, PLAIN))),
    "k alone packed": ("AK211", lambda: program(inputs=(PLAIN, PACKED, PACKED))),
    "no lengths": ("AK211", lambda: program(inputs=(PLAIN, Layout("padded"), Layout("padded")))),
    "lengths of bhsd": ("AK211", lambda: program(inputs=(Layout("bhsd", 1), PLAIN, PLAIN))),
    "zero scale": ("AK212", lambda: program(scale=0.0)),
    "negative scale": ("AK212", lambda: program(scale=-1.0)),
    "infinite scale": ("AK212", lambda: program(scale=float("inf"))),
    "nan scale": ("AK212", lambda: program(scale=float("nan"))),
    "constant": ("AK213", lambda: program(mask=make("lt", var("h"), const(2**31)))),
    "return twice": ("AK214", lambda: program(values=(3, 3))),
    "return q": ("AK214", lambda: program(values=(0,))),
    "return nothing": ("AK214", lambda: program(values=())),
    "nodes": ("AK215", lambda: program(chain(4096))),
    "inputs": ("AK206", lambda: program(inputs=(PLAIN, PLAIN))),
    "no return": ("AK216", lambda: program(ops=(Attend((0, 1, 2)),))),
    "order": ("AK216", lambda: program(ops=(Return((3,)), Attend((0, 1, 2))))),
    "buffers": ("AK106", lambda: program(buffers=[F32] * 65)),
    "params": ("AK106", lambda: program(num_params=65)),
    "text": ("AK101", lambda: program(wordy(4090), buffers=[Buffer("i32", 5)])),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str) -> None:
    code, build = PROGRAMS[name]
    assert raised(lambda: verify(build())).code == code


def test_parse_verifies() -> None:
    assert raised(lambda: parse(program_text("mask = s < 0"))).code == "AK205"


# --- tracing --------------------------------------------------------------------------------------------

ARRAY = np.zeros((4, 4), np.float32)


MODS = {
    "if": ("AK301", lambda s, b, h, q, kv: s if q > kv else 0.0),
    "and": ("AK301", lambda s, b, h, q, kv: (q > kv) and (q < kv)),
    "not": ("AK301", lambda s, b, h, q, kv: not (q > kv)),
    "int": ("AK301", lambda s, b, h, q, kv: int(q)),
    "float": ("AK301", lambda s, b, h, q, kv: float(s)),
    "list index": ("AK301", lambda s, b, h, q, kv: [1.0, 2.0][q]),
    "item": ("AK301", lambda s, b, h, q, kv: s.item()),
    "chained comparison": ("AK301", lambda s, b, h, q, kv: 0 <= q < kv),
    "method": ("AK302", lambda s, b, h, q, kv: s.cumsum(0)),
    "keyword": ("AK302", lambda s, b, h, q, kv: s.exp(out=s)),
    "reduction": ("AK302", lambda s, b, h, q, kv: s.min()),
    "rounding": ("AK302", lambda s, b, h, q, kv: s.div(2, rounding_mode="up")),
    "to": ("AK302", lambda s, b, h, q, kv: s.to("bfloat16")),
    "dtype": (
        "AK303",
        lambda s, b, h, q, kv: h.context.load(
            ARRAY.astype(np.float64),
            (
                h,
                q,
            ),
        ),
    ),
    "too few indices": ("AK304", lambda s, b, h, q, kv: h.context.load(ARRAY, (h,))),
    "slice": (
        "AK304",
        lambda s, b, h, q, kv: h.context.load(
            ARRAY,
            (
                h,
                slice(None),
            ),
        ),
    ),
    "float index": (
        "AK304",
        lambda s, b, h, q, kv: h.context.load(
            ARRAY,
            (
                h,
                s,
            ),
        ),
    ),
    "constant index": (
        "AK304",
        lambda s, b, h, q, kv: h.context.load(
            ARRAY,
            (
                h,
                4,
            ),
        ),
    ),
    "rank 6": (
        "AK304",
        lambda s, b, h, q, kv: h.context.load(
            np.zeros((1,) * 6, np.float32),
            (
                h,
                h,
                h,
                h,
                h,
                h,
            ),
        ),
    ),
    "none": ("AK305", lambda s, b, h, q, kv: None),
    "tuple": ("AK305", lambda s, b, h, q, kv: (s, s)),
    "bool": ("AK305", lambda s, b, h, q, kv: q > kv),
    "string": ("AK306", lambda s, b, h, q, kv: s.add("1")),
    "whole array": ("AK306", lambda s, b, h, q, kv: s.add(ARRAY)),
    "types": ("AK201", lambda s, b, h, q, kv: s.where(q, 0.0)),
    "bits": ("AK201", lambda s, b, h, q, kv: s & 1),
}


@pytest.mark.parametrize("name", MODS)
def test_tracing(name: str) -> None:
    code, score = MODS[name]
    exc = raised(lambda: trace(score, None))
    assert exc.code == code
    if code != "AK305":  # the error names the line of the function above
        path, _, line = exc.where.rpartition(":")
        assert path == __file__
        assert int(line) >= score.__code__.co_firstlineno


def test_a_mask_must_be_a_bool() -> None:
    exc = raised(lambda: trace(None, lambda b, h, q, kv: q - kv))
    assert (exc.code, exc.where) == ("AK305", "mask")


def test_proxies_say_what_to_write_instead() -> None:
    with pytest.raises(TypeError, match=r"torch\.where"):
        bool(Proxy(Context(), "t0", "bool"))


def test_torch_functions_without_a_meaning_here() -> None:
    torch = pytest.importorskip("torch")
    from attnkit.ops.tracing import trace_mods

    exc = raised(lambda: trace_mods(lambda s, b, h, q, kv: torch.cumsum(s, 0), None))
    assert (exc.code, exc.given) == ("AK302", "torch function cumsum")
    assert exc.where.startswith(__file__)
    exc = raised(lambda: trace_mods(lambda s, b, h, q, kv: s + torch.zeros(2, dtype=torch.float64)[h], None))
    assert exc.code == "AK303"
