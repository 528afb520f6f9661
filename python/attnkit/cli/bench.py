"""``attnkit bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnkit.cli.options import DTYPES, SUITES, VARIANTS, ShapeType

if TYPE_CHECKING:
    from attnkit.bench.workloads import Shape

_PICTURES = (".png", ".svg", ".pdf")


def _pictures(ctx: click.Context, param: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    for path in value:
        if path.suffix not in _PICTURES:
            raise click.BadParameter(f"{path} does not end in {', '.join(_PICTURES)}")
    return value


@click.command()
@click.option(
    "--suite", type=click.Choice(SUITES), default="quick", show_default=True, help="What to measure."
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(VARIANTS),
    help="Only these variants (repeat the option for several).",
)
@click.option("--shape", type=ShapeType(), help="Measure the variants on this shape instead of the suite's.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the inputs.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of every contender.  [default: torch's]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, max=86400),
    default=24.0,
    show_default=True,
    help="Time to measure for, spread over the workloads; each gets at least three rounds.",
)
@click.option("--rounds", type=click.IntRange(min=1), help="Exactly so many rounds, whatever they take.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Write the records as JSON; - is stdout, the table then goes to stderr.",
)
@click.option(
    "--plot",
    "plots",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    callback=_pictures,
    help="Draw ratios and shares of the ceilings: a .png, .svg or .pdf.",
)
def bench(
    suite: str, variants: tuple[str, ...], shape: Shape | None, dtype: str, seed: int, threads: int | None,
    seconds: float, rounds: int | None, json_path: Path | None, plots: tuple[Path, ...],
) -> None:  # fmt: skip
    """Measure attnkit beside its peers.

    Every contender runs in turn within each round, and ratios are formed round by round: what disturbs a round disturbs
    all of them. Each row shows the median time, the share of the binding ceiling (arithmetic or memory, probed between
    the rounds), the speed-up over the baseline with its 95 % interval, and the error of that very output against
    float64. Exits with 1 if an output is wrong.

    \b
    Examples:
      attnkit bench --suite quick --json out.json --plot out.png
      attnkit bench --variant causal --variant window --seconds 60
      attnkit bench --variant alibi --shape 2,16,4,2048,2048,128 --rounds 11 --json -
    """
    from attnkit.bench import console, records, report, runner, workloads

    if shape is not None:
        chosen = [
            workloads.Workload(v, shape, dtype=dtype, seed=seed) for v in variants or ("full", "causal")
        ]
    else:
        chosen = workloads.select(suite, variants=variants, dtype=dtype, seed=seed)
    if not chosen:
        raise click.UsageError(f"suite {suite} has no such variant; add --shape to measure it anyway")
    with console.progress_bar() as progress:
        document = runner.run(chosen, threads=threads, seconds=seconds, rounds=rounds, progress=progress)
    talk = console.talk()
    to_stdout = json_path is not None and str(json_path) == "-"
    (talk if to_stdout else console.data()).print(report.table(document))
    _save(document, None if to_stdout else json_path, plots)
    if to_stdout:
        click.echo(records.dumps(document), nl=False)
    for skipped in document["skipped"]:
        talk.print(
            f"left out: {skipped['backend']} on {skipped['workload']}: {skipped['reason']}", markup=False
        )
    problems = runner.wrong(document)
    for problem in problems:
        talk.print(problem, style="red", markup=False)
    sys.exit(1 if problems else 0)


def _save(document: dict[str, Any], json_path: Path | None, plots: tuple[Path, ...]) -> None:
    from attnkit.bench import console, records, report

    if json_path is not None:
        records.write(document, json_path)
    if plots:
        report.plot(document, list(plots))
    for path in filter(None, (json_path, *plots)):
        console.talk().print(f"wrote {path}", markup=False)
