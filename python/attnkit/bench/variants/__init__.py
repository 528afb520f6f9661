"""Suite variants: the families beside what a user would write today, and beside our own dense attention.

Each family is a file here that lists its jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attnkit.bench import machine
from attnkit.bench.bars import verdict
from attnkit.bench.ceilings import Ceilings
from attnkit.bench.measure import Interval, Rounds, interval, measure, ratio
from attnkit.bench.records import SCHEMA_VERSION, Document
from attnkit.bench.report import drawing
from attnkit.bench.rows import Bar
from attnkit.bench.runner import Progress, use_threads
from attnkit.bench.variants import block_sparse, factorizable, groups, linear, selective, sparge
from attnkit.bench.variants.jobs import BEYOND, CEILING, OWN, Job

FAMILIES = (linear, factorizable, block_sparse, groups, sparge, selective)
SECONDS = 60.0
_FLAT_FROM = 4096  # tokens: from there on the time of a token is to be the same
_MARKERS = "osD^vP"  # there are more curves than colours
_BYTES = " bytes"  # how the name of a fact ends that is memory
_FLAT = Bar("time a token, most over least", most=1.15)
_CONSTANT = Bar(f"MiB {BEYOND.removeprefix('bytes ')}, at any length", most=16)


def jobs(patterns: Sequence[str] = ()) -> list[Job]:
    """The rows of the suite whose title has one of the patterns in it."""
    found = [job for family in FAMILIES for job in family.jobs()]
    return [job for job in found if not patterns or any(fnmatchcase(job.title, f"*{p}*") for p in patterns)]


def run(
    chosen: Sequence[Job],
    *,
    seed: int = 0,
    threads: int | None = None,
    seconds: float = SECONDS,
    rounds: int | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Document:
    """Measure jobs; the result file's content. ``runs`` holds times in milliseconds, ``bars`` what they are judged by."""
    document: Document = {
        "schema_version": SCHEMA_VERSION, "suite": "variants", "machine": machine.describe(), "commit": machine.commit(),
        "records": [], "runs": [], "bars": [], "skipped": [],
    }  # fmt: skip
    with use_threads(threads) as used:
        document["threads"] = used
        ceilings = Ceilings(used)
        for i, job in enumerate(chosen):
            progress(job.title, i / len(chosen))
            found, bars = _measure(job, ceilings, seed, seconds / len(chosen), rounds)
            document["runs"].append(found)
            document["bars"] += bars
    best = ceilings.best if ceilings.bursts else None
    document["ceilings"] = {
        "threads": used, "fma_gflops": best and best.gflops["float32"], "bf16_gflops": best and best.gflops.get("bfloat16"),
        "read_gbytes_per_s": best and best.read_gbytes_per_s, "bursts": len(ceilings.bursts),
    }  # fmt: skip
    document["bars"] += [*_flatness(document["runs"]), *_constancy(document["runs"])]
    return document


