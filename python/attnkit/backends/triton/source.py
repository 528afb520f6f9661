"""From a template and what fills it to a module of Triton kernels that can be read, interpreted and compiled."""

from __future__ import annotations

import hashlib
import linecache
import re
import textwrap
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import ModuleType

from attnkit.plan.triton import helpers

# Names and kinds of a kernel's arguments, in order: "pointer", "stride", "size" or "float".
Arguments = tuple[tuple[str, str], ...]

HEAD = """import triton
import triton.language as tl
"""
_WIDTH = 120
_HOLE = re.compile(r"^(\s*)\$(\w+)$")


def render(template: str, flags: Collection[str], holes: Mapping[str, list[str] | str]) -> str:
    """Fill a template.

    ``#if flag``, ``#if not flag``, ``#else`` and ``#end`` on lines of their own keep or drop what is between. A line
    ``$hole`` becomes the lines of that hole, with its indentation; ``{hole}`` within a line becomes its text.
    """
    kept: list[str] = []
    keep = [True]
    for line in template.splitlines():
        word, _, condition = line.strip().partition(" ")
        if word == "#if":
            wanted = (condition.removeprefix("not ") in flags) != condition.startswith("not ")
            keep.append(wanted)
        elif word == "#else":
            keep[-1] = not keep[-1]
        elif word == "#end":
            keep.pop()
        elif all(keep):
            kept += _filled(line, holes)
    assert len(keep) == 1, "an #if without its #end"
    return "\n".join(kept) + "\n"


def part(template: str, flags: Collection[str], holes: Mapping[str, list[str] | str]) -> list[str]:
    """The lines of a template that fills a hole of another."""
    return textwrap.dedent(render(template, flags, holes)).strip("\n").splitlines()


def _filled(line: str, holes: Mapping[str, list[str] | str]) -> list[str]:
    hole = _HOLE.match(line)
    if hole:
        return [hole[1] + each for each in holes[hole[2]]]
    return [re.sub(r"\{(\w+)\}", lambda m: str(holes[m[1]]), line)]


def _wrapped(line: str) -> list[str]:
    """A line of code, or several that are within brackets after the first."""
    if len(line) <= _WIDTH or not ("(" in line or line.endswith(",")):
        return [line]
    start = line[: len(line) - len(line.lstrip())]
    found, indent = [], start if line.endswith(",") else start + "    "
    while len(line) > _WIDTH and (cut := line.rfind(", ", len(indent), _WIDTH)) > 0:
        found.append(line[: cut + 1])
        line = indent + line[cut + 2 :]
    return [*found, line]


def whole(text: str) -> str:
    """The text of a module: imports, the helpers that are called, the kernels."""
    lines = f"{HEAD}\n{helpers(text)}\n{text}".splitlines()
    wrapped = "\n".join(part for line in lines for part in _wrapped(line.rstrip()))
    return re.sub(r"\n{4,}", "\n\n\n", wrapped) + "\n"


@lru_cache(maxsize=4096)
def load(text: str) -> ModuleType:
    """The module of a text, which Triton reads again through `linecache`; nothing is written to a disk.

    The text is printed by this package from a verified program: names, numbers and operators of our own tables.
    """
    name = f"attnkit_triton_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(name)
    module.__file__ = file
    exec(compile(text, file, "exec"), module.__dict__)  # noqa: S102 -- see above
    return module
