"""Ctrl-C, signal handlers and calls within calls, at every line of attnkit's Python code: usable afterwards, no deadlock.

A trace function stands for the signal: it acts when a given line is about to run. That happens in a process of its own
(this file as a script: one line in how many), which ends itself where no step is done for minutes: a deadlock.
"""

import ast
import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import attnkit as ak
from attnkit import runtime
from attnkit.ir.text import parse
from attnkit.ops import traced
from attnkit.ops.counts import counts, recorder

HOME = str(Path(ak.__file__).parent)
STEP_S = 200  # of the slowest step on a loaded machine under a sanitizer it is a small part
Line = tuple[str, int]

torch.manual_seed(0)
Q, K, V = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 12)
BIAS, SINK, IDS = torch.randn(20, 30), torch.randn(4), torch.arange(30) // 7
CAP = ak.param("cap", 20.0)


# --- scenarios: everything that the library does in Python ------------------------------------------------


def fresh_attention() -> Any:
    """Traced, printed, parsed, verified, compiled and run."""
    runtime.clear()
    traced._cache.clear()
    parse.cache_clear()
    return ak.attention(
        Q, K, V, score=lambda s, b, h, i, j: (s / CAP).tanh() * CAP + BIAS[i, j],
        mask=lambda b, h, i, j: (IDS[i] == IDS[j]) | (j < 3), normalizer=ak.softmax(SINK), return_lse=True,
    )[0]  # fmt: skip


def dense() -> Any:
    lens = torch.tensor([25], dtype=torch.int32)
    return ak.dense_attention(
        Q, K, V, causal=True, window=(9, 0), softcap=5.0, alibi_slopes=SINK.abs(), kv_lens=lens
    )


def packed_op() -> Any:
    cu_q, cu_kv = torch.tensor([0, 5, 20], dtype=torch.int32), torch.tensor([0, 9, 30], dtype=torch.int32)
    return ak.attention(Q, K, V, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, mask=ak.causal())


def drop_in() -> Any:
    with ak.installed():
        return torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True)


def gradients() -> Any:
    q = Q.clone().requires_grad_()
    ak.attention(q, K, V).sum().backward()
    return q.grad


def explained() -> Any:
    return torch.tensor(len(ak.explain(dense).calls))


