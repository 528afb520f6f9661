"""A benchmark run: every row, every contender, checked against float64 and timed in interleaved rounds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from typing import Any, Protocol

from attnkit.bench import machine
from attnkit.bench.bars import BESIDE, Found, judge
from attnkit.bench.ceilings import Burst, Ceilings
from attnkit.bench.checks import Check, Error, is_wrong
from attnkit.bench.measure import Contender, Interval, Rounds, interval, measure, ratio
from attnkit.bench.memory import peak_bytes
from attnkit.bench.peers import CPU, Call, Peer
from attnkit.bench.records import SCHEMA_VERSION, Document, Record
from attnkit.bench.rows import Row
from attnkit.bench.workloads import Inputs, Workload, make_inputs
from attnkit.errors import AttnkitError

Progress = Callable[[str, float], None]  # (what is being measured, fraction of the run that is done)
_CACHES = 4  # KV caches that decoding goes through in turn


class Probe(Protocol):
    """What a place can do, probed between rounds: `ceilings.Ceilings`, or a GPU's."""

    threads: int
    bursts: list[Burst]

    def burst(self) -> None:
        """Probe every ceiling."""

    @property
    def best(self) -> Burst:
        """The best of all rounds."""


@dataclass(frozen=True)
class Place:
    """Where a suite runs, and how it is measured there; ``own`` is attnkit there."""

    own: Peer = CPU
    ceilings: Callable[[int], Probe] = Ceilings
    inputs: Callable[[Workload], Inputs] = make_inputs
    measure: Callable[..., Rounds] = measure
    peak_bytes: Callable[[Callable[[], object]], int | None] = peak_bytes
    describe: Callable[[], dict[str, Any]] = machine.describe


HOST = Place()


@dataclass
class _Measured:
    """One row after its rounds, before the ceilings of the whole run are known."""

    row: Row
    times: Rounds = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    errors: dict[str, Error] = field(default_factory=dict)
    peaks: dict[str, int | None] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    shares: dict[str, Interval] = field(default_factory=dict)
    binding: str | None = None  # what bound in most rounds

    @property
    def wrong(self) -> frozenset[str]:
        dtype = self.row.workload.dtype
        return frozenset(name for name, error in self.errors.items() if is_wrong(error, dtype))


def run(
    rows: Iterable[Row],
    *,
    threads: int | None = None,
    seconds: float = 24.0,
    rounds: int | None = None,
    progress: Progress = lambda what, fraction: None,
    place: Place | None = None,
) -> Document:
    """Measure attnkit and its peers in every row; the result file's content (see `records`).

    ``threads`` defaults to torch's. ``seconds`` is what measuring may take, spread evenly; a row always gets three
    rounds. ``rounds`` fixes their number instead. Beside the fields of the schema the document holds ``ceilings``,
    ``bars`` (see `bars.judge`) and ``skipped``: who cannot run a workload, with the reason. attnkit is among these where
    it refuses; its row is then not measured.
    """
    import torch

    rows, place = list(rows), place or HOST
    with use_threads(threads) as used, torch.no_grad():
        ceilings = place.ceilings(used)
        measured = []
        for i, row in enumerate(rows):

            def part_done(fraction: float, i: int = i, row: Row = row) -> None:
                progress(row.name, (i + fraction) / len(rows))

            measured.append(_measure(row, seconds / len(rows), rounds, ceilings, part_done, place))
    commit = machine.commit()
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": place.describe(),
        "ceilings": _ceilings(ceilings),
        "records": [record for m in measured for record in _records(m, ceilings, commit, place)],
        "bars": [bar for m in measured for bar in _judged(m, place)],
        "skipped": [
            {"workload": m.row.name, "backend": name, "reason": reason}
            for m in measured
            for name, reason in m.skipped.items()
        ],
    }


def wrong(document: Document) -> list[str]:
    """The records whose output is not the float64 result within rounding: their times mean nothing."""
    return [
        f"{r['backend']} computes {r['workload']} wrong: relative error {r['error']['rel_fro']}"
        for r in document["records"]
        if is_wrong(r["error"], r["dtype"])
    ]


# --- one row ------------------------------------------------------------------------------------------------


def _measure(
    row: Row,
    seconds: float,
    rounds: int | None,
    ceilings: Probe,
    part_done: Callable[[float], None],
    place: Place,
) -> _Measured:
    part_done(0.0)
    found, contenders = _Measured(row), {}
    if (reason := place.own.refuses(row.workload)) is not None:
        found.skipped[place.own.name] = reason
        return found
    inputs = place.inputs(row.workload)
    check = Check(inputs)
    for peer in (place.own, *row.peers):
        version = peer.installed()
        reason = _not_installed(peer) if version is None else peer.refuses(row.workload)
        if version is not None and reason is None:
            try:
                contenders[peer.name] = _admit(peer, inputs, check, found, place)
                found.versions[peer.name] = version
                continue
            except AttnkitError as exc:
                reason = f"attnkit refuses: {' '.join(str(exc).split())}"
            except Exception as exc:  # whatever goes wrong in somebody else's library
                if peer is place.own:
                    raise
                reason = (
                    f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc).strip() else ''}"
                )
        found.skipped[peer.name] = reason or ""
        if peer is place.own:
            return found
    if row.beside is not None:
        contenders[BESIDE] = _contender(place.own, place.inputs(row.beside))[0]
    start, first = time.perf_counter(), len(ceilings.bursts)

    def after_round() -> None:
        ceilings.burst()
        part_done(min(1.0, (time.perf_counter() - start) / max(seconds, 1e-9)))

    found.times = place.measure(contenders, seconds=seconds, rounds=rounds, after_round=after_round)
    _take_shares(found, ceilings, first)
    return found


