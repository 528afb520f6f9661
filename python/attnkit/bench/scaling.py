"""Suite scaling: how time and memory grow with length, as slopes of lines through logarithms; judged and drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnkit.bench.records import Document, Record
from attnkit.bench.report import OWN, drawing

_FIT_FROM = 4096  # below, what every call costs whatever its length is in sight
# Time is quadratic without a cliff, memory linear: the most that a slope may be, and the most that time may grow beyond
# fourfold where the length doubles.
LIMITS = {"time slope": 2.1, "memory slope": 1.1, "steepest doubling of time over 4": 1.25}


@dataclass(frozen=True)
class Curve:
    """One direction's lengths with the time (ms) and memory (bytes; None where it cannot be read) at each."""

    name: str
    lengths: list[int]
    ms: list[float]
    peak_bytes: list[int | None]


@dataclass(frozen=True)
class Fit:
    """A slope in logarithms, and two standard errors to both sides."""

    median: float
    lo: float
    hi: float
    n: int


def curves(document: Document) -> list[Curve]:
    """A curve for each direction and dtype in a result file, over growing lengths."""
    groups: dict[str, list[Record]] = {}
    for r in document["records"]:
        if r["backend"] in OWN:
            groups.setdefault(f"{r['variant']} {r['direction']} {r['dtype']}", []).append(r)
    found = []
    for name, records in groups.items():
        ordered = sorted(records, key=lambda r: r["shape"]["skv"])
        found.append(
            Curve(
                name,
                [r["shape"]["skv"] for r in ordered],
                [r["time_ms"]["median"] for r in ordered],
                [r["peak_bytes"] for r in ordered],
            )
        )
    return found


def slope(lengths: list[int], values: list[float]) -> Fit | None:
    """The power with which ``values`` grow: least squares in logarithms; None of fewer than three points."""
    if len(lengths) < 3 or min(values) <= 0:
        return None
    x, y = np.log(lengths), np.log(values)
    x = x - x.mean()
    power = float(x @ y / (x @ x))
    left = y - y.mean() - power * x
    error = 2 * float(np.sqrt(left @ left / (len(x) - 2) / (x @ x)))
    return Fit(power, power - error, power + error, len(x))


def judge(document: Document) -> list[dict[str, Any]]:
    """Entries like those of `bars.judge`, for every curve: slopes of time and memory, and the steepest doubling."""
    entries = []
    for curve in curves(document):
        long = [i for i, s in enumerate(curve.lengths) if s >= _FIT_FROM]
        s = [curve.lengths[i] for i in long]
        ms = [curve.ms[i] for i in long]
        peaks = [float(curve.peak_bytes[i] or 0) for i in long]
        steps = [
            ms[i + 1] / ms[i] / 4 for i in range(len(s) - 1) if s[i + 1] == 2 * s[i]
        ]  # the time of a doubling over what quadratic growth asks
        steepest = Fit(max(steps), min(steps), max(steps), len(steps)) if steps else None
        fits = (slope(s, ms), slope(s, peaks) if peaks else None, steepest)
        for (what, most), fit in zip(LIMITS.items(), fits, strict=True):
            entries.append(
                {
                    "workload": f"{curve.name}, {s[0] if s else '-'} to {s[-1] if s else '-'}",
                    "against": what,
                    "least": None,
                    "most": most,
                    "stretch": None,
                    "measured": None if fit is None else asdict(fit),
                    "met": fit is not None and fit.median <= most,
                    "stretch_met": None,
                    "note": None if fit else "too few lengths, or no memory to read",
                }
            )
    return entries


def plot(document: Document, paths: list[Path]) -> None:
    """Time and memory against length, each beside a line of the power that it should have, into each of ``paths``.

    Raises:
        OSError: a file cannot be written.
        ValueError: the suffix is not a known format.
    """
    with drawing(document, paths, (9, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        for curve in curves(document):
            read = [(s, b / 2**20) for s, b in zip(curve.lengths, curve.peak_bytes, strict=True) if b]
            left.plot(curve.lengths, curve.ms, "o-", label=_label(curve.name, curve.lengths, curve.ms))
            if read:
                lengths, mib = [s for s, _ in read], [m for _, m in read]
                right.plot(lengths, mib, "o-", label=_label(curve.name, lengths, mib))
        for axes, power, what in ((left, 2, "ms"), (right, 1, "peak MiB of a call")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _guide(axes, power)
            axes.set_xlabel("tokens")
            axes.set_ylabel(what)
            axes.grid(axis="y")
            axes.legend()


def _label(name: str, lengths: list[int], values: list[float]) -> str:
    """With the slope that is judged, where there are enough lengths for one."""
    long = [(s, x) for s, x in zip(lengths, values, strict=True) if s >= _FIT_FROM]
    fit = slope([s for s, _ in long], [x for _, x in long])
    return name if fit is None else f"{name}: slope {fit.median:.2f} ± {(fit.hi - fit.lo) / 2:.2f}"


def _guide(axes: Any, power: int) -> None:
    """A dashed line of that power through the end of the last curve."""
    if not axes.lines:
        return
    x, y = axes.lines[-1].get_data()
    axes.plot(
        x,
        [y[-1] * (s / x[-1]) ** power for s in x],
        "--",
        color="black",
        linewidth=0.8,
        label=f"slope {power}",
    )
