"""Masks that see a stretch: for each query the keys from one bound to another, or for each key the queries.

Causal masks, windows, prefixes and their conjunctions are such. A kernel then finds the tiles to visit from the bounds of
its own rows, and needs no list of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attnkit.analysis.linear import COMPARISONS, difference
from attnkit.ir.expr import Expr, const, make, topological, var

_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq"}


@dataclass
class Stretch:
    """``streamed >= each of lower``, ``streamed < each of upper``, where each of ``conditions`` holds.

    None of these expressions reads the streamed index.
    """

    lower: list[Expr] = field(default_factory=list)
    upper: list[Expr] = field(default_factory=list)
    conditions: list[Expr] = field(default_factory=list)

    @property
    def roots(self) -> list[Expr]:
        """All its expressions."""
        return [*self.lower, *self.upper, *self.conditions]


def stretch(mask: Expr | None, streamed: str) -> Stretch | None:
    """The stretch of the streamed index, ``"q_idx"`` or ``"kv_idx"``, that a mask sees; None if it is not known as one."""
    found = Stretch()
    pending = [] if mask is None else [mask]
    while pending:
        atom = pending.pop()
        if atom.op == "and":
            pending += atom.args
        elif not reads(atom, streamed):
            found.conditions.append(atom)
        elif not _add_bound(found, atom, streamed):
            return None
    return found


def reads(root: Expr, variable: str) -> bool:
    """Whether an expression depends on a variable."""
    return any(node.op == "var" and node.attr == variable for node in topological([root]))


def _add_bound(found: Stretch, atom: Expr, streamed: str) -> bool:
    op = atom.op
    if op == "not" and atom.args[0].op in _OPPOSITE:
        atom = atom.args[0]
        op = _OPPOSITE[atom.op]
    if op not in COMPARISONS or op == "ne" or atom.args[0].dtype != "int":
        return False
    form = difference(atom)
    index = var(streamed)
    factor = form.terms.get(index, 0)
    others = {node: times for node, times in form.terms.items() if node is not index}
    if factor not in (1, -1) or any(reads(node, streamed) for node in others):
        return False
    if factor == -1:  # R - x < 0 is x > R
        op = _MIRRORED[op]
    # x + R < 0 is x < -R
    bound, constant = None, -factor * form.constant
    for node, times in others.items():
        signed = -factor * times
        term = node if abs(signed) == 1 else make("mul", node, const(abs(signed)))
        if bound is None:
            bound = term if signed > 0 else make("neg", term)
        else:
            bound = make("add" if signed > 0 else "sub", bound, term)
    if op in ("lt", "ge"):
        _append(found.upper if op == "lt" else found.lower, bound, constant)
    elif op == "le":
        _append(found.upper, bound, constant + 1)
    elif op == "gt":
        _append(found.lower, bound, constant + 1)
    else:
        _append(found.lower, bound, constant)
        _append(found.upper, bound, constant + 1)
    return True


def _append(to: list[Expr], bound: Expr | None, constant: int) -> None:
    if bound is None:
        to.append(const(constant))
    else:
        to.append(bound if constant == 0 else make("add", bound, const(constant)))
