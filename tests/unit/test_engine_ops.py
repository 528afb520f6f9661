"""Every opcode by itself against numpy: special values, all exponents, and the error bound of its row in the op table.

Lanes are 4 bytes: ints travel as the float32 of the same bits, bools as 0 and ~0.
"""

import itertools
from typing import Any

import numpy as np
import pytest

from attnkit import _engine
from attnkit.ir.optable import LEAVES, OPS

F32 = np.finfo(np.float32)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
DENSE = 2**20

# (types of the arguments, type of the result, suffix): rows of the op table
ROWS = {
    ("f", "f", "f"): "neg abs exp exp2 log log2 sqrt rsqrt tanh sigmoid erf sin cos floor",
    ("ff", "f", "f"): "add sub mul div floordiv mod min max pow",
    ("i", "i", "i"): "neg abs",
    ("ii", "i", "i"): "add sub mul floordiv mod min max and or xor",
    ("ff", "b", "f"): "lt le gt ge eq ne",
    ("ii", "b", "i"): "lt le gt ge eq ne",
    ("bb", "b", "b"): "eq ne and or xor",
    ("b", "b", "b"): "not",
    ("bff", "f", "f"): "where",
    ("bii", "i", "i"): "where",
    ("bbb", "b", "b"): "where",
}
# opcode: (row of the op table, types of its arguments, type of its result)
SIGNATURES = {
    **{f"{row}_{t}": (row, types, result) for (types, result, t), rows in ROWS.items() for row in rows.split()},
    "i_to_f": ("float", "i", "f"),
    "b_to_f": ("float", "b", "f"),
    "b_to_i": ("int", "b", "i"),
    "f_to_i": ("int", "f", "i"),
}  # fmt: skip


def grid(kind: str, rng: np.random.Generator, size: int = 2000) -> np.ndarray:
    """Special values and random ones of one type: float32, int32 or bool."""
    if kind == "b":
        return np.array([False, True])
    if kind == "i":
        special = [
            INT_MIN,
            INT_MIN + 1,
            -(2**24) - 1,
            -7,
            -2,
            -1,
            0,
            1,
            2,
            3,
            7,
            46341,
            2**24 + 1,
            INT_MAX - 1,
            INT_MAX,
        ]
        ints = [special, rng.integers(INT_MIN, INT_MAX, size, endpoint=True), rng.integers(-9999, 9999, size)]
        return np.concatenate(ints).astype(np.int32)
    positive = [0, F32.smallest_subnormal, 1e-40, F32.tiny, 1e-20, 1e-4, 0.5, 1, 1.5, 2, 3, 10, 88, 89, 104, 127, 128, 150,
                2**23 + 1, 2**31, 1e30, F32.max, np.inf]  # fmt: skip
    special = np.array([*positive, np.nan], np.float32)
    with np.errstate(all="ignore"):
        near = [np.nextafter(special, np.float32(end)) for end in (0, np.inf)]
    bits = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)  # all exponents alike
    moderate = rng.standard_normal(size, dtype=np.float32) * np.float32(10)
    x = np.concatenate([special, *near, bits, moderate])
    return np.concatenate([x, -x]).astype(np.float32)


def operands(types: str, rng: np.random.Generator) -> list[np.ndarray]:
    """All pairs of special values, and random tuples."""
    if len(types) == 1:
        return [grid(types, rng)]
    random = [rng.permutation(np.resize(grid(t, rng), 10_000)) for t in types]
    crossed = zip(*itertools.product(*[grid(t, rng, 0)[:64] for t in types]), strict=True)
    return [np.concatenate([np.array(c, r.dtype), r]) for c, r in zip(crossed, random, strict=True)]


def evaluate(opcode: str, args: list[np.ndarray], result: str) -> np.ndarray:
    lanes = [(-x.astype(np.int32) if x.dtype == bool else x).view(np.float32) for x in args]
    out = _engine.evaluate(opcode, lanes)
    if result == "f":
        return out
    ints = out.view(np.int32)
    if result == "i":
        return ints
    assert np.isin(ints, (0, -1)).all(), "a bool lane is neither 0 nor ~0"
    return ints == -1


