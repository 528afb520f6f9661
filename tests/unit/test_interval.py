"""Intervals: sound on random expressions, in float64 and in float32, and exact on the masks people write."""

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings, strategies as st

from attnkit.analysis.blocks import Block, block_counts, classify
from attnkit.analysis.interval import Facts, evaluate
from attnkit.analysis.structure import BlockCounts
from attnkit.backends.reference import evaluate as run
from attnkit.ir import causal, document, prefix, window
from attnkit.ir.expr import Expr, const, make, topological, var
from attnkit.ir.intervals import ANY_FLOAT, Interval, point
from attnkit.ir.optable import OPS, VARIABLES
from attnkit.ir.program import Buffer
from attnkit.ir.text import parse
from attnkit.ir.trace import Context, build_text, trace
from attnkit.testing.strategies import expressions

BUFFERS = (Buffer("f32", 1), Buffer("i32", 2), Buffer("bool", 1), Buffer("f32", 0))


def contents(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    floats = rng.standard_normal(5).astype(np.float32)
    floats[seed % 5] = [np.nan, np.inf, -np.inf, 0.0, 7.0][seed % 5]
    return [floats, rng.integers(-3, 4, (4, 6)).astype(np.int32), rng.random(3) < 0.5, np.float32(1.25)]


@st.composite
def boxes(draw: st.DrawFn) -> dict[str, Interval]:
    box = {}
    for name, dtype in VARIABLES.items():
        if dtype == "float":
            lo, hi = sorted(x + 0.0 for x in draw(st.tuples(*[st.floats(-40, 40, width=32)] * 2)))
        else:
            lo, hi = sorted(draw(st.tuples(*[st.integers(0, 9)] * 2)))
        box[name] = Interval(lo, hi)
    return box


def points(box: dict[str, Interval], count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random points of a box, its corners among them."""
    inside = {}
    for name, (lo, hi, _) in box.items():
        if VARIABLES[name] == "float":
            values = np.clip(rng.uniform(lo, hi, count).astype(np.float32), lo, hi)
        else:
            values = rng.integers(int(lo), int(hi) + 1, count)
        corner = rng.random(count) < 0.2
        inside[name] = np.where(corner, np.where(rng.random(count) < 0.5, lo, hi), values).astype(
            values.dtype
        )
    return inside


def run_f32(root: Any, variables: Any, buffers: Any, params: Any) -> Any:
    """As a float32 kernel computes: every result is rounded."""
    values: dict[Expr, np.ndarray] = {}
    kinds = {"float": np.float32, "int": np.int64, "bool": np.bool_}
    with np.errstate(all="ignore"):
        for node in topological([root]):
            args = [values[arg] for arg in node.args]
            if node.op in OPS:
                value = OPS[node.op].numpy(*args)
            elif node.op == "load":
                array = np.asarray(buffers[node.attr])
                value = array[tuple(np.clip(i, 0, n - 1) for i, n in zip(args, array.shape, strict=True))]
            else:
                value = {"const": lambda n: n.attr, "var": lambda n: variables[n.attr]}.get(
                    node.op, lambda n: params[n.attr]
                )(node)
            values[node] = np.asarray(value, dtype=kinds[node.dtype])
    return values[root]


def check_holds(interval: Interval, value: Any) -> None:
    """Every one of the values is in the interval."""
    value = np.asarray(value)
    inside = np.where(value != value, interval.nan, (interval.lo <= value) & (value <= interval.hi))
    assert inside.all(), f"{value[~inside][:5]} not in {interval}"


def check_sound(expr: Expr, box: dict[str, Interval], seed: int, count: int) -> int:
    """The ranges of an expression hold what it is at points of the box, in both precisions; returns how many points."""
    buffers, params = contents(seed), [0.3]
    (interval,) = evaluate([expr], box, Facts(buffers, params))
    assert interval.lo <= interval.hi
    inside = points(box, count, np.random.default_rng(seed))
    check_holds(interval, run([expr], inside, buffers, params)[0])
    check_holds(interval, run_f32(expr, inside, buffers, params))
    (unknown,) = evaluate([expr], box)
    assert unknown.lo <= interval.lo
    assert interval.hi <= unknown.hi
    return count


@settings(max_examples=400)
@given(st.sampled_from(["float", "int", "bool"]), st.data(), boxes(), st.integers(0, 4))
def test_ranges_hold_every_value(dtype: str, data: st.DataObject, box: Any, seed: int) -> None:
    check_sound(data.draw(expressions(dtype, buffers=BUFFERS, num_params=1, max_ops=12)), box, seed, 200)


@pytest.mark.slow
@pytest.mark.shows
def test_ten_million_values_and_no_violation() -> None:
    samples = 0

    @settings(max_examples=1500, phases=[Phase.generate])
    @given(
        st.sampled_from(["float", "int", "bool"]),
        st.data(),
        st.lists(boxes(), min_size=4, max_size=4),
        st.integers(0, 4),
    )
    def many(dtype: str, data: st.DataObject, several: Any, seed: int) -> None:
        nonlocal samples
        expr = data.draw(expressions(dtype, buffers=BUFFERS, num_params=1, max_ops=16))
        samples += sum(check_sound(expr, box, seed, 2000) for box in several)

    many()
    assert samples >= 10**7


@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize("op", OPS)
@given(st.data(), boxes())
def test_each_rule_holds_every_value(op: str, data: st.DataObject, box: Any) -> None:
    check_sound(data.draw(expressions("float", max_ops=4, ops=[op, "mul", "where"])), box, 0, 200)


def test_integer_valued_floats_stay_exact() -> None:
    distance = make("float", make("sub", var("kv_idx"), var("q_idx")))
    box = {"q_idx": Interval(128, 255), "kv_idx": Interval(0, 127)}
    assert evaluate([distance], box) == [Interval(-255.0, -1.0)]
    assert evaluate([make("lt", distance, const(0.0))], box) == [point(1)]


def test_what_is_unknown_can_be_anything() -> None:
    assert evaluate([var("s")], {}) == [ANY_FLOAT]
    assert evaluate([make("tanh", var("s"))], {})[0].lo >= -1.001


def program_of(mask: Any) -> Any:
    """The program of a mask, traced without torch."""
    return parse(build_text(trace(None, mask, Context())))


def counts_by_definition(
    program: Any, q_len: int, kv_len: int, q_block: int, kv_block: int, buffers: Any
) -> Any:
    grid = {"b": 0, "h": 0, "q_len": q_len, "kv_len": kv_len}
    grid |= {"q_idx": np.arange(q_len)[:, None], "kv_idx": np.arange(kv_len)[None, :]}
    visible = np.broadcast_to(run([program.attend.mask], grid, buffers)[0], (q_len, kv_len))
    kinds = {(False, False): 0, (True, True): 1, (True, False): 2}
    counts = [0, 0, 0]
    for i in range(0, q_len, q_block):
        for j in range(0, kv_len, kv_block):
            block = visible[i : i + q_block, j : j + kv_block]
            counts[kinds[bool(block.any()), bool(block.all())]] += 1
    return BlockCounts(*counts)


IDS = np.repeat(np.arange(5, dtype=np.int32), [30, 1, 64, 40, 65])
MASKS = {
    "causal": causal(),
    "top_left": causal("top_left"),
    "window": window(40, 8),
    "causal window": causal() & window(64),
    "sink and window": causal() & (prefix(4) | window(30)),
    "prefix": prefix(50) | causal(),
    "document": document(IDS),
    "not causal": ~causal(),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", [(200, 200), (130, 200), (200, 77), (1, 200), (1, 1)])
def test_block_counts_are_exact_for_common_masks(name: str, lengths: tuple[int, int]) -> None:
    program = program_of(MASKS[name])
    buffers = [IDS] * len(program.buffers)
    q_len, kv_len = lengths
    found = block_counts(program, 0, 0, q_len, kv_len, 32, 16, buffers)
    expected = counts_by_definition(program, q_len, kv_len, 32, 16, buffers)
    assert sum(found) == -(-q_len // 32) * -(-kv_len // 16)
    assert found.empty <= expected.empty
    assert found.full <= expected.full
    if name in ("causal", "top_left", "document", "not causal", "prefix"):
        assert found == expected


def test_classify() -> None:
    visible = make("le", var("kv_idx"), var("q_idx"))
    box = {"q_idx": Interval(64, 127), "kv_idx": Interval(0, 63)}
    assert classify(visible, box) is Block.FULL
    assert classify(make("not", visible), box) is Block.EMPTY
    assert classify(visible, box | {"kv_idx": Interval(64, 127)}) is Block.PARTIAL
    assert classify(None, box) is Block.FULL


def test_long_sequences_cost_their_boundary() -> None:
    program = program_of(causal())
    n = 1 << 20
    counts = block_counts(program, 0, 0, n, n, n // 256, n // 256)
    assert counts == BlockCounts(256 * 255 // 2, 256 * 255 // 2, 256)


def test_no_blocks_and_no_mask() -> None:
    assert block_counts(program_of(causal()), 0, 0, 0, 64, 32, 32) == (0, 0, 0)
    assert block_counts(program_of(None), 0, 0, 64, 65, 32, 32) == (0, 6, 0)


def test_unknown_or_short_buffers_prove_nothing() -> None:
    program = program_of(document(IDS))
    assert block_counts(program, 0, 0, 200, 200, 64, 64) == (0, 0, 16)
    assert block_counts(program, 0, 0, 300, 300, 300, 300, [IDS]) == (0, 0, 1)


# --- sums ------------------------------------------------------------------------------------------------------

SIDES = st.tuples(*[st.integers(-6, 6)] * 2, st.integers(-40, 40))
ORDERS = ("lt", "le", "gt", "ge", "eq", "ne")


def side(a: int, b: int, c: int) -> Expr:
    """``a * q_idx + b * kv_idx + c``, with each variable in it twice."""
    q, kv = (make("mul", const(n - 2), var(name)) for n, name in ((a, "q_idx"), (b, "kv_idx")))
    twice = (make("mul", var(name), const(2)) for name in ("q_idx", "kv_idx"))
    return make("add", make("sub", make("add", q, kv), const(-c)), make("add", *twice))


@given(SIDES, SIDES, st.sampled_from(ORDERS), *[st.integers(0, 30)] * 2, *[st.integers(0, 12)] * 2)
def test_comparisons_of_sums_are_exact(
    x: Any, y: Any, op: str, top: int, left: int, height: int, width: int
) -> None:
    q, kv = np.arange(top, top + height + 1)[:, None], np.arange(left, left + width + 1)
    box = {"q_idx": Interval(top, top + height), "kv_idx": Interval(left, left + width)}
    sums = [a * q + b * kv + c for a, b, c in (x, y)]
    for expr, value in zip((side(*x), side(*y)), sums, strict=True):
        assert evaluate([expr], box) == [Interval(value.min(), value.max())]
    (truth,) = (OPS[op].numpy(*sums),)
    (found,) = evaluate([make(op, side(*x), side(*y))], box)
    assert found == Interval(int(truth.all()), int(truth.any()))


def test_what_wraps_around_is_not_compared_by_its_difference() -> None:
    """q - 2**62 - 2**62 - 3 leaves 64 bits, and compares as what it becomes."""
    far = make("sub", make("sub", var("q_idx"), const(2**62)), const(2**62))
    wrapped = make("sub", far, const(3))
    box = {"q_idx": Interval(0, 5)}
    (found,) = evaluate([make("lt", wrapped, var("q_idx"))], box)
    with np.errstate(over="ignore"):
        check_holds(found, run([make("lt", wrapped, var("q_idx"))], {"q_idx": np.arange(6)})[0])


def test_long_sums_and_products_of_variables() -> None:
    total = var("q_idx")
    for n in range(400):  # nested deeper than Python would recurse into at ease
        total = make("add", total, make("mul", const(n % 3 - 1), var("kv_idx")))
    box = {"q_idx": Interval(2, 5), "kv_idx": Interval(0, 7), "h": point(3)}
    assert evaluate([total], box) == [Interval(2 - 7, 5)]
    assert evaluate([make("mul", var("h"), var("q_idx"))], box) == [Interval(6, 15)]
