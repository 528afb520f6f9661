"""Option types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from attnkit.bench.workloads import Shape

# Names that the library also has; a test keeps them equal. Importing it here would make `--help` slow.
VARIANTS = (
    "full", "causal", "window", "alibi", "softcap", "alibi_softcap", "prefix", "document", "causal_alibi", "causal_softcap",
    "two_way_window", "two_way_document",
)  # fmt: skip
SUITES = (
    "quick",
    "demo",
    "smoke",
    "cpu",
    "gpu",
    "kv",
    "scaling",
    "variants",
    "models",
    "training",
    "generation",
    "learning",
)
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SHAPE = "1,8,8,4096,4096,64"


class ShapeType(click.ParamType):  # type: ignore[type-arg] # generic only in the newest click
    """``B,HQ,HKV,SQ,SKV,D[,DV]`` as a `Shape`."""

    name = "B,HQ,HKV,SQ,SKV,D[,DV]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        """Parse; a usage error says what is wrong."""
        from attnkit.bench.workloads import Shape

        if isinstance(value, Shape):
            return value
        try:
            sizes = [int(part) for part in str(value).split(",")]
        except ValueError:
            sizes = []
        if len(sizes) == 6:
            sizes.append(sizes[-1])
        if len(sizes) != 7 or min(sizes) < 1 or max(sizes) >= 2**31:
            self.fail(f"{value!r} is not six or seven positive numbers {self.name}", param, ctx)
        if sizes[1] % sizes[2]:
            self.fail(f"{sizes[1]} query heads are not a multiple of {sizes[2]} kv heads", param, ctx)
        return Shape(*sizes)


def json_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``: print JSON instead of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


class Source(NamedTuple):
    """What names a target: one of these is given."""

    file: IO[bytes] | str | None
    variant: str | None
    mask: str | None


class FileType(click.File):
    """A file of program text, - for stdin; or ``path.py:name``, which is left as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Open the text; a usage error if there is none."""
        path, colon, name = str(value).rpartition(":")
        if not (colon and path.endswith(".py") and name.isidentifier()):
            return super().convert(value, param, ctx)
        if not Path(path).is_file():
            self.fail(f"{path!r}: No such file", param, ctx)
        return value


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``[FILE]``, ``--variant``, ``--mask`` and ``--shape``: which program, as ``source``, for which problem."""

    @wraps(command)
    def gathered(*, file: Any, variant: str | None, mask: str | None, **others: Any) -> Any:
        return command(source=Source(file, variant, mask), **others)

    wrapped: Callable[..., Any] = gathered
    for option in (
        click.option(
            "--shape", type=ShapeType(), default=DEFAULT_SHAPE, show_default=True,
            help="Sizes of the problem: batch, query heads, kv heads, queries, keys, head dim, value dim.",
        ),
        click.option(
            "--mask", metavar="EXPRESSION",
            help='A mask, instead of FILE: "causal & window(128)", "(q_idx - kv_idx) % 4 == 0".',
        ),
        click.option("--variant", type=click.Choice(VARIANTS), help="A named variant, instead of FILE."),
        click.argument("file", required=False, type=FileType("rb"), metavar="[FILE]"),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped
