"""Random expressions from any `random.Random`: typed from the top, so that nothing that is drawn is thrown away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from random import Random

from attnkit.ir.expr import Expr, const, load, make, param, var
from attnkit.ir.intervals import INT32_MAX, INT32_MIN
from attnkit.ir.optable import OPS, VARIABLES, DType
from attnkit.ir.program import ELEMENT, Buffer

_DTYPES: tuple[DType, ...] = ("float", "int", "bool")


def _signatures(result: DType) -> list[tuple[str, tuple[DType, ...]]]:
    """Every operator that gives a type, with operands of exactly the types that it wants."""
    found = []
    for name, info in OPS.items():
        for dtypes in product(_DTYPES, repeat=info.arity):
            cast_to_itself = dtypes == (name,)
            if info.rule(dtypes) == (dtypes, result) and not cast_to_itself:
                found.append((name, dtypes))
    return found


# Those whose results stay small and smooth enough for differences to check a derivative.
TAME = frozenset(["neg", "add", "sub", "mul", "tanh", "sigmoid", "erf", "sin", "cos", "where", "float"])
_LOGIC = frozenset(
    ["lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not", "mod", "floordiv", "min", "max"]
)


class Expressions:
    """Random expressions over the variables of an operation, buffers and params; parts of them are shared."""

    def __init__(
        self, rng: Random, variables: Sequence[str], captured: Sequence[tuple[int, Buffer]], num_params: int, tame: bool
    ) -> None:  # fmt: skip
        self.rng, self.tame = rng, tame
        self.leaves: dict[DType, list[Expr]] = {"float": [], "int": [], "bool": []}
        for name in variables:
            self.leaves[VARIABLES[name]].append(var(name))
        self.leaves["float"] += [param(i) for i in range(num_params)]
        indices = self.leaves["int"][:]
        for slot, buffer in captured:
            index = [rng.choice(indices) for _ in range(buffer.rank)]
            dtype = ELEMENT[buffer.dtype]
            self.leaves[dtype].append(load(slot, *index, dtype=dtype))

    def of(self, dtype: DType, depth: int) -> Expr:
        """An expression of a type, up to ``depth`` operators deep."""
        known = self.leaves[dtype]
        if depth == 0 or self.rng.random() < 0.15:
            return self.rng.choice(known) if known and self.rng.random() < 0.8 else self._constant(dtype)
        op, dtypes = self.rng.choice((_TAME if self.tame else _ALL)[dtype])
        node = make(op, *(self.of(each, depth - 1) for each in dtypes))
        if self.rng.random() < 0.3 and node.op != "const":
            known.append(node)
        return node

    def _constant(self, dtype: DType) -> Expr:
        if dtype == "bool":
            return const(self.rng.random() < 0.5)
        if dtype == "int":
            wild = not self.tame and self.rng.random() < 0.1
            return const(self.rng.randint(INT32_MIN, INT32_MAX) if wild else self.rng.randint(-4, 9))
        if not self.tame and self.rng.random() < 0.3:
            wide = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-310, 1e300, self.rng.uniform(-1e9, 1e9))
            return const(self.rng.choice(wide))
        return const(round(self.rng.uniform(-2, 2), 2))


_ALL = {dtype: _signatures(dtype) for dtype in _DTYPES}
_TAME = {
    dtype: [(op, args) for op, args in rows if op in TAME or (op in _LOGIC and "float" not in (dtype, *args))]
    for dtype, rows in _ALL.items()
}  # fmt: skip
