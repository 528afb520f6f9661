"""Random scores and masks: tiles, strips and ranks must give what the operators give pair by pair."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings, strategies as st

from attnkit import _engine
from attnkit.analysis.canonical import canonical
from attnkit.backends.cpu.backend import CpuKernel
from attnkit.errors import AttnkitError
from attnkit.ir.program import Attend, Buffer, Layout, Normalizer, Program, Return
from attnkit.ir.verify import verify
from attnkit.plan.bytecode import emit
from attnkit.plan.spec import KernelSpec
from attnkit.testing.strategies import buffers, expressions

HEADS, KV_HEADS, BATCH = 4, 2, 2
VARIABLES = ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len")
NAMES = {number: name for name, number in _engine.opcodes().items()}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Program, int, int, int, dict[str, int]]:
    """A program with any score and mask, lengths, a seed for what it reads, and tile sizes."""
    declared = tuple(draw(buffers(max_size=3, max_rank=3)))
    shared: dict[str, Any] = {"buffers": declared, "num_params": 1, "max_ops": 12}
    score = draw(expressions("float", **shared))
    mask = draw(st.one_of(st.none(), expressions("bool", VARIABLES, **shared)))
    program = Program(
        (Layout(),) * 3, declared, 1, (Attend((0, 1, 2), 1.0, score=score, mask=mask), Return((3, 4)))
    )
    verify(program)
    q_len, kv_len = draw(st.sampled_from([(1, 70), (17, 40), (100, 33), (40, 150), (3, 16)]))
    tiles = {
        "tile_q": draw(st.sampled_from([16, 48, 96])),
        "tile_kv": draw(st.sampled_from([32, 64, 128])),
        "split_kv": draw(st.sampled_from([512, 4096])),
    }
    return program, q_len, kv_len, draw(st.integers(0, 2**32 - 1)), tiles


def contents(declared: Sequence[Buffer], rng: np.random.Generator) -> list[Any]:
    """Captured arrays of sizes around the lengths, so that some indices are outside and some are not."""
    arrays: list[Any] = []
    for buffer in declared:
        shape = rng.choice([1, 4, 40, 160], buffer.rank)
        if buffer.dtype == "f32":
            arrays.append(np.asarray(rng.standard_normal(shape), np.float32))
        elif buffer.dtype == "bool":
            arrays.append(np.asarray(rng.random(shape) < 0.7))
        else:
            arrays.append(
                np.asarray(rng.integers(-2, 40, shape), np.int32 if buffer.dtype == "i32" else np.int64)
            )
    return arrays


class PairByPair:
    """The values of a program's code at every pair of one head, from the engine's operators and plain numpy loads."""

    def __init__(self, code: Any, s: Any, leaves: dict[str, int], arrays: list[Any], param: float) -> None:
        self.outside = np.zeros(s.shape, bool)  # some load of the pair leaves its buffer
        self.ints_hold = True
        self.values: list[Any] = []
        index = dict(zip(("q_idx", "kv_idx"), np.indices(s.shape, dtype=np.int32), strict=True))
        for opcode, attr, nargs, *numbers in code.tolist():
            name = NAMES[opcode]
            args = [self.values[n] for n in numbers[:nargs]]
            kind, _, rest = name.partition("_")
            value: Any
            if name == "var_s":
                value = s
            elif kind == "var":
                value = index[rest] if rest in index else np.full(s.shape, leaves[rest], np.int32)
            elif name == "param":
                value = np.full(s.shape, param, np.float32)
            elif kind == "const":
                value = np.full(s.shape, -attr if rest == "b" else attr, np.int32).view(lanes(rest))
            elif kind == "load":
                value = self._load(arrays[attr], args, s.shape)
            else:
                self._check(name, args)
                flat = [np.ascontiguousarray(x).reshape(-1).view(np.float32) for x in args]
                value = _engine.evaluate(name, flat).view(lanes(result_of(name))).reshape(s.shape)
            self.values.append(value)

    def _load(self, array: Any, args: list[Any], shape: tuple[int, ...]) -> Any:
        inside = []
        for i, size in zip(args, array.shape, strict=True):
            self.outside |= (i < 0) | (i >= size)
            inside.append(np.clip(i, 0, size - 1))
        value = np.broadcast_to(array[tuple(inside)], shape)
        return -value.astype(np.int32) if value.dtype == bool else value.astype(lanes(value.dtype.kind))

    def _check(self, name: str, args: list[Any]) -> None:
        """Whether integers stay within 32 bits, computed with 64."""
        wide = [x.astype(np.int64) if x.dtype == np.int32 else x.astype(np.float64) for x in args]
        with np.errstate(all="ignore"):
            if name in ("floordiv_i", "mod_i"):
                self.ints_hold &= bool((wide[1] != 0).all())
            exact = {"add_i": lambda: wide[0] + wide[1], "sub_i": lambda: wide[0] - wide[1],
                     "mul_i": lambda: wide[0] * wide[1], "neg_i": lambda: -wide[0], "abs_i": lambda: abs(wide[0]),
                     "f_to_i": lambda: np.nan_to_num(wide[0], nan=np.inf)}.get(name)  # fmt: skip
            if exact is not None:
                value = exact()
                self.ints_hold &= bool(((value > -(2**31) - 1) & (value < 2**31)).all())


def lanes(kind: str) -> Any:
    return np.float32 if kind == "f" else np.int32


def result_of(name: str) -> str:
    base, _, kind = name.rpartition("_")
    if base.endswith("_to"):
        return kind
    return "b" if base in ("lt", "le", "gt", "ge", "eq", "ne") else kind


def weights_of(z: Any, live: Any) -> tuple[Any, Any]:
    """Softmax over the live pairs in float64, and its lse. A score of NaN or +inf makes its row NaN."""
    z = np.where(live, z.astype(np.float64), -np.inf)
    with np.errstate(all="ignore"):
        top = z.max(1, keepdims=True)
        pivot = np.where(np.isneginf(top), 0, top)
        w = np.exp(z - pivot)
        total = w.sum(1, keepdims=True)
        return np.where(total == 0, 0, w / total), (pivot + np.log(total))[:, 0]


def unnormalized(program: Program) -> Program:
    """The same, its scores being the weights themselves."""
    attend = program.attend
    weighed = Attend(
        attend.operands, 1.0, score=attend.score, mask=attend.mask, normalizer=Normalizer("none")
    )
    return Program(program.inputs, program.buffers, program.num_params, (weighed, Return((3,))))


@pytest.fixture(scope="module", autouse=True)
def _restored_isa() -> Iterator[None]:
    before = _engine.current_isa()
    yield
    _engine.set_isa(before)


MANY = settings().max_examples * 3 // 2  # of the profile: `make fuzz` asks for more


@settings(max_examples=MANY, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(problems())
def test_tiles_equal_pairs(problem: tuple[Program, int, int, int, dict[str, int]]) -> None:
    program, q_len, kv_len, seed, tiles = problem
    rng = np.random.default_rng(seed)
    arrays, param = contents(program.buffers, rng), float(np.float32(rng.standard_normal()))
    # Small integers in one channel: the logits are exact whatever computes them.
    q, k = (
        rng.integers(-4, 5, (BATCH, h, n, 1)).astype(np.float32)
        for h, n in ((HEADS, q_len), (KV_HEADS, kv_len))
    )
    v = np.broadcast_to(np.eye(kv_len, dtype=np.float32), (BATCH, KV_HEADS, kv_len, kv_len))
    try:
        kernel = CpuKernel(KernelSpec(program, "float32", 1, kv_len), tiles)
    except AttnkitError as refused:
        if "tiles alive" not in str(refused):
            raise
        event("too many tiles")
        return
    held = [torch.from_numpy(np.array(x)) for x in (q, k, v)]
    score, mask = kernel.bytecode.score, kernel.bytecode.mask
    for isa in _engine.isa_levels():
        _engine.set_isa(isa)
        heads, live = {}, {}
        for b, h in itertools.product(range(BATCH), range(HEADS)):
            s = q[b, h] @ k[b, h // (HEADS // KV_HEADS)].T
            leaves = {"b": b, "h": h, "q_len": q_len, "kv_len": kv_len}
            pairs = PairByPair(kernel.bytecode.code, s, leaves, arrays, param)
            heads[b, h] = pairs, s if score < 0 else pairs.values[score]
            live[b, h] = np.ones(s.shape, bool) if mask < 0 else pairs.values[mask] != 0
        faults = any((pairs.outside & live[at]).any() for at, (pairs, _) in heads.items())
        _engine.set_isa(isa)  # forgets that operators ran
        o, lse = torch.empty(BATCH, HEADS, q_len, kv_len), torch.empty(BATCH, HEADS, q_len)
        try:
            kernel(*held, o, lse, [torch.from_numpy(x) for x in arrays], [param], 2)
        except AttnkitError as fault:
            event(fault.code)
            if fault.code == "AK601":
                assert faults
            continue
        assert _engine.last_isa() == isa
        assert all(pairs.ints_hold for pairs, _ in heads.values())
        assert not faults
        event("ran")
        for at, (_, z) in heads.items():
            want, want_lse = weights_of(z, live[at])
            np.testing.assert_allclose(o[at].numpy(), want, rtol=3e-5, atol=1e-36)
            np.testing.assert_allclose(lse[at].numpy(), want_lse, rtol=1e-6, atol=1e-6)
        scores = CpuKernel(KernelSpec(unnormalized(program), "float32", 1, kv_len), tiles)
        scores(*held, o, None, [torch.from_numpy(x) for x in arrays], [param], 2)
        for at, (_, z) in heads.items():
            want = np.where(live[at] & ~np.isneginf(z), z, 0)
            rows = np.isfinite(want).all(1)  # infinity times the zeros of v is no number
            np.testing.assert_array_equal(o[at].numpy()[rows], want[rows])


@settings(max_examples=MANY, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(problems(), st.sampled_from([32, 48, 96]), st.sampled_from([32, 96, 192]))
def test_gradients_of_tiles_are_sums_over_pairs(
    problem: tuple[Program, int, int, int, dict[str, int]], tile_q: int, tile_kv: int
) -> None:
    """From the slopes of every pair, by the engine's operators, in float64: what q, k, v and captured tensors get."""
    program, q_len, kv_len, seed, tiles = problem
    rng = np.random.default_rng(seed)
    arrays, param = contents(program.buffers, rng), float(np.float32(rng.standard_normal()))
    shapes = [(BATCH, HEADS, q_len, 1), *2 * [(BATCH, KV_HEADS, kv_len, 1)], (BATCH, HEADS, q_len, 1)]
    q, k, v, d_o = (rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes)
    d_lse = rng.integers(-2, 3, (BATCH, HEADS, q_len)).astype(np.float32)
    wanted = [i for i, buffer in enumerate(program.buffers) if buffer.dtype == "f32"]
    config = {**tiles, "backward_tile_q": tile_q, "backward_tile_kv": tile_kv}
    try:
        kernel = CpuKernel(KernelSpec(program, "float32", 1, 1), config)
        whole = canonical(program)
        code = emit(whole.attend, whole, _engine.opcodes(), frozenset(wanted))
    except AttnkitError as refused:
        if "tiles alive" not in str(refused):
            raise
        event("too many tiles")
        return
    held = [torch.from_numpy(np.array(x)) for x in (q, k, v)]
    captured = [torch.from_numpy(x) for x in arrays]
    for isa in _engine.isa_levels():
        _engine.set_isa(isa)
        o, lse = torch.zeros(BATCH, HEADS, q_len, 1), torch.zeros(BATCH, HEADS, q_len)
        dq, dk, dv = (torch.zeros_like(x) for x in held)
        sums = [torch.zeros_like(x) if i in wanted else None for i, x in enumerate(captured)]
        try:
            kernel(*held, o, lse, captured, [param], 2)
            cotangents = torch.from_numpy(d_o), torch.from_numpy(d_lse)
            kernel.backward(*held, o, lse, captured, [param], *cotangents, dq, dk, dv, sums, 2)
        except AttnkitError as fault:
            event(fault.code)
            continue
        found = [dq, dk, dv, *(sums[i] for i in wanted)]
        exact = [np.zeros(x.shape) for x in found if x is not None]
        sizes = [np.zeros(x.shape) for x in exact]  # of what was added: roundings are shares of it
        steepest, finite = 0.0, True
        for b, h in itertools.product(range(BATCH), range(HEADS)):
            g = h // (HEADS // KV_HEADS)
            s = q[b, h] @ k[b, g].T
            pairs = PairByPair(
                code.code, s, {"b": b, "h": h, "q_len": q_len, "kv_len": kv_len}, arrays, param
            )
            value = [x.astype(np.float64) for x in pairs.values]
            live = np.ones(s.shape, bool) if code.mask < 0 else value[code.mask] != 0
            z = np.where(live, s.astype(np.float64) if code.score < 0 else value[code.score], -np.inf)
            slope = np.where(live, 1.0 if code.slope < 0 else value[code.slope], 0)
            of_loads = [(load, np.where(live, value[at], 0)) for load, at in code.loads]
            weights, _ = weights_of(z, live)
            finite &= not np.isnan(weights).any() and not np.isposinf(z).any()
            finite &= all(np.isfinite(x).all() for x in (slope, *(each for _, each in of_loads)))
            if not finite:
                break
            steepest = max(steepest, float(abs(z[np.isfinite(z)]).max(initial=0)))
            d_weights, delta = d_o[b, h] * v[b, g].T, (weights @ v[b, g]) * d_o[b, h]
            d_z = weights * (d_weights - delta + d_lse[b, h][:, None])
            most = weights * (
                abs(d_weights) + abs(weights @ abs(v[b, g]) * d_o[b, h]) + abs(d_lse[b, h])[:, None]
            )
            for to, by, of in ((exact, d_z, lambda x: x), (sizes, most, abs)):
                ds = by * of(slope)
                to[0][b, h] += ds @ of(k[b, g])
                to[1][b, g] += ds.T @ of(q[b, h])
                to[2][b, g] += weights.T @ of(d_o[b, h])
                for load, each in of_loads:
                    _, buffer, nargs, *args = code.code[load]
                    at = np.zeros(s.shape, np.int64)
                    for a, n in zip(args[:nargs], arrays[buffer].shape, strict=True):
                        at = at * n + np.clip(pairs.values[a], 0, n - 1)
                    flat = to[3 + wanted.index(buffer)].reshape(-1)
                    np.add.at(flat, at, np.where(live, by * of(each), 0))
        if not finite:
            event("not finite")
            continue
        event("ran")
        share = 2e-5 + 4e-7 * steepest
        for got, want, size in zip(found, exact, sizes, strict=True):
            assert got is not None
            np.testing.assert_array_less(abs(got.numpy() - want), share * size + 1e-30)
