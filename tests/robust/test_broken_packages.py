"""Optional packages that are installed and do not work: `import attnkit` works, errors are typed, doctor says it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import attnkit as ak
from attnkit import backends
from attnkit.plan.spec import KernelSpec
from attnkit.runtime import choose

BREAKAGES = {
    "ImportError": "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "OSError": "raise OSError('/lib/libc10.so: undefined symbol: _ZN3c10')",
    "no submodule": "from %s import _C",
    "syntax": "def broken(:",
    "anything": "raise RuntimeError('CUDA driver version is insufficient')",
    "empty": "",
}

# What every process below does; prints one JSON object.
SCRIPT = """
import json, os, sys
import attnkit as ak
found = {"version": ak.__version__, "light": ak.parse.__name__, "calls": []}
for _ in range(2):  # the second time half of it is in sys.modules
    try:
        import torch
        q = torch.ones(1, 2, 3, 4)
        found["calls"].append(float(ak.attention(q, q, q).sum()))
    except Exception:
        try:
            ak.attention
        except ak.AttnkitError as exc:
            found["calls"].append([exc.code, exc.given, exc.hint])
from attnkit.bench.doctor import examine
found["problems"] = examine()["problems"]
json.dump(found, sys.stdout)
sys.stdout.write(os.linesep)
sys.stdout.flush()
"""

# The same beside a torch that works, once for each folder: importing it takes ten times as long as the rest.
EACH = f"""
import os, sys
import torch
for folder in sys.argv[1:]:
    if os.fork() == 0:
        sys.path.insert(0, folder)
        exec({SCRIPT!r})
        os._exit(0)
    assert os.wait()[1] == 0, folder
"""


def break_packages(folder: Path, packages: tuple[str, ...], content: str) -> None:
    for name in packages:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(content % name if "%s" in content else content)


def python(*arguments: str | Path, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process that looks for packages in the folder ``first`` before all others."""
    paths = filter(None, (first and str(first), os.environ.get("PYTHONPATH")))
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def run(script: str, *folders: Path, first: Path | None = None) -> list[dict[str, Any]]:
    done = python("-c", script, *folders, first=first)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_torch(name: str, tmp_path: Path) -> None:
    break_packages(tmp_path, ("torch",), BREAKAGES[name])
    (found,) = run(SCRIPT, first=tmp_path)
    assert found["version"] == ak.__version__
    (first, second) = found["calls"]
    assert first[0] == second[0] == "AK501"
    assert "doctor" in first[2]
    (problem,) = [p for p in found["problems"] if p.startswith("torch")]
    assert str(tmp_path) in problem if name == "empty" else "does not import" in problem, problem


def test_broken_triton_and_cupy(tmp_path: Path) -> None:
    """Nothing of attnkit's needs them on the CPU; doctor names both."""
    folders = [tmp_path / name for name in BREAKAGES]
    for folder, content in zip(folders, BREAKAGES.values(), strict=True):
        break_packages(folder, ("triton", "cupy"), content)
    for name, found in zip(BREAKAGES, run(EACH, *folders), strict=True):
        assert found["calls"] == [24.0, 24.0], name
        for package in ("triton", "cupy"):
            assert any(p.startswith(f"{package} ") for p in found["problems"]), (name, found["problems"])


def test_doctor_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(BREAKAGES["OSError"])
    done = python("-m", "attnkit", "doctor", first=tmp_path)
    assert done.returncode == 1
    assert "torch is installed but does not import: OSError" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr


def test_a_broken_backend_of_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "theirs"

        def load(self) -> None:
            raise ImportError("libtheirs.so: not found")

    monkeypatch.setattr(backends, "entry_points", lambda group: [Entry()])
    for cached in (backends.names, backends.get):
        cached.cache_clear()
    try:
        spec = KernelSpec(ak.trace(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx), "float32", 4, 4)
        chosen, rejected = choose(spec)
        assert chosen == "cpu"
        assert rejected["theirs"] == ("not available: ImportError: libtheirs.so: not found",)
        with pytest.raises(ak.AttnkitError, match=r"AK502(.|\n)*libtheirs.so"):
            choose(spec, "theirs")
    finally:
        for cached in (backends.names, backends.get):
            cached.cache_clear()
