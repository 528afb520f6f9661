"""`make gpu` without a GPU: it says so, and its dry run goes as far as the launch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("run.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUNNER), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.shows
def test_the_dry_run_reaches_the_launch(tmp_path: Path) -> None:
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "dry-run.json").read_text())
    assert found["schema_version"] == 1
    assert found["code"] == 0
    assert "1 passed" in found["said"]
    assert "done before" in run("--dry-run", "--out", str(tmp_path)).stdout
