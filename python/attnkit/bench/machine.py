"""Where a measurement was taken: the machine, the versions, the commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import attnkit
from attnkit.backends.cpu.engine import cpu_model, engine, usable_cores
from attnkit.bench.peers import installed_version


def describe() -> dict[str, Any]:
    """CPU model, cores, instruction set and versions, as the ``machine`` of a result file."""
    return {
        **software(),
        "isa": engine().current_isa(),
        "isa_levels": list(engine().isa_levels()),
        "compiler": engine().compiler,
    }


def software() -> dict[str, Any]:
    """What a result file says of every machine."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "attnkit": attnkit.__version__,
        "torch": installed_version("torch"),
        "numpy": installed_version("numpy"),
    }


def commit() -> str | None:
    """The commit of the working tree that attnkit is imported from, ``-dirty`` if it has changed; else None."""
    root, git = Path(attnkit.__file__).parents[2], shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- fixed arguments
    return run.stdout.strip() or None
