"""``attnkit dump``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attnkit.cli.options import json_flag, target_options

if TYPE_CHECKING:
    from attnkit.bench.workloads import Shape
    from attnkit.cli.options import Source
    from attnkit.cli.target import Target

STAGES = ("text", "ir", "bytecode")


@click.command()
@target_options
@click.option("--stage", type=click.Choice(STAGES), default="text", show_default=True, help="What to print.")
@json_flag
def dump(source: Source, shape: Shape, stage: str, as_json: bool) -> None:
    """Print a program at one stage of its way to a kernel. (`attnkit mask` draws its blocks.)

    \b
    text      the canonical text: the program's identity, and the key of every cache
    ir        its expressions, one node a line, shared parts once
    bytecode  what the CPU engine runs, and of that on tiles of scores

    \b
    Examples:
      attnkit dump --variant alibi_softcap --stage bytecode
      attnkit dump --mask "causal & window(128)" --stage ir
      attnkit dump --variant causal | attnkit dump - --stage ir
    """
    from attnkit.bench import records
    from attnkit.cli.target import resolve

    found = {"text": _text, "ir": _ir, "bytecode": _bytecode}[stage](resolve(source, shape))
    if as_json:
        click.echo(records.dumps({"stage": stage, **found}), nl=False)
    else:
        click.echo("\n".join(found["lines"]))


def _text(target: Target) -> dict[str, Any]:
    return {"key": target.program.key, "lines": target.program.text.rstrip("\n").split("\n")}


def _ir(target: Target) -> dict[str, Any]:
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


def _bytecode(target: Target) -> dict[str, Any]:
    from attnkit.backends.cpu.engine import engine
    from attnkit.plan.bytecode import disassemble, emit

    opcodes = engine().opcodes()
    code = emit(target.program.attend, target.program, opcodes)
    program = engine().Program(code.code, code.score, code.mask, code.num_buffers, code.num_params)
    lines = disassemble(code, opcodes).split("\n")
    for value, name, args in program.passes:  # several instructions may have become one
        lines.append(f"on tiles: %{value} = {' '.join([name, *(f'%{a}' for a in args)])}")
    return {"lines": lines}
