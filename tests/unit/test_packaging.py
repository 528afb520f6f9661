"""What ships, how it was built, and that the linters are content."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

import attnkit
from attnkit import _engine

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "attnkit"
CSRC = [str(path) for path in sorted((ROOT / "csrc").rglob("*.[ch]*"))]
SOURCES = sorted(PACKAGE.rglob("*.py"))
LINTERS = {
    "ruff": ["ruff", "check", "--no-cache", "."],
    "format": ["ruff", "format", "--no-cache", "--check", "."],
    "mypy": ["mypy"],
    "clang-format": ["clang-format", "--dry-run", "-Werror", *CSRC],
    "codespell": ["codespell"],
}
CODE_FROM_DATA = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@pytest.mark.lint
@pytest.mark.parametrize("linter", LINTERS)
def test_linter(linter: str) -> None:
    program, *arguments = LINTERS[linter]
    command = [Path(sys.executable).with_name(program), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_version_is_one() -> None:
    assert attnkit.__version__ == version("attnkit")


def test_package_is_typed() -> None:
    assert files("attnkit").joinpath("py.typed").is_file()


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_names_the_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_tests() -> None:
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_make_target_has_a_help_line() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == set(re.findall(r"^([\w-]+):.*## ", text, re.MULTILINE))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_from_data(path: Path) -> None:
    """Nothing in the package can be made to run what it reads: no pickle and its kin, no eval, no exec.

    One file runs what the package itself has printed, from tables of its own.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {(node.module or "").partition(".")[0]}
        else:
            imported = set()
        assert not imported & CODE_FROM_DATA, f"line {node.lineno}: {imported}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            printed = path == PACKAGE / "backends" / "triton" / "source.py" and node.func.id in {
                "exec",
                "compile",
            }
            assert printed or node.func.id not in {"eval", "exec", "compile", "__import__"}, (
                f"line {node.lineno}"
            )


def _objects(pattern: str) -> list[Path]:
    found = sorted((ROOT / "build").glob(f"cp*/CMakeFiles/{pattern}"))
    assert found, "no objects under build/: run `make dev`"
    return found


def test_isa_objects_define_no_weak_symbols() -> None:
    """The linker keeps one of several weak copies: one compiled for AVX-512 would then run on every machine."""
    command = ["nm", "--defined-only", "-A", *_objects("engine.dir/csrc/cpu/isa_*.o")]
    table = subprocess.run(command, capture_output=True, text=True, check=True)
    weak = [line for line in table.stdout.splitlines() if re.search(r" [VvWwu] ", line)]
    assert not weak, "\n".join(weak)


def test_isa_objects_run_nothing_when_loaded() -> None:
    """All of them are loaded on every machine: what they did then, they would do without their instruction set."""
    for path in _objects("engine.dir/csrc/cpu/isa_*.o"):
        done = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True)
        assert " .text" in done.stdout
        assert ".init_array" not in done.stdout, path.name


# AVX2 may use the wide registers of AVX, AVX-512 also those that only EVEX instructions reach; the rest neither.
WIDE, EVEX = re.compile(r"%ymm"), re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b")
USES = {
    "isa_avx2.cc.o": (True, False),
    "isa_avx512.cc.o": (True, True),
    "isa_avx512bf16.cc.o": (True, True),
    "isa_avx512amx.cc.o": (True, True),
}


def test_objects_use_the_registers_of_their_level_alone() -> None:
    for path in _objects("*engine.dir/csrc/*/*.o"):
        run = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True)
        used = tuple(bool(registers.search(run.stdout)) for registers in (WIDE, EVEX))
        assert used == USES.get(path.name, (False, False)), path.name


@pytest.mark.slow
@pytest.mark.shows
def test_wheel_runs_without_a_compiler(tmp_path: Path) -> None:
    """What is installed from the wheel computes attention with nothing on PATH.

    The interpreter starts without `site`, or the developer's editable install would answer the import.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    site, purelib = tmp_path / "site", sysconfig.get_path("purelib")
    build = ["wheel", "--no-build-isolation", "--no-deps", "-C", f"build-dir={tmp_path / 'build'}"]
    subprocess.run([*pip, *build, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("attnkit-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    code = """
import torch, attnkit
q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
torch.testing.assert_close(attnkit.attention(q, k, v), expected)
print(attnkit.__file__)
"""
    environment = {"PATH": "", "PYTHONPATH": f"{site}{os.pathsep}{purelib}"}
    command = [sys.executable, "-S", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(site)


def test_the_engine_knows_its_kernels() -> None:
    """What was tuned is kept under the sources of the kernels that were timed: any change of them is another key."""
    untuned = r"(code_|decode_store|encode|groups|kernel_(bytes|encoded)|kv_append|linear|moments|readout|recur|route|select).*"
    files = sorted(path for path in (ROOT / "csrc/cpu").iterdir() if not re.fullmatch(untuned, path.name))
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    assert _engine.kernels == hashlib.sha256(digests.encode()).hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.shows
def test_fresh_clone_needs_only_the_two_commands(tmp_path: Path) -> None:
    """What is committed, cloned into a new folder, sets itself up: no file of this working tree helps it."""
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    own = {"VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    for target in ("demo", "test"):
        subprocess.run(["make", target], cwd=tmp_path / "clone", env=environment, check=True)
