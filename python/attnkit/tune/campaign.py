"""Campaigns: what is tuned offline, as TOML; and running one, or a share of one.

```toml
name = "cpu"
seconds = 900            # the budget; --seconds says otherwise

[programs]               # texts beside the named variants; they capture nothing but lengths
sdpa_causal = '''...'''

[[cases]]                # every combination of these lists is tuned
variants = ["full", "causal", "sdpa_causal"]
shapes = ["1,8,8,1024,1024,64"]     # batch, query heads, kv heads, queries, keys, head dim[, value dim]
dtypes = ["float32", "bfloat16"]
directions = ["forward", "backward"]
```

The store is the whole state: a campaign that was killed is run again, and what is there is not measured again.
"""

from __future__ import annotations

import multiprocessing
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from attnkit.errors import error
from attnkit.plan.space import DIRECTIONS, Config, Direction
from attnkit.testing.inputs import Dims
from attnkit.tune.choose import choose
from attnkit.tune.entry import Entry
from attnkit.tune.problem import Problem, of_text, problem
from attnkit.tune.search import STRATEGIES
from attnkit.tune.store import Folder
from attnkit.tune.tuner import tune, tuned_space
from attnkit.variants import dense

DTYPES = ("float32", "bfloat16", "float16")
_LISTS = {
    "variants": "",
    "shapes": "",
    "dtypes": "float32",
    "directions": "forward",
}  # and what stands for none


class Case(NamedTuple):
    """One problem of a campaign, before it has tensors. ``text`` is empty where ``variant`` names it."""

    variant: str
    dims: Dims
    dtype: str = "float32"
    direction: Direction = "forward"
    text: str = ""

    def problem(self, threads: int) -> Problem:
        """What is measured."""
        if not self.text:
            return problem(
                self.variant, self.dims, dtype=self.dtype, direction=self.direction, threads=threads
            )
        return of_text(
            self.text,
            self.dims,
            name=self.variant,
            dtype=self.dtype,
            direction=self.direction,
            threads=threads,
        )


@dataclass(frozen=True)
class Campaign:
    """Problems, and how long they may take together."""

    name: str
    cases: tuple[Case, ...]
    seconds: float = float("inf")
    strategy: str = "halving"

    def shard(self, rank: int, of: int) -> Campaign:
        """Every so manieth case: the shares of all ranks together are the campaign."""
        return Campaign(self.name, self.cases[rank::of], self.seconds, self.strategy)


@dataclass(frozen=True)
class Result:
    """What became of a case. ``measured`` counts what this run measured."""

    case: Case
    problem: str
    entry: Entry
    config: Config
    changed: Config = field(default_factory=dict)  # fields that are not the default
    gain: float = 1.0  # the default's time over the chosen config's
    complete: bool = True
    measured: int = 0


Progress = Callable[[str, float], None]  # what is being measured, and the part of the campaign that is done


def run(
    campaign: Campaign,
    folder: Folder,
    *,
    threads: int,
    workers: int = 1,
    again: bool = False,
    progress: Progress = lambda what, fraction: None,
) -> list[Result]:
    """Tune every case, until all are done or the budget is spent; in the order of the cases.

    Several ``workers`` prepare and check at the same time, and time in turn. ``again`` forgets what was measured before.

    Raises:
        AttnkitError: AK401, AK5xx: a case cannot be run at all.
    """
    until = time.monotonic() + campaign.seconds
    jobs = [_Job(case, folder.path, threads, until, again, campaign.strategy) for case in campaign.cases]
    results: list[Result] = []
    for result in _in_processes(jobs, workers) if workers > 1 else map(_run, jobs):
        results.append(result)
        progress(result.problem, len(results) / len(jobs))
    return results


class _Job(NamedTuple):
    case: Case
    folder: Path | None
    threads: int
    until: float
    again: bool
    strategy: str


def _in_processes(jobs: Sequence[_Job], workers: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # a fork would share a thread pool that is not there
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_run, jobs)


