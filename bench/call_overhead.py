"""What a small call costs beside its kernel, layer by layer: each layer is one of the last, called by itself.

Every call is timed many times and the quickest is kept: what a call costs where nothing disturbs it. One thread, so that no
layer waits for another core. With ``--json`` the file keeps one run under each label, such as the commits before and after.

    python bench/call_overhead.py [--json bench/results/FILE.json --label after]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnkit as ak
from attnkit.bench import machine
from attnkit.ops import registry  # noqa: F401 -- defines the op
from attnkit.runtime import prepare

SHAPES = ((1, 1, 1, 16), (1, 12, 16, 64), (1, 12, 64, 64), (1, 12, 128, 64))  # the first has next to no work
SECONDS, BATCH_S = 0.7, 2e-4
TEXT = (
    "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\n  o, lse = attend(q, k, v, scale = default) {\n"
    "    normalizer = softmax\n  }\n  return o, lse\n}\n"
)


def microseconds(call: Callable[[], Any]) -> float:
    """The quickest call, from batches short enough to fit between two disturbances."""
    best, repeats = float("inf"), 1
    for _ in range(5):
        call()
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + SECONDS
        while time.perf_counter() < stop:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            best = min(best, (time.perf_counter() - start) / repeats)
            repeats = max(1, int(BATCH_S / best))
    finally:
        gc.enable()
    return round(best * 1e6, 2)


def layers(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Microseconds by layer."""
    q, k, v, d_o = (torch.randn(shape) for _ in range(4))
    o, lse = torch.empty_like(q), torch.empty(shape[:3])
    grads = [torch.zeros_like(q) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    kernel: Any = prepare(TEXT, "float32", shape[3], shape[3]).kernel
    cap, causal = 30.0, ak.causal()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sdpa(*leaves), leaves, d_o)

    def backward() -> None:
        kernel.backward(q, k, v, o, lse, [], [], d_o, None, *grads, [], 1)

    found: dict[str, float] = {}
    with torch.no_grad():
        found["kernel"] = microseconds(lambda: kernel(q, k, v, o, None, [], [], 1))
        kernel(q, k, v, o, lse, [], [], 1)
        found["kernel, backward"] = microseconds(backward)
        op = torch.ops.attnkit.attend.default
        found["torch.ops.attnkit.attend"] = microseconds(lambda: op(q, k, v, TEXT, [], [], None, False))
        found["ak.scaled_dot_product_attention"] = microseconds(
            lambda: ak.scaled_dot_product_attention(q, k, v)
        )
        found["ak.attention"] = microseconds(lambda: ak.attention(q, k, v))
        found["ak.attention, mask"] = microseconds(lambda: ak.attention(q, k, v, mask=causal))
        found["ak.attention, score"] = microseconds(
            lambda: ak.attention(q, k, v, score=lambda s, b, h, i, j: cap * torch.tanh(s / cap))
        )
        with ak.installed():
            found["F.sdpa installed"] = microseconds(lambda: sdpa(q, k, v))
        found["F.sdpa torch"] = microseconds(lambda: sdpa(q, k, v))
    with ak.installed():
        found["F.sdpa installed, of leaves"] = microseconds(lambda: sdpa(*leaves))
        found["F.sdpa installed, and gradients"] = microseconds(step)
    found["F.sdpa torch, of leaves"] = microseconds(lambda: sdpa(*leaves))
    found["F.sdpa torch, and gradients"] = microseconds(step)
    return found


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--label", default="now")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"B{} H{} S{} D{}".format(*shape): layers(shape) for shape in SHAPES}
    for name in found[next(iter(found))]:
        sys.stdout.write(f"{name:34}" + "".join(f"{of[name]:10.2f}" for of in found.values()) + "\n")
    if args.json is not None:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {}
        kept[args.label] = {"machine": machine.describe(), "commit": machine.commit(), "microseconds": found}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
