"""Every operator as it is printed for Triton, and random expressions of them, against numpy in float64."""

from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from attnkit.backends.reference.evaluate import evaluate
from attnkit.backends.triton.source import load, whole
from attnkit.ir.expr import Expr, const, make, topological, var
from attnkit.ir.optable import OPS, VARIABLES
from attnkit.ir.program import Program
from attnkit.ir.text import parse
from attnkit.plan.triton import Printer
from attnkit.testing.expressions import Expressions

SIZE = 1024
PLAIN = parse(
    "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\n o, lse = attend(q, k, v) {\n normalizer = softmax\n }\n return o\n}\n"
)
TYPES = {"float": (np.float32, "float32"), "int": (np.int32, "int32"), "bool": (np.bool_, "bool")}


def run(root: Expr, values: dict[str, Any], program: Program = PLAIN) -> Any:
    """An expression of variables, evaluated by a kernel."""
    printer = Printer(program)
    lines = printer.lines([root])
    names = sorted({str(node.attr) for node in topological([root]) if node.op == "var"})
    read = [
        f"{name} = tl.load(of_{name} + i)" + (" != 0" if VARIABLES[name] == "bool" else "") for name in names
    ]
    body = [*read, *lines, f"tl.store(to + i, tl.broadcast_to({printer.name(root)}, [{SIZE}]))"]
    text = whole(
        f"\n@triton.jit\ndef kernel(to, {', '.join(f'of_{n}' for n in names)}):\n"
        f"    i = tl.arange(0, {SIZE})\n" + "".join(f"    {line}\n" for line in body)
    )
    to = torch.empty(SIZE, dtype=getattr(torch, TYPES[root.dtype][1]))
    load(text).kernel[(1,)](to, *(torch.from_numpy(values[name]) for name in names))
    return to.numpy()


def values_of(rng: np.random.Generator) -> dict[str, Any]:
    """Floats with what is special among them, and small ints."""
    special = np.array(
        [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-3, 40.0, -40.0, np.inf, -np.inf, np.nan], np.float32
    )
    floats = {
        n: (rng.standard_normal(SIZE) * rng.choice([0.3, 3, 30], SIZE)).astype(np.float32) for n in "sxyzwf"
    }
    for i, x in enumerate(floats.values()):
        x[:144] = np.repeat(special, 12) if i % 2 else np.tile(special, 12)
    ints = {
        n: rng.integers(-9, 10, SIZE).astype(np.int32)
        for n in ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len")
    }
    return floats | ints


ROWS = [(name, dtypes) for name, info in OPS.items() for dtypes in product(("float", "int"), repeat=info.arity)
        if info.rule(dtypes) is not None and info.rule(dtypes)[0] == dtypes and dtypes != (name,)]  # fmt: skip
LEAVES = {"float": ("s", "x", "y"), "int": ("q_idx", "kv_idx", "h")}


@pytest.mark.parametrize(("name", "dtypes"), ROWS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_operator(name: str, dtypes: Any, rng: np.random.Generator) -> None:
    values = values_of(rng)
    root = make(name, *(var(LEAVES[dtype][i]) for i, dtype in enumerate(dtypes)))
    with np.errstate(all="ignore"):
        want = np.asarray(evaluate([root], values)[0])
    got = run(root, values)
    if root.dtype != "float":
        known = np.ones(SIZE, bool) if name != "int" else np.isfinite(values["s"])
        np.testing.assert_array_equal(got[known], want[known])
        return
    steps = name in ("floordiv", "mod")  # a quotient's last bit decides on which side
    same = np.abs(want) < 3e38
    if steps or name == "pow":
        same &= np.isfinite(got)
    if not (steps or name == "pow"):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    size = np.abs(want[same])
    error = np.abs(got[same] - want[same])
    bound = {"pow": 2e-5}.get(name, max(OPS[name].ulp, 4) * 2.0**-23 if np.isfinite(OPS[name].ulp) else 1e-5)
    close = error <= bound * size + (1e-30 if not steps else 1e-5 * np.abs(values["x"][same]))
    assert close.mean() > 0.95 if steps else close.all(), (error[~close][:5], want[same][~close][:5])


def test_logic(rng: np.random.Generator) -> None:
    values = values_of(rng)
    a, b = make("lt", var("q_idx"), var("kv_idx")), make("ne", var("h"), var("kv_idx"))
    for root in (make("and", a, b), make("or", a, b), make("xor", a, make("not", b)), make("eq", a, b)):
        np.testing.assert_array_equal(run(root, values), evaluate([root], values)[0])
    root = make("where", a, make("float", b), var("s"))
    np.testing.assert_array_equal(run(root, values), evaluate([root], values)[0].astype(np.float32))


def test_what_is_made_of_constants(rng: np.random.Generator) -> None:
    values = values_of(rng)
    known = make("tanh", make("float", make("max", const(1), make("and", const(6), const(3)))))
    root = make("where", make("lt", var("h"), const(2)), make("tanh", known), make("mul", known, known))
    np.testing.assert_allclose(run(root, values), evaluate([root], values)[0], rtol=1e-6)


def test_random_expressions(rng: np.random.Generator, seed: int, effort: int) -> None:
    values = values_of(rng)
    for x in ("s", "x", "y"):
        values[x] = rng.uniform(-2, 2, SIZE).astype(np.float32)
    random = Random(seed)  # noqa: S311 -- of tests
    for _ in range(30 * effort):
        root = Expressions(random, ("s", "x", "y", "q_idx", "kv_idx", "h"), [], 0, True).of("float", 5)
        if root.op in ("const", "var"):
            continue
        with np.errstate(all="ignore"):
            want = evaluate([root], values)[0]
        got = run(root, values)
        finite = np.isfinite(want) & (np.abs(want) < 1e4)
        assert np.mean(np.abs(got[finite] - want[finite]) <= 1e-3 * (1 + np.abs(want[finite]))) > 0.98, root
