"""``attnkit explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attnkit.cli.options import DTYPES, json_flag, target_options

if TYPE_CHECKING:
    from attnkit.bench.workloads import Shape
    from attnkit.cli.options import Source
    from attnkit.cli.target import Target


@click.command()
@target_options
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--backend", default="auto", show_default=True, help="Ask for one backend by name.")
@json_flag
def explain(source: Source, shape: Shape, dtype: str, backend: str, as_json: bool) -> None:
    """Say what a call would run on, and why. Nothing is computed.

    Shows the backend and its config, why the other backends are not used, how many tiles are empty (never touched), partial
    (masked element by element) and full (no mask), and what the call costs. In Python, `attnkit.explain(fn, ...)` does the
    same for any function that calls attention.

    \b
    Examples:
      attnkit explain --variant causal --shape 1,8,8,4096,4096,64
      attnkit explain program.txt --json
    """
    from attnkit.bench import console, records
    from attnkit.cli.target import resolve

    facts = _facts(resolve(source, shape), dtype, backend)
    if as_json:
        click.echo(records.dumps(facts), nl=False)
        return
    out = console.data()
    out.print(
        f"{facts['target']} runs on {facts['backend']}, {dtype}, {_words(facts['shape'])}", markup=False
    )
    out.print(f"  config   {_words(facts['config'])}", markup=False)
    for name, reasons in facts["rejected"].items():
        out.print(f"  not on   {name}: {'; '.join(reasons)}", markup=False)
    for title in ("blocks", "cost"):
        if facts[title] is not None:
            out.print(f"  {title:8} {_words(facts[title])}", markup=False)
    for note in facts["notes"]:
        out.print(f"  note     {note}", markup=False)
    out.print("\n" + facts["text"], markup=False, end="")


def _facts(target: Target, dtype: str, backend: str) -> dict[str, Any]:
    from dataclasses import asdict

    from attnkit.bench.workloads import ITEM_BYTES

    prepared, s = target.prepared(dtype, backend), target.shape
    facts: dict[str, Any] = {
        "target": target.name, "backend": prepared.backend, "dtype": dtype, "shape": asdict(s),
        "config": prepared.config, "rejected": {k: list(v) for k, v in prepared.rejected.items()},
        "blocks": None, "cost": None, "notes": [], "text": target.program.text,
    }  # fmt: skip
    unknown = target.blocks_unknown() or (
        None if prepared.backend == "cpu" else "only the CPU engine works in tiles"
    )
    if unknown:
        facts["notes"].append(f"no block counts: {unknown}")
        return facts
    tile_q, tile_kv = prepared.config["tile_q"], prepared.config["tile_kv"]
    tiles = target.structure(tile_q, tile_kv)
    facts["blocks"] = tiles.by_kind
    facts["notes"].append(f"blocks are tiles of {tile_q} x {tile_kv}, {tiles.of_heads}")
    pairs = tiles.pairs * s.b * s.hq // (tiles.sizes.batch * tiles.sizes.heads)
    flops = 2 * pairs * (s.d + s.dv)
    elements = s.b * (s.hq * s.sq + s.hkv * s.skv) * (s.d + s.dv)
    moved = elements * ITEM_BYTES[dtype]
    facts["cost"] = {
        "pairs": pairs,
        "flops": flops,
        "bytes": moved,
        "flops_per_byte": round(flops / moved, 1),
    }
    return facts


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items()) or "none"
