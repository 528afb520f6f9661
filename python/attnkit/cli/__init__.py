"""The command line, ``attnkit``: one file per command. They parse and print; the library does the work."""

from __future__ import annotations

import sys


def main() -> None:
    """The console entry point. Exit codes: 0, 1 a problem was found, 2 usage."""
    try:
        from attnkit.cli.app import app
    except ModuleNotFoundError as exc:
        if exc.name != "click":
            raise
        print("attnkit: the command line is an extra: pip install 'attnkit[cli]'", file=sys.stderr)
        sys.exit(1)
    app(prog_name="attnkit")