def exact(row: str, args: list[np.ndarray]) -> np.ndarray:
    wide = {"f": np.float64, "i": np.int64, "b": np.bool_}
    with np.errstate(all="ignore"):
        return np.asarray(OPS[row].numpy(*[x.astype(wide[x.dtype.kind]) for x in args]))


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distance from a float64 in units of its last place in float32; infinite where only one is NaN."""
    top = 2.0**128  # what infinity is rounded from: overflow is as far off as the true value is from here
    with np.errstate(all="ignore"):
        size = np.spacing(np.minimum(np.abs(want), F32.max).astype(np.float32)).astype(np.float64)
        distance = np.abs(np.clip(got.astype(np.float64), -top, top) - np.clip(want, -top, top)) / size
    return np.where(
        np.isnan(got) & np.isnan(want), 0.0, np.where(np.isnan(got) | np.isnan(want), np.inf, distance)
    )


def worst(got: np.ndarray, want: np.ndarray, args: list[np.ndarray]) -> tuple[float, str]:
    """The largest error, and where it is."""
    error = ulps(got, want)
    i = int(error.argmax())
    return float(error[i]), f"max {error[i]:.4g} ulp, at {[x[i] for x in args]}: {got[i]!r} for {want[i]!r}"


def test_every_opcode_with_arguments_is_tested() -> None:
    leaves = {name for name in _engine.opcodes() if name.split("_")[0] in LEAVES}
    assert set(SIGNATURES) == set(_engine.opcodes()) - leaves
    assert {row for row, *_ in SIGNATURES.values()} == set(OPS)


@pytest.mark.parametrize("opcode", SIGNATURES)
def test_opcode(opcode: str, isa: str, rng: np.random.Generator) -> None:
    row, types, result = SIGNATURES[opcode]
    args = operands(types, rng)
    if opcode == "f_to_i":
        args = [x[np.abs(x) < 2**31] for x in args]  # the analysis excludes the others
    if opcode in ("floordiv_i", "mod_i"):
        args = [x[args[1] != 0] for x in args]
    want = exact(row, args)
    got = evaluate(opcode, args, result)
    if result == "b":
        np.testing.assert_array_equal(got, want)
    elif result == "i":
        held = (want >= INT_MIN) & (want <= INT_MAX)  # the analysis excludes the others
        assert held.mean() > 0.1
        np.testing.assert_array_equal(got[held], want[held])
    else:
        error, where = worst(got, want, args)
        assert error <= OPS[row].ulp, f"{opcode}: {where}; the op table allows {OPS[row].ulp}"


@pytest.mark.parametrize("row", ["floordiv", "mod"])
def test_float_division_is_its_steps(row: str, isa: str, rng: np.random.Generator) -> None:
    """`//` and `%` on floats are a division, a floor and what follows, each rounded once: bit for bit."""
    x, y = operands("ff", rng)
    with np.errstate(all="ignore"):
        floor = np.floor(x / y)
        want = floor if row == "floordiv" else x - floor * y
    np.testing.assert_array_equal(evaluate(f"{row}_f", [x, y], "f"), want)


# What the engine makes of several instructions (csrc/cpu/fuse.cc): types of the arguments, and the value in float64.
FUSED = {
    "mul_add": ("fff", lambda x, y, z: x * y + z),
    "mul_sub_from": ("fff", lambda x, y, z: z - x * y),
    "add_ramp": ("ffii", lambda x, y, i, j: x + y * (i - j)),
    "add_gap": ("ffii", lambda x, y, i, j: x + y * abs(i - j)),
    "sub_gap": ("ffii", lambda x, y, i, j: x - y * abs(i - j)),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_sums(name: str, isa: str, rng: np.random.Generator) -> None:
    """Right to three roundings, whichever arguments are the same for all elements."""
    types, value = FUSED[name]
    drawn = {"f": lambda: rng.standard_normal(1000, dtype=np.float32),
             "i": lambda: rng.integers(-(2**30), 2**30, 1000).astype(np.int32)}  # fmt: skip
    for same in itertools.product((False, True), repeat=len(types)):
        args = [drawn[t]()[: 1 if one else None] for t, one in zip(types, same, strict=True)]
        got = _engine.evaluate(name, [x.view(np.float32) for x in args])
        wide = [x.astype(np.float64) for x in args]
        sizes = FUSED["mul_add" if types == "fff" else "add_gap"][1](*(abs(x) if x.dtype == np.float32 else w
                                                                     for x, w in zip(args, wide, strict=True)))  # fmt: skip
        assert (abs(got - value(*wide)) <= 1.5 * F32.eps * abs(sizes)).all(), f"{name}, same: {same}"


def test_within(isa: str, rng: np.random.Generator) -> None:
    for same in itertools.product((False, True), repeat=3):
        args = [rng.integers(-4, 5, 1000).astype(np.int32)[: 1 if one else None] for one in same]
        got = _engine.evaluate("within", [x.view(np.float32) for x in args]).view(np.int32)
        x, low, high = args
        np.testing.assert_array_equal(got, np.where((low <= x) & (x <= high), -1, 0), err_msg=f"same: {same}")


def softcap(x: np.ndarray, cap: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(cap * np.tanh(x / cap))


@pytest.mark.parametrize("cap", [1.0, 10.0, 50.0, -30.0, 1e-3, 1e12])
def test_softcap(cap: float, isa: str, rng: np.random.Generator) -> None:
    """As right as its parts together: the tanh of the op table, a division and a product."""
    small = np.exp2(rng.uniform(-40, 4, 100_000))
    x = (
        np.concatenate([small, -small, np.linspace(-12, 12, 100_000), [0.0, np.inf, -np.inf, np.nan]]) * cap
    ).astype(np.float32)
    c = np.array([cap], np.float32)
    want = softcap(x.astype(np.float64), np.float64(c[0]))
    for caps in (c, np.resize(c, x.shape)):
        error, where = worst(_engine.evaluate("softcap", [x, caps]), want, [x])
        assert error <= OPS["tanh"].ulp + 2, where


@pytest.mark.parametrize("cap", [0.0, -0.0, np.inf, np.nan, 1e-40, 3e38])
def test_softcap_of_odd_caps(cap: float, isa: str) -> None:
    x = np.array([0.0, 1e-40, -1.0, 3e38, np.inf, np.nan], np.float32)
    c = np.array([cap], np.float32)
    np.testing.assert_allclose(_engine.evaluate("softcap", [x, c]), softcap(x, c[0]), rtol=1e-6)


# Where the function is neither 0, 1 nor infinite in float32.
RANGES = {"exp": (-104.0, 89.0), "exp2": (-150.0, 128.0), "tanh": (-10.0, 10.0), "sigmoid": (-104.0, 18.0)}


@pytest.mark.parametrize("row", RANGES)
def test_dense(row: str, isa: str, rng: np.random.Generator) -> None:
    """Half of 2^20 floats evenly over the range in which something happens, half over its exponents."""
    low, high = RANGES[row]
    even = np.linspace(low, high, DENSE // 2, dtype=np.float32)
    small = np.float32(high) * np.exp2(-rng.uniform(0, 30, DENSE // 2)).astype(np.float32)
    small[::2] *= np.float32(-1)
    x = np.concatenate([even, small])
    error, where = worst(evaluate(f"{row}_f", [x], "f"), exact(row, [x]), [x])
    assert error <= OPS[row].ulp, f"{row}: {where}; the op table allows {OPS[row].ulp}"


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100])
def test_any_length(n: int, isa: str, rng: np.random.Generator) -> None:
    args = [rng.standard_normal(n, dtype=np.float32) for _ in range(2)]
    np.testing.assert_array_equal(_engine.evaluate("add_f", args), args[0] + args[1])


def test_signs_and_nan_pass_through(isa: str) -> None:
    """Bits, not values: -0 stays -0, and integers that look like signalling NaN survive a selection."""
    zeros = np.array([0.0, -0.0], np.float32)
    for opcode, signs in {"neg_f": [True, False], "abs_f": [False, False], "floor_f": [False, True],
                          "sqrt_f": [False, True], "tanh_f": [False, True]}.items():  # fmt: skip
        np.testing.assert_array_equal(np.signbit(_engine.evaluate(opcode, [zeros])), signs, err_msg=opcode)
    patterns = np.array([0x7F800001, 0x7FA00000, -1, INT_MIN], np.int64).astype(np.int32)
    chosen: Any = evaluate("where_i", [np.array([True, False] * 2), patterns, patterns[::-1].copy()], "i")
    assert chosen.tolist() == [patterns[0], patterns[2], patterns[2], patterns[0]]


def weights(bits: np.ndarray) -> tuple[float, str]:
    """The worst error of e^x, the softmax weight, over the floats of these bit patterns."""
    x = bits.astype(np.uint32).view(np.float32)
    return worst(_engine.evaluate("exp_weight", [x]), np.exp(x.astype(np.float64)), [x])


# Every float from -0 to where e^x is hardly a normal number. Past it a weight is 0: none is subnormal.
MINUS_ZERO, LAST_WEIGHT = 0x80000000, int(np.float32(-87.3148).view(np.uint32))


def test_exponential_of_weights(isa: str, rng: np.random.Generator) -> None:
    error, where = weights(rng.integers(MINUS_ZERO, LAST_WEIGHT, 200_000))
    assert error <= 1.5, where
    ends = np.array([0.0, -0.0, -104, -1e30, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(_engine.evaluate("exp_weight", [ends]), np.float32([1, 1, 0, 0, 0, np.nan]))
    beyond = _engine.evaluate("exp_weight", [np.linspace(-104, -87.3149, 160_000, dtype=np.float32)])
    assert not beyond.any()


@pytest.mark.slow
@pytest.mark.shows
def test_exponential_of_weights_over_all_floats(isa: str) -> None:
    for first in range(MINUS_ZERO, LAST_WEIGHT, 1 << 24):
        error, where = weights(np.arange(first, min(first + (1 << 24), LAST_WEIGHT + 1)))
        assert error <= 1.5, where
