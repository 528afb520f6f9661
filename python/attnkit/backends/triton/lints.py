"""What can be told of a compiled kernel by reading its TTIR, TTGIR and PTX."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def lint(compiled: Any, dtype: str, precision: str) -> list[str]:
    """What is wrong with a kernel; empty if nothing is."""
    ttir, ttgir, ptx = (str(compiled.asm[kind]) for kind in ("ttir", "ttgir", "ptx"))
    found = _precision(ttir, ptx, dtype, precision) + _transposed(ttgir)
    if (
        compiled.metadata.target.arch == 90
        and dtype != "float32"
        and _wide_enough(ttir, compiled.metadata.num_warps)
    ):
        found += [] if "wgmma.mma_async" in ptx else ["a tile of 64 rows and four warps runs without WGMMA"]
    if re.search(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr<(bf16|f16)", ttir) and dtype != "float32":
        loops = ttir.count("scf.for") > ttir.count("tt.num_stages = 1") and compiled.metadata.num_stages > 1
        found += ["tiles are not loaded asynchronously"] if loops and "cp.async" not in ptx else []
    return found + (_attributes(ttir) if "tt.dot" in ttir else [])


def serialized(compiled: Any) -> list[str]:
    """What ptxas says of matrix products that it made wait for each other."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        arch = f"sm_{compiled.metadata.target.arch}{'a' if compiled.metadata.target.arch >= 90 else ''}"
        command = [
            str(tool),
            "-v",
            f"--gpu-name={arch}",
            str(source),
            "-o",
            str(Path(folder, "kernel.cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr  # noqa: S603 -- Triton's own
    return ["matrix products wait for each other"] if re.search(r"C751[45]|[Ss]erializ", said) else []


def _attributes(ttir: str) -> list[str]:
    """Pointers, and all strides but those of channels, are multiples of 16: else loads are narrow and not asynchronous."""
    head = next(line for line in ttir.splitlines() if "tt.func public" in line)
    pointers = re.findall(r"!tt\.ptr<\w+>( \{tt\.divisibility = 16)?", head)
    found = [] if all(pointers) else ["a pointer is not known to be aligned"]
    aligned = re.search(r": i32 \{tt\.divisibility = 16", head)
    return found if aligned else [*found, "no stride is known to be aligned"]


def _precision(ttir: str, ptx: str, dtype: str, precision: str) -> list[str]:
    """Products of float32 say how exact they are: nothing said is TF32 on a GPU, and exact in the interpreter."""
    if dtype != "float32":
        return []
    said = set(re.findall(r"inputPrecision = (\w+)", ttir)) or {"ieee"}
    found = [] if said == {precision} else [f"products are {', '.join(sorted(said))}, not {precision}"]
    tensor_cores = re.search(r"(wgmma|mma\.sync|tcgen05\.mma)\S*tf32", ptx) is not None
    if tensor_cores and precision == "ieee":
        found.append("exact float32 products run on tensor cores")
    return found


def _transposed(ttgir: str) -> list[str]:
    """Triton [3.4, 3.7.1) multiplies the transpose of a product wrongly at some sizes."""
    bad = re.search(r"tt\.trans .*#mma\w* ?> -> .*#linear", ttgir)
    return ["the transpose of a product is multiplied"] if bad else []


def _wide_enough(ttir: str, warps: int) -> bool:
    rows = [int(m) for m in re.findall(r"tt\.dot .*: tensor<(\d+)x", ttir)]
    return bool(rows) and min(rows) >= 64 and warps >= 4
