"""The one-way street between packages; the contracts themselves stand in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.lint
def test_import_contracts() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("package", ["errors", "ir", "analysis"])
def test_foundations_need_only_numpy(package: str) -> None:
    graph = grimp.build_graph("attnkit", include_external_packages=True, cache_dir=None)
    root = f"attnkit.{package}"
    allowed = {"attnkit", *sys.stdlib_module_names} | (set() if package == "errors" else {"numpy"})
    foreign = {
        (module, imported)
        for module in {root} | graph.find_descendants(root)
        for imported in graph.find_modules_directly_imported_by(module)
        if imported.partition(".")[0] not in allowed
    }
    assert not foreign
