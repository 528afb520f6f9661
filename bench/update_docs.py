"""Write the measured tables of the documentation from the result files they cite."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from attnkit.bench import learning, training, variants
from attnkit.bench.training import distances

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def quick_table() -> str:
    """The README's table of the quick suite."""
    name = "zen5-2core-quick.json"
    result = _load(name)
    lines = [
        "| float32 forward | attnkit | of the FMA peak | torch SDPA | ratio, 95 % interval |",
        "|---|---|---|---|---|",
    ]
    rows: dict[str, dict[str, Any]] = {}
    for record in result["records"]:
        rows.setdefault(record["workload"], {})[record["backend"]] = record
    for workload, by_backend in rows.items():
        ours, torch = by_backend["cpu"], by_backend.get("torch")
        time = f"{ours['time_ms']['median']:.3g} ms"
        share = f"{100 * ours['roofline']['fraction']:.0f} %"
        if torch is None:
            lines.append(f"| {workload} | {time} | {share} | cannot express it | |")
            continue
        s = ours["speedup"]
        ratio = f"**{s['median']:.2f}×** [{s['lo']:.2f}, {s['hi']:.2f}]"
        lines.append(f"| {workload} | {time} | {share} | {torch['time_ms']['median']:.3g} ms | {ratio} |")
    m = result["machine"]
    lines += [
        "",
        f"{m['cpu']}, {m['isa']}, {result['ceilings']['threads']} threads, torch {m['torch']}: medians of interleaved rounds in",
        f"one run ([{name}](bench/results/{name})). torch gets the window as a mask tensor.",
        "",
        "![ratios and shares of the ceilings](bench/results/zen5-2core-quick.svg)",
    ]
    return "\n".join(lines)


def cost_table() -> str:
    """The table of instruction costs."""
    lines = ["| instruction | ns a tile | of the plain forward |", "|---|---|---|"]
    lines += [
        f"| {row['operator']} | {row['ns_per_tile']:.0f} | {row['percent_of_forward']:.1f} % |"
        for row in _load("zen5-2core-expression-cost.json")["operators"]
    ]
    return "\n".join(lines)


def selective_table() -> str:
    """Losses of dense and selective models, by the keys that a query sees."""
    name = "zen5-2core-selective-training.json"
    result = _load(name)
    budgets = list(result["runs"][0]["budgets"])
    lines = [f"| | all keys | {' | '.join(budgets)} |", "|---|---|" + "---|" * len(budgets)]
    for run in sorted(result["runs"], key=lambda r: r["kind"]):
        cells = [run["held_out"], *run["budgets"].values()]
        lines.append(f"| {run['kind']}, seed {run['seed']} | " + " | ".join(f"{x:.4f}" for x in cells) + " |")
    lines += ["", f"{result['recipe']['steps']} steps; `bench/results/{name}`."]
    return "\n".join(lines)


def bars_table(suite: str) -> str:
    """What was promised beside what was measured, of a suite that has bars, on machines with AVX-512, with AMX and with AVX2."""
    names = [f"{machine}-2core-{suite}.json" for machine in ("zen5", "xeon", "zen3")]
    results = {name: _load(name) for name in names if (RESULTS / name).is_file()}
    measured = [{(bar["workload"], bar["against"]): bar for bar in r["bars"]} for r in results.values()]
    where = [r["machine"]["isa"].upper() for r in results.values()]
    lines = [f"| row | against | bar | {' | '.join(where)} |", "|---|---|---" + "|---" * len(where) + "|"]
    last = None
    for (workload, against), bar in measured[0].items():
        sign, asked = ("≤", bar["most"]) if bar["least"] is None else ("≥", bar["least"])
        wish = "" if bar["stretch"] is None else f", stretch {bar['stretch']:g}"
        told = " | ".join(_told(bars.get((workload, against))) for bars in measured)
        lines.append(
            f"| {'' if workload == last else workload} | {against} | {sign} {asked:g}{wish} | {told} |"
        )
        last = workload
    for name, result in results.items():
        m, c = result["machine"], result["ceilings"]
        versions = dict.fromkeys(
            f"{r['backend']} {r['backend_version']}" for r in result["records"] if r["backend"] != "cpu"
        )
        met = sum(bar["met"] for bar in result["bars"])
        lines += [
            "",
            f"{m['isa'].upper()}: {met} of {len(result['bars'])} bars met. {m['cpu']}, {c['threads']} threads, attnkit {m['attnkit']}",
            f"at {result['records'][0]['commit']}{''.join(f', {v}' for v in versions)}; medians of interleaved rounds in one run (`bench/results/{name}`).",
        ]
    return "\n".join(lines)


