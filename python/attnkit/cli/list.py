"""``attnkit list``."""

from __future__ import annotations

from typing import Any

import click

from attnkit.cli.options import DTYPES, VARIANTS, json_flag

_DIRECTIONS = ("fwd", "bwd")


@click.command(name="list")
@json_flag
def list_(as_json: bool) -> None:
    """What can run: named variants, backends, dtypes and directions.

    A dtype is shown where the combination is supported; a dash means that it is not built, or not available here
    (`attnkit list --json` has the reason of each).

    \b
    Examples:
      attnkit list
      attnkit list --json
    """
    from attnkit.bench import console, records

    rows = _rows()
    if as_json:
        click.echo(records.dumps(rows), nl=False)
    else:
        console.data().print(_table(rows))


def _rows() -> list[dict[str, Any]]:
    """One row per variant, backend, direction and dtype; ``reasons`` is empty where it is supported."""
    from attnkit import backends
    from attnkit.bench.workloads import Shape, Workload
    from attnkit.ir.text import parse
    from attnkit.plan.space import default_config
    from attnkit.plan.spec import KernelSpec
    from attnkit.variants import dense

    rows = []
    for variant in VARIANTS:
        program = parse(dense.program(**Workload(variant, Shape.of(1, 2, 64, 64)).parameters)[0])
        for name in backends.names():
            backend = backends.get(name)
            missing = backend.available()
            for direction in _DIRECTIONS:
                for dtype in (*DTYPES, "float64"):
                    if missing:
                        reasons = [f"not available: {missing}"]
                    else:
                        spec = KernelSpec(program, dtype, 64, 64)
                        reasons = list(backend.supports(spec))
                        if direction == "bwd" and not reasons:
                            kernel = backend.build(spec, default_config(backend.space(spec)))
                            reasons = [] if hasattr(kernel, "backward") else ["not built"]
                    rows.append(
                        {"variant": variant, "backend": name, "direction": direction, "dtype": dtype,
                         "supported": not reasons, "reasons": reasons}
                    )  # fmt: skip
    return rows


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    columns = list(dict.fromkeys((r["backend"], r["direction"]) for r in rows))
    table = Table(
        "variant",
        *(f"{backend} {direction}" for backend, direction in columns),
        box=box.SIMPLE,
        pad_edge=False,
    )
    for variant in dict.fromkeys(r["variant"] for r in rows):
        cells = []
        for column in columns:
            mine = [r for r in rows if r["variant"] == variant and (r["backend"], r["direction"]) == column]
            cells.append(", ".join(r["dtype"] for r in mine if r["supported"]) or "-")
        table.add_row(variant, *cells)
    return table
