"""``attnkit doctor``."""

from __future__ import annotations

import sys
from typing import Any

import click

from attnkit.cli.options import json_flag


@click.command()
@json_flag
def doctor(as_json: bool) -> None:
    """Look for trouble in this installation.

    Shows versions, instruction sets, threads, the OpenMP runtimes in the process and optional packages. Loads the engine (beside torch, if there is one), computes a small attention and checks it. Exits with 1 if a problem
    was found.

    \b
    Examples:
      attnkit doctor
      attnkit doctor --json | jq .problems
    """
    from attnkit.bench import console, doctor as library, records

    facts = library.examine()
    if as_json:
        click.echo(records.dumps(facts), nl=False)
        sys.exit(1 if facts["problems"] else 0)
    out = console.data()
    for title in ("machine", "threads", "packages"):
        out.print(title, style="bold")
        for name, value in facts[title].items():
            out.print(f"  {name:16} {_say(value)}", markup=False)
    for problem in facts["problems"]:
        out.print(f"problem: {problem}", style="red", markup=False)
    if not facts["problems"]:
        out.print("no problems found", style="green")
    sys.exit(1 if facts["problems"] else 0)


def _say(value: Any) -> str:
    if value is None:
        return "not installed"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
