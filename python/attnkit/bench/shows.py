"""``python -m attnkit.bench.shows``: re-measures what was promised in numbers, and fails if a promise does not hold.

Prints a table of PASS and FAIL, writes shows.json (the claims), bench.json (the records behind them), minilm.json and
masks.json; exits with 1 if anything failed. Speed-ups are paired with torch in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from attnkit.bench import console, masks, minilm, records
from attnkit.bench.peers import CPU
from attnkit.bench.records import Document
from attnkit.bench.rows import Row
from attnkit.bench.runner import run
from attnkit.bench.workloads import Shape, Workload

THREADS = 2


@dataclass(frozen=True)
class Claim:
    """A promise: at least ``needed`` was ``measured``; at most, if it is a ``limit``."""

    what: str
    needed: float
    measured: float
    interval: tuple[float, float] | None = None
    limit: bool = False

    @property
    def holds(self) -> bool:
        """Whether the measured value (a median, if it is one) keeps the promise."""
        return self.measured <= self.needed if self.limit else self.measured >= self.needed


# Speed-ups over torch's SDPA that were promised: workload -> the least.
SPEEDUPS = {
    Workload("full", Shape.of(1, 8, 4096, 64)): 1.8,
    Workload("full", Shape.of(1, 8, 4096, 128)): 1.8,
    Workload("causal", Shape.of(1, 8, 4096, 64)): 2.0,
    Workload("causal", Shape.of(1, 8, 4096, 128)): 2.0,
}


def speed_claims(document: Document) -> list[Claim]:
    """The promised speed-ups beside those in a result file."""
    found = {r["workload"]: r["speedup"] for r in document["records"] if r["backend"] == CPU.name}
    claims = []
    for workload, needed in SPEEDUPS.items():
        speedup = found[workload.name]
        what = f"{workload.name}, {THREADS} threads: times faster than torch SDPA"
        claims.append(Claim(what, needed, speedup["median"], (speedup["lo"], speedup["hi"])))
    return claims


def model_claims(found: minilm.Comparison) -> list[Claim]:
    """What was promised about the pretrained model."""
    return [
        Claim("MiniLM: sentences", 200, found.sentences),
        Claim("MiniLM: least cosine to torch's embedding", minilm.MIN_COSINE, found.min_cosine),
        Claim("MiniLM: attention calls that attnkit computed", 1, found.report.attnkit),
    ]


MASK_MS, MASK_MB = 20, 64


def mask_claims(found: list[masks.Analysis]) -> list[Claim]:
    """What was promised about the analysis of masks of a million tokens. Memory that cannot be read is no claim."""
    claims = []
    for each in found:
        what = f"block mask of 1M x 1M, {each.mask}"
        claims.append(Claim(f"{what}: ms", MASK_MS, each.ms.median, (each.ms.lo, each.ms.hi), limit=True))
        if each.peak_mb is not None:
            claims.append(Claim(f"{what}: MB", MASK_MB, each.peak_mb, limit=True))
    return claims


def table(claims: list[Claim]) -> Table:
    """One row per claim."""
    out = Table("claim", box=box.SIMPLE, pad_edge=False)
    for heading in ("needed", "measured", "95 % interval", ""):
        out.add_column(heading, justify="right", no_wrap=True)
    for c in claims:
        between = "" if c.interval is None else f"[{c.interval[0]:.2f}, {c.interval[1]:.2f}]"
        verdict = "[green]PASS[/green]" if c.holds else "[bold red]FAIL[/bold red]"
        out.add_row(
            c.what,
            f"{'≤ ' if c.limit else ''}{c.needed:g}",
            f"{c.measured:.9g}" if c.interval is None else f"{c.measured:.2f}",
            between,
            verdict,
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every claim; returns the exit code."""
    parser = argparse.ArgumentParser("python -m attnkit.bench.shows", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/shows"), metavar="DIR", help="where results go")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to measure (default: 40)")
    args = parser.parse_args(argv)
    lacking = minilm.missing()
    if lacking:
        console.talk().print(f"The model is not installed: {lacking}", style="red", markup=False)
        return 1
    with console.progress_bar() as on_progress:
        document = run(
            [Row(w) for w in SPEEDUPS], threads=THREADS, seconds=args.seconds, progress=on_progress
        )
    with console.talk().status("embedding sentences"):
        model = minilm.compare(minilm.read_sentences())
    with console.talk().status("analysing masks"):
        analysed = masks.analyse()
    claims = [*model_claims(model), *speed_claims(document), *mask_claims(analysed)]
    records.write(document, args.out / "bench.json")
    records.write(model.to_dict(), args.out / "minilm.json")
    records.write([each.to_dict() for each in analysed], args.out / "masks.json")
    summary = [{**asdict(c), "holds": c.holds} for c in claims]
    records.write({"machine": document["machine"], "claims": summary}, args.out / "shows.json")
    console.data().print(table(claims))
    return 0 if all(c.holds for c in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