def _admit(peer: Peer, inputs: Inputs, check: Check, found: _Measured, place: Place) -> Contender:
    """Prepare and check a contender, and note what it needs."""
    contender, call = _contender(peer, inputs)
    with contender.context():
        found.errors[peer.name] = _error(call, inputs, check)
        found.peaks[peer.name] = place.peak_bytes(contender.run)
    found.configs[peer.name] = call.config
    return contender


def _contender(peer: Peer, inputs: Inputs) -> tuple[Contender, Call]:
    """What is timed, and the call it is made of (the first of several)."""
    import torch

    w = inputs.workload
    with torch.set_grad_enabled(w.needs_grad):
        call = peer.prepare(inputs)
    if w.direction == "fwdbwd":
        leaves = (inputs.q, inputs.k, inputs.v)
        return Contender(lambda: torch.autograd.grad(call.run(), leaves, inputs.do), torch.enable_grad), call
    if w.direction == "decode":
        others = [
            peer.prepare(replace(inputs, k=inputs.k.clone(), v=inputs.v.clone())) for _ in range(_CACHES - 1)
        ]
        turns = cycle([call.run, *(other.run for other in others)])

        def with_next_cache() -> Any:
            return next(turns)()

        return Contender(with_next_cache), call
    return Contender(call.run, torch.enable_grad if w.grad else torch.no_grad), call


def _error(call: Call, inputs: Inputs, check: Check) -> Error:
    import torch

    if call.meant is not None:
        check = Check(inputs, call.meant())
    if inputs.workload.direction != "fwdbwd":
        return check.output(call.output(call.run()))

    def step(do: Any) -> tuple[Any, ...]:
        o = call.run()
        return (o, *torch.autograd.grad(o, (inputs.q, inputs.k, inputs.v), do))

    return check.gradients(step)


def _not_installed(peer: Peer) -> str:
    return "not installed" + (f": pip install 'attnkit[{peer.extra}]'" if peer.extra else "")


def _take_shares(m: _Measured, ceilings: Probe, first: int) -> None:
    """The share of the binding ceiling that each reached, round by round as everything else."""
    w = m.row.workload
    bursts = ceilings.bursts[first:]
    least = [b.least_seconds(w.dtype, w.flops, w.min_bytes) for b in bursts]
    for name, seconds in m.times.items():
        shares = [x[0] / t for x, t in zip(least, seconds, strict=True) if x is not None]
        if name != BESIDE and len(shares) == len(seconds):
            m.shares[name] = interval(shares)
    binds = Counter(x[1] for x in least if x is not None)
    m.binding = binds.most_common(1)[0][0] if binds else None


# --- the document -------------------------------------------------------------------------------------------


def _judged(m: _Measured, place: Place) -> list[dict[str, Any]]:
    own = place.own.name
    if not m.times:
        return judge(m.row, None, m.skipped[own], own)
    return judge(m.row, Found(m.times, m.shares.get(own), m.wrong, m.binding), own=own)


def _ceilings(ceilings: Probe) -> dict[str, Any]:
    """The best of all bursts; null where no row was measured."""
    found = ceilings.best if ceilings.bursts else None
    return {
        "threads": ceilings.threads,
        "fma_gflops": found and found.gflops["float32"],
        "bf16_gflops": found and found.gflops.get("bfloat16"),
        "read_gbytes_per_s": found and found.read_gbytes_per_s,
        "bursts": len(ceilings.bursts),
    }


def _records(m: _Measured, ceilings: Probe, commit: str | None, place: Place) -> Iterator[Record]:
    w = m.row.workload
    baseline = next((name for name in m.times if name not in (place.own.name, BESIDE)), None)
    for name, seconds in m.times.items():
        if name == BESIDE:
            continue
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
            "roofline": _roofline(w, t, m.shares.get(name), ceilings),
            "baseline": None if faster is None else baseline,
            "speedup": None if faster is None else asdict(faster),
            "error": m.errors[name],
            "peak_bytes": m.peaks[name],
            "config": m.configs[name],
            "commit": commit,
        }


def _roofline(w: Workload, t: Interval, share: Interval | None, ceilings: Probe) -> dict[str, Any] | None:
    """The share of the binding ceiling that is reached: the time the machine must take over the time taken.

    ``fraction`` is of the best ceiling of the whole run, ``interleaved`` of the one probed in the same round.
    """
    found = ceilings.best.least_seconds(w.dtype, w.flops, w.min_bytes)
    if found is None:
        return None
    least, binding, ceiling = found
    return {
        "fraction": least / t.median, "lo": least / t.hi, "hi": least / t.lo, "binding": binding, "ceiling": ceiling,
        "interleaved": share and asdict(share),
    }  # fmt: skip


@contextmanager
def use_threads(wanted: int | None) -> Iterator[int]:
    """torch's thread count, which attnkit takes over at each call, set for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if wanted is None else wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
