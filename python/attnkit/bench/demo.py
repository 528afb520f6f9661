"""``python -m attnkit.bench.demo``: a few seconds of benchmark, then a pretrained model on torch and on attnkit.

Writes bench.json, bench.png, bench.svg and minilm.json. Exits with 1 if the embeddings differ, 2 for usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from attnkit.bench import console, minilm, records, report
from attnkit.bench.rows import suites
from attnkit.bench.runner import run, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser("python -m attnkit.bench.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="where results go")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure (default: 5)")
    args = parser.parse_args(argv)
    out = console.data()
    out.rule("attention: attnkit beside torch")
    with console.progress_bar() as on_progress:
        document = run(suites["demo"], seconds=args.seconds, progress=on_progress)
    records.write(document, args.out / "bench.json")
    pictures = [args.out / "bench.png", args.out / "bench.svg"]
    report.plot(document, pictures)
    out.print(report.table(document))
    out.print(f"results {args.out / 'bench.json'}, plot {pictures[0]}\n")

    for problem in wrong(document):
        console.talk().print(problem, style="red", markup=False)

    out.rule("a pretrained model: MiniLM on torch and on attnkit")
    lacking = minilm.missing()
    if lacking:
        console.talk().print(f"The model is not installed: {lacking}", style="red", markup=False)
        return 1
    return show_minilm(out, args.out) or int(bool(wrong(document)))


def show_minilm(out: Console, folder: Path) -> int:
    """Compare the embeddings of the packaged sentences, print what came out and write minilm.json."""
    with console.talk().status("embedding sentences"):
        found = minilm.compare(minilm.read_sentences())
    records.write(found.to_dict(), folder / "minilm.json")
    ms, ratio = found.attnkit_ms.median, found.speedup
    out.print(
        f"{found.sentences} sentences, cosine at least {found.min_cosine:.9f} (needed: {minilm.MIN_COSINE})"
    )
    out.print(f"torch {found.torch_ms.median:.0f} ms, attnkit {ms:.0f} ms: the whole model is")
    out.print(f"{ratio.median:.2f} times as fast [{ratio.lo:.2f}, {ratio.hi:.2f}]", style="bold")
    out.print(str(found.report), markup=False)
    out.print(
        "same embeddings" if found.same else "NOT the same embeddings", style="green" if found.same else "red"
    )
    return 0 if found.same else 1


if __name__ == "__main__":
    sys.exit(main())