def _measure(
    job: Job, ceilings: Ceilings, seed: int, seconds: float, rounds: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is noted of a row, and its bars judged."""
    prepared = job.prepare(seed)
    errors = prepared.errors()
    wrong = {name for name, error in errors.items() if not error < prepared.wrong}
    first = len(ceilings.bursts)
    times = measure(prepared.rivals, seconds=seconds, rounds=rounds, after_round=ceilings.burst)
    share = None
    if prepared.flops is not None:
        peaks = [burst.gflops[prepared.dtype] for burst in ceilings.bursts[first:]]
        share = interval(
            [prepared.flops / t / peak * 1e-9 for t, peak in zip(times[OWN], peaks, strict=True)]
        )
    found = {
        "workload": job.title, "curve": job.curve, "length": job.length, "facts": dict(prepared.facts),
        "ms": {name: asdict(interval(t).scaled(1e3)) for name, t in times.items()},
        "speedup": {name: asdict(ratio(times, name, OWN)) for name in times if name != OWN},
        "share": share and asdict(share), "error": errors,
    }  # fmt: skip
    judged = [
        verdict(job.title, bar, None, f"wrong: {', '.join(sorted(wrong & {OWN, bar.against}))}")
        if wrong & {OWN, bar.against}
        else verdict(job.title, bar, share if bar.against == CEILING else _ratio(times, bar))
        for bar in job.bars
    ]
    return found, judged


def _ratio(times: Rounds, bar: Bar) -> Interval:
    return ratio(times, OWN, bar.against) if bar.least is None else ratio(times, bar.against, OWN)


def _flatness(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A verdict for each curve: whether a token takes the same time at any length."""
    for name in dict.fromkeys(r["curve"] for r in runs if r["curve"]):
        per_token = [
            r["ms"][OWN]["median"] / r["length"]
            for r in runs
            if r["curve"] == name and r["length"] >= _FLAT_FROM
        ]
        if len(per_token) > 1:
            spread = [x / min(per_token) for x in per_token]
            found = Interval(max(spread), min(spread), max(spread), len(spread))
            yield verdict(f"{name}, {_FLAT_FROM} tokens and more", _FLAT, found)


def _constancy(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A verdict for each curve whose memory was read: whether it is what some states take, at every length."""
    for name in dict.fromkeys(r["curve"] for r in runs if r["curve"]):
        mib = [
            value / 2**20
            for r in runs
            if r["curve"] == name
            for fact, value in r["facts"].items()
            if fact.startswith(BEYOND)
        ]
        if mib:
            yield verdict(name, _CONSTANT, Interval(max(mib), min(mib), max(mib), len(mib)))


def plot(document: Document, paths: list[Path]) -> None:
    """Time a token, and how far memory rises, against length, each beside dense attention, into each of ``paths``.

    Raises:
        OSError: a file cannot be written.
        ValueError: the suffix is not a known format.
    """
    timed = [r for r in document["runs"] if r["curve"]]
    weighed = [r for r in document["runs"] if any(fact.endswith(_BYTES) for fact in r["facts"])]
    drawn = [(draw, runs) for draw, runs in ((_draw_times, timed), (_draw_memory, weighed)) if runs]
    with drawing(document, paths, (6 * max(len(drawn), 1), 3.6)) as figure:
        for i, (draw, runs) in enumerate(drawn):
            axes = figure.add_subplot(1, len(drawn), i + 1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("tokens")
            draw(axes, runs)
            axes.grid(axis="y")
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_times(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    lines = {
        name: [r for r in runs if r["curve"] == name] for name in dict.fromkeys(r["curve"] for r in runs)
    }
    for i, (name, mine) in enumerate(lines.items()):
        axes.plot(*_per_token(mine, OWN), color=f"C{i}", marker=_MARKERS[i % len(_MARKERS)], label=name)
        if beside := [r for r in mine if "dense" in r["ms"]]:
            axes.plot(*_per_token(beside, "dense"), "--", color=f"C{i}", label=f"dense, beside {name}")
    axes.set_ylabel("µs a token")


def _draw_memory(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    """A line for each fact that is bytes, a colour for each contender; one that doubles with the length beside them."""
    facts = dict.fromkeys(fact for r in runs for fact in r["facts"] if fact.endswith(_BYTES))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(fact.split()[0] for fact in facts))}
    for fact in facts:
        points = [(r["length"], r["facts"][fact] / 2**20) for r in runs if fact in r["facts"]]
        name, direction, _ = fact.split()
        style = "o:" if direction == "fwd" else "o-"
        axes.plot(*zip(*points, strict=True), style, color=colours[name], label=f"{name} {direction}")
    lengths = [r["length"] for r in runs]
    last = max(r["facts"].get(f"{OWN} fwd{_BYTES}", 0.0) for r in runs) / 2**20
    line = [last * n / max(lengths) for n in lengths]
    axes.plot(lengths, line, "--", color="black", linewidth=0.8, label="linear")
    axes.set_ylabel("peak MiB of a call")


def _per_token(runs: Sequence[dict[str, Any]], rival: str) -> tuple[list[int], list[float]]:
    lengths = [r["length"] for r in runs]
    return lengths, [1e3 * r["ms"][rival]["median"] / r["length"] for r in runs]
