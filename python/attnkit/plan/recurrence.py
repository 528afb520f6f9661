"""What a program must look like for a kernel of recurrences: one `recur` over q, k, v, and a map that q and k share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

from attnkit.ir.expr import Expr
from attnkit.ir.program import Map, Program, Recur, Return
from attnkit.ir.text import parse
from attnkit.variants.linear import FEATURE_MAPS

ROLES = ("gate", "beta", "bonus", "initial", "initial_norm")


@dataclass(frozen=True)
class Recurrence:
    """A recurrence of inputs q, k, v, and of those that ``roles`` name, in the order of the inputs after v.

    ``lengths`` is the number of the buffer that holds ``cu_seqlens``, None where tokens are not packed.
    """

    op: Recur
    norm: str
    feature_map: str
    roles: tuple[str, ...]
    kinds: tuple[str, ...]
    lengths: int | None

    def features(self, dim: int) -> int:
        """The rows of a state."""
        of = self.op.coefficients
        return dim if of is None else sum(dim**power for power in range(len(of)))

    def operations(self, dim: int, v_dim: int, chunk: int) -> int:
        """Multiplications and additions forward, of a token and a head: see `operations`."""
        op = self.op
        order = None if op.coefficients is None else len(op.coefficients) - 1
        return operations(dim, v_dim, chunk if op.causal else 0, delta=op.beta is not None, order=order)


def operations(dim: int, v_dim: int, chunk: int, *, delta: bool = False, order: int | None = None) -> int:
    """Multiplications and additions forward, of a token and a head, in chunks of so many tokens (0: not causal).

    A state is read and written, and the pairs of a chunk are half a square. ``order``: of a polynomial, whose pairs of
    channels count once.
    """
    rows = dim if order is None else (1, 1 + dim, 1 + dim + dim * (dim + 1) // 2)[order]
    pairs = (chunk + 1) * (dim + v_dim) if chunk else 0
    solved = 2 * dim * v_dim + chunk * (dim + v_dim) if delta else 0
    return 4 * rows * v_dim + pairs + solved


@lru_cache(maxsize=1024)
def recurrence(program: Program) -> Recurrence | None:
    """The recurrence that a program is, None if it is more or something else."""
    *maps, op, result = program.ops
    if (
        not isinstance(op, Recur)
        or not isinstance(result, Return)
        or program.num_params
        or len(maps) not in (0, 2)
    ):
        return None
    count = len(program.inputs)
    norm, feature_map = "none", "identity"
    if maps:
        q, k = maps
        if not (isinstance(q, Map) and isinstance(k, Map)) or (q.norm, q.value) != (k.norm, k.value):
            return None
        known = next((name for name, value in _feature_maps().items() if value is q.value), None)
        if known is None or q.operands != (0,) or k.operands != (1,) or op.operands != (count, count + 1, 2):
            return None
        norm, feature_map = q.norm, known
    elif op.operands != (0, 1, 2):
        return None
    held = {getattr(op, role): role for role in ROLES if getattr(op, role) is not None}
    if sorted(held) != list(range(3, count)) or any(layout.codec is not None for layout in program.inputs):
        return None
    first = count + len(maps)
    if result.operands != (first, first + 1) + ((first + 2,) if op.normalize else ()):
        return None
    lengths = program.inputs[0].lengths
    if any(layout.lengths != lengths for layout in program.inputs[:3]) or len(program.buffers) != (
        lengths is not None
    ):
        return None
    kinds = tuple(layout.kind for layout in program.inputs[3:])
    return Recurrence(op, norm, feature_map, tuple(held[i] for i in range(3, count)), kinds, lengths)


@cache
def _feature_maps() -> dict[str, Expr]:
    """The feature maps that kernels know, as interned expressions."""
    head = "attnkit 1\nprogram (q: bhsd) {\n  m = map(q, norm = none) { value = "
    found = {}
    for name, text in FEATURE_MAPS.items():
        program = parse(head + text + " }\n  return m\n}\n")
        op = program.ops[0]
        assert isinstance(op, Map)
        found[name] = op.value
    return found
