"""What one expression instruction costs per tile: the slope of run time over the number of instructions.

Each operator is applied 0, 2, 4, 6 and 8 times to the score of a full fp32 attention (B1 H8 S2048 D64), the counts interleaved
within each round. A least-squares line through the medians gives the cost of one instruction. Two threads.

    python bench/expression_cost.py [--json bench/results/FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attnkit as ak
from attnkit.bench import machine

HEADS, LENGTH, DIM, THREADS = 8, 2048, 64, 2
COUNTS = (0, 2, 4, 6, 8)
bias = torch.zeros(HEADS, LENGTH, LENGTH)
slopes = torch.full((HEADS,), 1e-3)

# Each applies its operator once; values stay small so that the softmax itself costs the same.
OPERATORS: dict[str, Callable[..., Any]] = {
    "tile * constant": lambda s, x, h, q, k: x * 0.999,
    "tile + tile": lambda s, x, h, q, k: x + s,
    "tile + per-query": lambda s, x, h, q, k: x + q,
    "tile + per-key": lambda s, x, h, q, k: x + k,
    "compare and select (2 instructions)": lambda s, x, h, q, k: torch.where(x < 1.0, x, s),
    "tanh": lambda s, x, h, q, k: torch.tanh(x),
    "exp(x - 3) (2 instructions)": lambda s, x, h, q, k: torch.exp(x - 3.0),
    "ALiBi (5 instructions)": lambda s, x, h, q, k: x - slopes[h] * (q - k).abs(),
    "load bias[h, q, kv]": lambda s, x, h, q, k: x + bias[h, q % LENGTH, k % LENGTH],
}


def repeated(operator: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A score function that applies ``operator`` ``count`` times."""

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        x = s
        for _ in range(count):
            # Distinct indices, or the second application would find the first one's sub-expressions.
            q_idx, kv_idx = q_idx + 1, kv_idx + 1
            x = operator(s, x, h, q_idx, kv_idx)
        return x

    return score


def seconds(call: Callable[[], Any]) -> float:
    """One timed call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, DIM) for _ in range(3))
    config = ak.explain(ak.attention, q, k, v).calls[0].config
    tiles = HEADS * -(-LENGTH // config["tile_q"]) * -(-LENGTH // config["tile_kv"])
    elements = HEADS * LENGTH * LENGTH / tiles
    rows = []
    for name, operator in OPERATORS.items():
        calls = [partial(ak.attention, q, k, v, score=repeated(operator, n)) for n in COUNTS]
        times: list[list[float]] = [[] for _ in COUNTS]
        for round_ in range(options.rounds + 1):
            for sample, call in zip(times, calls, strict=True):
                sample.append(seconds(call))
                if round_ == 0:
                    sample.clear()
        medians = [statistics.median(sample) for sample in times]
        slope = float(np.polyfit(COUNTS, medians, 1)[0])
        ns = slope * THREADS / tiles * 1e9
        rows.append(
            {
                "operator": name,
                "ns_per_tile": round(ns, 1),
                "percent_of_forward": round(100 * slope / medians[0], 2),
            }
        )
        sys.stdout.write(
            f"{name:36s} {ns:8.0f} ns a tile  {100 * slope / medians[0]:6.2f} % of the plain forward\n"
        )
    if options.json:
        shape = {"b": 1, "hq": HEADS, "sq": LENGTH, "d": DIM}
        result = {"machine": machine.describe(), "commit": machine.commit(), "threads": THREADS, "shape": shape, "config": config,
                  "elements_per_tile": round(elements), "operators": rows}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
