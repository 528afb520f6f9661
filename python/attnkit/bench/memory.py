"""How much memory a call needs, read from the operating system: it sees torch, the engine and everything else."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_bytes(run: Callable[[], object]) -> int | None:
    """How far resident memory rises above its present level while ``run`` runs; None where that cannot be read.

    The result is counted, and so is every temporary; what is kept from earlier calls (thread stacks, workspaces) is not.
    Linux only: the kernel's high-water mark is reset before the call.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call could reuse freed memory that still counts as resident
        _CLEAR.write_text("5", encoding="ascii")
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
        del result
    except (OSError, AttributeError, KeyError):
        return None
    return max(0, peak - before)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise KeyError(field)
    return int(found[1]) * 1024
