"""Outputs and gradients beside float64: whoever is timed is checked in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnkit.bench.workloads import Inputs
from attnkit.variants import dense

_ROWS = 32  # queries per head that are compared
# A relative error above this is not rounding. (The tests hold kernels to much tighter bounds.)
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
Error = dict[str, Any]  # as in a record: max_abs, rel_fro, rows


class Check:
    """What a workload's output must be in some query rows, the first and the last among them."""

    def __init__(self, inputs: Inputs, meant: tuple[Any, Any] | None = None) -> None:
        """``meant`` are keys and values in place of the inputs', where codes of them are what a call sees."""
        w, s = inputs.workload, inputs.workload.shape
        rng = np.random.default_rng(w.seed)
        self._inputs = inputs
        self.rows = np.unique(np.r_[0, s.sq - 1, rng.integers(0, s.sq, _ROWS - 2)])
        q, k, v = (_host(t) for t in (inputs.q, *(meant or (inputs.k, inputs.v))))
        self.expected = dense.naive(q, k, v, rows=self.rows, **w.parameters)[0]

    def output(self, o: Any) -> Error:
        """The error of an output ``[B, Hq, Sq, Dv]``."""
        return self._error([(_host(o)[:, :, self.rows], self.expected)])

    def gradients(self, step: Callable[[Any], tuple[Any, ...]]) -> Error:
        """The error of ``step(do) -> (o, dq, dk, dv)``.

        Gradients are linear in the cotangent, so one that is zero outside the sampled rows makes all of dk and dv, and
        the zeros of dq, comparable at the cost of those rows.
        """
        import torch

        do = torch.zeros_like(self._inputs.do)
        do[:, :, self.rows] = self._inputs.do[:, :, self.rows]
        o, *found = step(do)
        pairs = zip(found, self._naive_gradients(do[:, :, self.rows]), strict=True)
        return self._error(
            [
                (_host(o)[:, :, self.rows], self.expected),
                *((_host(a), b) for a, b in pairs),
            ]
        )

    def _naive_gradients(self, do: Any) -> list[Any]:
        """dq, dk, dv by torch's own differentiation of the equation in float64."""
        import torch

        w, s = self._inputs.workload, self._inputs.workload.shape
        group, cap = s.hq // s.hkv, w.parameters.get("softcap")
        added = torch.from_numpy(dense.added_bias(s.sq, s.skv, self.rows, **w.parameters))
        seen = torch.from_numpy(dense.visible(s.sq, s.skv, self.rows, **w.parameters))
        given = (self._inputs.q, self._inputs.k, self._inputs.v)
        with torch.enable_grad():
            q, k, v = leaves = [t.detach().cpu().double().requires_grad_() for t in given]
            z = q[:, :, self.rows] @ k.repeat_interleave(group, 1).mT * s.d**-0.5
            z = (z if cap is None else cap * torch.tanh(z / cap)) + added
            weights = torch.softmax(z.masked_fill(~seen, float("-inf")), -1)
            o = weights @ v.repeat_interleave(group, 1)
            return [g.numpy() for g in torch.autograd.grad(o, leaves, do.cpu().double())]

    def _error(self, pairs: list[tuple[Any, Any]]) -> Error:
        """The worst over (found, expected) pairs; null where something is not finite."""
        worst = {"max_abs": 0.0, "rel_fro": 0.0}
        for found, expected in pairs:
            difference = found - expected
            if not np.isfinite(difference).all():
                return {"max_abs": None, "rel_fro": None, "rows": len(self.rows)}
            norm = float(np.linalg.norm(expected)) or 1.0
            worst["max_abs"] = max(worst["max_abs"], float(np.abs(difference).max(initial=0.0)))
            worst["rel_fro"] = max(worst["rel_fro"], float(np.linalg.norm(difference)) / norm)
        return {**worst, "rows": len(self.rows)}


def _host(t: Any) -> Any:
    """A tensor of any device and dtype as float64 numpy."""
    return t.detach().cpu().double().numpy()


def is_wrong(error: Error, dtype: str) -> bool:
    """Whether an error is more than rounding."""
    return error["rel_fro"] is None or error["rel_fro"] > TOLERANCE[dtype]
