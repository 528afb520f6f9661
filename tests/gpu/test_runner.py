"""`make gpu` without a GPU: it says so, and its dry run goes as far as the launch."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("run.py")


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_runner", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


runner = _module()


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
    kernels = json.loads((tmp_path / "dry-run-kernels.json").read_text())
    assert "forward causal bfloat16 128/128" in kernels["said"]
    assert "done before" in run("--dry-run", "--out", str(tmp_path)).stdout


def fake_ptxas(folder: Path, release: str) -> Path:
    ptxas = folder / "ptxas"
    ptxas.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    ptxas.chmod(0o755)
    return ptxas


def test_another_assembler_is_taken_if_it_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own is 12.8; one of 13 or later is told to Triton by its environment, and noted."""
    old, new = (
        fake_ptxas(folder, release)
        for folder, release in zip(_folders(tmp_path), ("12.9", "13.3"), strict=True)
    )
    assert runner.version(old) == (12, 9)
    assert runner.version(tmp_path / "none") == (0, 0)
    step = runner.Step("x", ("timeit", "-n", "1"), 60, newer=True)
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    monkeypatch.setattr(runner.shutil, "which", lambda name: str(old))
    if runner.assembler() is None:  # unless this machine has one
        assert "not run" in str(runner.run(step, 60, tmp_path)["said"])
    monkeypatch.setattr(runner.shutil, "which", lambda name: str(new))
    found = runner.run(step, 60, tmp_path)
    assert found["code"] == 0
    assert runner.version(Path(str(found["assembler"]))) >= (13, 3)


def _folders(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir()
    return folders


def test_steps_that_are_done_or_late_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What was cut off leaves no file and is run again; what is done is not."""
    steps = (
        runner.Step("a", ("timeit", "-n", "1"), 60), runner.Step("b", ("timeit", "-n", "1", "import time; time.sleep(9)"), 1),
        runner.Step("c", ("timeit", "--no"), 60),
    )  # fmt: skip
    monkeypatch.setattr(runner, "DRY", steps)
    monkeypatch.setattr(sys, "argv", ["run.py", "--dry-run", "--out", str(tmp_path)])
    assert runner.main() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "c.json"]
    assert runner.main() == 1
    assert "a: done before" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--dry-run", "--out", str(tmp_path / "late"), "--seconds", "5"]
    )
    assert runner.main() == 0
    assert capsys.readouterr().out.count("no time left") == 3


def test_measurements_wait_for_what_runs_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def run(step: Any, seconds: float, out: Path) -> dict[str, object]:
        time.sleep(0.3 if step.beside else 0)
        order.append(step.name)
        return {"code": 0, "seconds": 0.0}

    steps = (
        runner.Step("warm", (), 60, beside=True),
        runner.Step("test", (), 60),
        runner.Step("measure", ("--json",), 60),
    )
    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "DRY", steps)
    monkeypatch.setattr(sys, "argv", ["run.py", "--dry-run", "--out", str(tmp_path)])
    assert runner.main() == 0
    assert order == ["test", "warm", "measure"]


def test_every_bench_step_names_rows_of_the_suite(tmp_path: Path) -> None:
    from attnkit.bench.rows import select, suites

    patterns = [
        step.command[step.command.index("--rows") + 1] for step in runner.STEPS if "--rows" in step.command
    ]
    chosen = [row.name for pattern in patterns for row in select("gpu", patterns=[pattern])]
    assert {row.name for row in suites["gpu"]} <= set(chosen)
    assert all(select("gpu", patterns=[pattern]) for pattern in patterns)
