"""The result file: ``{"schema_version": 1, "machine": {...}, "records": [...]}``, written, read and checked.

A record is a plain dictionary with the fields of `FIELDS`. Units: milliseconds, TFLOP/s of live pairs, GB/s of the least
traffic. A roofline's ``ceiling`` has the unit of what binds: TFLOP/s (compute) or GB/s (memory). An ``error`` of null is not
finite: the output has NaN or infinity where it should not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnkit.bench.workloads import DTYPES

SCHEMA_VERSION = 1
Record = dict[str, Any]
Document = dict[str, Any]
Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _one_of(*allowed: str) -> Check:
    return lambda value: value in allowed


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _fields(**checks: Check) -> Check:
    return lambda value: (
        isinstance(value, dict)
        and checks.keys() <= value.keys()
        and all(c(value[k]) for k, c in checks.items())
    )


_interval = _fields(median=_number, lo=_number, hi=_number)

FIELDS: dict[str, Check] = {
    "variant": _text,
    "workload": _text,
    "direction": _one_of("fwd", "bwd", "fwdbwd", "decode"),
    "backend": _text,
    "backend_version": _text,
    "dtype": _one_of(*DTYPES, "float64"),
    "shape": _fields(b=_count, hq=_count, hkv=_count, sq=_count, skv=_count, d=_count, dv=_count),
    "mask": _text,
    "threads": _count,
    "seed": _count,
    "time_ms": _fields(median=_number, lo=_number, hi=_number, n=_count),
    "tflops": _number,
    "gbytes_per_s": _number,
    "roofline": _optional(_fields(fraction=_number, binding=_one_of("compute", "memory"), ceiling=_number)),
    "baseline": _optional(_text),
    "speedup": _optional(_interval),
    "error": _fields(max_abs=_optional(_number), rel_fro=_optional(_number)),
    "peak_bytes": _optional(_count),
    "config": lambda value: isinstance(value, dict),
    "commit": _optional(_text),
}


def problems(document: Any) -> list[str]:
    """Everything that is wrong with a result file, empty if nothing is. Unknown fields are allowed."""
    if not isinstance(document, dict):
        return ["not a JSON object"]
    found = []
    if document.get("schema_version") != SCHEMA_VERSION:
        found.append(f"schema_version is {document.get('schema_version')!r}, not {SCHEMA_VERSION}")
    if not isinstance(document.get("machine"), dict):
        found.append("machine is missing")
    records = document.get("records")
    if not isinstance(records, list):
        return [*found, "records is not a list"]
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            found.append(f"records[{i}] is not an object")
            continue
        for name, check in FIELDS.items():
            if name not in record:
                found.append(f"records[{i}].{name} is missing")
            elif not check(record[name]):
                found.append(f"records[{i}].{name} is not valid: {record[name]!r}")
    return found


def dumps(document: Any) -> str:
    """JSON as it is written to files: indented, strict (NaN is an error)."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def write(document: Any, path: Path) -> None:
    """Write JSON to ``path``, whole or not at all; makes the folder.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(dumps(document), encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> Document:
    """A result file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not a valid result file; the message names the first problem.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    found = problems(document)
    if found:
        raise ValueError(f"{path}: {found[0]}")
    return document  # type: ignore[no-any-return]
