"""What was asked of a row beside what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnkit.bench.measure import Interval, Rounds, interval, ratio
from attnkit.bench.peers import CPU
from attnkit.bench.rows import Bar, Row

BESIDE = "beside"  # the contender that is attnkit on the row's other workload


@dataclass(frozen=True)
class Found:
    """What the rounds of a row gave. ``share`` is of the ceiling, ``binding`` says which; ``wrong`` are peers that do not count."""

    times: Rounds
    share: Interval | None
    wrong: frozenset[str]
    binding: str | None = None


def judge(
    row: Row, found: Found | None, refusal: str | None = None, own: str = CPU.name
) -> list[dict[str, Any]]:
    """One entry per bar of a row, for the result file; ``own`` is the contender that is attnkit.

    ``measured`` is an interval, or null with the reason in ``note``; then the bar is not met.
    """
    return [_judge(row, bar, found, refusal, own) for bar in row.bars]


def _judge(row: Row, bar: Bar, found: Found | None, refusal: str | None, own: str) -> dict[str, Any]:
    measured, note = (None, refusal) if found is None else _measured(row, bar, found, own)
    return verdict(row.name, bar, measured, note)


def verdict(workload: str, bar: Bar, measured: Interval | None, note: str | None = None) -> dict[str, Any]:
    """A bar's entry in a result file."""
    wish = (bar.stretch, None) if bar.most is None else (None, bar.stretch)
    return {
        "workload": workload,
        **asdict(bar),
        "measured": None if measured is None else asdict(measured),
        "met": measured is not None and _reaches(measured.median, bar.least, bar.most),
        "stretch_met": (
            None if bar.stretch is None else measured is not None and _reaches(measured.median, *wish)
        ),
        "note": note,
    }


def _reaches(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _measured(row: Row, bar: Bar, found: Found, own: str) -> tuple[Interval | None, str | None]:
    times = found.times
    if own in found.wrong:
        return None, "attnkit is wrong"
    if bar.against == "ceiling":
        return found.share, f"{found.binding} limit" if found.share else "no probe of this ceiling"
    if bar.against == "beside":
        assert row.beside is not None
        work = row.workload.flops / row.beside.flops
        mine_to_other = [a / b / work for a, b in zip(times[own], times[BESIDE], strict=True)]
        return interval(mine_to_other), f"{row.beside.name}, per live pair"
    rivals = [name for name in times if name not in (own, BESIDE) and name not in found.wrong]
    if bar.against == "best":
        best = min(rivals, key=lambda name: interval(times[name]).median, default=None)
        return (None, "no peer ran") if best is None else (ratio(times, best, own), best)
    if bar.against not in rivals:
        return None, f"{bar.against} is wrong" if bar.against in found.wrong else f"{bar.against} did not run"
    return ratio(times, bar.against, own), None
