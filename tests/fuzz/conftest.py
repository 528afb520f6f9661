"""The engine with the sanitizers inside, or with AVX-512 emulated: built beside the ordinary one, and how to run with it."""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pybind11
import pytest

from attnkit import _engine

ROOT = Path(__file__).parents[2]
SANITIZE = "ATTNKIT_SANITIZE=address,undefined,float-cast-overflow"
BIN = Path(sys.executable).parent

# handle_segv: a crash stays the signal that tests of crashes expect. Leaks: see test_sanitized.py.
# Asking for more memory than there is is an error to be told, not a report.
# No fake frames: GCC 12 aligns them less than it takes them to be, and vectors of 64 bytes crash (its bug 110027).
ASAN_OPTIONS = "detect_leaks=0:handle_segv=0:detect_stack_use_after_return=0:allocator_may_return_null=1"


def build(target: str, kind: str, *options: str) -> Path:
    """Bring a target of another build up to date; returns its folder."""
    folder = ROOT / "build" / kind
    folder.mkdir(parents=True, exist_ok=True)
    cmake = str(BIN / "cmake")
    configure = [
        cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{option}" for option in options),
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}",
    ]  # fmt: skip
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes, one build
        for command in (configure, [cmake, "--build", folder, "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def build_sanitized(target: str, kind: str, levels: Sequence[str]) -> Path:
    """For some instruction sets of this machine: others would take as long to compile, and never run."""
    return build(target, kind, SANITIZE, f"ATTNKIT_LEVELS={';'.join(levels)}")


def with_engine(folder: Path) -> dict[str, str]:
    """The environment in which Python loads the engine of a folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "overlay"), "ENGINE_FOLDER": str(folder)}


@pytest.fixture
def passing() -> Callable[..., str]:
    """``passing(tests, environment, timeout=seconds)``: run them there; what pytest said, if all passed."""

    def run(tests: Sequence[str], environment: dict[str, str], *, timeout: float) -> str:
        options = ["-q", "-n", "2", "-m", "not slow", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-5000:]
        assert re.search(r"\d+ passed", said), said[-500:]
        return said

    return run


@pytest.fixture(scope="session")
def emulated() -> Callable[..., dict[str, str]]:
    """``emulated(level)``: the environment in which Python runs the kernels of a level of AVX-512 on any x86-64 with AVX2."""
    folder = build("_engine", "emulate", "ATTNKIT_EMULATE=ON")
    return lambda level: {**with_engine(folder), "ATTNKIT_ISA": level}


@pytest.fixture(scope="session")
def fuzzed_levels(effort: int) -> list[str]:
    """Those that the native fuzzer runs: its queries are float32, for which the others take the kernels of these. With
    little effort the narrowest and the widest vectors: each level takes as long to compile as to run many cases."""
    levels = [level for level in _engine.isa_levels() if level not in ("avx512bf16", "avx512amx")]
    return levels if effort > 1 else sorted({levels[0], levels[-1]})


@pytest.fixture(scope="session")
def engine_fuzz(fuzzed_levels: list[str]) -> Path:
    """The native fuzzer, csrc/fuzz/engine_fuzz.cc."""
    return build_sanitized("engine_fuzz", "fuzz", fuzzed_levels) / "engine_fuzz"


@pytest.fixture(scope="session")
def sanitized() -> Callable[..., dict[str, str]]:
    """``sanitized(**asan_options)``: the environment in which Python runs on the sanitized engine."""
    folder = build_sanitized("_engine", "sanitize", _engine.isa_levels())
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True)
        for name in ("libasan", "libstdc++")  # the latter too: its exceptions must be seen from the start
    ]

    def environment(**options: object) -> dict[str, str]:
        return {
            **with_engine(folder),
            "LD_PRELOAD": " ".join(done.stdout.strip() for done in libraries),
            "PYTHONMALLOC": "malloc",  # every object is an allocation that can be watched
            "ASAN_OPTIONS": ":".join([ASAN_OPTIONS, *(f"{k}={v}" for k, v in options.items())]),
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }

    return environment
