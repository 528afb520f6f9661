"""A benchmark run: every workload, every contender, checked against float64 and timed in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from attnkit.bench import machine
from attnkit.bench.ceilings import Ceilings
from attnkit.bench.measure import Contender, Interval, Rounds, interval, measure, ratio
from attnkit.bench.memory import peak_bytes
from attnkit.bench.peers import CPU, PEERS, Peer
from attnkit.bench.records import SCHEMA_VERSION, Document, Record
from attnkit.bench.workloads import Inputs, Workload, make_inputs
from attnkit.variants import dense

Progress = Callable[[str, float], None]  # (what is being measured, fraction of the run that is done)
_CHECKED_ROWS = 32  # queries per head that are compared with float64
# A relative error above this is not rounding. (The tests hold kernels to much tighter bounds.)
_WRONG = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass
class _Measured:
    """One workload after its rounds, before the ceilings of the whole run are known."""

    workload: Workload
    times: Rounds
    versions: dict[str, str]
    errors: dict[str, dict[str, float | None]]
    peaks: dict[str, int | None]
    configs: dict[str, dict[str, int]]
    skipped: dict[str, str] = field(default_factory=dict)


def run(
    workloads: list[Workload],
    *,
    threads: int | None = None,
    seconds: float = 24.0,
    rounds: int | None = None,
    peers: Iterable[Peer] = PEERS,
    progress: Progress = lambda what, fraction: None,
) -> Document:
    """Measure attnkit and its peers on every workload; the result file's content (see `records`).

    ``threads`` defaults to torch's. ``seconds`` is what measuring may take, spread evenly; a workload always gets three
    rounds. ``rounds`` fixes their number instead. Beside the fields of the schema the document holds ``ceilings`` and
    ``skipped`` (peers that cannot run a workload, with the reason).

    Raises:
        AttnkitError: attnkit cannot run a workload.
    """
    import torch

    with _threads(threads) as used, torch.no_grad():
        ceilings = Ceilings(used)
        measured = []
        for i, workload in enumerate(workloads):

            def part_done(fraction: float, i: int = i, workload: Workload = workload) -> None:
                progress(workload.name, (i + fraction) / len(workloads))

            budget = seconds / len(workloads)
            measured.append(_measure(workload, (CPU, *peers), budget, rounds, ceilings, part_done))
    commit = machine.commit()
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine.describe(),
        "ceilings": {
            "threads": used,
            "fma_gflops": ceilings.fma_gflops,
            "read_gbytes_per_s": ceilings.read_gbytes_per_s,
            "bursts": ceilings.bursts,
        },
        "records": [record for m in measured for record in _records(m, ceilings, commit)],
        "skipped": [
            {"workload": m.workload.name, "backend": name, "reason": reason}
            for m in measured
            for name, reason in m.skipped.items()
        ],
    }


def wrong(document: Document) -> list[str]:
    """The records whose output is not the float64 result within rounding: their times mean nothing."""
    return [
        f"{r['backend']} computes {r['workload']} wrong: relative error {r['error']['rel_fro']}"
        for r in document["records"]
        if r["error"]["rel_fro"] is None or r["error"]["rel_fro"] > _WRONG[r["dtype"]]
    ]


def _measure(
    workload: Workload,
    peers: tuple[Peer, ...],
    seconds: float,
    rounds: int | None,
    ceilings: Ceilings,
    part_done: Callable[[float], None],
) -> _Measured:
    part_done(0.0)
    inputs = make_inputs(workload)
    rows, expected = _expected(inputs)
    found = _Measured(workload, {}, {}, {}, {}, {})
    contenders: dict[str, Contender] = {}
    for peer in peers:
        version = peer.installed()
        reason = "not installed" if version is None else peer.refuses(workload)
        if version is None or reason is not None:
            found.skipped[peer.name] = reason or ""
            continue
        call = peer.prepare(inputs)
        found.versions[peer.name] = version
        found.errors[peer.name] = _error(call(), rows, expected)
        found.peaks[peer.name] = peak_bytes(call)
        found.configs[peer.name] = peer.config(call)
        contenders[peer.name] = Contender(call)
    start = time.perf_counter()

    def after_round() -> None:
        ceilings.burst()
        part_done(min(1.0, (time.perf_counter() - start) / max(seconds, 1e-9)))

    found.times = measure(contenders, seconds=seconds, rounds=rounds, after_round=after_round)
    return found


def _expected(inputs: Inputs) -> tuple[Any, Any]:
    """Some query rows, the first and the last among them, and their outputs in float64."""
    w, s = inputs.workload, inputs.workload.shape
    rng = np.random.default_rng(w.seed)
    rows = np.unique(np.r_[0, s.sq - 1, rng.integers(0, s.sq, _CHECKED_ROWS - 2)])
    q, k, v = (t.double().numpy() for t in (inputs.q, inputs.k, inputs.v))
    return rows, dense.naive(q, k, v, rows=rows, **w.parameters)[0]


def _error(o: Any, rows: Any, expected: Any) -> dict[str, float | None]:
    difference = o.double().numpy()[:, :, rows] - expected
    norm = float(np.linalg.norm(expected)) or 1.0
    if not np.isfinite(difference).all():
        return {"max_abs": None, "rel_fro": None, "rows": len(rows)}
    return {
        "max_abs": float(np.abs(difference).max()),
        "rel_fro": float(np.linalg.norm(difference)) / norm,
        "rows": len(rows),
    }


def _records(m: _Measured, ceilings: Ceilings, commit: str | None) -> Iterator[Record]:
    w = m.workload
    baseline = next((name for name in m.times if name != CPU.name), None)
    for name, seconds in m.times.items():
        t = interval(seconds)
        faster = None if baseline in (None, name) else ratio(m.times, str(baseline), name)
        yield {
            "variant": w.variant,
            "workload": w.name,
            "direction": w.direction,
            "backend": name,
            "backend_version": m.versions[name],
            "dtype": w.dtype,
            "shape": asdict(w.shape),
            "mask": w.mask,
            "threads": ceilings.threads,
            "seed": w.seed,
            "time_ms": asdict(t.scaled(1e3)),
            "tflops": w.flops / t.median * 1e-12,
            "gbytes_per_s": w.min_bytes / t.median * 1e-9,
            "roofline": _roofline(w, t, ceilings),
            "baseline": None if faster is None else baseline,
            "speedup": None if faster is None else asdict(faster),
            "error": m.errors[name],
            "peak_bytes": m.peaks[name],
            "config": m.configs[name],
            "commit": commit,
        }


def _roofline(w: Workload, t: Interval, ceilings: Ceilings) -> dict[str, Any] | None:
    """The share of the binding ceiling that is reached: the time the machine must take over the time taken."""
    tflops, gbytes = ceilings.compute_tflops(w.dtype), ceilings.read_gbytes_per_s
    if tflops is None:
        return None
    compute_s, memory_s = w.flops / (tflops * 1e12), w.min_bytes / (gbytes * 1e9)
    binding, ceiling = ("compute", tflops) if compute_s >= memory_s else ("memory", gbytes)
    least = max(compute_s, memory_s)
    return {
        "fraction": least / t.median, "lo": least / t.hi, "hi": least / t.lo, "binding": binding, "ceiling": ceiling,
    }  # fmt: skip


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """torch's thread count, which attnkit takes over at each call, set for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if wanted is None else wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
