"""``attnkit dump``."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import click

from attnkit.cli.options import json_flag, target_options

if TYPE_CHECKING:
    from attnkit.bench.workloads import Shape
    from attnkit.cli.target import Target

STAGES = ("text", "ir", "bytecode", "blocks")
_MARKS = ".+#"  # in the order of target.BLOCKS
_MAP_SIZE = 48  # blocks along the longer side, unless --block says otherwise


@click.command()
@target_options
@click.option("--stage", type=click.Choice(STAGES), default="text", show_default=True, help="What to print.")
@click.option(
    "--block", type=click.IntRange(min=1), help="Block size of the map.  [default: at most 48 blocks a side]"
)
@json_flag
def dump(
    file: IO[bytes] | None, variant: str | None, shape: Shape, stage: str, block: int | None, as_json: bool
) -> None:
    """Print a program at one stage of its way to a kernel.

    \b
    text      the canonical text: the program's identity, and the key of every cache
    ir        its expressions, one node a line, shared parts once
    bytecode  what the CPU engine runs on tiles of scores
    blocks    a map of the (query, key) plane: . empty, + partial, # full

    \b
    Examples:
      attnkit dump --variant alibi_softcap --stage bytecode
      attnkit dump --variant window --stage blocks --shape 1,1,1,2048,2048,64 --block 64
      attnkit dump --variant causal | attnkit dump - --stage ir
    """
    from attnkit.bench import records
    from attnkit.cli.target import resolve

    found = {"text": _text, "ir": _ir, "bytecode": _bytecode, "blocks": _blocks}[stage](
        resolve(file, variant, shape), block
    )
    if as_json:
        click.echo(records.dumps({"stage": stage, **found}), nl=False)
    else:
        click.echo("\n".join(found["lines"]))


def _text(target: Target, block: int | None) -> dict[str, Any]:
    return {"key": target.program.key, "lines": target.program.text.rstrip("\n").split("\n")}


def _ir(target: Target, block: int | None) -> dict[str, Any]:
    from attnkit.ir.expr import topological

    attend = target.program.attend
    order = topological(attend.roots)
    number = {node: i for i, node in enumerate(order)}
    lines = []
    for node in order:
        operands = [] if node.attr is None else [str(node.attr)]
        operands += [f"%{number[arg]}" for arg in node.args]
        lines.append(f"%{number[node]}: {node.dtype} = {node.op}({', '.join(operands)})")
    lines.append(f"score = %{number[attend.score]}")
    if attend.mask is not None:
        lines.append(f"mask = %{number[attend.mask]}")
    return {"lines": lines}


def _bytecode(target: Target, block: int | None) -> dict[str, Any]:
    from attnkit.backends.cpu.engine import engine
    from attnkit.plan.bytecode import disassemble, emit

    opcodes = engine().opcodes()
    code = emit(target.program.attend, target.program, opcodes)
    return {"lines": disassemble(code, opcodes).split("\n")}


def _blocks(target: Target, block: int | None) -> dict[str, Any]:
    from attnkit.cli.target import BLOCKS

    unknown = target.blocks_unknown()
    if unknown:
        raise click.ClickException(f"no block map: {unknown}")
    longest = max(target.shape.sq, target.shape.skv)
    size = block or max(16, 1 << ((longest - 1) // _MAP_SIZE).bit_length())
    if (longest + size - 1) // size > 1024:
        raise click.ClickException(
            f"a block of {size} makes a map of more than 1024 blocks a side; use a larger one"
        )
    tiles = target.block_map(size, size)
    counts = {kind: int((tiles == i).sum()) for i, kind in enumerate(BLOCKS)}
    legend = ", ".join(f"{mark} {kind} {counts[kind]}" for mark, kind in zip(_MARKS, BLOCKS, strict=True))
    lines = [f"rows: queries, columns: keys, blocks of {size} x {size}; {legend}"]
    lines += ["".join(_MARKS[tile] for tile in row) for row in tiles]
    return {"block": size, "counts": counts, "map": tiles.tolist(), "lines": lines}
