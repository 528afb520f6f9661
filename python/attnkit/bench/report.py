"""Results for people: a table for the terminal and a plot for a page, both made from the result file alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnkit.bench.records import Document, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

STYLE = Path(__file__).parent / "data" / "attnkit.mplstyle"
OWN = ("cpu", "triton")  # the backends whose records are attnkit's


def table(document: Document) -> Table:
    """One row per record: time, rates, share of the ceiling, ratio to the baseline, error, memory."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE, pad_edge=False, caption=caption(document), caption_justify="left")
    out.add_column("workload", no_wrap=True)
    out.add_column("backend")
    for heading in ("ms", "GFLOP/s", "of ceiling", "speed-up", "max error", "peak MiB"):
        out.add_column(heading, justify="right", no_wrap=True)
    last = None
    for r in document["records"]:
        name = r["workload"]
        out.add_row(
            "" if name == last else name,
            "attnkit" if r["backend"] in OWN else r["backend"],
            f"{r['time_ms']['median']:.3g}",
            f"{r['tflops'] * 1e3:.0f}",
            _share(r),
            _speedup(r),
            "NaN" if r["error"]["max_abs"] is None else f"{r['error']['max_abs']:.1e}",
            "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}",
            style="bold" if r["backend"] in OWN else "",
        )
        last = name
    return out


def bars_table(document: Document) -> Table:
    """One row per bar: what was asked, what was measured with its interval, and whether that is enough."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE, pad_edge=False, caption=caption(document), caption_justify="left")
    out.add_column("workload", no_wrap=True)
    out.add_column("against")
    for heading in ("measured", "95 % interval", "bar", "met", "stretch"):
        out.add_column(heading, justify="right", no_wrap=True)
    last = None
    met = [bar["met"] for bar in document["bars"] if _asked(bar)]
    for bar in document["bars"]:
        m, asked = bar["measured"], _asked(bar)
        named = bar["against"] in ("best", "ceiling") and m and bar["note"]
        against = f"{bar['against']}: {bar['note']}" if named else bar["against"]
        out.add_row(
            "" if bar["workload"] == last else bar["workload"],
            against if m else f"{against}: {bar['note']}",
            f"{m['median']:.2f}" if m else "-",
            f"[{m['lo']:.2f}, {m['hi']:.2f}]" if m else "-",
            asked,
            "" if not asked else "yes" if bar["met"] else "NO",
            "" if bar["stretch"] is None else f"{bar['stretch']:g} {'yes' if bar['stretch_met'] else 'no'}",
            style="green" if bar["met"] else "red" if m else "dim",
        )
        last = bar["workload"]
    out.title = f"{sum(met)} of {len(met)} bars met" if met else "Nothing was promised"
    return out


def _asked(bar: dict[str, Any]) -> str:
    """What a bar asks for; nothing where it is a ratio to look at."""
    if bar["least"] is None:
        return "" if bar["most"] is None else f"≤ {bar['most']:g}"
    return f"≥ {bar['least']:g}"


def caption(document: Document) -> str:
    """The machine and how the numbers were taken, in a line."""
    m, c = document["machine"], document.get("ceilings")
    parts = [f"{m.get('cpu', '?')}, {m.get('isa', '?')}"]
    if c and c["fma_gflops"]:
        parts.append(
            f"{c['threads']} threads; ceilings {c['fma_gflops']:.0f} GFLOP/s, {c['read_gbytes_per_s']:.0f} GB/s"
        )
    elif "threads" in document:
        parts.append(f"{document['threads']} threads")
    return "; ".join([*parts, document.get("how", "medians of interleaved rounds")])


@contextmanager
def drawing(document: Document, paths: list[Path], size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of so many inches, to be drawn on; then it is captioned and written into each of ``paths``.

    The suffix decides the format: ``.png``, ``.svg``, ``.pdf``.

    Raises:
        OSError: a file cannot be written.
        ValueError: the suffix is not a known format.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.suptitle(caption(document), fontsize="small")
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def plot(document: Document, paths: list[Path]) -> None:
    """Draw speed-ups over the baseline and shares of the ceiling, with error bars, into each of ``paths``.

    Raises:
        OSError, ValueError: as `drawing`.
    """
    names = list(dict.fromkeys(r["workload"] for r in document["records"]))
    backends = list(dict.fromkeys(r["backend"] for r in document["records"]))
    with drawing(document, paths, (11, 1.6 + 0.5 * len(names))) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, document, names, backends, "speedup", "median", "{:.1f}x", start=1.0)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:g}")
        left.margins(x=0.15)
        left.axvline(1.0, color="black", linewidth=1)
        left.set_xlabel("times faster than the baseline")
        _bars(right, document, names, backends, "roofline", "fraction", "{:.0%}", start=0.0)
        right.set_xlim(0, 1)
        right.set_xlabel("share of the binding ceiling")
        right.legend(loc="lower right")
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()


def _bars(
    axes: Any,
    document: Document,
    names: list[str],
    backends: list[str],
    field: str,
    middle: str,
    form: str,
    start: float,
) -> None:
    """Horizontal bars of ``record[field][middle]`` from ``start``, a group per workload, a colour per backend."""
    height = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        records = [r for r in document["records"] if r["backend"] == backend]
        rows = [r for r in records if r[field]]
        at = [names.index(r["workload"]) + (i - (len(backends) - 1) / 2) * height for r in rows]
        values = [r[field][middle] for r in rows]
        low = [max(0.0, v - r[field].get("lo", v)) for v, r in zip(values, rows, strict=True)]
        high = [max(0.0, r[field].get("hi", v) - v) for v, r in zip(values, rows, strict=True)]
        label = "attnkit" if backend in OWN else f"{backend} {records[0]['backend_version']}"
        axes.barh(
            at,
            [v - start for v in values],
            height,
            left=start,
            xerr=[low, high] if rows else None,
            label=label,
        )
        for y, value, more in zip(at, values, high, strict=True):
            axes.annotate(
                form.format(value), (value + more, y), (4, 0), textcoords="offset points", va="center"
            )


def _share(r: Record) -> str:
    return f"{r['roofline']['fraction']:.0%} {r['roofline']['binding']}" if r["roofline"] else "-"


def _speedup(r: Record) -> str:
    if not r["speedup"]:
        return "-"
    s = r["speedup"]
    return f"{s['median']:.2f}x [{s['lo']:.2f}, {s['hi']:.2f}] {r['baseline']}"
