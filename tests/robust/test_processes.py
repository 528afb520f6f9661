"""Threads, forks, the environment and the schedule: none of them changes a bit, and none of them hangs."""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import _engine
from attnkit.backends import get
from attnkit.ops.traced import Traceable, bind
from attnkit.runtime import prepare

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def make(
    rng: np.random.Generator, batch: int, q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (batch, heads, q_len, 32), (batch, kv_heads, kv_len, 32), (batch, kv_heads, kv_len, 40)
    q, k, v = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    return q, k, v


def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return (s / 20.0).tanh() * 20.0 + SLOPES[h] * (j - i)


def run(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **keywords: Any) -> tuple[Tensor, Tensor]:
    o, lse = ak.attention(q, k, v, score=score, mask=mask or ak.causal(), return_lse=True, **keywords)
    return o, lse


def equal(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


# --- the schedule changes no bit -------------------------------------------------------------------------

SIZES = [(3, 300, 300), (2, 97, 500), (5, 1, 700), (2, 130, 64)]


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), SIZES)
def test_threads_and_repeats(batch: int, q_len: int, kv_len: int, isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, batch, q_len, kv_len)
    torch.set_num_threads(1)
    want = run(q, k, v)
    assert torch.isfinite(want[0]).all()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for _ in range(3):
            equal(run(q, k, v), want)


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), SIZES)
def test_batch_composition(batch: int, q_len: int, kv_len: int, isa: str, rng: np.random.Generator) -> None:
    """A sequence gives the same bits alone, in a batch, padded and packed."""
    q, k, v = make(rng, batch, q_len, kv_len)
    o, lse = run(q, k, v)
    lens = torch.tensor([kv_len - 11 * b for b in range(batch)], dtype=torch.int32)
    padded = run(q, k, v, kv_lens=lens)
    packed = [x.transpose(0, 1).flatten(1, 2)[None].contiguous() for x in (q, k, v)]
    cu_q, cu_kv = (torch.arange(batch + 1, dtype=torch.int32) * n for n in (q_len, kv_len))
    po, plse = run(packed[0], packed[1], packed[2], cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    for b in range(batch):
        one = slice(b, b + 1)
        equal(run(q[one], k[one], v[one]), (o[one], lse[one]))
        n = int(lens[b])
        equal(run(q[one], k[one, :, :n], v[one, :, :n]), (padded[0][one], padded[1][one]))
        rows = slice(b * q_len, (b + 1) * q_len)
        equal((po[:, :, rows], plse[:, :, rows]), (o[one], lse[one]))


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), SIZES)
def test_heads_and_queries_are_independent(
    batch: int, q_len: int, kv_len: int, isa: str, rng: np.random.Generator
) -> None:
    """One head alone, and the last queries alone, give the bits they give among the others."""
    q, k, v = make(rng, batch, q_len, kv_len)
    o, lse = ak.attention(q, k, v, mask=ak.causal(), return_lse=True)
    for h in range(4):
        head = ak.attention(
            q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v[:, h // 2 : h // 2 + 1], mask=ak.causal()
        )
        assert torch.equal(head, o[:, h : h + 1])
    for last in {1, min(5, q_len), q_len}:
        got = ak.attention(q[:, :, -last:], k, v, mask=ak.causal(), return_lse=True)
        equal(got, (o[:, :, -last:], lse[:, :, -last:]))


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [*SIZES, (1, 6, 400)])
@pytest.mark.parametrize("name", ["causal", "window", "document", "everything"])
def test_tile_q(name: str, batch: int, q_len: int, kv_len: int, isa: str, rng: np.random.Generator) -> None:
    """``tile_q`` is a schedule field, as the backend declares: it changes no bit, whatever the mask lets tiles skip."""
    ids = torch.arange(max(q_len, kv_len), dtype=torch.int32) // 50
    mask = {
        "causal": ak.causal(),
        "window": ak.window(40, 3),
        "document": ak.document(ids),
        "everything": None,
    }[name]
    q, k, v = make(rng, batch, q_len, kv_len)
    bound = bind(Traceable(score, mask))
    prepared = prepare(bound.text, "float32", q.shape[3], v.shape[3], backend="cpu")
    backend = get("cpu")
    space = backend.space(prepared.spec)
    assert space["tile_q"].kind == "schedule"

    def outputs(kernel: Any) -> tuple[Tensor, Tensor]:
        o, lse = torch.full((batch, 4, q_len, 40), torch.nan), torch.full((batch, 4, q_len), torch.nan)
        kernel(q, k, v, o, lse, bound.buffers, [], 2)
        return o, lse

    want = outputs(prepared.kernel)
    for tile_q in sorted({*space["tile_q"].values, 1, 5, 17, 95}):
        equal(outputs(backend.build(prepared.spec, {**prepared.config, "tile_q": tile_q})), want)


