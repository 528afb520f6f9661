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
# Of one SM in one cycle, by the makers' data sheets: operations of 16-bit matrix products (TF32: half of them), and of exact
# float32; and exponentials.
_PRODUCTS = {80: 2048, 90: 4096, 100: 8192}
_EXACT, _EXPONENTIALS = 256, 16
# Products of a pair by kernel: by keys' width, by values' width.
_DOTS = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


class Resources(NamedTuple):
    """Of one kernel: registers and stack bytes (spills) of a thread, shared memory of a block, blocks on an SM."""

    registers: int
    stack: int
    shared: int
    blocks: int


def ceiling(kernel: str, arch: int, precision: str, head_dim: int, v_head_dim: int) -> float | None:
    """The share of the peak of products that a kernel can reach if nothing overlaps its exponentials; None if memory binds it.

    A prediction from data sheets: nothing was measured.
    """
    dots = _DOTS.get(kernel)
    if dots is None:
        return None
    rate = {"ieee": float(_EXACT), "tf32": _PRODUCTS[arch] / 2}.get(precision, float(_PRODUCTS[arch]))
    products = 2 * (dots[0] * head_dim + dots[1] * v_head_dim) / rate
    return products / (products + 1 / _EXPONENTIALS)


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
