"""The compiled extension, loaded once and late.

Where torch is already imported its OpenMP runtime is loaded too, and the engine's libgomp resolves to it: one pool of
threads in the process, not two.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from types import ModuleType

from attnkit.errors import error

# What the engine's status codes (csrc/cpu/problem.h) are called.
FAULTS = {1: "AK604", 2: "AK605", 3: "AK601", 4: "AK603", 5: "AK606", 6: "AK607", 7: "AK602"}


@cache
def engine() -> ModuleType:
    """The extension module.

    Raises:
        AttnkitNotImplementedError: AK501, the extension is not built or does not load.
        AttnkitValueError: AK401, ``ATTNKIT_ISA`` names an instruction set that this machine or build lacks.
    """
    try:
        from attnkit import _engine
    except ImportError as exc:
        raise error("AK501", where="backend cpu", given=str(exc), hint="reinstall attnkit") from exc
    cap = os.environ.get("ATTNKIT_ISA")
    if cap is not None and cap not in _engine.isa_levels():
        raise error("AK401", where="environment variable ATTNKIT_ISA", given=repr(cap),
                    allowed=", ".join(_engine.isa_levels()))  # fmt: skip
    module: ModuleType = _engine
    return module


@cache
def cpu_model() -> str:
    """The name the processor gives itself."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@cache
def cpu_generation() -> str:
    """Family, model and stepping: virtual machines often name no more than the brand. Empty where nobody tells."""
    facts = _cpuinfo()
    return " ".join(facts[name] for name in ("cpu family", "model", "stepping") if name in facts)


@cache
def _cpuinfo() -> dict[str, str]:
    """What the system says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def usable_cores() -> int:
    """Cores that this process may run on, as OpenMP counted them before it bound this thread to one (OMP_PROC_BIND).

    Raises:
        AttnkitError: as `engine`.
    """
    return int(engine().cores())
