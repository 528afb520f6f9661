"""``attnkit bench``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
@click.option(
    "--rows",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Only rows whose name has this in it; * and ? stand for anything (repeat the option for several).",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Of every row.  [default: the suite's; float32]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the inputs.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of every contender.  [default: torch's]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, max=86400),
    help="Time to measure for, spread over the rows; each gets at least three rounds.  [default: the suite's; 24]",
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
    help="Draw what was measured: a .png, .svg or .pdf.",
)
def bench(
    suite: str, variants: tuple[str, ...], shape: Shape | None, patterns: tuple[str, ...], dtype: str | None, seed: int,
    threads: int | None, seconds: float | None, rounds: int | None, json_path: Path | None, plots: tuple[Path, ...],
) -> None:  # fmt: skip
    """Measure attnkit beside its peers.

    Every contender runs in turn within each round, and ratios are formed round by round: what disturbs a round disturbs
    all of them. Each row shows the median time, the share of the binding ceiling (arithmetic or memory, probed between
    the rounds), the speed-up over the baseline with its 95 % interval, and the error of that very output against
    float64. Exits with 1 if an output is wrong, if attnkit refuses a workload, or if a bar is not met.

    Suite cpu is what is promised of the CPU engine beside every library that computes attention on a CPU: it prints
    the promises (bars) and whether they are met. pip install 'attnkit[peers]' gets the libraries; those that are
    not there are left out. Suite gpu measures an NVIDIA GPU beside the libraries that compute attention there. Suite scaling
    is time and memory against length, suite variants the other families beside what one would write in torch today. Suite models times architectures of
    transformers beside its "sdpa"; suite training trains a small model on torch and on attnkit and compares the losses; suite
    generation decodes on caches of codes, and reads text on them; suite learning trains models whose layers fold keys and values into
    a state.

    \b
    Examples:
      attnkit bench --suite quick --json out.json --plot out.png
      attnkit bench --variant causal --variant window --seconds 60
      attnkit bench --variant alibi --shape 2,16,4,2048,2048,128 --rounds 11 --json -
      attnkit bench --suite cpu --rounds 11 --json out.json
      attnkit bench --suite cpu --rows decode --rows "causal*bfloat16"
      attnkit bench --suite models --rows llama --json out.json
      attnkit bench --suite training --json out.json --plot out.svg
    """
    from attnkit.bench import console, records, runner

    asked = Asked(suite, variants, shape, patterns, dtype, seed, threads, seconds, rounds)
    if suite in _OF_THEIR_OWN and (variants or shape):
        raise click.UsageError(f"suite {suite} has no --variant and no --shape: its rows are its own")
    measure = _OF_THEIR_OWN.get(suite, _attention)
    with console.progress_bar() as progress:
        document, draw = measure(asked, progress)
    talk = console.talk()
    to_stdout = json_path is not None and str(json_path) == "-"
    if document["records"] or document["bars"]:
        (talk if to_stdout else console.data()).print(_table(document))
    measured = document["records"] or document.get("runs")
    _save(document, None if to_stdout else json_path, plots if measured else (), draw)
    if to_stdout:
        click.echo(records.dumps(document), nl=False)
    refused = False
    for told, is_ours in _left_out(document):
        talk.print(told, markup=False)
        refused = refused or is_ours
    problems = runner.wrong(document)
    for problem in problems:
        talk.print(problem, style="red", markup=False)
    unmet = any(not bar["met"] for bar in document["bars"])
    sys.exit(1 if problems or refused or unmet else 0)


class Asked(NamedTuple):
    """The options that say what to measure and how."""

    suite: str
    variants: tuple[str, ...]
    shape: Shape | None
    patterns: tuple[str, ...]
    dtype: str | None
    seed: int
    threads: int | None
    seconds: float | None
    rounds: int | None


Progress = Callable[[str, float], None]
Measured = tuple[dict[str, Any], Callable[..., None]]  # the document, and what draws it


def _attention(asked: Asked, progress: Progress) -> Measured:
    """Attention alone, on rows of a suite or on a shape."""
    from attnkit.bench import report, rows, runner, scaling, workloads

    if asked.shape is not None:
        chosen = [
            rows.Row(workloads.Workload(v, asked.shape, dtype=asked.dtype or "float32", seed=asked.seed))
            for v in asked.variants or ("full", "causal")
        ]
    else:
        chosen = rows.select(
            asked.suite, variants=asked.variants, patterns=asked.patterns, dtype=asked.dtype, seed=asked.seed
        )
    if not chosen:
        raise click.UsageError(
            f"suite {asked.suite} has no such row; add --shape to measure a variant anyway"
        )
    budget = rows.SECONDS.get(asked.suite, 24.0) if asked.seconds is None else asked.seconds
    place = None
    if asked.suite == "gpu":
        from attnkit.bench import gpu

        place = gpu.PLACE
    document = runner.run(
        chosen, threads=asked.threads, seconds=budget, rounds=asked.rounds, progress=progress, place=place
    )
    if asked.suite != "scaling" or asked.shape is not None:
        return document, report.plot
    document["bars"] = scaling.judge(document)
    return document, scaling.plot


def _models(asked: Asked, progress: Progress) -> Measured:
    from attnkit.bench import models

    chosen = models.jobs(asked.patterns)
    if not chosen:
        raise click.UsageError("suite models has no such row")
    plan = models.Plan(dtype=asked.dtype or "float32")
    seconds = models.SECONDS if asked.seconds is None else asked.seconds
    found = models.run(
        chosen, plan, threads=asked.threads, seconds=seconds, rounds=asked.rounds, progress=progress
    )
    return found, models.plot


def _variants(asked: Asked, progress: Progress) -> Measured:
    from attnkit.bench import variants

    chosen = variants.jobs(asked.patterns)
    if not chosen:
        raise click.UsageError("suite variants has no such row")
    seconds = variants.SECONDS if asked.seconds is None else asked.seconds
    found = variants.run(
        chosen,
        seed=asked.seed,
        threads=asked.threads,
        seconds=seconds,
        rounds=asked.rounds,
        progress=progress,
    )
    return found, variants.plot


def _training(asked: Asked, progress: Progress) -> Measured:
    """A round is a step of all models; how many there are decides how long it takes."""
    from attnkit.bench import training

    if asked.patterns or asked.seconds is not None:
        raise click.UsageError(
            "suite training has no --rows and no --seconds; --rounds is its number of steps"
        )
    recipe = training.Recipe() if asked.rounds is None else training.Recipe(steps=asked.rounds)
    dtypes = training.DTYPES if asked.dtype is None else (asked.dtype,)
    found = training.run(recipe, dtypes=dtypes, seed=asked.seed, threads=asked.threads, progress=progress)
    return found, training.plot


def _generation(asked: Asked, progress: Progress) -> Measured:
    from attnkit.bench import generation

    if asked.patterns or asked.dtype:
        raise click.UsageError("suite generation has no --rows and no --dtype")
    seconds = 60.0 if asked.seconds is None else asked.seconds
    found = generation.run(threads=asked.threads, seconds=seconds, rounds=asked.rounds, progress=progress)
    return found, generation.plot


def _learning(asked: Asked, progress: Progress) -> Measured:
    from attnkit.bench import learning, training

    if asked.patterns or asked.dtype or asked.seconds is not None:
        raise click.UsageError(
            "suite learning has no --rows, --dtype and --seconds; --rounds is its number of steps"
        )
    recipe = training.Recipe() if asked.rounds is None else training.Recipe(steps=asked.rounds)
    return learning.run(recipe, seed=asked.seed, threads=asked.threads, progress=progress), learning.plot


_OF_THEIR_OWN = {
    "models": _models, "training": _training, "variants": _variants, "generation": _generation, "learning": _learning,
}  # fmt: skip


def _table(document: dict[str, Any]) -> Any:
    from attnkit.bench import report

    return report.bars_table(document) if document["bars"] else report.table(document)


def _left_out(document: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Who did not run and why, a line for each reason; and whether that is attnkit, which should have."""
    from attnkit.bench.report import OWN

    where: dict[tuple[str, str], list[str]] = {}
    for skipped in document["skipped"]:
        where.setdefault((skipped["backend"], skipped["reason"]), []).append(skipped["workload"])
    for (backend, reason), names in where.items():
        rows = names[0] if len(names) == 1 else f"{len(names)} rows"
        yield f"left out: {backend} on {rows}: {reason}", backend in OWN


def _save(
    document: dict[str, Any], json_path: Path | None, plots: tuple[Path, ...], draw: Callable[..., None]
) -> None:
    from attnkit.bench import console, records

    if json_path is not None:
        records.write(document, json_path)
    if plots:
        draw(document, list(plots))
    for path in filter(None, (json_path, *plots)):
        console.talk().print(f"wrote {path}", markup=False)
