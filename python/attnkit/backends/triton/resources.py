"""What a compiled kernel takes of a GPU, read from the cubin: no driver is asked."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# By architecture: shared memory of one block in bytes. Registers: 65,536 on all of them.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
REGISTERS = 65_536


class Resources(NamedTuple):
    """Of one kernel: registers and stack bytes (spills) of a thread, shared memory of a block, blocks on an SM."""

    registers: int
    stack: int
    shared: int
    blocks: int


def resources(compiled: Any) -> Resources:
    """Read by the `cuobjdump` in Triton's package. STACK is what is spilled: these kernels have no arrays."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 -- Triton's own
    registers, stack = (int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    metadata = compiled.metadata
    threads = metadata.num_warps * 32
    by_registers = REGISTERS // (max(-(-registers // 8) * 8, 8) * threads)
    by_shared = SHARED[metadata.target.arch] // max(metadata.shared, 1)
    return Resources(registers, stack, metadata.shared, max(min(by_registers, by_shared, 2048 // threads), 0))
