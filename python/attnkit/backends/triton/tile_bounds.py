"""What a mask is in a whole tile, told by its rows and its columns: interval arithmetic, printed.

What varies with one index alone is a vector, bounded by its least and greatest element. What varies with both is bounded by
the bounds of its operands. So a tile costs as much as its edges, and its pairs are looked at where that decides nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from attnkit.backends.triton.pairs import Pairs
from attnkit.ir.expr import Expr, topological
from attnkit.plan.ranges import reads
from attnkit.plan.triton import Printer

# The least and the greatest value of an operator, of the bounds x..X and y..Y of its operands.
_RULES = {
    "neg": ("-{X}", "-{x}"),
    "abs": ("tl.maximum(tl.maximum({x}, -{X}), 0)", "tl.maximum(-{x}, {X})"),
    "add": ("{x} + {y}", "{X} + {Y}"),
    "sub": ("{x} - {Y}", "{X} - {y}"),
    "min": ("tl.minimum({x}, {y})", "tl.minimum({X}, {Y})"),
    "max": ("tl.maximum({x}, {y})", "tl.maximum({X}, {Y})"),
    "lt": ("{X} < {y}", "{x} < {Y}"),
    "le": ("{X} <= {y}", "{x} <= {Y}"),
    "gt": ("{x} > {Y}", "{X} > {y}"),
    "ge": ("{x} >= {Y}", "{X} >= {y}"),
    "eq": ("({x} == {Y}) & ({X} == {y})", "({x} <= {Y}) & ({y} <= {X})"),
    "ne": ("({X} < {y}) | ({Y} < {x})", "({x} != {Y}) | ({X} != {y})"),
    "and": ("{x} & {y}", "{X} & {Y}"),
    "or": ("{x} | {y}", "{X} | {Y}"),
    "not": ("~{X}", "~{x}"),
}
_COMPARE_NUMBERS = ("eq", "ne")
_OF_BOOLS = ("and", "or")  # of ints they are of bits
_UNKNOWN = ("tl.full((), 0, tl.int1)", "tl.full((), 1, tl.int1)")
_MOST = {False: 2**31 - 1, True: 2**62}  # beyond what an integer is, by whether they have 64 bits


class TileBounds(NamedTuple):
    """Lines before the loop over tiles and in it, then whether all pairs exist and whether some may."""

    before: list[str]
    inside: list[str]
    all: str
    some: str


def tile_bounds(pairs: Pairs, printer: Printer) -> TileBounds | None:
    """The bounds of a mask; None where they would decide nothing, or a load may leave its buffer.

    The owned index is that of rows that exist; ``live`` says which streamed ones do.
    """
    mask = pairs.attend.mask
    assert mask is not None
    nodes = topological([mask])
    own = "q_idx" if pairs.streamed == "kv_idx" else "kv_idx"
    loads = {int(node.attr or 0) for node in nodes if node.op == "load"}
    if any(node in pairs.unproven for node in nodes) or any(
        pairs.program.buffers[i].dtype == "i64" for i in loads
    ):
        return None
    mixed = {node for node in nodes if reads(node, own) and reads(node, pairs.streamed)}
    edges = {arg for node in mixed for arg in node.args} - mixed if mask in mixed else {mask}
    found = TileBounds([], [], "", "")
    bounds: dict[Expr, tuple[str, str] | None] = {}
    for node in sorted(
        (node for node in nodes if node in edges), key=lambda node: reads(node, pairs.streamed)
    ):
        bounds[node] = _edge(node, pairs, printer, found)
    for node in nodes:
        if node in mixed:
            bounds[node] = _combined(node, bounds, found.inside)
    root = bounds[mask]
    return None if root in (None, _UNKNOWN) else found._replace(all=root[0], some=root[1])


def _combined(
    node: Expr, bounds: dict[Expr, tuple[str, str] | None], lines: list[str]
) -> tuple[str, str] | None:
    """Of a node that varies with both indices."""
    unknown = _UNKNOWN if node.dtype == "bool" else None
    operands = [bounds[arg] for arg in node.args]
    wanted = "int" if node.op in _COMPARE_NUMBERS else "bool" if node.op in _OF_BOOLS else None
    if node.op not in _RULES or None in operands or wanted not in (None, node.args[0].dtype):
        return unknown
    names = {
        name: text
        for pair, each in zip(("xX", "yY"), operands, strict=False)
        for name, text in zip(pair, each or (), strict=True)
    }
    count = len(lines)
    lines += [
        f"{end}{count} = {rule.format(**names)}"
        for end, rule in zip(("least", "most"), _RULES[node.op], strict=True)
    ]
    return f"least{count}", f"most{count}"


def _edge(node: Expr, pairs: Pairs, printer: Printer, found: TileBounds) -> tuple[str, str] | None:
    """Of a node that varies with one index alone, or with none."""
    if node.dtype == "float":
        return None
    streamed = reads(node, pairs.streamed)
    lines = found.inside if streamed else found.before
    lines += printer.lines([node])
    name = printer.name(node)
    if not streamed and not reads(node, "q_idx" if pairs.streamed == "kv_idx" else "kv_idx"):
        return name, name
    if node.dtype == "bool":
        least, most = (f"({name}) | ~live", f"({name}) & live") if streamed else (name, name)
        ends = f"tl.min(({least}).to(tl.int32)) > 0", f"tl.max(({most}).to(tl.int32)) > 0"
    else:
        beyond = _MOST[pairs.wide]
        least, most = (
            (f"tl.where(live, {name}, {x})" for x in (beyond, -beyond)) if streamed else (name, name)
        )
        ends = f"tl.min({least})", f"tl.max({most})"
    count = f"{'s' if streamed else 'o'}{len(lines)}"
    lines += [f"{end}_{count} = {text}" for end, text in zip(("least", "most"), ends, strict=True)]
    return f"least_{count}", f"most_{count}"