# --- Python threads --------------------------------------------------------------------------------------


def test_calls_from_many_threads(isa: str, rng: np.random.Generator) -> None:
    """Eight threads, fifty calls each, of problems that need workspaces of different sizes."""
    problems = [make(rng, 2, q_len, kv_len) for q_len, kv_len in ((20, 30), (150, 150), (1, 400), (97, 33))]
    want = [run(*p) for p in problems]
    start = threading.Barrier(8)

    def work(thread: int) -> int:
        start.wait(timeout=60)
        for call in range(50):
            n = (thread + call) % len(problems)
            equal(run(*problems[n]), want[n])
        return thread

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))


def test_first_calls_from_many_threads(isa: str, rng: np.random.Generator) -> None:
    """All at once trace, build and call a program that nobody has prepared."""
    from attnkit import runtime

    runtime.clear()
    q, k, v = make(rng, 1, 33, 65)
    start = threading.Barrier(8)

    def work(_: int) -> tuple[Tensor, Tensor]:
        start.wait(timeout=60)
        return run(q, k, v, mask=ak.window(13, 5))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for result in results:
        equal(result, results[0])


def test_the_gil_is_released(isa: str, rng: np.random.Generator) -> None:
    q, k, v = make(rng, 1, 1500 if isa == "scalar" else 6000, 6000)
    torch.set_num_threads(1)
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        while ticks == 0:
            time.sleep(0.001)
        before, start = ticks, time.perf_counter()
        ak.attention(q, k, v)
        during, took = ticks - before, time.perf_counter() - start
    finally:
        done.set()
        ticker.join()
    assert took > 0.03, "too short a call to tell"
    assert during >= 5, f"{during} ticks of a millisecond during a call of {took:.3f} s"


# --- processes -------------------------------------------------------------------------------------------


def python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


FORK = """
import os, sys, signal
import torch
torch.set_num_threads(2)
import attnkit as ak
from attnkit import _engine

_engine.set_isa({isa_name!r})
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 300, 32) for _ in range(3))

def digest():
    return ak.attention(q, k, v, mask=ak.causal()).numpy().tobytes()

want = digest()  # two threads, and they stay
threads = len(os.listdir("/proc/self/task"))
assert threads >= 2, f"{{threads}} threads: nothing is tested"

def fork(depth):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        _engine.set_isa({isa_name!r})  # forgets what ran before
        same = all(digest() == want for _ in range(3)) and _engine.last_isa() == {isa_name!r}
        if depth:
            same = same and fork(depth - 1) == 0
        os._exit(0 if same else 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

code = fork(1)
assert code == 0, f"child: {{code}} (3: other bits or another level, -14: it hung)"
assert digest() == want
assert fork(0) == 0
"""


def test_a_forked_child_computes_the_same(isa_name: str) -> None:
    done = python(FORK.format(isa_name=isa_name))
    assert done.returncode == 0, done.stderr[-2000:]