def refused() -> Any:
    try:
        ak.attention(Q, K, V, mask=lambda b, h, i, j: i // j == 0)
    except ak.AttnkitError as error:
        return torch.tensor(int(error.code[2:]))
    raise AssertionError


SCENARIOS: dict[str, Callable[[], Any]] = {
    f.__name__: f for f in (fresh_attention, dense, packed_op, drop_in, gradients, explained, refused)
}


# --- acting at a line -------------------------------------------------------------------------------------


@cache
def restoring(file: str) -> frozenset[int]:
    """The first line of each ``finally``: Python looks for signals at calls, never between a ``try`` and that line."""
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    return frozenset(
        node.finalbody[0].lineno for node in nodes if isinstance(node, ast.Try) and node.finalbody
    )


@contextmanager
def at_lines(act: Callable[[Line], None]) -> Iterator[None]:
    """``act(line)`` is called before each line of attnkit's that runs inside."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno not in restoring(frame.f_code.co_filename):
            act((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(HOME) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(scenario: Callable[[], Any]) -> list[Line]:
    found: dict[Line, None] = {}
    with at_lines(found.setdefault):
        scenario()
    assert len(found) > 50
    return list(found)


def step() -> None:
    """Something has been done: the wait for a deadlock starts again."""
    faulthandler.dump_traceback_later(STEP_S, exit=True)


def unharmed(want: dict[str, Tensor]) -> None:
    """Nothing is left over, and everything gives what it gave."""
    step()
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert recorder() is None
    while ak.installed_report().active:
        ak.uninstall()
    for name, expected in want.items():
        assert torch.equal(SCENARIOS[name](), expected), name


def interrupted(every: int) -> None:
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        want = {other: SCENARIOS[other]() for other in (name, "dense", "drop_in")}
        for line in lines_of(scenario)[number % every :: every]:

            def act(at: Line, line: Line = line) -> None:
                if at == line:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt), at_lines(act):
                scenario()
            unharmed(want)


def reentered(every: int) -> None:
    """At each line another call is made, as a signal handler or a finalizer may; both are right."""
    inner = {other: SCENARIOS[other]() for other in ("dense", "packed_op", "refused")}
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        if name == "explained":
            continue  # which is to explain this thread's calls, a handler's among them
        want, lines = scenario(), set(lines_of(scenario)[number % every :: every])
        seen: set[Line] = set()

        def act(line: Line, lines: set[Line] = lines, seen: set[Line] = seen) -> None:
            if line in lines - seen:
                seen.add(line)
                step()
                other = list(inner)[len(seen) % len(inner)]
                assert torch.equal(SCENARIOS[other](), inner[other]), line

        with at_lines(act):
            assert torch.equal(scenario(), want)
        assert len(seen) > len(lines) / 2  # the calls in between fill caches, which spares some lines
        unharmed({name: want})


# --- real signals -----------------------------------------------------------------------------------------


@contextmanager
def alarms(
    handler: Callable[[int, FrameType | None], None], first: float, interval: float = 0
) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, first, interval)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kernels_are_not_interrupted(every: int) -> None:
    """What a signal asks for happens as soon as the engine returns: a call by the handler, or KeyboardInterrupt."""
    q = torch.randn(1, 8, 1000, 64)
    want, small, handled = ak.attention(q, q, q), ak.attention(Q, K, V, mask=ak.causal()), list[str]()

    def handler(number: int, frame: FrameType | None) -> None:
        step()
        assert torch.equal(ak.attention(Q, K, V, mask=ak.causal()), small)
        handled.append(frame.f_code.co_filename if frame else "")

    with alarms(handler, 0.01, 0.01):
        while len(handled) < 500 // every:
            assert torch.equal(ak.attention(q, q, q), want)
    assert any(file.startswith(HOME) for file in handled), "all of them came outside attnkit"

    interrupting = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 -- where it strikes is the point
        interrupting.start()
        while True:
            ak.attention(q, q, q)
    assert torch.equal(ak.attention(q, q, q), want)


def errors_at_random(every: int) -> None:
    """Handlers that raise, wherever the calls are."""

    class Alarm(Exception):
        pass

    def handler(number: int, frame: FrameType | None) -> None:
        raise Alarm

    want = {name: SCENARIOS[name]() for name in ("fresh_attention", "dense")}
    for n in range(400 // every):
        # Once more after a while: Python drops what is raised while it calls a finalizer.
        with pytest.raises(Alarm), alarms(handler, 1e-5 + n % 50 * 4e-5, 0.1):  # noqa: PT012
            while True:
                fresh_attention()
                dense()
        unharmed(want)


PROCESSES = (interrupted, reentered, kernels_are_not_interrupted, errors_at_random)


def run(every: int) -> None:
    """One line in ``every``."""
    command = [sys.executable, "-X", "faulthandler", __file__, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"


def test_interrupts_here_and_there() -> None:
    run(every=16)


@pytest.mark.slow
@pytest.mark.shows
def test_interrupts_at_every_line() -> None:
    run(every=1)


# --- calls within calls -----------------------------------------------------------------------------------


def in_time(call: Callable[[], Any]) -> Any:
    """In a thread, so that a deadlock is a failure."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(timeout=100)
    assert not thread.is_alive(), "deadlock"
    assert result, "it raised"
    return result[0]


@pytest.fixture
def plain() -> Tensor:
    return ak.attention(Q, K, V)


def test_inside_a_torch_function_mode(plain: Tensor) -> None:
    calls = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(torch.equal(ak.attention(Q, K, V), plain))
            return func(*args, **(kwargs or {}))

    def call() -> Any:
        with Mode():
            return ak.attention(Q, K, V, mask=lambda b, h, i, j: IDS[j] == IDS[i])

    assert torch.equal(in_time(call), ak.attention(Q, K, V, mask=lambda b, h, i, j: IDS[j] == IDS[i]))
    assert calls
    assert all(calls)


def test_inside_a_subclass(plain: Tensor) -> None:
    class Inner(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert torch.equal(ak.attention(Q, K, V), plain)
            return super().__torch_function__(func, types, args, kwargs or {})

    assert torch.equal(in_time(lambda: ak.attention(Q.as_subclass(Inner), K, V)).as_subclass(Tensor), plain)


def test_inside_a_mask(plain: Tensor) -> None:
    """A mask that attends while it is traced: its own trace is not disturbed."""

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        assert torch.equal(ak.attention(Q, K, V), plain)
        first = IDS[i] == IDS[j]
        assert not ak.attention(Q, K, V, mask=lambda b, h, i, j: j < 0).any()
        return first | (j < 3)

    want = ak.attention(Q, K, V, mask=lambda b, h, i, j: (IDS[i] == IDS[j]) | (j < 3))
    assert torch.equal(in_time(lambda: ak.attention(Q, K, V, mask=mask)), want)


def test_a_mask_of_another_trace(plain: Tensor) -> None:
    """A proxy that has outlived its trace, and one of the trace around it."""
    kept: list[Any] = []
    ak.attention(Q, K, V, mask=lambda b, h, i, j: kept.append(i) or j >= 0)
    masks: list[Callable[..., Any]] = [
        lambda b, h, i, j: kept[0],
        lambda b, h, i, j: kept[0] <= j,
        lambda b, h, i, j: j >= kept[0],
        lambda b, h, i, j: IDS[kept[0]] == IDS[j],
        lambda b, h, i, j: ak.attention(Q, K, V, mask=lambda *x: x[3] <= i).any(),
        lambda b, h, i, j: ak.attention(Q, K, V, mask=lambda *x: i >= x[3]).any(),
    ]
    for mask in masks:
        with pytest.raises(ak.AttnkitError) as raised:
            ak.attention(Q, K, V, mask=mask)
        assert raised.value.code == "AK306", raised.value
    assert torch.equal(ak.attention(Q, K, V), plain)


def test_a_mask_without_end(plain: Tensor) -> None:
    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return mask(b, h, i, j)

    def attends(b: Any, h: Any, i: Any, j: Any) -> Any:
        ak.attention(Q, K, V, mask=attends)
        return j >= 0

    for endless in (mask, attends):
        with pytest.raises(RecursionError):
            ak.attention(Q, K, V, mask=endless)
        assert torch._C._len_torch_function_stack() == 0
        assert torch.equal(ak.attention(Q, K, V), plain)


def test_inside_a_backward_hook(plain: Tensor) -> None:
    seen = []
    q = Q.clone().requires_grad_()
    q.register_hook(lambda gradient: seen.append(torch.equal(ak.attention(Q, K, V), plain)))
    in_time(lambda: ak.attention(q, K, V).sum().backward() or True)
    assert seen == [True]


def test_inside_a_finalizer(plain: Tensor) -> None:
    seen = []

    class Last:
        def __del__(self) -> None:
            seen.append(torch.equal(ak.attention(Q, K, V), plain))

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        last = Last()
        del last
        return j >= 0

    assert torch.equal(in_time(lambda: ak.attention(Q, K, V, mask=mask)), ak.attention(Q, K, V, mask=mask))
    assert seen
    assert all(seen)


def test_counts_are_whole(plain: Tensor) -> None:
    """Counted from many threads and from within."""
    before = counts.kernel_runs
    threads = [threading.Thread(target=lambda: [ak.attention(Q, K, V) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.kernel_runs - before == 400


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # who starts in the background is made to ignore it
    torch.set_num_threads(2)
    for process in PROCESSES:
        step()
        process(int(sys.argv[1]))
