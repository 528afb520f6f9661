"""The printer of expressions for Triton kernels: lines of Python in which every variable is a tensor that broadcasts.

What varies with neither index is a scalar, with one of them a row or a column: nobody has to say which.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from attnkit.analysis.interval import Box, Facts, evaluate
from attnkit.ir.expr import Expr, topological
from attnkit.ir.intervals import ANY, INT32_MAX, INT32_MIN, Interval
from attnkit.ir.optable import OPS
from attnkit.ir.program import Program

# What the op table's spellings call beside Triton's own language.
HELPERS = {
    "floor_div": '''
@triton.jit
def floor_div(x, y):
    """Python's ``//``; an integer divided by 0 is 0."""
    if x.dtype.is_floating():
        found = tl.floor(x / y)
    else:
        divisor = tl.where(y == 0, 1, y)
        cut = x // divisor
        found = tl.where(y == 0, 0, cut - ((x != cut * divisor) & ((x < 0) != (divisor < 0))).to(cut.dtype))
    return found
''',
    "floor_mod": '''
@triton.jit
def floor_mod(x, y):
    """Python's ``%``; an integer modulo 0 is 0."""
    if x.dtype.is_floating():
        found = x - tl.floor(x / y) * y
    else:
        divisor = tl.where(y == 0, 1, y)
        rest = x % divisor
        found = tl.where(y == 0, 0, tl.where((rest != 0) & ((rest < 0) != (divisor < 0)), rest + divisor, rest))
    return found
''',
    "tanh": '''
@triton.jit
def tanh(x):
    """A polynomial near 0, where the quotient of exponentials loses its digits."""
    square = x * x
    tail = -5.70498872745e-3 * square + 2.06390887954e-2
    tail = ((tail * square - 5.37397155531e-2) * square + 1.33314422036e-1) * square - 3.33332819422e-1
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * square * tail, tl.where(x < 0.0, -far, far))
''',
    "power": '''
@triton.jit
def power(x, y):
    """``x ** y`` by logarithms: NaN for a negative x and a y that is not whole, as pow has it."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    signed = tl.where(x < 0.0, tl.where(whole, tl.where(odd, -size, size), float("nan")), size)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, signed)
''',
}
_WIDE = 60  # characters of an expression, from which on it gets a name


class Printer:
    """Prints expressions of one kernel; what was printed once has a name from then on.

    Variables go by their own names, params by ``p0``, buffers by their pointers ``b0`` with strides ``b0_s0`` and sizes
    ``b0_n0``. ``streamed`` is the index of the kernel's loop, whose loads are masked by ``live``. Loads of ``unproven`` may
    leave their buffer: they read within it only, and `outside` tells where they would not have. ``wide`` computes
    integers in 64 bits.
    """

    def __init__(
        self, program: Program, streamed: str = "", unproven: Collection[Expr] = (), wide: bool = False
    ) -> None:
        self._program, self._streamed, self._unproven = program, streamed, frozenset(unproven)
        self._int = "tl.int64" if wide else "tl.int32"
        self._names: dict[Expr, str] = {}
        self._known: dict[Expr, Any] = {}  # values of constants, and of what is made of nothing else
        self._outside: dict[Expr, str] = {}

    def lines(self, roots: Sequence[Expr]) -> list[str]:
        """Lines after which `name` knows the roots."""
        order = [node for node in topological(roots) if node not in self._names]
        uses = Counter(arg for node in order for arg in node.args)
        uses.update(roots)
        printed: list[str] = []
        for node in order:
            text = self._text(node, printed)
            leaf = node.op in ("var", "param") or node in self._known
            named = not leaf and (uses[node] > 1 or len(text) > _WIDE or node.op == "load")
            if named:
                name = f"t{sum(n.startswith('t') for n in self._names.values())}"
                printed.append(f"{name} = {_bare(text)}")
                text = name
            self._names[node] = text
        return printed

    def name(self, node: Expr) -> str:
        """What a node that has been printed is called."""
        return self._names[node]

    def outside(self, roots: Sequence[Expr]) -> str:
        """An expression that is true where a load under the roots left its buffer; empty if none can."""
        return " | ".join(self._outside[node] for node in topological(roots) if node in self._outside)

    def _text(self, node: Expr, printed: list[str]) -> str:
        if node.op == "const" or (node.op in OPS and all(arg in self._known for arg in node.args)):
            known = [self._known[arg] for arg in node.args]
            self._known[node] = OPS[node.op].numpy(*known) if known else node.attr
            return _literal(node, self._known[node])
        if node.op == "var":
            return str(node.attr)
        if node.op == "param":
            return f"p{node.attr}"
        if node.op == "load":
            return self._load(node, printed)
        spelling, names = OPS[node.op].triton, [self._names[arg] for arg in node.args]
        if spelling.partition("(")[0] in HELPERS:  # functions ask for the type of what they are given
            names = [self._tensor(arg) for arg in node.args]
        return spelling.format(*(map(_bare, names) if spelling[0].isalpha() else names), int=self._int)

    def _tensor(self, node: Expr) -> str:
        name = self._names[node]
        if node not in self._known or name.startswith("tl."):
            return name
        return f"tl.full((), {_bare(name)}, {'tl.float32' if node.dtype == 'float' else self._int})"

    def _load(self, node: Expr, printed: list[str]) -> str:
        slot = int(node.attr or 0)
        buffer = self._program.buffers[slot]
        index = [self._names[arg] for arg in node.args]
        offset = " + ".join(f"{i} * b{slot}_s{d}" for d, i in enumerate(index)) or "0"
        masks = ["live"] if any(_depends(arg, self._streamed) for arg in node.args) else []
        if node in self._unproven:
            within = " & ".join(f"({i} >= 0) & ({i} < b{slot}_n{d})" for d, i in enumerate(index))
            name = f"in{len(self._outside)}"
            printed.append(f"{name} = {within}")
            self._outside[node] = f"~({name})"
            masks = [name]
        mask = f", mask={masks[0]}" if masks else ""
        cast = {"f32": ".to(tl.float32)", "bool": " != 0"}.get(buffer.dtype, "")
        if buffer.dtype == "i32" and self._int == "tl.int64":
            cast = ".to(tl.int64)"
        text = f"tl.load(b{slot} + ({offset}){mask}){cast}"
        return f"({text})" if buffer.dtype == "bool" else text


def helpers(text: str) -> str:
    """The functions of `HELPERS` that a text calls."""
    return "".join(code for name, code in HELPERS.items() if re.search(rf"(?<![\w.]){name}\(", text))


class _Shapes(Facts):
    """What is known of buffers whose elements are on the device: their types."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        object.__setattr__(self, "program", program)

    program: Program

    def load(self, node: Expr, index: Sequence[Interval]) -> Interval:
        dtype = self.program.buffers[int(node.attr or 0)].dtype
        return Interval(INT32_MIN, INT32_MAX) if dtype == "i32" else ANY[node.dtype]