def training_table() -> str:
    """How far the losses of the models of suite training are apart, and what a step takes."""
    name = "zen5-2core-training.json"
    if not (RESULTS / name).is_file():
        return f"Not measured yet: `attnkit bench --suite training --threads 2 --json bench/results/{name}`."
    result = _load(name)
    lines = [
        "| | attnkit and torch, one seed | torch, two seeds | last loss: torch, torch, attnkit | ms a step: torch, attnkit | ratio, 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for dtype, s in result["speedups"].items():
        first, second, ours = (r for r in result["runs"] if r["dtype"] == dtype)
        mine, noise = (distances(r["losses"], first["losses"]) for r in (ours, second))
        apart = " | ".join(f"mean {sum(d) / len(d):.2g}, at most {max(d):.2g}" for d in (mine, noise))
        last = ", ".join(f"{r['losses'][-1]:.3f}" for r in (first, second, ours))
        ms = ", ".join(f"{1e3 * r['seconds_per_step']['median']:.0f}" for r in (first, ours))
        lines.append(f"| {dtype} | {apart} | {last} | {ms} | {_ratio(s)} |")
    return "\n".join([*lines, "", *_source(result, name), "", "![losses and their distances](training.svg)"])


def models_table() -> str:
    """Time of whole models on torch over that on attnkit, a line for each model."""
    name = "zen5-2core-models.json"
    if not (RESULTS / name).is_file():
        return f"Not measured yet: `attnkit bench --suite models --threads 2 --rounds 11 --json bench/results/{name}`."
    result = _load(name)
    stages = list(dict.fromkeys(r["stage"] for r in result["runs"]))
    lines = [f"| | beside | {' | '.join(stages)} |", "|---" * (len(stages) + 2) + "|"]
    bars = {bar["workload"]: bar for bar in result["bars"]}
    models = dict.fromkeys((r["model"], r["baseline"]) for r in result["runs"])
    for model, beside in [*models, ("geometric mean,", "")]:
        cells = [bars.get(f"{model} {stage}") for stage in stages]
        told = ["" if c is None else _ratio(c["measured"]) if c["measured"] else c["note"] for c in cells]
        lines.append(f"| {model.rstrip(',')} | {beside} | {' | '.join(told)} |")
    slower = sum(not bar["met"] for bar in result["bars"] if "mean" not in bar["workload"])
    total = bars["geometric mean, all stages"]["measured"]["median"]
    summary = f"Geometric mean of all {total:.2f}×; {slower} of {len(result['runs']) + len(result['skipped'])} slower, wrong or refused."
    return "\n".join([*lines, "", summary, *_source(result, name)])


def families_table() -> str:
    """What was promised of the families beside what was measured, on machines with AVX-512, with AMX and with AVX2."""
    wide = ("variants", "families", "lengths", "moba-linear")  # some rows each; what was measured last counts
    machines = [
        [f"zen5-2core-{name}.json" for name in wide],
        ["xeon-2core-variants.json"],
        ["zen3-2core-variants.json"],
    ]
    results = {name: _load(name) for names in machines for name in names}
    measured: list[dict[tuple[str, str], Any]] = [
        {(bar["workload"], bar["against"]): bar for name in names for bar in results[name]["bars"]}
        for names in machines
    ]
    errors = {r["workload"]: r["error"].get("attnkit") for r in results[machines[-1][0]]["runs"]}
    lines = [
        "| row | beside | asked | AVX-512 | AMX | AVX2 | relative error |",
        "|---|---|---|---|---|---|---|",
    ]
    for (workload, against), bar in measured[-1].items():
        asked = f"≥ {bar['least']:g}" if bar["least"] is not None else f"ours over its ≤ {bar['most']:g}"
        told = " | ".join(_told(bars.get((workload, against))) for bars in measured)
        error = errors.get(workload)  # of what is said of several rows: none
        lines.append(
            f"| {workload} | {against} | {asked} | {told} | {'' if error is None else f'{error:.1e}'} |"
        )
    sources = [line for name, result in results.items() for line in (*_source(result, name), "")]
    return "\n".join([*lines, "", *sources])


def _told(bar: Any) -> str:
    if bar is None:
        return ""
    m = bar["measured"]
    if m is None:
        return str(bar["note"])
    peer = f" {bar['note']}" if bar["against"] == "best" and bar["note"] else ""
    signs = "".join("✓" if met else "✗" for met in (bar["met"], bar.get("stretch_met")) if met is not None)
    return f"**{m['median']:.2f}**{peer} [{m['lo']:.2f}, {m['hi']:.2f}] {signs}"


def generation_table() -> str:
    """Decoding on caches of codes, and what they cost a model that has learnt something."""
    name = "zen5-2core-generation.json"
    if not (RESULTS / name).is_file():
        return (
            f"Not measured yet: `attnkit bench --suite generation --threads 2 --json bench/results/{name}`."
        )
    result = _load(name)
    faster = {bar["workload"]: bar["measured"] for bar in result["bars"]}
    lines = ["| cache | tokens a second | over transformers' own | MiB |", "|---|---|---|---|"]
    for r in (r for r in result["runs"] if "cache" in r):
        own = r["cache"] == "sdpa"
        what = "transformers' own, `sdpa`" if own else f"`{r['cache']}`"
        ratio = "" if own else _ratio(faster[f"decoding on {r['cache']}"])
        lines.append(f"| {what} | {r['tokens_per_s']['median']:.0f} | {ratio} | {r['bytes'] / 2**20:.1f} |")
    lines += ["", "| codec | newest tokens kept exact | perplexity a byte |", "|---|---|---|"]
    for r in (r for r in result["runs"] if "codec" in r):
        exact = str(r["residual"]) if r["codec"] in ("int4", "int2") else ""
        codec = "no cache, float32" if r["codec"] == "none" else f"`{r['codec']}`"
        lines.append(f"| {codec} | {exact} | {r['perplexity']:.4f} |")
    return "\n".join([*lines, "", *_source(result, name)])


def learning_table() -> str:
    """What the models of suite learning have learnt, and what a step takes."""
    name = "zen5-2core-learning.json"
    if not (RESULTS / name).is_file():
        return f"Not measured yet: `attnkit bench --suite learning --threads 2 --json bench/results/{name}`."
    result = _load(name)
    lines = ["| | weights | loss of unseen text | last losses | ms a step |", "|---|---|---|---|---|"]
    for r in result["runs"]:
        last = sum(r["losses"][-20:]) / 20
        ms = 1e3 * r["seconds_per_step"]["median"]
        lines.append(
            f"| {r['model']} | {r['parameters'] / 1e6:.2f} M | {r['held_out']:.3f} | {last:.3f} | {ms:.0f} |"
        )
    return "\n".join([*lines, "", *_source(result, name), "", "![losses while learning](learning.svg)"])


def _ratio(s: dict[str, float]) -> str:
    return f"**{s['median']:.2f}×** [{s['lo']:.2f}, {s['hi']:.2f}]"


def _source(result: Any, name: str) -> list[str]:
    m = result["machine"]
    return [
        f"{m['cpu']}, {m['isa']}, {result['threads']} threads, torch {m['torch']}, attnkit {m['attnkit']} at {result['commit']}",
        f"(`bench/results/{name}`).",
    ]


def resources_table() -> str:
    """What the default kernels take of each architecture: registers, bytes spilled a thread, KiB of shared memory."""
    result = _load("triton-compile.json")
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in result["rows"]:
        case, taken, tiles = row["case"], row["resources"], row["config"]
        if (case["program"], case["dtype"]) != ("causal", "bfloat16") or "mend" in case["kernel"]:
            continue
        cell = f"{tiles['tile_q']}×{tiles['tile_kv']} w{tiles['warps']}: {taken['registers']}, {taken['stack']}, {taken['shared'] >> 10}"
        dims = f"{case['head_dim']}/{case['v_head_dim']}"
        cells.setdefault((case["kernel"], dims), {})[case["arch"]] = cell
    architectures = sorted({arch for found in cells.values() for arch in found})
    lines = [
        f"| kernel, D/Dv | {' | '.join(f'sm_{arch}' for arch in architectures)} |",
        "|" + "---|" * (1 + len(architectures)),
    ]
    for kernel in ("forward", "decode", "dq", "dkv"):
        for name, dims in sorted(
            (key for key in cells if key[0] == kernel), key=lambda key: int(key[1].split("/")[0])
        ):
            lines.append(
                f"| {name} {dims} | {' | '.join(cells[name, dims][arch] for arch in architectures)} |"
            )
    most = {
        kind: max(row["resources"]["stack"] for row in result["rows"] if row["case"]["kernel"] in kinds)
        for kind, kinds in (
            ("forward and decode", ("forward", "decode", "forward mend")),
            ("backward", ("dq", "dkv", "pairs", "scatter", "delta", "dq mend", "dkv mend")),
        )
    }
    said = {
        kind: f"spill at most {stack} bytes a thread" if stack else "spill nothing"
        for kind, stack in most.items()
    }
    lines += [
        "",
        f"{len(result['rows'])} kernels, of all programs of `check.py`, dtypes and architectures ({result['tools']}):",
        f"{', '.join(f'{kind} kernels {what}' for kind, what in said.items())}. All of them:",
        "`bench/results/triton-compile.json`.",
    ]
    return "\n".join(lines)


def sparge_table() -> str:
    """What searched thresholds cost and give."""
    name = "zen5-2core-sparge-curve.json"
    result = _load(name)
    lines = [
        "| | bound | searched: largest error | other text: mean and largest | tiles kept | times faster than dense |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["runs"]:
        s, e = r["speedup"], r["error"]
        lines.append(
            f"| {r['model']}, {r['heads']} heads | {r['bound']:g} | {r['searched']['error']:.3f} | {e['mean']:.3f}, {e['max']:.3f} "
            f"| {r['density']:.2f} | **{s['median']:.2f}×** [{s['lo']:.2f}, {s['hi']:.2f}] |"
        )
    m = result["machine"]
    lines += [
        "",
        f"All layers together, {result['tokens']} tokens, {result['dtype']}, {result['threads']} threads, prediction included, beside our dense attention;",
        f"{m['cpu']}, {m['isa']}, attnkit at {result['commit']} (`bench/results/{name}`).",
        "",
        "![error against what is kept, and speed against error](../sparge.svg)",
    ]
    return "\n".join(lines)


TABLES = [
    ("README.md", "results", quick_table),
    ("docs/design/cpu-engine.md", "expression cost", cost_table),
    ("docs/variants/selective.md", "selective training", selective_table),
    ("docs/benchmarks.md", "cpu suite", partial(bars_table, "cpu")),
    ("docs/benchmarks.md", "scaling suite", partial(bars_table, "scaling")),
    ("docs/design/triton.md", "resources", resources_table),
    ("docs/training.md", "training suite", training_table),
    ("docs/training.md", "models suite", models_table),
    ("docs/variants.md", "families", families_table),
    ("docs/training.md", "learning suite", learning_table),
    ("docs/kv-cache.md", "generation suite", generation_table),
    ("docs/variants/sparge.md", "sparge curve", sparge_table),
]


def updated(text: str, marker: str, table: str) -> str:
    """``text`` with the table between the markers."""
    start, end = f"<!-- {marker} -->", f"<!-- end {marker} -->"
    block = f"{start}\n\n{table}\n\n{end}"
    pattern = re.escape(start) + (f".*?{re.escape(end)}" if end in text else "")
    return re.sub(pattern, lambda _: block, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages, and draw their plots."""
    for name, marker, table in TABLES:
        path = ROOT / name
        path.write_text(updated(path.read_text(), marker, table()))
    if (
        RESULTS / "zen5-2core-lengths.json"
    ).is_file():  # the rows of suite variants that are points of curves
        variants.plot(_load("zen5-2core-lengths.json"), [ROOT / "docs" / "lengths.svg"])
    for suite in (training, learning):
        name = suite.__name__.rpartition(".")[2]
        if (RESULTS / f"zen5-2core-{name}.json").is_file():
            suite.plot(_load(f"zen5-2core-{name}.json"), [ROOT / "docs" / f"{name}.svg"])


if __name__ == "__main__":
    main()
