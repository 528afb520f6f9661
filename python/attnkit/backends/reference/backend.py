"""The reference as a backend: asked for by name, to check the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from attnkit.backends import Kernel
from attnkit.backends.reference.run import gradients, run
from attnkit.errors import error
from attnkit.ir.program import Program, Return
from attnkit.plan.readouts import Results
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

    def readout(
        self,
        q: Any,
        k: Any,
        lse: Any,
        results: Results,
        buffers: list[Any],
        params: list[float],
        threads: int,
    ) -> None:
        """What is wanted of the weights, of all of them: `attnkit.plan.readouts`."""
        (q64, k64, lse64), captured = _arrays(q, k, lse, buffers)
        try:
            p, own = weights(self.program, q64, k64, captured, params)
        except MemoryError as exc:
            raise error("AK603", where="backend reference", given=str(exc)) from exc
        with np.errstate(all="ignore"):
            p = p * np.where(np.isneginf(own), 0.0, np.exp(own - lse64))[..., None]
            logs = np.log(np.where(p == 0, 1.0, p))
        found: dict[str, Any] = {
            "column_sum": p.sum(2), "column_max": p.max(2, initial=0), "row_max": p.max(3, initial=0), "entropy": -(p * logs).sum(3),
        }  # fmt: skip
        if results.best is not None:
            best = np.argsort(-p, axis=3, kind="stable")[..., : results.best.shape[3]]
            found["best"] = np.take_along_axis(p, best, 3)
            found["best_keys"] = np.where(found["best"] > 0, best, -1)
        if results.rows is not None:
            found["weights"] = p[:, :, results.rows.numpy()]
        for name, to in results._asdict().items():
            if to is not None and name != "rows":
                to[tuple(map(slice, found[name].shape))] = to.new_tensor(found[name])


@lru_cache(maxsize=256)
def _with_weights(program: Program) -> Program:
    """The weights and the lse of an attention over two inputs."""
    attend = replace(program.attend, operands=(0, 1, 1), outputs=("weights", "lse"))
    return Program(program.inputs[:2], program.buffers, program.num_params, (attend, Return((2, 3))))


def weights(
    program: Program, q: Any, k: Any, buffers: Sequence[Any] = (), params: Sequence[float] = ()
) -> tuple[Any, Any]:
    """All weights ``[B, Hq, Sq, Skv]`` of the attention of a program, and its lse ``[B, Hq, Sq]``, float64. Raises as `run`."""
    p, lse = run(_with_weights(program), (q, k), buffers, params)
    layouts = program.layout(program.attend.q), program.layout(program.attend.k)
    if layouts[1].kind != "packed":
        return p, lse
    every = np.zeros((1, q.shape[1], q.shape[2], k.shape[2]))
    ends = [np.asarray(buffers[layout.lengths or 0]).tolist() for layout in layouts]
    for i, (rows, columns) in enumerate(zip(*map(pairwise, ends), strict=True)):
        part = p[i, :, : rows[1] - rows[0], : columns[1] - columns[0]]
        every[0, :, slice(*rows), slice(*columns)] = part
    return every, lse


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
