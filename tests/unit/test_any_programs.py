"""Random programs of all operations: text and back, keys in every process, and a run of each by the reference."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from attnkit.backends.reference import gradients, run
from attnkit.ir.program import OPERATIONS, Attend, Map, Merge, Program, Recur
from attnkit.ir.text import parse, print_program
from attnkit.ir.verify import infer, verify
from attnkit.testing.arrays import random_inputs
from attnkit.testing.generate import random_program
from attnkit.testing.strategies import any_programs


def of_seed(seed: int) -> Program:
    return random_program(Random(seed))  # noqa: S311


@given(any_programs())
def test_parse_of_print_is_the_same_object(p: Program) -> None:
    text = print_program(p)
    text.encode("ascii")
    parse.cache_clear()
    assert parse(text) is p
    assert print_program(parse(text)) == text


def test_the_generator_reaches_every_operation_keyword_and_output() -> None:
    """A round trip of what is never generated would show nothing."""
    programs = [of_seed(seed) for seed in range(3000)]
    ops = Counter(op.NAME for p in programs for op in p.ops)
    assert all(ops[name] > 100 for name in OPERATIONS)
    attends = [op for p in programs for op in p.ops if isinstance(op, Attend)]
    for name in ("blocks", "groups", "initial", "budget", "dropout", "skip", "mask", "carry"):
        assert sum(getattr(op, name) is not None for op in attends) > 10, name
    assert {name for op in attends for name in op.outputs} == set(Attend.OUTPUTS)
    assert len({op.normalizer.kind for op in attends}) == 5
    assert max(len(op.operands) for op in attends) == 7
    kinds = {layout.kind for p in programs for layout in p.inputs}
    assert len(kinds) == 11
    assert {t.kind for p in programs for t in infer(p)} >= {
        "tokens",
        "bhs",
        "relation",
        "bh",
        "weights",
        "bs",
        "bhdv",
    }


def relaxations(p: Program) -> Iterator[str]:
    """Where tokens of one input stand for those of another, or one operation's numbers for another's."""
    types = infer(p)
    for op in p.ops[:-1]:
        axes = [t.axis for t in (types[i] for i in op.operands) if t.axis is not None]
        if isinstance(op, Map | Merge | Recur) and len({axis.root for axis in axes}) > 1:
            yield f"{op.NAME} of several inputs"
        if isinstance(op, Map) and any(axis.block != axes[0].block for axis in axes):
            yield "map of a pool"
        if not isinstance(op, Attend):
            continue
        q, k = axes[:2]
        for name, relations in (("blocks", (op.blocks,)), ("groups", op.groups or ())):
            held = [types[i] for i in relations if i is not None]
            roots = {t.axis.root for t in held if t.axis} | {t.columns.root for t in held if t.columns}
            if held and not {q.root, k.root} <= roots:
                yield f"{name} of others"
        if op.initial is not None:
            yield "initial of a result" if op.initial >= len(p.inputs) else f"initial of {k.layout.kind} keys"


def test_the_generator_uses_what_the_language_allows() -> None:
    programs = [of_seed(seed) for seed in range(3000)]
    seen = Counter(what for p in programs for what in relaxations(p))
    assert all(seen[f"{name} of several inputs"] > 20 for name in ("map", "merge", "recur"))
    for what in ("map of a pool", "blocks of others", "initial of packed keys"):
        assert seen[what] > 20, what
    assert min(seen["groups of others"], seen["initial of a result"]) > 2
    arrays = [random_inputs(p, np.random.default_rng(n))[0][:3] for n, p in enumerate(programs[:100])]
    assert sum(len({getattr(x, "codes", x).shape[1] for x in qkv}) > 1 for qkv in arrays) > 20


ROUND_TRIPS = """
import sys
from random import Random
import numpy as np
from attnkit.ir.text import parse
from attnkit.testing.generate import random_program
keys = set()
for seed in range(int(sys.argv[1]), int(sys.argv[2])):
    p = random_program(Random(seed))
    assert parse.__wrapped__(p.text) is p, f"seed {seed}"
    keys.add(int(p.key[:16], 16))
sys.stdout.buffer.write(np.array(sorted(keys), np.uint64).tobytes())
"""


@pytest.mark.slow
@pytest.mark.shows
def test_a_million_programs_survive_their_text() -> None:
    """Distinct ones; every seed is one program, and a few come twice."""
    count = 1_010_000
    halves = [(0, count // 2), (count // 2, count)]
    running = [
        subprocess.Popen([sys.executable, "-c", ROUND_TRIPS, str(a), str(b)], stdout=subprocess.PIPE)
        for a, b in halves
    ]
    with ThreadPoolExecutor() as threads:  # both pipes are read at once
        found = list(threads.map(lambda process: process.communicate()[0], running))
    assert [process.returncode for process in running] == [0, 0]
    assert len(np.unique(np.frombuffer(b"".join(found), np.uint64))) >= 1_000_000


KEYS = """
import json
from random import Random
from attnkit.testing.generate import random_program
print(json.dumps([random_program(Random(seed)).key for seed in range(300)]))
"""


@pytest.mark.shows
def test_keys_are_the_same_in_every_process() -> None:
    here = [of_seed(seed).key for seed in range(300)]
    for seed in ("0", "1", "4242"):
        command = [sys.executable, "-c", KEYS]
        out = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        )
        assert json.loads(out.stdout) == here


@given(any_programs(), st.integers(0, 2**32 - 1))
def test_the_reference_runs_whatever_is_legal(p: Program, seed: int) -> None:
    inputs, buffers, params = random_inputs(p, np.random.default_rng(seed))
    out = run(p, inputs, buffers, params, seed)
    assert len(out) == len(p.ops[-1].operands)
    if not any(isinstance(op, Attend) and op.skip is not None for op in p.ops):
        found = gradients(p, inputs, [np.ones(o.shape) for o in out], buffers, params, seed)
        shapes = [getattr(x, "codes", x).shape for x in inputs]
        assert [g.shape for g in found.inputs] == shapes
    verify(p)
