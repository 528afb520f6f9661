"""Is this installation sound? What `attnkit doctor` prints."""

from __future__ import annotations

import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import attnkit
from attnkit.backends.cpu.engine import usable_cores
from attnkit.bench import machine
from attnkit.bench.peers import installed_version
from attnkit.errors import AttnkitError
from attnkit.variants import dense

OPTIONAL = (
    "numpy",
    "torch",
    "transformers",
    "triton",
    "click",
    "rich",
    "matplotlib",
    "openvino",
    "onnxruntime",
)
_IMPORTED = ("torch", "triton", "cupy")  # by attnkit or by what it runs on
_OLDEST_TORCH = (2, 11)
_RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*$")


def examine() -> dict[str, Any]:
    """Facts about this process and what is wrong with them: ``machine``, ``threads``, ``packages``, ``problems``."""
    # torch before the engine, as in a user's program: both then share one OpenMP runtime
    broken = {name: trouble for name in _IMPORTED if (trouble := _trouble(name))}
    problems = list(broken.values())
    threads: dict[str, Any] = {}
    torch_works = "torch" not in broken and find_spec("torch") is not None
    if torch_works:
        import torch

        threads["torch threads"] = torch.get_num_threads()
    facts: dict[str, Any] = {"attnkit": attnkit.__version__}
    try:
        facts |= machine.describe()
    except AttnkitError as exc:
        allowed = f"; allowed: {exc.allowed}" if exc.allowed else ""
        problems.append(f"the CPU engine does not work: {exc.given or exc.what} ({exc.where}{allowed})")
    else:
        threads["usable cores"] = usable_cores()
        problems += _instruction_set_problems(facts)
        if torch_works:
            problems += _self_test()
    for name in ("OMP_NUM_THREADS", "ATTNKIT_ISA"):
        threads[name] = os.environ.get(name, "not set")
    runtimes = openmp_runtimes()
    threads["OpenMP"] = runtimes
    if len(runtimes) > 1:
        problems.append(f"several OpenMP runtimes in one process fight over the cores: {', '.join(runtimes)}")
    packages = {name: installed_version(name) for name in OPTIONAL}
    return {
        "machine": facts,
        "threads": threads,
        "packages": packages,
        "problems": problems + _package_problems(packages),
    }


def _trouble(name: str) -> str | None:
    """What is wrong with an optional package; None if nothing is, or if it is not there."""
    try:
        if find_spec(name) is None:
            return None
        module = import_module(name)
    except Exception as exc:  # a broken package may raise anything
        return f"{name} is installed but does not import: {type(exc).__name__}: {exc}"
    if not hasattr(module, "__version__"):
        found = getattr(module, "__file__", None) or list(getattr(module, "__path__", []))
        return f"{name} has no __version__, so it is something else of that name: {found}"
    return None


def openmp_runtimes() -> list[str]:
    """The OpenMP runtime libraries mapped into this process; empty where that cannot be read."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    mapped = {line.split(maxsplit=5)[-1] for line in lines if line.count(" /")}
    return sorted(path for path in mapped if _RUNTIME.search(path))


def _instruction_set_problems(facts: dict[str, Any]) -> list[str]:
    best, used = facts["isa_levels"][-1], facts["isa"]
    if used != best and "ATTNKIT_ISA" not in os.environ:
        return [f"the engine uses {used} although this machine has {best}"]
    return []


def _package_problems(packages: dict[str, str | None]) -> list[str]:
    torch = packages["torch"]
    if torch is None:
        return ["torch is not installed, and attention on tensors needs it: pip install 'attnkit[torch]'"]
    version = tuple(int(part) for part in re.findall(r"\d+", torch)[:2])
    if version < _OLDEST_TORCH:
        return [f"torch {torch} is older than {'.'.join(map(str, _OLDEST_TORCH))}: pip install -U torch"]
    return []


def _self_test() -> list[str]:
    """Compute a small causal attention on the engine, in each of its dtypes, and compare it with float64."""
    import torch

    q, k, v = (np.random.default_rng(i).standard_normal((1, 2, 33, 16), np.float32) for i in range(3))
    problems = []
    for dtype, allowed in (
        ("float32", 1e-5),
        ("bfloat16", 5e-2),
        ("float16", 5e-3),
    ):  # with what rounds the inputs
        stored = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in (q, k, v)]
        try:
            with torch.no_grad():
                o: Any = attnkit.dense_attention(*stored, causal=True)
        except AttnkitError as exc:
            problems.append(f"a small attention in {dtype} fails: {exc.code}: {exc.what}")
            continue
        error = float(np.abs(o.double().numpy() - dense.naive(q, k, v, causal=True)[0]).max())
        if not error < allowed:
            problems.append(f"a small attention in {dtype} is wrong by {error:.1e}")
    return problems
