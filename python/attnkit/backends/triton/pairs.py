"""What the kernels of one program print about pairs: score, mask, bounds, and the tensors that these read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnkit.backends.triton.source import Arguments
from attnkit.ir.expr import Expr, topological
from attnkit.ir.program import Attend, Program
from attnkit.plan.ranges import Stretch, reads, stretch
from attnkit.plan.triton import Printer

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Pairs:
    """A program's pairs as a kernel sees them that streams ``kv_idx`` past its queries, or ``q_idx`` past its keys.

    ``unproven`` and ``wide`` as `attnkit.plan.triton.Printer` has them.
    """

    program: Program
    streamed: str = "kv_idx"
    unproven: frozenset[Expr] = frozenset()
    wide: bool = False

    @property
    def attend(self) -> Attend:
        """The operation."""
        return self.program.attend

    @property
    def has_score(self) -> bool:
        """Whether a logit is more than the scaled product."""
        return not (self.attend.score.op == "var" and self.attend.score.attr == "s")

    def raw(self, scale: float) -> bool:
        """Whether products need not be logits before they are weighed: one multiplication does both, and none overflows.

        Else what is multiplied by log2(e) are differences of logits: a logit may be the least float.
        """
        return not self.has_score and not self.attend.unnormalized and scale * LOG2E <= 1.0

    @cached_property
    def stretch(self) -> Stretch | None:
        """The bounds of the streamed index, if the mask is of that kind."""
        found = stretch(self.attend.mask, self.streamed)
        unknown = found is not None and any(node in self.unproven for node in topological(found.roots))
        return None if unknown else found

    @property
    def reads_indices(self) -> bool:
        """Whether score or mask read the streamed index, or dropout draws by it."""
        roots = [root for root in (self.attend.score, self.attend.mask) if root is not None]
        return self.attend.dropout is not None or any(reads(root, self.streamed) for root in roots)

    @property
    def counter(self) -> str:
        """The counter of a pair's random word: 32 bits each."""
        return (
            "b, h.to(tl.int32), q_idx.to(tl.int32), kv_idx.to(tl.int32)"
            if self.wide
            else "b, h, q_idx, kv_idx"
        )

    def printer(self) -> Printer:
        """A new one: names are a kernel's own."""
        return Printer(self.program, self.streamed, self.unproven, self.wide)

    def captured(self, roots: Sequence[Expr]) -> Arguments:
        """The arguments that some expressions need: pointers, strides and sizes of buffers, params."""
        nodes = topological(roots)
        found: list[tuple[str, str]] = []
        for slot in sorted({int(node.attr or 0) for node in nodes if node.op == "load"}):
            dims = range(self.program.buffers[slot].rank)
            found += [(f"b{slot}", "pointer"), *((f"b{slot}_s{d}", "stride") for d in dims)]
            if any(node in self.unproven and node.attr == slot for node in nodes):
                found += [(f"b{slot}_n{d}", "size") for d in dims]
        found += [
            (f"p{i}", "float") for i in sorted({int(node.attr or 0) for node in nodes if node.op == "param"})
        ]
        return tuple(found)

    def score(self, printer: Printer) -> tuple[list[str], str]:
        """Lines of the score, and what it is."""
        root = self.attend.score
        lines = printer.lines([root])
        text = printer.name(root)
        outside = printer.outside([root])
        return lines, f'tl.where({outside}, float("nan"), {text})' if outside else text

    def mask(self, printer: Printer) -> tuple[list[str], str, list[str]]:
        """Lines of the mask, when a pair exists, and lines that make what read outside a buffer not a number.

        A pair whose mask cannot be read exists, so that the mistake shows.
        """
        root = self.attend.mask
        if root is None:
            return [], "live", []
        lines = printer.lines([root])
        outside = printer.outside([root])
        text = f"live & {printer.name(root)}"
        if not outside:
            return lines, text, []
        lines.append(f"lost = live & ({outside})")
        return lines, f"({text}) | lost", ['logit = tl.where(lost, float("nan"), logit)']

    def maybe(self, printer: Printer) -> tuple[list[str], str, str]:
        """As `mask`, and when all of a tile's pairs are known to exist."""
        lines, exists, poison = self.mask(printer)
        return lines, exists, f"({exists}) & ~lost" if poison else exists

    def bounds(self, printer: Printer) -> list[str]:
        """Lines that narrow ``lower`` and ``upper`` to what the mask lets a row see."""
        if self.stretch is None:
            return []
        lines = printer.lines(self.stretch.roots)
        length = "kv_len" if self.streamed == "kv_idx" else "q_len"
        lines += [f"lower = tl.maximum(lower, {printer.name(each)})" for each in self.stretch.lower]
        lines += [f"upper = tl.minimum(upper, {printer.name(each)})" for each in self.stretch.upper]
        for each in self.stretch.conditions:
            lines.append(f"upper = tl.where({printer.name(each)}, upper, 0)")
            lines.append(f"lower = tl.where({printer.name(each)}, lower, {length})")
        if lines and self.wide:
            lines += [
                f"lower = tl.minimum(lower, {length}).to(tl.int32)",
                "upper = tl.maximum(upper, 0).to(tl.int32)",
            ]
        return lines


def number(x: float) -> str:
    """A float32 as source text."""
    return repr(float(np.float32(x)))
