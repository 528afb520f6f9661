"""Random programs of all operations: text and back, keys in every process, and a run of each by the reference."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from attnkit.backends.reference import gradients, run
from attnkit.ir.program import OPERATIONS, Attend, Program
from attnkit.ir.text import parse, print_program
from attnkit.ir.verify import infer, verify
from attnkit.testing.generate import random_inputs, random_program
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
