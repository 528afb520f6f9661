"""The kernels for AVX-512 on a machine without it: the engine's own tests, with its instructions emulated (csrc/emulate).

`make emulate` runs this file alone. Of little use where a processor has the instructions: there every test uses them.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.slow

# What computes. Without: what runs other processes or looks at compiled code.
TESTS = (
    "tests/conformance",
    "tests/laws",
    "tests/ops",
    "tests/robust/test_dead_slots.py",
    "tests/robust/test_codes_memory.py",
)
NAMED = """
from attnkit import _engine
assert "emulate" in _engine.__file__, _engine.__file__
print(_engine.current_isa())
"""


@pytest.mark.parametrize("level", ["avx512", "avx512bf16", "avx512amx"])
def test_level(level: str, emulated: Callable[[str], dict[str, str]], passing: Callable[..., str]) -> None:
    environment = emulated(level)
    named = subprocess.run(
        [sys.executable, "-c", NAMED], env=environment, capture_output=True, text=True, check=False
    )
    assert named.stdout == f"{level}\n", named.stderr
    passing(TESTS, environment, timeout=7200)
