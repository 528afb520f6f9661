"""Sixteen threads with errors in between: right results, nothing hangs, nothing is left behind.

Runs in a process of its own (this file as a script: level, calls a thread), where memory, descriptors and threads can
be counted and a hang is killed.
"""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import _engine, runtime

THREADS, FAST, FULL = 16, 50, 1000
TABLE = torch.arange(64)
Call = Callable[[], Any]


def randn(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def good_calls() -> list[Call]:
    """Different programs, layouts and workspace sizes; some with enough to do for two OpenMP threads."""
    rng, calls = np.random.default_rng(0), list[Call]()
    for q_len, kv_len, heads in ((1, 40, 8), (20, 30, 2), (64, 64, 4), (33, 17, 2), (150, 150, 8)):
        q, k, v = randn(rng, 2, heads, q_len, 16), randn(rng, 2, 2, kv_len, 16), randn(rng, 2, 2, kv_len, 20)
        bias, lens = randn(rng, q_len, kv_len), torch.tensor([kv_len, kv_len // 2], dtype=torch.int32)
        cap = ak.param("cap", 20.0)
        calls += [
            lambda q=q, k=k, v=v: ak.attention(q, k, v, mask=ak.causal()),
            lambda q=q, k=k, v=v, b=bias: ak.attention(q, k, v, score=ak.bias(b), mask=ak.window(9, 2)),
            lambda q=q, k=k, v=v, n=lens: ak.attention(q, k, v, kv_lens=n),
            lambda q=q, k=k, v=v, c=cap: ak.dense_attention(q, k, v, score=ak.softcap(c), causal=True),
            lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ]
    return calls


Q = torch.ones(1, 2, 5, 8)
BAD_CALLS: dict[str, Call] = {
    "AK402": lambda: ak.attention(None, Q, Q),  # type: ignore[arg-type]
    "AK403": lambda: ak.attention(Q[0], Q, Q),
    "AK404": lambda: ak.attention(Q, Q.double(), Q),
    "AK302": lambda: ak.attention(Q, Q, Q, mask=lambda *index: torch.sort(index[0])),
    "AK601": lambda: ak.attention(Q, Q, Q, score=lambda s, b, h, i, j: s + TABLE[j + 61]),
    "AK604": lambda: ak.attention(Q, Q, Q, mask=lambda b, h, i, j: (i + 1) * 2**30 * 4 > j),
    "AK605": lambda: ak.attention(Q, Q, Q, mask=lambda b, h, i, j: i // j == 0),
    "AK103": lambda: torch.ops.attnkit.attend(Q, Q, Q, "attnkit 1 nonsense", [], [], None, True),
    "ZeroDivisionError": lambda: ak.attention(Q, Q, Q, score=lambda *index: 1 / 0),
    "ValueError": lambda: _engine.Program(np.ones((3, 8), np.int32), 7, 7, 0, 0),
}


def provoke(name: str) -> None:
    with pytest.raises((ak.AttnkitError, ValueError, ZeroDivisionError)) as raised:
        BAD_CALLS[name]()
    assert getattr(raised.value, "code", type(raised.value).__name__) == name


def work(thread: int, calls: list[Call], want: list[Tensor], start: threading.Barrier, count: int) -> int:
    bad, provoked = list(BAD_CALLS), 0
    start.wait(timeout=60)
    for n in range(thread, thread + count):
        assert torch.equal(calls[n % len(calls)](), want[n % len(calls)]), f"thread {thread}: other bits"
        if n % 3 == 0:
            provoke(bad[n // 3 % len(bad)])
            provoked += 1
        if n % 200 == 0:
            runtime.clear()  # somebody forgets all kernels meanwhile
    return provoked


# A sanitizer keeps freed memory back, so that its use is noticed.
MEASURABLE = "libasan" not in os.environ.get("LD_PRELOAD", "")


def resident_bytes() -> int:
    if not MEASURABLE:
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def tasks() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def sixteen_threads(count: int) -> None:
    calls = good_calls()
    with ak.installed():
        want = [call() for call in calls]
        with ThreadPoolExecutor(THREADS) as pool:

            def round_of(count: int) -> None:
                start = threading.Barrier(THREADS)
                done = [pool.submit(work, t, calls, want, start, count) for t in range(THREADS)]
                assert min(d.result() for d in done) >= len(BAD_CALLS)

            round_of(count)  # warm: arenas, workspaces, caches
            gc.collect()
            memory, files, threads = resident_bytes(), open_files(), tasks()
            round_of(count)
            gc.collect()
            assert open_files() == files
            assert tasks() == threads
            assert resident_bytes() - memory < 16 * 2**20, resident_bytes() - memory


def threads_that_end() -> None:
    """Each has workspaces and OpenMP threads of its own: they end with it."""
    calls = good_calls()[-5:]
    want = [call() for call in calls[:-1]]

    def once() -> None:
        for call, expected in zip(calls, want, strict=False):
            assert torch.equal(call(), expected)

    def generation() -> None:
        threads = [threading.Thread(target=once) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()

    for _ in range(5):
        generation()
    memory, files, threads = resident_bytes(), open_files(), tasks()
    for _ in range(20):
        generation()
    deadline = time.monotonic() + 30
    while tasks() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # OpenMP's threads end a little after the thread that used them
    assert tasks() <= threads
    assert open_files() == files
    assert resident_bytes() - memory < 8 * 2**20, resident_bytes() - memory


def calls_alone(count: int) -> None:
    """No kind of call, good or bad, leaves an object behind."""
    calls = good_calls()[:5]
    kinds: dict[str, Call] = {name: lambda name=name: provoke(name) for name in BAD_CALLS}
    kinds |= {f"good call {n}": call for n, call in enumerate(calls)}
    with ak.installed():
        for name, call in kinds.items():
            for _ in range(count):  # fills caches
                call()
            gc.collect()
            memory, files, blocks = resident_bytes(), open_files(), sys.getallocatedblocks()
            for _ in range(count):
                call()
            gc.collect()
            left = sys.getallocatedblocks() - blocks  # 0 where Python's own allocator is off
            assert left < count / 2, f"{name}: {left} objects left by {count} calls"
            assert open_files() == files
            assert resident_bytes() - memory < 4 * 2**20, f"{name}: {resident_bytes() - memory} bytes"


def run(level: str, count: int) -> None:
    command = [sys.executable, __file__, level, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"


def test_sixteen_threads() -> None:
    run(_engine.isa_levels()[-1], FAST)


@pytest.mark.slow
@pytest.mark.shows
def test_sixteen_threads_of_a_thousand_calls(isa_name: str) -> None:
    run(isa_name, FULL)


if __name__ == "__main__":
    torch.set_num_threads(2)
    _engine.set_isa(sys.argv[1])
    sixteen_threads(int(sys.argv[2]))
    threads_that_end()
    calls_alone(max(int(sys.argv[2]), 500))  # the caches that fill take some hundreds
    assert _engine.last_isa() == sys.argv[1]
