"""Two result files beside each other: what got slower, what got faster, and what nobody can tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attnkit.bench import records
from attnkit.bench.checks import is_wrong
from attnkit.bench.records import Document, Record
from attnkit.errors import error
from attnkit.tune.statistics import Interval

By = Literal["time", "speedup", "share"]
Verdict = Literal["slower", "faster", "same", "unknown", "missing", "new", "wrong"]
_IDENTITY = ("workload", "backend", "threads")


@dataclass(frozen=True)
class Row:
    """One record of both files. ``ratio`` is B's time over A's, with an interval that it lies in; None where there is none."""

    workload: str
    backend: str
    threads: int
    verdict: Verdict
    ratio: Interval | None = None

    @property
    def is_problem(self) -> bool:
        """Whether a change should not go in: slower for certain, wrong, or not measured any more."""
        return self.verdict in ("slower", "wrong", "missing")


def load(path: Path) -> Document:
    """Read a result file.

    Raises:
        OSError: the file cannot be read.
        AttnkitValueError: AK401, it is not a result file; says why.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise error(
            "AK401", where=str(path), given=str(exc), allowed="a result file of `attnkit bench --json`"
        ) from exc
    if wrong := records.problems(document):
        given = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise error("AK401", where=str(path), given=given, allowed="a result file of `attnkit bench --json`")
    found: Document = document
    return found


def compare(
    a: Document, b: Document, *, by: By = "time", threshold: float = 0.05, backend: str | None = "cpu"
) -> list[Row]:
    """B beside A, record by record, in the order of A; ``backend`` None compares every contender.

    A record is slower (faster) if its time changed by more than ``threshold`` for certain: the whole interval of the ratio lies
    beyond it. ``by`` says what stands for time: ``time`` itself, for runs on one quiet machine; ``speedup``, beside the baseline
    of the same rounds, and ``share``, of the ceiling probed in them, cancel what the machine did.
    """
    first, second = (_by_identity(document, backend) for document in (a, b))
    rows = [_row(first[key], second.get(key), by, threshold) for key in first]
    return rows + [_only(record, "new") for key, record in second.items() if key not in first]


def _by_identity(document: Document, backend: str | None) -> dict[tuple[Any, ...], Record]:
    return {
        tuple(record[name] for name in _IDENTITY): record
        for record in document["records"]
        if backend is None or record["backend"] == backend
    }


def _only(record: Record, verdict: Verdict, ratio: Interval | None = None) -> Row:
    return Row(record["workload"], record["backend"], record["threads"], verdict, ratio)


def _row(a: Record, b: Record | None, by: By, threshold: float) -> Row:
    if b is None:
        return _only(a, "missing")
    if is_wrong(b["error"], b["dtype"]) and not is_wrong(a["error"], a["dtype"]):
        return _only(b, "wrong")
    before, after = _quantity(a, by), _quantity(b, by)
    if before is None or after is None:
        return _only(a, "unknown")
    ratio = Interval(
        after.median / before.median, after.lo / before.hi, after.hi / before.lo, min(before.n, after.n)
    )
    verdict: Verdict = "same"
    if ratio.lo > 1 + threshold:
        verdict = "slower"
    elif ratio.hi < 1 / (1 + threshold):
        verdict = "faster"
    return _only(a, verdict, ratio)


def _quantity(record: Record, by: By) -> Interval | None:
    """What is compared, as something that grows with time."""
    n = record["time_ms"]["n"]
    found: Any = {
        "time": lambda: record["time_ms"],
        "speedup": lambda: _inverse(record["speedup"]),
        "share": lambda: _inverse((record["roofline"] or {}).get("interleaved")),
    }[by]()
    return (
        None if found is None or found["lo"] <= 0 else Interval(found["median"], found["lo"], found["hi"], n)
    )


def _inverse(interval: Any) -> Any:
    if interval is None or interval["lo"] <= 0:
        return None
    return {"median": 1 / interval["median"], "lo": 1 / interval["hi"], "hi": 1 / interval["lo"]}


def differing_machines(a: Document, b: Document) -> Iterator[str]:
    """What is not the same about the machines of two files, and may be why times differ."""
    for name in ("cpu", "cores", "isa", "torch"):
        before, after = a["machine"].get(name), b["machine"].get(name)
        if before != after:
            yield f"{name}: {before} and {after}"
