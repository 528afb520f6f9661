"""How much a tuned config, and the default, lose against the best one: `python bench/regret.py --seconds 170 --out DIR`.

Tunes the buckets twice, each into a store of its own; then, on shapes that were not tuned (others of the same buckets), measures every
config beside the default, and what the tunes have chosen for the bucket. Everything that is measured is kept, so it can be run in
slices: again and again, until it says that it is done and prints the table. The machine should be quiet.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

for _name, _value in (("OMP_PROC_BIND", "true"), ("OMP_PLACES", "cores"), ("OPENBLAS_NUM_THREADS", "1")):
    os.environ.setdefault(_name, _value)

from attnkit.bench import machine, records  # noqa: E402 -- what is loaded reads the above
from attnkit.plan.space import Config, Direction, default_config  # noqa: E402
from attnkit.testing.inputs import Dims  # noqa: E402
from attnkit.tune import shelf  # noqa: E402
from attnkit.tune.choose import TIE, choose  # noqa: E402
from attnkit.tune.entry import Entry, Measurement  # noqa: E402
from attnkit.tune.problem import Problem, problem  # noqa: E402
from attnkit.tune.search import ROUNDS, Job, halving  # noqa: E402
from attnkit.tune.store import Folder  # noqa: E402
from attnkit.tune.tuner import key_of_problem, tune, tuned_space  # noqa: E402

THREADS = 2
LAST = len(ROUNDS) - 1
DTYPES = ("float32", "bfloat16")


class Bucket(NamedTuple):
    """A bucket: the shape it is tuned at, and shapes that it serves."""

    variant: str
    direction: Direction
    tuned: Dims
    held_out: tuple[Dims, ...]


def _d(b: int, hq: int, hkv: int, sq: int, skv: int, d: int) -> Dims:
    return Dims(b, hq, hkv, sq, skv, d, d)


BUCKETS = [
    *(
        bucket
        for direction in ("forward", "backward")
        for bucket in (
            Bucket("full", direction, _d(4, 12, 12, 128, 128, 64), (_d(1, 12, 12, 100, 100, 64),)),
            Bucket("causal", direction, _d(1, 8, 8, 512, 512, 64), (_d(1, 6, 6, 400, 400, 64), _d(2, 4, 2, 300, 300, 64))),
            Bucket("full", direction, _d(1, 4, 4, 512, 512, 128), (_d(1, 3, 3, 448, 448, 128),)),
            Bucket("causal", direction, _d(1, 4, 4, 1024, 1024, 64), (_d(1, 2, 2, 777, 777, 64),)),
        )
    ),
    Bucket("full", "forward", _d(1, 32, 8, 1, 512, 128), (_d(1, 16, 4, 1, 300, 128), _d(4, 32, 8, 1, 400, 128))),
    Bucket("full", "forward", _d(1, 32, 8, 1, 2048, 128), (_d(1, 32, 8, 1, 1500, 128),)),
    Bucket("full", "forward", _d(1, 32, 8, 1, 8192, 128), (_d(1, 32, 8, 1, 6000, 128), _d(1, 16, 16, 1, 5000, 128))),
]  # fmt: skip


def thorough(candidates: Sequence[Config], entry: Entry) -> Job | None:
    """Every config a little; those within a tenth of the best more; the best six, and the default, for certain."""
    survivors = list(candidates)
    for rung, kept in enumerate((len(survivors), 12, 6)):
        known = [(m.ratio.median, i) for i, c in enumerate(survivors) if (m := entry.measured(c)) and m.ratio]
        if rung:
            near = [i for median, i in sorted(known) if median <= 1.1 * min(known)[0]][:kept]
            survivors = [survivors[i] for i in sorted({0, *near})]
        for config in survivors:
            m = entry.measured(config)
            if m is None or (m.ratio is not None and m.rung < rung):
                return config, rung
    return None


class Case(NamedTuple):
    """A held-out shape and the problem its bucket was tuned at."""

    tuned: Problem
    held_out: Problem


def cases() -> Iterator[Case]:
    """Every held-out shape in every dtype."""
    for bucket in BUCKETS:
        for dtype in DTYPES:
            problems = [
                problem(bucket.variant, dims, dtype=dtype, direction=bucket.direction, threads=THREADS)
                for dims in (bucket.tuned, *bucket.held_out)
            ]
            yield from (Case(problems[0], held_out) for held_out in problems[1:])


def measure(out: Path, until: float) -> bool:
    """Go on until everything is measured; whether it is."""
    stores = [Folder(out / name) for name in ("a", "b")]
    complete = True
    for store in stores:
        for asked in {c.tuned.name: c.tuned for c in cases()}.values():
            complete &= tune(asked, store, strategy=halving, until=until)[1]
    for i, case in enumerate(cases()):
        folder = Folder(out / "held_out" / str(i))  # two shapes of one bucket have the same key
        complete &= tune(case.held_out, folder, strategy=thorough, pruned=math.inf, until=until)[1]
        if not complete:
            break
        chosen = [config for store in stores if (config := _chosen(case, store)) is not None]

        def rest(candidates: Sequence[Config], entry: Entry, chosen: list[Config] = chosen) -> Job | None:
            for config in chosen:
                known = entry.measured(config)
                if known is None or (known.ratio is not None and known.rung < LAST):
                    return config, LAST
            return None

        complete &= tune(case.held_out, folder, strategy=rest, pruned=math.inf, until=until)[1]
    return complete


def _chosen(case: Case, store: Folder) -> Config | None:
    entry = store.get(key_of_problem(case.tuned, "cpu"))
    return None if entry is None else choose(tuned_space(case.tuned, "cpu"), entry)


def results(out: Path) -> dict[str, Any]:
    """The table, as JSON has it."""
    rows = []
    for i, case in enumerate(cases()):
        entry = Folder(out / "held_out" / str(i)).get(key_of_problem(case.held_out, "cpu"))
        assert entry is not None
        default = default_config(tuned_space(case.held_out, "cpu"))
        finalists = [m for m in entry.measurements if m.ratio is not None and m.rung == LAST]
        best = min(finalists, key=_median)
        row: dict[str, Any] = {
            "problem": case.held_out.name, "tuned_at": case.tuned.name, "configs": len(entry.measurements),
            "best": _differs(dict(best.config), default), "default_regret": 1 / _median(best), "noise": _noise(entry, default),
        }  # fmt: skip
        for name in ("a", "b"):
            config = _chosen(case, Folder(out / name))
            assert config is not None
            found = entry.measured(config)
            assert found is not None
            assert found.ratio is not None
            # The default beside itself is noise around 1; its time is 1.
            ratio = 1.0 if config == default else found.ratio.median
            row[name] = {
                "config": _differs(config, default), "regret": max(1.0, ratio / _median(best)), "ratio": asdict(found.ratio),
                "slower_than_default": config != default and found.ratio.lo > 1 + TIE,
            }  # fmt: skip
        rows.append(row)
    keys, differences = shelf.differences(Folder(out / "a"), Folder(out / "b"))
    means = {
        "tuned_regret": _mean([r[n]["regret"] for r in rows for n in ("a", "b")]),
        "default_regret": _mean([max(1.0, r["default_regret"]) for r in rows]),
        "gain": _mean([r["default_regret"] / r[n]["regret"] for r in rows for n in ("a", "b")]),
    }
    return {
        "machine": machine.describe(), "commit": machine.commit(), "threads": THREADS, "geometric_means": means,
        "slower_than_default": sum(r[n]["slower_than_default"] for r in rows for n in ("a", "b")),
        "entries": keys, "agree": keys - len(differences), "not_covered_by_noise": sum(not d.covered for d in differences),
        "rows": rows,
    }  # fmt: skip


def _median(m: Measurement) -> float:
    assert m.ratio is not None
    return m.ratio.median


def _noise(entry: Entry, default: Config) -> list[float]:
    known = entry.measured(default)
    assert known is not None
    assert known.ratio is not None
    return [known.ratio.lo, known.ratio.hi]


def _differs(config: Config, default: Config) -> Config:
    return {name: value for name, value in config.items() if value != default[name]}


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """Measure a slice; print the table when all is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=170.0, help="how long this slice may take")
    parser.add_argument(
        "--out", type=Path, default=Path("out/regret"), help="where measurements and result go"
    )
    args = parser.parse_args()
    done = measure(args.out, time.monotonic() + args.seconds)
    if not done:
        sys.stdout.write("not done: run it again\n")
        return
    found = results(args.out)
    records.write(found, args.out / "regret.json")
    for row in found["rows"]:
        sys.stdout.write(
            f"{row['problem']:48} best {row['best'] or 'default'!s:48} default {row['default_regret']:.3f}"
            f" a {row['a']['regret']:.3f} b {row['b']['regret']:.3f}\n"
        )
    sys.stdout.write(f"{ {k: v for k, v in found.items() if k not in ('rows', 'machine')} }\n")


if __name__ == "__main__":
    main()
