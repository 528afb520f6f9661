"""``attnkit compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from attnkit.cli.options import json_flag

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_STYLES = {"slower": "red", "wrong": "red", "missing": "red", "faster": "green"}


@click.command()
@click.argument("a", type=_FILE, metavar="A.json")
@click.argument("b", type=_FILE, metavar="B.json")
@click.option("--by", type=click.Choice(("time", "speedup", "share")), default="time", show_default=True,
              help="What is compared: time; or speed-up over the baseline, or share of the ceiling, of the same rounds.")  # fmt: skip
@click.option("--threshold", type=click.FloatRange(min=0), default=5.0, show_default=True, metavar="PERCENT",
              help="Changes up to this are no changes.")  # fmt: skip
@click.option("--all", "everybody", is_flag=True, help="Compare peers, too, and not attnkit alone.")
@json_flag
def compare(
    a: Path,
    b: Path,
    by: Literal["time", "speedup", "share"],
    threshold: float,
    everybody: bool,
    as_json: bool,
) -> None:
    """Compare two result files of `attnkit bench --json`: A is before, B is after.

    A row is slower or faster only if all of the interval that the ratio of times lies in is beyond the threshold: what noise may
    have done is no change. Exits with 1 if a row is slower, is computed wrong, or is gone.

    Times of two runs are comparable on a quiet machine alone. On a shared one compare by speedup or by share, which were formed
    round by round.

    \b
    Examples:
      attnkit compare before.json after.json
      attnkit compare before.json after.json --by speedup --threshold 3
      attnkit compare before.json after.json --json | jq '.rows[] | select(.problem)'
    """
    from attnkit.bench import compare as library, console, records

    before, after = library.load(a), library.load(b)
    rows = library.compare(
        before, after, by=by, threshold=threshold / 100, backend=None if everybody else "cpu"
    )
    problems = [row for row in rows if row.is_problem]
    talk = console.talk()
    for difference in library.differing_machines(before, after):
        talk.print(f"the machines differ: {difference}", style="yellow", markup=False)
    if as_json:
        click.echo(
            records.dumps({"by": by, "threshold": threshold, "rows": [_facts(r) for r in rows]}), nl=False
        )
    else:
        console.data().print(_table(rows))
    talk.print(f"{len(problems)} of {len(rows)} rows slower, wrong or gone")
    sys.exit(1 if problems else 0)


def _facts(row: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(row), "problem": row.is_problem}


def _table(rows: list[Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("workload", "backend", box=box.SIMPLE, pad_edge=False)
    for heading in ("time B / A", "interval", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        r = row.ratio
        table.add_row(
            row.workload, row.backend, f"{r.median:.3f}" if r else "-", f"[{r.lo:.3f}, {r.hi:.3f}]" if r else "-",
            row.verdict, style=_STYLES.get(row.verdict, ""),
        )  # fmt: skip
    return table
