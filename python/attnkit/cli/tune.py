"""``attnkit tune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnkit.cli.options import DEFAULT_SHAPE, DTYPES, VARIANTS, json_flag

if TYPE_CHECKING:
    from attnkit.tune.campaign import Campaign, Result

_DIRECTIONS = ("forward", "backward")


class _ShardType(click.ParamType):  # type: ignore[type-arg] # generic only in the newest click
    """``RANK/WORLD`` as two numbers."""

    name = "RANK/WORLD"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse; a usage error says what is wrong."""
        rank, _, of = str(value).partition("/")
        if not (rank.isdecimal() and of.isdecimal() and int(rank) < int(of)):
            self.fail(f"{value!r} is not RANK/WORLD, ranks counted from 0", param, ctx)
        return int(rank), int(of)


def _of_torchrun() -> str:
    """The share that torchrun gives this process; everything where there is none."""
    return f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"


@click.command()
@click.option("--campaign", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="What to tune, as TOML (autotune/campaigns/ has some).")  # fmt: skip
@click.option("--variant", "variants", multiple=True, type=click.Choice(VARIANTS),
              help="A named variant, instead of a campaign (repeat the option for several).")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="B,HQ,HKV,SQ,SKV,D[,DV]",
              help=f"Sizes to tune for (several: repeat).  [default: {DEFAULT_SHAPE}]")  # fmt: skip
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Of the tensors.  [default: float32]"
)
@click.option("--direction", "directions", multiple=True, type=click.Choice(_DIRECTIONS),
              help="Which kernels.  [default: forward]")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0), help="The budget.  [default: the campaign's; none]")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of the kernels.  [default: one for each core]"
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True,
              help="Processes that prepare and check at the same time; they time in turn.")  # fmt: skip
@click.option("--shard", type=_ShardType(), default=_of_torchrun,
              help="Every WORLD-th case from the RANK-th on.  [default: torchrun's RANK and WORLD_SIZE; 0/1]")  # fmt: skip
@click.option("--store", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where entries go.  [default: yours, see `attnkit cache`]")  # fmt: skip
@click.option("--again", is_flag=True, help="Forget what was measured before.")
@click.option(
    "--list", "only_list", is_flag=True, help="Say what would be tuned, and how much of it is known."
)
@json_flag
def tune(
    path: Path | None, variants: tuple[str, ...], shapes: tuple[str, ...], dtypes: tuple[str, ...],
    directions: tuple[str, ...], seconds: float | None, threads: int | None, workers: int, shard: tuple[int, int],
    store: Path | None, again: bool, only_list: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure which configs are fastest here, and keep what was found.

    Every config is first checked against float64, then timed beside the default in the same rounds. It replaces the default only
    if it is faster beyond noise. Every measurement is kept as soon as it is taken: a run that was stopped goes on where it was,
    and a finished one measures nothing. Threads are bound to cores, unless OMP_PROC_BIND is set.

    Calls then find what was tuned by themselves (see ATTNKIT_TUNE). `attnkit cache` shows and carries it.

    \b
    Examples:
      attnkit tune --campaign autotune/campaigns/cpu.toml --seconds 600
      attnkit tune --variant causal --shape 1,8,8,2048,2048,64 --direction backward
      attnkit tune --campaign cpu.toml --list
      attnkit tune --campaign cpu.toml --shard 3/8 --store out/rank3
      torchrun --nproc-per-node 8 -m attnkit tune --campaign gpu.toml
    """
    # Two threads on one core cost milliseconds a call. These are read when libraries are loaded, which is below.
    for name, value in (("OMP_PROC_BIND", "true"), ("OMP_PLACES", "cores"), ("OPENBLAS_NUM_THREADS", "1")):
        os.environ.setdefault(name, value)

    from attnkit.backends.cpu.engine import usable_cores
    from attnkit.bench import console, records
    from attnkit.tune import campaign as library, lookup
    from attnkit.tune.store import Folder

    if (path is None) == (not variants):
        raise click.UsageError("give --campaign FILE or --variant NAME (one of them)")
    if path is not None and (shapes or dtypes or directions):
        raise click.UsageError("--shape, --dtype and --direction go with --variant; a campaign has its own")
    chosen = _campaign(path, variants, shapes, dtypes, directions).shard(*shard)
    if seconds is not None:
        chosen = library.Campaign(chosen.name, chosen.cases, seconds, chosen.strategy)
    folder = lookup.user() if store is None else Folder(store)
    threads = threads or usable_cores()
    if only_list:
        _list(chosen, folder, threads, as_json)
        return
    with console.progress_bar() as progress:
        results = library.run(
            chosen, folder, threads=threads, workers=workers, again=again, progress=progress
        )
    if as_json:
        click.echo(records.dumps([_facts(r) for r in results]), nl=False)
    else:
        console.data().print(_table(results))
    left = sum(not r.complete for r in results)
    more = f"; the budget is spent, {left} are unfinished: run it again to go on" if left else ""
    console.talk().print(
        f"{sum(r.measured for r in results)} measurements for {len(results)} cases in {folder.path}{more}",
        markup=False, highlight=False,
    )  # fmt: skip


def _campaign(
    path: Path | None, variants: tuple[str, ...], shapes: tuple[str, ...], dtypes: tuple[str, ...],
    directions: tuple[str, ...],
) -> Campaign:  # fmt: skip
    from attnkit.tune import campaign as library

    if path is not None:
        return library.load(path)
    group: dict[str, Any] = {"variants": list(variants), "shapes": list(shapes or (DEFAULT_SHAPE,))}
    group |= {"dtypes": list(dtypes)} if dtypes else {}
    group |= {"directions": list(directions)} if directions else {}
    return library.Campaign("options", tuple(library.cases(group, {}, "options")))


def _list(campaign: Campaign, folder: Any, threads: int, as_json: bool) -> None:
    from attnkit.bench import console, records
    from attnkit.tune.cost import candidates
    from attnkit.tune.tuner import key_of_problem, tuned_space

    rows = []
    for case in campaign.cases:
        problem = case.problem(threads)
        known = folder.get(key_of_problem(problem, "cpu"))
        rows.append(
            {"problem": problem.name, "candidates": len(candidates(tuned_space(problem, "cpu"), problem)),
             "measured": 0 if known is None else len(known.measurements)}
        )  # fmt: skip
    if as_json:
        click.echo(records.dumps(rows), nl=False)
        return
    for row in rows:
        console.data().print(
            f"{row['problem']}: {row['candidates']} configs, {row['measured']} measured", markup=False
        )


def _facts(result: Result) -> dict[str, Any]:
    return {
        "problem": result.problem, "key": result.entry.key.digest, "config": result.config, "changed": result.changed,
        "gain": result.gain, "complete": result.complete, "measured": result.measured,
        "known": len(result.entry.measurements),
    }  # fmt: skip


def _table(results: list[Result]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("problem", box=box.SIMPLE, pad_edge=False)
    for heading in ("configs", "measured now", "chosen", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        changed = ", ".join(f"{name}={value}" for name, value in r.changed.items()) or "default"
        table.add_row(
            r.problem, str(len(r.entry.measurements)), str(r.measured), changed if r.complete else f"{changed} (unfinished)",
            f"{r.gain:.2f}x" if r.changed else "-",
        )  # fmt: skip
    return table
