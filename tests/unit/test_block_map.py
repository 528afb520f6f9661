"""The engine's block analysis against every pair by brute force, and against the analysis in Python."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st

import attnkit as ak
from attnkit import _engine
from attnkit.analysis.blocks import Block, block_counts, classify
from attnkit.analysis.interval import Facts
from attnkit.analysis.structure import Sizes, Structure
from attnkit.backends import get
from attnkit.backends.reference import evaluate
from attnkit.errors import AttnkitError
from attnkit.ir.expr import topological
from attnkit.ir.intervals import Interval, point
from attnkit.ir.optable import OPS
from attnkit.ir.program import Attend, Buffer, Layout, Program, Return
from attnkit.ir.text import parse
from attnkit.ops.traced import Traceable, bind
from attnkit.plan.bytecode import emit
from attnkit.plan.spec import KernelSpec
from attnkit.testing.strategies import PAIR_VARIABLES, buffers as buffer_types, expressions

EMPTY, PARTIAL, FULL = 0, 1, 2
ENGINE_KINDS = {Block.EMPTY: EMPTY, Block.PARTIAL: PARTIAL, Block.FULL: FULL}
NUMPY = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "bool": np.bool_}
BLOCKS = [16, 32, 48, 64, 96, 128]
Arrays = list[np.ndarray[Any, Any]]


def documents(length: int, borders: list[int]) -> torch.Tensor:
    return torch.tensor(np.searchsorted(borders, np.arange(length), side="right"), dtype=torch.int32)


def gallery(q_len: int, kv_len: int) -> dict[str, Callable[..., Any]]:
    ids = documents(kv_len, [50, 51, 200, 333])
    document = ak.document(
        ids[kv_len - q_len :] if q_len < kv_len else documents(q_len, [50, 51, 200, 333]), ids
    )
    ends = torch.tensor([77], dtype=torch.int32)

    def dilated(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx) % 4 == 0

    def strided(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx // 64) % 2 == (kv_idx // 64) % 2

    return {
        "causal": ak.causal(),
        "causal, top left": ak.causal("top_left"),
        "window": ak.window(100, 20),
        "causal window": ak.causal() & ak.window(130),
        "window and sinks": ak.causal() & (ak.window(100) | ak.prefix(4)),
        "document": document,
        "document, causal": document & ak.causal("top_left" if q_len > kv_len else "bottom_right"),
        "prefix": ak.prefix(100),
        "prefix of a tensor": ak.prefix(ends),
        "prefix | causal": ak.prefix(100) | ak.causal(),
        "not a window": ~ak.window(64, 64),
        "dilated": dilated,
        "dilated, causal window": dilated_and(ak.causal() & ak.window(150), dilated),
        "strided": strided,
        "everything": lambda b, h, q_idx, kv_idx: kv_idx >= 0,
        "nothing": lambda b, h, q_idx, kv_idx: kv_idx < 0,
    }


def dilated_and(mask: Callable[..., Any], dilated: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *index: mask(*index) & dilated(*index)


def traced(mask: Callable[..., Any]) -> tuple[Program, Arrays]:
    bound = bind(Traceable(None, mask))
    return parse(bound.text), [b.numpy() for b in bound.buffers]


def engine_map(
    program: Program, q_len: int, kv_len: int, q_block: int, kv_block: int, held: Arrays, params: list[float],
    b: int = 0, h: int = 0,
) -> np.ndarray[Any, Any]:  # fmt: skip
    code = emit(program.attend, program, _engine.opcodes())
    compiled = _engine.Program(code.code, code.score, code.mask, code.num_buffers, code.num_params)
    numbers = {"float32": 0, "int32": 1, "int64": 2, "bool": 3}
    tuples = [
        (x.ctypes.data, numbers[x.dtype.name], x.shape, tuple(s // x.itemsize for s in x.strides))
        for x in held
    ]
    sizes = Sizes(b + 1, h + 1, q_len, kv_len, q_block, kv_block)
    fault, _, batch, heads, offsets, runs = _engine.block_runs(compiled, *sizes, tuples, params)
    assert fault == 0
    kinds = Structure(sizes._replace(batch=batch, heads=heads), offsets, runs).to_dense()
    return kinds[b if batch > 1 else 0, h if heads > 1 else 0]


def pairs(
    program: Program, q_len: int, kv_len: int, held: Arrays, params: list[float], b: int = 0, h: int = 0
) -> np.ndarray[Any, Any]:
    """Which pairs are visible, by evaluating the mask at each of them: bool [q_len, kv_len]."""
    assert program.attend.mask is not None
    variables = {
        "b": b, "h": h, "q_len": q_len, "kv_len": kv_len,
        "q_idx": np.arange(q_len)[:, None], "kv_idx": np.arange(kv_len)[None],
    }  # fmt: skip
    (visible,) = evaluate([program.attend.mask], variables, held, params)
    return np.broadcast_to(visible, (q_len, kv_len))


def truth(visible: np.ndarray[Any, Any], q_block: int, kv_block: int) -> np.ndarray[Any, Any]:
    """The exact kind of every block."""
    rows, columns = (range(0, n, block) for n, block in zip(visible.shape, (q_block, kv_block), strict=True))
    parts = [[visible[i : i + q_block, j : j + kv_block] for j in columns] for i in rows]
    return np.array([[FULL if x.all() else PARTIAL if x.any() else EMPTY for x in row] for row in parts])


def check_sound(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    wrong = np.argwhere((got != PARTIAL) & (got != want))
    assert not len(wrong), (
        f"block {wrong[0]} is said to be {got[tuple(wrong[0])]}, is {want[tuple(wrong[0])]}"
    )


@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (400, 431), (90, 500), (431, 400), (1, 300)])
def test_gallery_is_sound_and_nearly_exact(q_len: int, kv_len: int) -> None:
    exact, total = {}, 0
    for name, mask in gallery(q_len, kv_len).items():
        program, held = traced(mask)
        visible = pairs(program, q_len, kv_len, held, [])
        exact[name] = total = 0
        for block in BLOCKS:
            got, want = (
                engine_map(program, q_len, kv_len, block, block, held, []),
                truth(visible, block, block),
            )
            assert got.shape == want.shape
            check_sound(got, want)
            exact[name], total = exact[name] + int((got == want).sum()), total + want.size
            counts = block_counts(program, 0, 0, q_len, kv_len, block, block, held)
            kinds = [int((got == kind).sum()) for kind in (EMPTY, FULL, PARTIAL)]
            # The engine also looks inside what ranges leave open.
            assert counts.empty <= kinds[0], f"{name}, blocks of {block}: Python {counts}, the engine {kinds}"
            assert counts.full <= kinds[1], f"{name}, blocks of {block}: Python {counts}, the engine {kinds}"
        # Two masks that each let a pair of a block through, but no pair both, are beyond intervals: corners of bands.
        assert exact[name] >= 0.95 * total, f"{name}: {exact[name]} of {total} blocks are exact"
    assert sum(exact.values()) >= 0.99 * total * len(exact), f"of {total} blocks each, exact are {exact}"


def test_blocks_need_not_be_square() -> None:
    program, held = traced(ak.causal() & ak.window(40))
    visible = pairs(program, 300, 333, held, [])
    for q_block, kv_block in [(1, 1), (16, 128), (96, 32), (1000, 7), (7, 1000)]:
        got = engine_map(program, 300, 333, q_block, kv_block, held, [])
        np.testing.assert_array_equal(got, truth(visible, q_block, kv_block))


def test_batch_and_head_are_those_asked_for() -> None:
    ids = torch.stack([documents(256, [64]), documents(256, [128, 192])])
    lefts = torch.tensor([3, 100], dtype=torch.int64)
    document = ak.document(ids)
    program, held = traced(lambda b, h, i, j: document(b, h, i, j) & (j >= i - lefts[h]))
    for b in range(2):
        for h in range(2):
            got = engine_map(program, 256, 256, 64, 64, held, [], b, h)
            want = truth(pairs(program, 256, 256, held, [], b, h), 64, 64)
            check_sound(got, want)
            assert (got == want).mean() >= 0.9


def test_without_a_mask_all_is_full() -> None:
    program = parse(bind(Traceable(None, None)).text)
    assert (engine_map(program, 40, 50, 16, 16, [], []) == FULL).all()


def test_a_large_mask_takes_little_time() -> None:
    """The analysis looks at blocks, not at pairs."""
    program, held = traced(ak.causal() & ak.window(4096))
    got = engine_map(program, 2**17, 2**17, 128, 128, held, [])
    assert got.shape == (1024, 1024)
    assert (got == FULL).sum() == sum(min(i, 31) for i in range(1024))


# --- random masks ----------------------------------------------------------------------------------------

Q_LEN, KV_LEN = 21, 37
INDICES = ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len")


@st.composite
def masks(draw: st.DrawFn, floats: bool) -> tuple[Program, Arrays, list[float]]:
    """A program of a mask alone, its captured arrays and its params; without floats if they are not wanted."""
    declared = [b for b in draw(buffer_types(max_size=2, max_rank=2)) if floats or b.dtype != "f32"]
    num_params = draw(st.integers(0, 1)) if floats else 0
    ops = [
        name
        for name, row in OPS.items()
        if floats or (row.rule(("int",) * row.arity) or ((), ""))[1] != "float"
    ]
    mask = draw(expressions("bool", INDICES, declared, num_params, max_ops=12, ops=ops))
    assume(floats or all(node.dtype != "float" for node in topological([mask])))
    layout = Layout("bhsd", None)
    ops_of = (Attend((0, 1, 2), mask=mask), Return((3,)))
    program = Program((layout, layout, layout), tuple(declared), num_params, ops_of)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    held = [_array(b, rng) for b in declared]
    return program, held, [float(np.float32(rng.normal())) for _ in range(num_params)]


def _array(b: Buffer, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    values = np.sort(rng.integers(-2, 60, (40,) * b.rank), axis=-1) if b.rank else rng.integers(-2, 60, ())
    return np.asarray(values).astype(NUMPY[b.dtype])


@given(masks(floats=False), st.sampled_from([1, 4, 16, 64]), st.sampled_from([1, 5, 16, 64]))
def test_random_masks_of_integers_are_sound(
    drawn: tuple[Program, Arrays, list[float]], q_block: int, kv_block: int
) -> None:
    program, held, params = drawn
    if engine_pairs(program, held, params, 1, 2) is None:
        return  # 32 bits or a divisor of zero: refused, and never analysed
    want = truth(pairs(program, Q_LEN, KV_LEN, held, params, 1, 2), q_block, kv_block)
    check_sound(engine_map(program, Q_LEN, KV_LEN, q_block, kv_block, held, params, 1, 2), want)


@given(masks(floats=True), st.sampled_from([1, 4, 16]), st.sampled_from([1, 5, 16]))
def test_random_masks_agree_with_what_the_engine_does(
    drawn: tuple[Program, Arrays, list[float]], q_block: int, kv_block: int
) -> None:
    """Floats round: the truth is the pairs that the engine itself evaluates, read off from a key at a time."""
    program, held, params = drawn
    seen = engine_pairs(program, held, params)
    if seen is None:
        return  # refused, and never analysed
    check_sound(
        engine_map(program, Q_LEN, KV_LEN, q_block, kv_block, held, params), truth(seen, q_block, kv_block)
    )
    assert program.attend.mask is not None
    box = {"b": point(0), "h": point(0), "q_len": point(Q_LEN), "kv_len": point(KV_LEN),
           "q_idx": Interval(0, Q_LEN - 1), "kv_idx": Interval(0, KV_LEN - 1)}  # fmt: skip
    python = classify(program.attend.mask, box, Facts(held, params))
    whole = int(engine_map(program, Q_LEN, KV_LEN, Q_LEN, KV_LEN, held, params)[0, 0])
    assert {ENGINE_KINDS[python], whole} != {EMPTY, FULL}


def engine_pairs(
    program: Program, held: Arrays, params: list[float], b: int = 0, h: int = 0
) -> np.ndarray[Any, Any] | None:
    """Which pairs the engine lets take part, from the weights of one-hot values; None if it refuses the program."""
    backend = get("cpu")
    spec = KernelSpec(program, "float32", 1, KV_LEN)
    q, k = torch.zeros(b + 1, h + 1, Q_LEN, 1), torch.zeros(b + 1, h + 1, KV_LEN, 1)
    v = torch.eye(KV_LEN).expand(b + 1, h + 1, -1, -1)
    o = torch.empty(b + 1, h + 1, Q_LEN, KV_LEN)
    try:
        kernel = backend.build(spec, {"tile_q": 1, "tile_kv": 1, "split_kv": 1})
        kernel(q, k, v, o, None, [torch.from_numpy(x) for x in held], params, 1)
    except AttnkitError as refused:
        if refused.code not in ("AK502", "AK601", "AK604", "AK605"):
            raise
        return None
    return (o[b, h] > 0).numpy()


def test_every_index_variable_is_drawn() -> None:
    assert {*INDICES, "s"} == set(PAIR_VARIABLES)


# --- sums ------------------------------------------------------------------------------------------------

COMPARISONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
}


@given(
    *[st.tuples(*[st.integers(-6, 6)] * 2, st.integers(-60, 60))] * 2, st.sampled_from(sorted(COMPARISONS))
)
def test_comparisons_of_sums_are_exact(x: Any, y: Any, name: str) -> None:
    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        left, right = (a * i - (n - 1) * j + c + (2 * n - 1) * j for a, n, c in (x, y))  # j twice in each
        return COMPARISONS[name](left, right)

    program, held = traced(mask)
    want = truth(pairs(program, 60, 60, held, []), 13, 7)
    np.testing.assert_array_equal(engine_map(program, 60, 60, 13, 7, held, []), want)