SAME_CORE = """
import os, time
import torch
torch.set_num_threads(2)
import attnkit as ak

q = torch.ones(1, 4, 64, 32)

def tasks():
    return {int(task) for task in os.listdir("/proc/self/task")}

def core_of(task):
    with open(f"/proc/self/task/{task}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[36])

def moves_of(task):  # to another core, from which whoever else runs may push it back; 0 on kernels that do not say
    try:
        with open(f"/proc/self/task/{task}/sched") as sched:
            return next(int(line.rpartition(":")[2]) for line in sched if line.startswith("se.nr_migrations"))
    except FileNotFoundError:
        return 0

before = tasks()
ak.attention(q, q, q)
(other,) = tasks() - before
cores = os.sched_getaffinity(0)
mine = min(cores)
os.sched_setaffinity(0, {mine})
away = 0
for _ in range(20):
    time.sleep(0.02)  # until the other sleeps
    os.sched_setaffinity(other, {mine})
    os.sched_setaffinity(other, cores)
    moves = moves_of(other)
    ak.attention(q, q, q)
    away += core_of(other) != mine or moves_of(other) > moves
    assert os.sched_getaffinity(other) == cores
assert os.sched_getaffinity(0) == {mine}
assert away >= 18, f"{away} of 20"
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_two_threads_do_not_stay_on_one_core() -> None:
    """And may go where they might before. On a quiet machine the kernel itself parted them 6 times of 20."""
    done = python(SAME_CORE)
    assert done.returncode == 0, done.stderr[-2000:]


CALL = """
import os, sys
import torch
import attnkit as ak
from attnkit import _engine
from attnkit.errors import AttnkitError

q = torch.ones(1, 1, 3, 4)

def call():
    try:
        ak.attention(q, q, q)
        said = _engine.last_isa()
    except AttnkitError as refused:
        said = f"{refused.code} {refused.given} {refused.allowed}"
    sys.stdout.write(said + "\\n")
    sys.stdout.flush()

assert callable(ak.attention)  # imported now
for level in sys.argv[1:]:  # each in a child that has called nothing yet
    os.environ["ATTNKIT_ISA"] = level
    if os.fork() == 0:
        call()
        os._exit(0)
    assert os.wait()[1] == 0
if not sys.argv[1:]:
    call()
"""


def test_environment_caps_the_instruction_set(isa_name: str) -> None:
    done = python(CALL, ATTNKIT_ISA=isa_name)
    assert done.stdout == f"{isa_name}\n", done.stderr[-2000:]


def test_environment_names_no_instruction_set() -> None:
    """Importing is fine; the first use says what the levels are."""
    wrong = ["nonsense", "", "AVX512", "avx", "avx2 ", "scalar,avx2"]
    done = python(CALL, *wrong, ATTNKIT_ISA="nonsense")
    refusals = [f"AK401 {level!r} {', '.join(_engine.isa_levels())}" for level in wrong]
    assert done.stdout.splitlines() == refusals, done.stderr[-2000:]


# What /proc/cpuinfo must name before a level may run; weakest first.
FEATURES: dict[str, set[str]] = {
    "scalar": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"},
    "avx512bf16": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma", "avx512_bf16"},
    "avx512amx": {
        "avx512f",
        "avx512dq",
        "avx512bw",
        "avx512vl",
        "fma",
        "avx512_bf16",
        "amx_tile",
        "amx_bf16",
    },
}


def test_every_level_of_the_processor_is_there() -> None:
    """A build that left one out without a word would be slow, and the tests of that level would not run."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    assert _engine.isa_levels() == [level for level, needs in FEATURES.items() if needs <= has]


def test_without_an_environment_the_best_is_used() -> None:
    clean = {k: v for k, v in os.environ.items() if k != "ATTNKIT_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=clean, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"{_engine.isa_levels()[-1]}\n", done.stderr[-2000:]
