"""What can be told of a compiled kernel by reading its TTIR, TTGIR and PTX."""

from __future__ import annotations

import re
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
        found += [] if "cp.async" in ptx or "scf.for" not in ttir else ["tiles are not loaded asynchronously"]
    return found


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
