"""An NVIDIA GPU as a place to measure: events on the stream, a cold L2, and what the device can do at most.

Nothing here has run on a GPU yet; the tests run it with a clock of their own.
"""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

from attnkit.bench import machine
from attnkit.bench.ceilings import Burst, best
from attnkit.bench.measure import Contender, Rounds, settled
from attnkit.bench.peers import TRITON, Peer, installed_version
from attnkit.bench.rows import Row, select
from attnkit.bench.runner import Place
from attnkit.bench.workloads import Inputs, Workload, make_inputs

DEVICE = "cuda"
# Written before every call: far more than any L2 holds, and so long that the host is ahead when the call starts.
_FLUSH_BYTES = 1 << 30
_COPY_BYTES = 1 << 29
_SQUARE = {"bfloat16": 8192, "float16": 8192, "float32": 2048}  # a product's sizes by dtype
_ROUNDS = 200  # at most
_WARM_UP = 3


def inputs(workload: Workload) -> Inputs:
    """The same numbers as on the CPU, on the device."""
    made = make_inputs(workload)
    q, k, v = (t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in (made.q, made.k, made.v))
    return Inputs(workload, q, k, v, made.do.to(DEVICE))


def measure(
    contenders: Mapping[str, Contender],
    *,
    seconds: float,
    rounds: int | None = None,
    after_round: Callable[[], None] = lambda: None,
) -> Rounds:
    """As `measure.measure`, by events on the stream: one call of each contender in a round, from a cold L2.

    The host waits once a round. Every round starts with another contender.
    """
    import torch

    names = list(contenders)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    for name in names:
        for _ in range(_WARM_UP):
            _call(contenders[name], flush)
    torch.cuda.synchronize()
    times: Rounds = {name: [] for name in names}
    start = time.perf_counter()
    done = 0
    while done < (3 if rounds is None else rounds) or (
        rounds is None and done < _ROUNDS and time.perf_counter() - start < seconds and not settled(times)
    ):
        turns = [names[(done + i) % len(names)] for i in range(len(names))]
        events = [(name, *_call(contenders[name], flush)) for name in turns]
        torch.cuda.synchronize()
        for name, before, after in events:
            times[name].append(before.elapsed_time(after) * 1e-3)
        after_round()
        done += 1
    return times


def _events() -> tuple[Any, Any]:
    import torch

    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return before, after


def _call(contender: Contender, flush: Any) -> tuple[Any, Any]:
    """One call between two events."""
    before, after = _events()
    with contender.context():
        flush.zero_()
        before.record()
        contender.run()
        after.record()
    return before, after


def _seconds(run: Callable[[], object]) -> float:
    """The best of three."""
    import torch

    events = [_events() for _ in range(3)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return float(min(before.elapsed_time(after) for before, after in events)) * 1e-3


class Ceilings:
    """Products of large matrices, and a copy: what a call is held against. See `ceilings.Ceilings`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.bursts: list[Burst] = []

    @cached_property
    def _buffers(self) -> Any:
        import torch

        return torch.zeros(2, _COPY_BYTES, dtype=torch.int8, device=DEVICE)

    @cached_property
    def _factors(self) -> dict[str, tuple[Any, Any]]:
        import torch

        squares = (
            (name, torch.randn(n, n, device=DEVICE).to(getattr(torch, name))) for name, n in _SQUARE.items()
        )
        return {name: (square, square.mT.contiguous()) for name, square in squares}

    def burst(self) -> None:
        """Probe every ceiling."""
        gflops = {
            name: 2 * _SQUARE[name] ** 3 / _seconds(partial(operator.matmul, *pair)) * 1e-9
            for name, pair in self._factors.items()
        }
        copied = 2 * _COPY_BYTES / _seconds(partial(self._buffers[0].copy_, self._buffers[1]))
        self.bursts.append(Burst(gflops, copied * 1e-9))

    @property
    def best(self) -> Burst:
        """The best of all rounds."""
        return best(self.bursts)


def peak_bytes(run: Callable[[], object]) -> int | None:
    """How far the memory that torch has given out rises while ``run`` runs."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def describe() -> dict[str, Any]:
    """The GPU, its driver, and the versions of whoever makes kernels."""
    import torch

    found: dict[str, Any] = machine.software() | {"gpu": None, "cuda": torch.version.cuda}
    found |= {name: installed_version(name) for name in ("triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name, "capability": [properties.major, properties.minor], "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory, "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }  # fmt: skip
    return found


PLACE = Place(
    own=TRITON, ceilings=Ceilings, inputs=inputs, measure=measure, peak_bytes=peak_bytes, describe=describe
)


def warm(rows: Iterable[Row], own: Peer = TRITON) -> int:
    """Call attnkit once in every row: kernels that are compiled and admitted then are found again in their folder."""
    import torch

    made = 0
    for row in rows:
        given = inputs(row.workload)
        with torch.set_grad_enabled(row.workload.needs_grad):
            o = own.prepare(given).run()
            if row.workload.direction == "fwdbwd":
                torch.autograd.grad(o, (given.q, given.k, given.v), given.do)
        made += 1
    torch.cuda.synchronize()
    return made


if __name__ == "__main__":
    sys.stdout.write(f"{warm(select('gpu', patterns=sys.argv[1:]))} rows\n")
