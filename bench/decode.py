"""Decoding one token against torch and against plain reading: batch 1, 32 query and 8 kv heads, 128 channels.

Caches are cold: each contender goes round at least four of them. The probe reads the bytes of the same caches. Ratios
are formed within rounds; "of the probe" is the probe's time over attnkit's.

    python bench/decode.py [--lengths 8192 32768] [--dtypes bfloat16 float32] [--json bench/results/FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnkit as ak
from attnkit.backends.cpu.engine import engine
from attnkit.bench import machine
from attnkit.bench.measure import Contender, interval, measure, ratio

HEADS, KV_HEADS, DIM = 32, 8, 128
Cache = tuple[Tensor, Tensor]


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group as the queries of one: torch then reads a kv head once for all of them."""
    b, h, s, d = q.shape
    o: Tensor = scaled_dot_product_attention(q.view(b, KV_HEADS, h // KV_HEADS * s, d), k, v)
    return o.view(b, h, s, d)


def rotating(call: Callable[[Tensor, Tensor], Any], caches: list[Cache]) -> Contender:
    """``call`` on one cache after the other."""
    turn = itertools.cycle(caches)
    return Contender(lambda: call(*next(turn)))


def row(dtype: torch.dtype, kv_len: int, q_len: int, threads: int, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    count = max(4, -(-(256 << 20) // (2 * KV_HEADS * kv_len * DIM * dtype.itemsize)))
    caches = [(torch.randn(1, KV_HEADS, kv_len, DIM).to(dtype), torch.randn(1, KV_HEADS, kv_len, DIM).to(dtype))
              for _ in range(count)]  # fmt: skip
    q = torch.randn(1, HEADS, q_len, DIM).to(dtype)

    def probe(k: Tensor, v: Tensor) -> None:
        for x in (k, v):
            engine().read_gbytes_per_s(threads, x.view(-1).view(torch.float32).numpy())

    contenders = {
        "attnkit": rotating(lambda k, v: ak.attention(q, k, v), caches),
        "torch folded": rotating(lambda k, v: folded(q, k, v), caches),
        "torch enable_gqa": rotating(
            lambda k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), caches
        ),
        "probe": rotating(probe, caches),
    }
    k, v = caches[0]
    error = (ak.attention(q, k, v).double() - folded(q.double(), k.double(), v.double())).abs().max().item()
    times = measure(contenders, seconds=seconds)
    size = sum(x.nbytes for x in caches[0])
    return {
        "dtype": str(dtype).removeprefix("torch."), "kv_len": kv_len, "q_len": q_len, "caches": count, "error": error,
        "gbytes_per_s": {name: round(size / interval(t).median * 1e-9, 2) for name, t in times.items()},
        "ms": {name: asdict(interval(t).scaled(1e3)) for name, t in times.items()},
        "ratio": {name: asdict(ratio(times, name, "attnkit")) for name in list(contenders)[1:]},
    }  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--q-len", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for dtype, kv_len in itertools.product(options.dtypes, options.lengths):
        found = row(getattr(torch, dtype), kv_len, options.q_len, options.threads, options.seconds)
        rows.append(found)
        ratios = "  ".join(
            f"{n} {r['median']:.2f} [{r['lo']:.2f}, {r['hi']:.2f}]" for n, r in found["ratio"].items()
        )
        sys.stdout.write(
            f"{dtype:9s} {kv_len:6d}  {found['ms']['attnkit']['median']:7.3f} ms "
            f"{found['gbytes_per_s']['attnkit']:6.2f} GB/s  {ratios}\n"
        )
    if options.json:
        result = {"machine": machine.describe(), "commit": machine.commit(), "threads": options.threads,
                  "heads": [HEADS, KV_HEADS], "head_dim": DIM, "rows": rows}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
