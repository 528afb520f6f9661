"""The reference as a backend: asked for by name, to check the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from attnkit.backends import Kernel
from attnkit.backends.reference.run import gradients, run
from attnkit.errors import error
from attnkit.ir.program import Program, Return
from attnkit.plan.spec import Config, KernelSpec, Space


@lru_cache(maxsize=256)
def _with_all_outputs(program: Program) -> Program:
    """The same attention, returning everything it gives."""
    *before, attend, _ = program.ops  # what encodes its operands
    first = len(program.inputs) + sum(len(op.results) for op in before)
    values = tuple(range(first, first + len(program.attend.outputs)))
    return Program(program.inputs, program.buffers, program.num_params, (*before, attend, Return(values)))


def attend(
    program: Program, q: Any, k: Any, v: Any, buffers: Sequence[Any] = (), params: Sequence[float] = (),
    seed: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The attention of a program over three inputs: ``o [B, Hq, Sq, Dv]`` and ``lse [B, Hq, Sq]``, float64.

    Where the normaliser has no lse it is NaN. Raises as `run`.
    """
    o, *lse = run(_with_all_outputs(program), (q, k, v), buffers, params, seed)
    return o, lse[0] if lse else np.full(o.shape[:3], np.nan)


_DTYPES = ("float64", "float32", "bfloat16", "float16")


class ReferenceBackend:
    """See `attnkit.backends.Backend`."""

    name = "reference"

    def available(self) -> str | None:
        """Always: numpy is all it needs."""
        return None

    def supports(self, spec: KernelSpec) -> tuple[str, ...]:
        """Float tensors in the CPU's memory."""
        reasons = []
        if spec.device != "cpu":
            reasons.append(f"tensors are on {spec.device}, not on the CPU")
        if spec.dtype not in _DTYPES:
            reasons.append(f"dtype is {spec.dtype}, not {', '.join(_DTYPES)}")
        return tuple(reasons)

    def space(self, spec: KernelSpec) -> Space:
        """Nothing to tune."""
        return {}

    def build(self, spec: KernelSpec, config: Config) -> Kernel:
        """A kernel that computes in float64 and rounds once, at the end."""

        return ReferenceKernel(spec.program)


class ReferenceKernel:
    """One program, materialised, in float64."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        lse: Any | None,
        buffers: list[Any],
        params: list[float],
        threads: int,
        seed: int | None = None,
    ) -> None:
        """See `attnkit.backends.Kernel`."""
        (q64, k64, v64), captured = _arrays(q, k, v, buffers)
        try:
            o64, lse64 = attend(self.program, q64, k64, v64, captured, params, seed)
        except MemoryError as exc:
            raise error("AK603", where="backend reference", given=str(exc)) from exc
        o.copy_(o.new_tensor(o64))
        if lse is not None:
            lse.numpy()[...] = lse64

    def backward(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        lse: Any,
        buffers: list[Any],
        params: list[float],
        d_o: Any,
        d_lse: Any | None,
        dq: Any,
        dk: Any,
        dv: Any,
        d_buffers: list[Any | None],
        threads: int,
        seed: int | None = None,
    ) -> None:
        """The gradients, from the inputs and the cotangents of ``o`` and ``lse``; everything is computed again."""
        inputs, captured = _arrays(q, k, v, buffers)
        program = _with_all_outputs(self.program)
        cotangents = [_array(name, t) for name, t in (("d_o", d_o), ("d_lse", d_lse)) if t is not None]
        cotangents += [None] * (len(program.attend.outputs) - len(cotangents))
        try:
            found = gradients(program, inputs, cotangents, captured, params, seed)
        except MemoryError as exc:
            raise error("AK603", where="backend reference", given=str(exc)) from exc
        for to, gradient in zip((dq, dk, dv, *d_buffers), (*found.inputs, *found.buffers), strict=True):
            if to is not None:
                to.copy_(to.new_tensor(gradient))


def _arrays(q: Any, k: Any, v: Any, buffers: list[Any]) -> tuple[list[Any], list[Any]]:
    captured = [_array(f"buffer b{i}", b) for i, b in enumerate(buffers)]
    return [_array(name, t) for name, t in (("q", q), ("k", k), ("v", v))], captured


def _array(name: str, t: Any) -> Any:
    """The tensor as numpy has it: lazy views resolved, gradients left behind."""
    if t.numel() > 0 and not t._is_zerotensor() and t.data_ptr() == 0:
        raise error("AK606", where=name)  # numpy would take memory of its own, with anything in it
    if str(t.dtype) == "torch.bfloat16":  # numpy has none
        t = t.float()
    return t.numpy(force=True)


backend = ReferenceBackend()
