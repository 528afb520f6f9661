"""`attnkit compare`: what counts as slower, and what nobody can tell."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from attnkit.bench import compare
from attnkit.bench.records import SCHEMA_VERSION, Document
from attnkit.cli.app import app
from attnkit.errors import AttnkitError


def record(
    ms: float = 1.0,
    width: float = 0.01,
    workload: str = "full",
    backend: str = "cpu",
    speedup: float = 2.0,
    error: float | None = 1e-7,
) -> dict[str, Any]:
    def around(x: float) -> dict[str, float]:
        return {"median": x, "lo": x * (1 - width), "hi": x * (1 + width)}

    return {
        "variant": "full", "workload": workload, "direction": "fwd", "backend": backend, "backend_version": "1", "dtype": "float32",
        "shape": dict.fromkeys(("b", "hq", "hkv", "sq", "skv", "d", "dv"), 1), "mask": "none", "threads": 2, "seed": 0,
        "time_ms": {**around(ms), "n": 9}, "tflops": 1.0, "gbytes_per_s": 1.0,
        "roofline": {"fraction": 0.5, "binding": "compute", "ceiling": 1.0, "interleaved": {**around(0.5 / ms), "n": 9}},
        "baseline": "torch", "speedup": {**around(speedup), "n": 9}, "error": {"max_abs": error, "rel_fro": error},
        "peak_bytes": 0, "config": {}, "commit": None,
    }  # fmt: skip


def document(*records: dict[str, Any], cpu: str = "a") -> Document:
    return {"schema_version": SCHEMA_VERSION, "machine": {"cpu": cpu}, "records": list(records)}


def verdict(a: dict[str, Any], b: dict[str, Any], **how: Any) -> str:
    (row,) = compare.compare(document(a), document(b), **how)
    return row.verdict


@pytest.mark.parametrize(
    ("ms", "width", "expected"),
    [
        (1.0, 0.01, "same"),
        (1.2, 0.01, "slower"),
        (0.8, 0.01, "faster"),
        (1.04, 0.001, "same"),
        (1.2, 0.2, "same"),
    ],
)
def test_only_what_is_certain_is_a_change(ms: float, width: float, expected: str) -> None:
    assert verdict(record(), record(ms, width)) == expected


def test_a_machine_that_is_slower_for_everybody_changes_no_speedup() -> None:
    a, b = record(1.0, speedup=2.0), record(3.0, speedup=2.0)
    assert verdict(a, b) == "slower"
    assert verdict(a, b, by="speedup") == "same"
    assert verdict(a, record(1.0, speedup=1.5), by="speedup") == "slower"
    assert verdict(a, record(2.0), by="share") == "slower"


def test_what_cannot_be_compared_is_said() -> None:
    without = {**record(), "speedup": None}
    assert verdict(without, record(), by="speedup") == "unknown"
    assert verdict(record(), record(error=1.0)) == "wrong"
    assert verdict(record(error=1.0), record(error=1.0)) == "same"
    rows = compare.compare(document(record(workload="a")), document(record(workload="b")))
    assert [(r.workload, r.verdict, r.is_problem) for r in rows] == [
        ("a", "missing", True),
        ("b", "new", False),
    ]


def test_peers_are_compared_only_when_asked() -> None:
    a = document(record(), record(backend="torch"))
    assert len(compare.compare(a, a)) == 1
    assert len(compare.compare(a, a, backend=None)) == 2


def test_thresholds() -> None:
    assert verdict(record(), record(1.2), threshold=0.3) == "same"
    assert verdict(record(), record(1.04, width=0.001), threshold=0.01) == "slower"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "a.json", tmp_path / "b.json"


@pytest.mark.parametrize(("ms", "code"), [(1.0, 0), (1.3, 1), (0.7, 0)])
def test_the_exit_code_is_for_machines(files: tuple[Path, Path], ms: float, code: int) -> None:
    for path, content in zip(files, (record(), record(ms)), strict=True):
        path.write_text(json.dumps(document(content, cpu=path.stem)))
    result = CliRunner().invoke(app, ["compare", *map(str, files)])
    assert result.exit_code == code, result.output
    assert "machines differ" in result.stderr
    as_json = CliRunner().invoke(app, ["compare", *map(str, files), "--json"])
    assert [row["problem"] for row in json.loads(as_json.stdout)["rows"]] == [bool(code)]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema_version": 1, "machine": {}, "records": [{}]}'])
def test_what_is_no_result_file(files: tuple[Path, Path], content: str) -> None:
    files[0].write_text(content)
    with pytest.raises(AttnkitError, match=r"a\.json") as raised:
        compare.load(files[0])
    assert raised.value.code == "AK401"
