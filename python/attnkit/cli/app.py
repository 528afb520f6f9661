"""The root command, and what all commands share: how errors are said."""

from __future__ import annotations

import errno
from typing import Any

import click

from attnkit._version import __version__
from attnkit.cli.bench import bench
from attnkit.cli.cache import cache
from attnkit.cli.compare import compare
from attnkit.cli.doctor import doctor
from attnkit.cli.dump import dump
from attnkit.cli.explain import explain
from attnkit.cli.list import list_
from attnkit.cli.mask import mask
from attnkit.cli.tune import tune
from attnkit.errors import AttnkitError

# Where the optional packages come from.
_EXTRAS = {"torch": "torch", "click": "cli", "rich": "cli", "matplotlib": "plot"}


class _App(click.Group):
    """Turns what may go wrong into one line on stderr and exit code 1; a bug still shows its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttnkitError as exc:
            raise click.ClickException(one_line(exc)) from exc
        except ModuleNotFoundError as exc:
            if exc.name not in _EXTRAS:
                raise
            hint = f"pip install 'attnkit[{_EXTRAS[exc.name]}]'"
            raise click.ClickException(f"this needs {exc.name}, which is not installed: {hint}") from exc
        except OSError as exc:
            if exc.errno == errno.EPIPE:
                raise
            raise click.ClickException(str(exc)) from exc


def one_line(error: AttnkitError) -> str:
    """An error as one line: code, what, and the details that there are."""
    details = [("at", error.where), ("given", error.given), ("allowed", error.allowed), ("hint", error.hint)]
    told = [f"{name}: {' '.join(value.split())}" for name, value in details if value]
    return "; ".join([f"{error.code}: {error.what}", *told])


@click.group(cls=_App, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def app() -> None:
    """attnkit: say which attention you want once; run it as a fast kernel on what you have.

    These commands measure and tune kernels, show what a variant compiles to and why, and look for trouble. None of them needs a
    GPU. Data goes to stdout and everything else to stderr; with --json the data is JSON.

    \b
    Examples:
      attnkit doctor                              is everything in order here?
      attnkit list                                what runs where, in which dtype
      attnkit bench --json out.json               measure beside torch
      attnkit bench --suite cpu                   beside every CPU library
      attnkit bench --variant window --shape 1,8,8,8192,8192,64
      attnkit compare before.json after.json      what got slower?
      attnkit tune --variant causal               which config is fastest here?
      attnkit cache ls                            what was tuned
      attnkit explain --variant causal --shape 1,8,8,4096,4096,64
      attnkit dump --variant alibi > alibi.txt    the text of a program
      attnkit dump alibi.txt --stage bytecode     what the CPU engine makes of it
      attnkit mask --mask "causal & window(128)"  draw which blocks it visits

    \b
    A program is a FILE with its text (- is stdin), a function path.py:name of
    yours, --mask with an expression, or --variant with one of
      full  causal  window  alibi  softcap  alibi_softcap  prefix  document
      causal_alibi  causal_softcap  two_way_window  two_way_document

    \b
    Exit status: 0 all is well, 1 a problem was found, 2 wrong usage.
    Environment: NO_COLOR turns colour off; ATTNKIT_ISA caps the instruction set.
    """


for _command in (bench, compare, tune, cache, explain, dump, mask, list_, doctor):
    app.add_command(_command)