def _run(job: _Job) -> Result:
    asked = job.case.problem(job.threads)
    measured = 0

    def count(entry: Entry, candidates: int) -> None:
        nonlocal measured
        measured += 1

    entry, complete = tune(
        asked, Folder(job.folder), strategy=STRATEGIES[job.strategy], again=job.again, until=job.until, progress=count
    )  # fmt: skip
    space = tuned_space(asked, "cpu")
    config = choose(space, entry)
    known = entry.measured(config)
    changed = {name: value for name, value in config.items() if value != space[name].default}
    gain = 1 / known.ratio.median if changed and known is not None and known.ratio is not None else 1.0
    return Result(job.case, asked.name, entry, config, changed, gain, complete, measured)


# --- the file -----------------------------------------------------------------------------------------------


def load(path: Path) -> Campaign:
    """Read a campaign.

    Raises:
        AttnkitValueError: AK401, something in the file is not as it should be; says which field.
        OSError: the file cannot be read.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise error("AK401", where=str(path), given=str(exc), allowed="a TOML file") from exc
    _only(document, ("name", "seconds", "strategy", "programs", "cases"), str(path))
    name, seconds = document.get("name", path.stem), document.get("seconds", float("inf"))
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or seconds <= 0:
        raise error("AK401", where=f"seconds of {path}", given=repr(seconds), allowed="a positive number")
    strategy = document.get("strategy", "halving")
    if strategy not in STRATEGIES:
        raise error("AK401", where=f"strategy of {path}", given=repr(strategy), allowed=", ".join(STRATEGIES))
    programs = document.get("programs", {})
    groups = document.get("cases")
    if not isinstance(programs, dict) or not isinstance(groups, list) or not groups:
        raise error("AK401", where=str(path), given="no [[cases]]", allowed="at least one")
    found: list[Case] = []
    for i, group in enumerate(groups):
        found += cases(group, programs, f"cases[{i}] of {path}")
    return Campaign(str(name), tuple(dict.fromkeys(found)), float(seconds), strategy)


def cases(group: Any, programs: dict[str, str], where: str) -> Iterator[Case]:
    """Every combination of a group's lists.

    Raises:
        AttnkitValueError: AK401, a list has something that it may not.
    """
    _only(group, tuple(_LISTS), where)
    lists = {name: group.get(name, [usual] if usual else None) for name, usual in _LISTS.items()}
    for name, values in lists.items():
        if not isinstance(values, list) or not values or not all(isinstance(x, str) for x in values):
            raise error("AK401", where=f"{name} in {where}", given=repr(values), allowed="a list of strings")
    for name, allowed in (
        ("dtypes", DTYPES),
        ("directions", DIRECTIONS),
        ("variants", (*dense.CASES, *programs)),
    ):
        for value in lists[name]:
            if value not in allowed:
                raise error(
                    "AK401", where=f"{name} in {where}", given=repr(value), allowed=", ".join(allowed)
                )
    for variant, shape, dtype, direction in product(*(lists[name] for name in _LISTS)):
        yield Case(variant, dims(shape, f"shapes in {where}"), dtype, direction, programs.get(variant, ""))


def dims(shape: str, where: str = "shape") -> Dims:
    """The sizes of ``B,HQ,HKV,SQ,SKV,D[,DV]``.

    Raises:
        AttnkitValueError: AK401, these are not six or seven positive numbers, or heads do not go together.
    """
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) == 6:
        sizes.append(sizes[-1])
    if len(sizes) != 7 or min(sizes) < 1 or max(sizes) >= 2**31 or sizes[1] % sizes[2]:
        raise error(
            "AK401", where=where, given=repr(shape),
            allowed="B,HQ,HKV,SQ,SKV,D[,DV], positive, HQ a multiple of HKV",
        )  # fmt: skip
    return Dims(*sizes)


def _only(table: Any, allowed: Sequence[str], where: str) -> None:
    names = list(table) if isinstance(table, dict) else [repr(table)]
    if unknown := [name for name in names if name not in allowed]:
        raise error("AK401", where=where, given=", ".join(unknown), allowed=", ".join(allowed))
