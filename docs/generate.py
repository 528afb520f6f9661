"""Write the pages that are generated from the code: `python docs/generate.py`. A test keeps them current."""

from __future__ import annotations

from pathlib import Path

from attnkit.environment import VARIABLES
from attnkit.errors import CODES
from attnkit.ir.functions import FUNCTIONS
from attnkit.ir.optable import OPS

RANGES = {
    "1": "Text form",
    "2": "Program",
    "3": "Tracing",
    "4": "Arguments",
    "5": "Capability",
    "6": "Run time",
}


def errors() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "Every error is an `attnkit.AttnkitError` with a `.code`, and also a `ValueError`, a `TypeError` or a",
        "`NotImplementedError`. Its message says what went wrong, where, what was given, what is allowed, and a hint.",
        "This page is generated from `attnkit.errors.CODES`.",
    ]
    section = ""
    for code, row in CODES.items():
        if RANGES[code[2]] != section:
            section = RANGES[code[2]]
            lines += ["", f"## {section}", "", "| code | also a | what | hint |", "|---|---|---|---|"]
        base = row.error.__bases__[1].__name__
        hint = row.hint.replace("|", "\\|")
        lines.append(f"| {code} | {base} | {row.summary} | {hint} |")
    return "\n".join(lines) + "\n"


def operators() -> str:
    """docs/operators.md."""
    lines = [
        "# Operators",
        "",
        "What score and mask functions may use, on proxies: Python's operators, and the torch functions and methods of these",
        "names. `ulp` bounds the error of a float32 implementation in units in the last place. This page is generated from",
        "`attnkit.ir.optable.OPS`, whose docstring gives the semantics of integer division, casts, min and max.",
        "",
        "| operator | text | traces from | ulp |",
        "|---|---|---|---|",
    ]
    for op in OPS.values():
        symbol = op.symbol.replace("|", "\\|")
        names = ", ".join(f"`{n}`" for n in op.torch if not n.startswith("__"))
        lines.append(f"| {op.name} | `{symbol}` | {names} | {op.ulp:g} |")
    rows = {name for op in OPS.values() for name in op.torch}
    composed = ", ".join(f"`{n}`" for n in sorted(FUNCTIONS) if n not in rows and not n.startswith("__"))
    lines += [
        "",
        "Composed of these (`attnkit.ir.functions`), also as methods and in place where torch has them:",
        "",
    ]
    return "\n".join([*lines, composed]) + "\n"


def env() -> str:
    """docs/env.md."""
    lines = [
        "# Environment variables",
        "",
        "All of attnkit's own. None is needed. This page is generated from `attnkit.environment.VARIABLES`.",
        "",
        "| variable | what it sets | if it is not set | who reads it | a bad value |",
        "|---|---|---|---|---|",
    ]
    for name, row in VARIABLES.items():
        bad = f"[{row.error}](errors.md)" if row.error else "a `ValueError`"
        lines.append(f"| `{name}` | {row.meaning} | {row.unset} | {row.reader} | {bad} |")
    lines += [
        "",
        "Of other people's: the engine runs on as many threads as torch says (`OMP_NUM_THREADS`, or `torch.set_num_threads`),",
        "and `NO_COLOR` turns off the colours of the command line. The [list of error codes](errors.md) has the rest of what can go",
        "wrong; `attnkit doctor` shows what is in force.",
    ]
    return "\n".join(lines) + "\n"


PAGES = {"errors.md": errors, "operators.md": operators, "env.md": env}


def main() -> None:
    """Write the pages beside this file."""
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page())


if __name__ == "__main__":
    main()
