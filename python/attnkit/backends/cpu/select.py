"""Selections on the CPU engine: csrc/cpu/select.h."""

from __future__ import annotations

from typing import Any

from attnkit.analysis.canonical import canonical
from attnkit.backends.cpu.engine import FAULTS, engine
from attnkit.errors import error
from attnkit.ir.expr import Expr
from attnkit.ir.program import Attend
from attnkit.plan import selection
from attnkit.plan.bytecode import emit
from attnkit.plan.spec import Config, KernelSpec

_RULES = {"top_k": 0, "top_fraction": 0, "top_cdf": 1, "threshold": 2}  # csrc/cpu/select.h, Rule
_TENSORS = ("q", "k", "chosen")  # as csrc/bind/select.cc counts them; then the buffers
_ABOUT_TENSORS = ("AK606", "AK607")


def reasons(spec: KernelSpec) -> tuple[str, ...]:
    """Why the engine cannot run this selection; empty if it can."""
    found = selection.selection(spec.program)
    if found is None:
        return ("the program is more than one selection among q and k, or means of them",)
    kinds = {layout.kind for layout in spec.program.inputs} - {"bhsd"}
    of_tokens = tuple(f"tokens are {kind}" for kind in sorted(kinds))
    return (*of_tokens, *selection.reasons(found))


class SelectKernel:
    """One selection on the engine. Calling it writes what is chosen in place."""

    def __init__(self, spec: KernelSpec, config: Config) -> None:
        found = selection.selection(spec.program)
        assert found is not None
        self.spec, self.config, self.selection = spec, config, found
        op = canonical(spec.program).ops[-2]
        self._mask = _compile(spec, op.expressions.get("mask"))
        self._force = _compile(spec, op.expressions.get("force"))
        self._scale = spec.head_dim**-0.5 if found.op.scale is None else found.op.scale

    def __call__(
        self, q: Any, k: Any, chosen: Any, buffers: list[Any], params: list[float], threads: int
    ) -> None:
        """Compute ``chosen``, bool, of the shape that `Selection.shape` says and the rows of a column adjacent, in place.

        Raises:
            AttnkitError: AK502, sizes beyond the engine's; AK601, a candidate reads outside a buffer; AK603, out of memory;
                AK604, an integer leaves 32 bits; AK605, an integer divisor may be zero; AK606, AK607, a tensor without
                memory or not aligned.
        """
        found, op = self.selection, self.selection.op
        least = None if op.incoherent is None else selection.number(op.incoherent, params)
        form = (
            found.row_block, found.column_block, self._scale, found.centered, least, _RULES[op.rule],
            found.limit(chosen.shape[3], params), op.rule in ("top_fraction", "top_cdf"), op.heads == "group",
        )  # fmt: skip
        try:
            fault, about = engine().select(
                q, k, chosen.mT, form, self._mask, self._force, buffers, params, threads
            )
        except ValueError as exc:
            raise error("AK502", where="backend cpu", given=str(exc)) from exc
        if fault:
            code = FAULTS[fault]
            names = (*_TENSORS, *(f"buffer b{i}" for i in range(len(buffers))))
            raise error(
                code, where=names[about] if code in _ABOUT_TENSORS else "mask or force of the selection"
            )


def _compile(spec: KernelSpec, expr: Expr | None) -> Any | None:
    """The engine's program of one expression over rows and columns."""
    if expr is None:
        return None
    code = emit(Attend((0, 1, 1), mask=expr), spec.program, engine().opcodes())
    try:
        return engine().Program(code.code, code.score, code.mask, code.num_buffers, code.num_params)
    except ValueError as exc:
        raise error("AK502", where="backend cpu", given=str(exc)) from exc
