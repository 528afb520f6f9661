"""Caches of codes between guard pages: appending and attention touch nothing outside the tensors that hold them.

The sweep runs in a process of its own, so that a fault is a failed test: this file run as a script.
"""

import itertools
import os
import subprocess
import sys
from typing import Any

import torch

import attnkit as ak
from attnkit import _engine

CODECS: list[Any] = ["int8", "fp8", "int4", "int2", ("int8", "int4"), ("bf16", "int2")]
DIMS = [(64, 96), (40, 33)]  # codes are multiplied; they are decoded
LENGTHS = [(1, 0), (0, 33), (150, 10), (97, 31)]  # what is there, and what comes: also up to the last slot
MAX, RESIDUAL = 160, 40


def test_nothing_outside_the_codes_is_touched() -> None:
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=200, check=False, env=os.environ
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"


def made(codec: Any, dims: tuple[int, int], page: int | None) -> ak.KVCache:
    return ak.KVCache(2, 1, *dims, max_len=MAX, codec=codec, residual=RESIDUAL, page_size=page)


def sweep() -> None:
    from test_memory import Guarded  # found beside a script

    memory = [Guarded(1 << 16) for _ in range(8)]
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int, dims: tuple[int, int]) -> list[torch.Tensor]:
        return [torch.randn(2, 1, n, dim, generator=generator) for dim in dims]

    for codec, dims, page, (held, new) in itertools.product(CODECS, DIMS, (None, 32), LENGTHS):
        first, then = tokens(held, dims), tokens(new, dims)
        lens = torch.tensor([new, new // 2], dtype=torch.int32)
        free = made(codec, dims, page)
        free.append(*first)
        before = [t.clone() for t in free._storage], free.lengths.clone()
        free.append(*then, lens)
        q = torch.randn(2, 4, 20, dims[0], generator=generator)
        queries = [q[:, :, :n].to(dtype) for dtype in (torch.float32, torch.bfloat16) for n in (1, 20)]
        for isa in _engine.isa_levels():
            _engine.set_isa(isa)
            want = [ak.attention(x, free, mask=ak.causal()) for x in queries]
            for side in ("left", "right"):
                cache = made(codec, dims, page)
                storage = [m.hold(t, side) for m, t in zip(memory, before[0], strict=False)]
                cache._keep(storage, before[1].clone(), cache._scheme)
                cache.append(*then, lens)
                got = [ak.attention(x, cache, mask=ak.causal()) for x in queries]
                where = f"{codec}, {dims}, pages of {page}, {held} and {new} tokens, {isa}, {side}"
                assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), where  # type: ignore[arg-type]
                assert all(m.intact() for m, _ in zip(memory, storage, strict=False)), where
    os._exit(0)


if __name__ == "__main__":
    sweep()
