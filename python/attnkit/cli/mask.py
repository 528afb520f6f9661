"""``attnkit mask``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attnkit.cli.options import json_flag, target_options

if TYPE_CHECKING:
    from attnkit.analysis.structure import Structure
    from attnkit.bench.workloads import Shape
    from attnkit.cli.options import Source

_STYLES = {".": "dim", "+": "yellow", "#": "green"}
_MAX_COLUMNS = 96


def _block(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    try:
        sizes = [int(part) for part in value.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or not all(1 <= size < 2**31 for size in sizes):
        raise click.BadParameter(f"{value!r} is not one or two positive numbers Q[,KV]")
    return sizes[0], sizes[-1]


@click.command()
@target_options
@click.option("--block", default="128", show_default=True, metavar="Q[,KV]", callback=_block,
              help="Block sizes.")  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(min=0), default=0, show_default=True, help="Batch entry to draw."
)
@click.option("--head", type=click.IntRange(min=0), default=0, show_default=True, help="Head to draw.")
@json_flag
def mask(source: Source, shape: Shape, block: tuple[int, int], batch: int, head: int, as_json: bool) -> None:
    """Draw the block structure of a mask.

    Rows are queries, columns are keys. Every cell is a block, or several where the map would be too large: . empty (never
    touched), + partial (masked element by element) and # full (no mask). FILE is a program text, or path.py:name for a mask
    function of yours. Found by the CPU engine's own analysis, as at every call of attention.

    \b
    Examples:
      attnkit mask --mask "causal & window(1024)"
      attnkit mask --mask "(kv_idx < 4) | window(512, 0)" --block 64
      attnkit mask --variant document --shape 1,1,1,65536,65536,64
      attnkit mask model.py:my_mask --block 128,64 --head 3 --json
    """
    from attnkit.bench import console, records
    from attnkit.cli.target import resolve

    target = resolve(source, shape)
    if unknown := target.blocks_unknown():
        raise click.ClickException(f"no block map: {unknown}")
    if batch >= shape.b or head >= shape.hq:
        raise click.UsageError(f"the shape has {shape.b} batch entries and {shape.hq} heads, counted from 0")
    blocks = target.structure(*block)
    # One head stands for all where they are alike.
    drawn = (batch if blocks.sizes.batch > 1 else 0, head if blocks.sizes.heads > 1 else 0)
    if as_json:
        click.echo(records.dumps(_facts(target.name, blocks, shape, drawn)), nl=False)
        return
    out = console.data()
    width = min(out.width, _MAX_COLUMNS)
    for line in blocks.draw(*drawn, max_rows=width // 2, max_columns=width).splitlines():
        out.print("".join(f"[{_STYLES[mark]}]{mark}[/]" for mark in line))
    _legend(target.name, blocks, shape, drawn)


def _legend(name: str, blocks: Structure, shape: Shape, drawn: tuple[int, int]) -> None:
    from attnkit.analysis.structure import KINDS, MARKS
    from attnkit.bench import console

    out = console.data()
    rows, columns = blocks.sizes.rows, blocks.sizes.columns
    out.print(
        f"{name}: {shape.sq:,} queries x {shape.skv:,} keys, {rows:,} x {columns:,} blocks of "
        f"{blocks.sizes.q_block} x {blocks.sizes.kv_block}", markup=False,
    )  # fmt: skip
    counts = ", ".join(
        f"{mark} {kind} {blocks.by_kind[kind]:,}" for mark, kind in zip(MARKS, KINDS, strict=True)
    )
    out.print(f"{counts}; density {100 * blocks.density:.2f} % ({blocks.of_heads})", markup=False)
    if blocks.sizes.batch * blocks.sizes.heads > 1:
        out.print(f"drawn: batch entry {drawn[0]}, head {drawn[1]}", markup=False)


def _facts(name: str, blocks: Structure, shape: Shape, drawn: tuple[int, int]) -> dict[str, Any]:
    """As JSON; ``runs`` are those of the drawn head, for each row (first kv block, end kv block, kind)."""
    from dataclasses import asdict

    from attnkit.analysis.structure import KINDS

    return {
        "target": name,
        "shape": asdict(shape),
        "block": [blocks.sizes.q_block, blocks.sizes.kv_block],
        "blocks": [blocks.sizes.rows, blocks.sizes.columns],
        "counts": blocks.by_kind,
        "counts_of": {"batch": blocks.sizes.batch, "heads": blocks.sizes.heads},
        "density": blocks.density,
        "drawn": {"batch": drawn[0], "head": drawn[1]},
        "runs": [[[first, end, KINDS[kind]] for first, end, kind in row] for row in blocks.rows(*drawn)],
    }
