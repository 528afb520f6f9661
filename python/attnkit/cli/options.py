"""Option types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from attnkit.bench.workloads import Shape

# Names that the library also has; a test keeps them equal. Importing it here would make `--help` slow.
VARIANTS = ("full", "causal", "window", "alibi", "softcap", "alibi_softcap", "prefix", "document")
SUITES = ("quick", "demo", "smoke")
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


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``[FILE]``, ``--variant`` and ``--shape``: which program, for which problem."""
    for option in (
        click.option(
            "--shape", type=ShapeType(), default=DEFAULT_SHAPE, show_default=True,
            help="Sizes of the problem: batch, query heads, kv heads, queries, keys, head dim, value dim.",
        ),
        click.option("--variant", type=click.Choice(VARIANTS), help="A named variant, instead of FILE."),
        click.argument("file", required=False, type=click.File("rb"), metavar="[FILE]"),
    ):  # fmt: skip
        command = option(command)
    return command
