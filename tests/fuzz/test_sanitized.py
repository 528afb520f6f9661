"""The engine's own tests with AddressSanitizer and UndefinedBehaviorSanitizer inside the engine: not one report.

`make sanitize` runs this file alone. A report ends the process that made it (-fno-sanitize-recover).
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attnkit import _engine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Sanitized = Callable[..., dict[str, str]]

# What runs code of the engine. Without: the sweep over a process that may not grow (ASan itself needs to), and what
# measures times or other processes.
TESTS = {
    "conformance": ["tests/conformance"],
    "robust": ["tests/robust"],
    "laws": ["tests/laws"],
    "errors": [
        "tests/error/test_hostile_calls.py", "tests/error/test_ops_errors.py",
        "--deselect", "tests/error/test_ops_errors.py::test_out_of_memory",
    ],
    "ops": ["tests/ops/test_attend_op.py", "tests/ops/test_functional.py", "tests/ops/test_captures.py", "tests/ops/test_gradients.py"],
    "states": ["tests/ops/test_recur_op.py", "tests/ops/test_linear_attention.py", "tests/ops/test_factorizable_attention.py"],
    "caches": ["tests/ops/test_kv_cache.py", "tests/ops/test_kv_codes.py"],
    "choices": ["tests/ops/test_select_op.py", "tests/ops/test_gathered.py", "tests/ops/test_encoded_attention.py", "tests/ops/test_sparge_attention.py"],
    "groups": ["tests/ops/test_groups.py", "tests/ops/test_routing_attention.py"],
    "weights": ["tests/ops/test_readout.py", "tests/ops/test_normalizers.py", "--deselect", "tests/ops/test_readout.py::test_errors[memory that is not there]"],
    "carried": ["tests/ops/test_selective_attention.py", "tests/ops/test_selective_codes.py"],
    "engine": [
        "tests/unit/test_bytecode.py", "tests/unit/test_bytecode_verifier.py", "tests/unit/test_block_map.py",
        "tests/unit/test_engine_ops.py", "tests/fuzz/test_bindings.py", "tests/fuzz/test_hostile.py",
    ],
}  # fmt: skip

START = """
import numpy as np
import torch
import attnkit as ak
from attnkit import _engine
assert "sanitize" in _engine.__file__, _engine.__file__
"""


def python(environment: dict[str, str], script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


# One element past the end of each of these, by a length that is not true.
OVERRUN = """
q, k, v, o = (np.zeros((1, 1, n, 4), np.float32) for n in (3, 5, 5, 3))
lengths = {"q": 3, "k": 5}
lengths["%s"] += 1
shape, near = lambda n: (1, 1, n, 4), (64, 64, 4, 1)
at = lambda x, n: (x.ctypes.data, 0, shape(n), near)
_engine.attend(_engine.Program(np.zeros((0, 8), np.int32), -1, -1, 0, 0),
    at(q, lengths["q"]), at(k, lengths["k"]), at(v, lengths["k"]), at(o, lengths["q"]),
    None, 1.0, None, None, [], [], None, 1, 96, 64, 1024)
"""


@pytest.mark.parametrize("level", _engine.isa_levels())
@pytest.mark.parametrize("tensor", ["q", "k"])
def test_one_element_too_far_is_reported(tensor: str, level: str, sanitized: Sanitized) -> None:
    """What all the rest relies on: the sanitizers are there, on every instruction set, and see the engine."""
    done = python({**sanitized(), "ATTNKIT_ISA": level}, OVERRUN % tensor)
    assert done.returncode == 1
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
    assert "csrc/cpu/kernel-inl.h" in done.stderr


@pytest.mark.parametrize("name", TESTS)
def test_no_reports(name: str, sanitized: Sanitized, passing: Callable[..., str]) -> None:
    said = passing(TESTS[name], sanitized(), timeout=3000)
    assert not re.search("AddressSanitizer|runtime error:", said), said[-5000:]


# Calls of every kind, more of them than anything that is kept between calls.
LEAKS = """
torch.set_num_threads(2)
q = torch.randn(1, 4, 200, 16)
table = torch.arange(200)
for n in range(300):
    ak.attention(q[:, :, :n % 7 + 1], q, q, mask=ak.causal(), score=ak.bias(torch.zeros(200, 200)), return_lse=True)
    ak.attention(q, q, q, mask=ak.document(table // 50), kv_lens=torch.tensor([n % 200], dtype=torch.int32))
    for bad in (lambda b, h, i, j: i // j == 0, lambda b, h, i, j: table[i + 1] == 0):
        try:
            ak.attention(q, q, q, mask=bad)
        except ak.AttnkitError:
            pass
    try:
        _engine.Program(np.full((5, 8), n, np.int32), 0, 0, 0, 0)
    except ValueError:
        pass
    _engine.evaluate("tanh_f", [np.zeros(n, np.float32)])
print("done")
"""


def leaks_in_the_engine(said: str) -> list[str]:
    """The leak reports whose allocation went through the engine; Python and torch leave things behind themselves."""
    reports = re.split(r"\n(?=(?:Direct|Indirect) leak of)", said)
    return [report for report in reports[1:] if "_engine" in report or "csrc/" in report]


def test_no_leaks(sanitized: Sanitized) -> None:
    done = python(sanitized(detect_leaks=1, exitcode=0), LEAKS)
    assert done.stdout == "done\n", done.stderr[-3000:]
    assert "LeakSanitizer" in done.stderr  # it did look: something of Python's or torch's always leaks
    assert not leaks_in_the_engine(done.stderr), leaks_in_the_engine(done.stderr)[0]