def care(
    program: Program, roots: Sequence[Expr], box: Box, shapes: Sequence[Sequence[int]]
) -> tuple[frozenset[Expr], bool]:
    """The loads under the roots that may leave their buffers, and whether an integer may leave 32 bits.

    Args:
        program: the program of the roots.
        roots: what will be printed.
        box: the intervals of the variables, over all pairs of a call.
        shapes: of the buffers.
    """
    nodes = topological(roots)
    ranges = dict(zip(nodes, evaluate(nodes, box, _Shapes(program)), strict=True))
    unproven: set[Expr] = set()
    wide: set[Expr] = set()  # 64 bits anyway: loads of i64, and what is made of them
    overflows = False
    for node in nodes:
        if node.op == "load":
            sizes = shapes[int(node.attr or 0)]
            if any(ranges[i].lo < 0 or ranges[i].hi >= n for i, n in zip(node.args, sizes, strict=True)):
                unproven.add(node)
            if program.buffers[int(node.attr or 0)].dtype == "i64":
                wide.add(node)
        elif node.dtype == "int" and any(arg in wide for arg in node.args):
            wide.add(node)
        elif node.dtype == "int":
            overflows |= not INT32_MIN <= ranges[node].lo <= ranges[node].hi <= INT32_MAX
    return frozenset(unproven), overflows


def _depends(root: Expr, variable: str) -> bool:
    return any(node.op == "var" and node.attr == variable for node in topological([root]))


def _literal(node: Expr, value: Any) -> str:
    if node.dtype == "bool":
        return f"tl.full((), {int(bool(value))}, tl.int1)"
    if node.dtype == "int":
        return str(int(value)) if int(value) >= 0 else f"({int(value)})"
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded):
        return f'float("{rounded}")'
    if 0 < abs(rounded) < 2.0**-126:  # Triton would take a double
        return f"tl.full((), {rounded!r}, tl.float32)"
    return repr(rounded) if rounded >= 0 and not math.copysign(1, rounded) < 0 else f"({rounded!r})"


def _bare(text: str) -> str:
    """Without the parentheses around all of it."""
    if not text.startswith("("):
        return text
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[1:-1] if i == len(text) - 1 else text
    return text
