"""The files of ``interpreted/``, half of them each in a process in which Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(map(str, (Path(__file__).parent / "interpreted").glob("test_*.py")))


@pytest.mark.shows
@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=["one half", "the other"])
def test_interpreted(files: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
