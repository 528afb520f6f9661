"""Tuning at a first call, for those who ask for it (``ATTNKIT_TUNE=tune-missing`` or ``retune``). Never otherwise."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

from attnkit import backends
from attnkit.backends import Kernel
from attnkit.errors import AttnkitError
from attnkit.plan.space import DIRECTIONS, Direction
from attnkit.plan.spec import KernelSpec
from attnkit.testing.inputs import Dims
from attnkit.tune.key import Lengths
from attnkit.tune.lookup import COST_MODEL, Served, mode, serve, user
from attnkit.tune.problem import Problem
from attnkit.tune.rig import RIGS
from attnkit.tune.tuner import tune

# What one call may wait for. What is not known by then is measured by the next process.
SECONDS = 10.0


def wants_tuning(backend: str, spec: KernelSpec, served: Served, lengths: Lengths) -> bool:
    """Whether a kernel is to be tuned at its first call: the mode says so, and it can be.

    Lengths that are not known, packed and paged sequences and dropout are left to campaigns.
    """
    if not served.config:
        return False  # nothing to choose
    asked, program = mode(), spec.program
    odd = any(layout.kind in ("packed", "paged") for layout in program.inputs)
    if backend not in RIGS or 0 in lengths or odd or program.attend.dropout is not None:
        return False
    return asked == "retune" or (asked == "tune-missing" and COST_MODEL in served.layers.values())


class TunedAtFirst:
    """A kernel that tunes each direction when it is first called, on tensors like those of the call.

    What the program captured is the call's own. A call waits for `SECONDS` at most.
    """

    def __init__(self, kernel: Any, backend: str, spec: KernelSpec, served: Served, lengths: Lengths) -> None:
        self._kernel, self._backend, self._spec, self._lengths = kernel, backend, spec, lengths
        self._again = mode() == "retune"
        self._todo = {d for d in DIRECTIONS if self._again or served.layers[d] == COST_MODEL}
        self._lock = threading.Lock()

    def __call__(
        self, q: Any, k: Any, v: Any, o: Any, lse: Any, buffers: list[Any], params: list[float], threads: int, *rest: Any
    ) -> None:  # fmt: skip
        """As the kernel."""
        self._tune("forward", q, k, v, buffers, params, threads)
        self._kernel(q, k, v, o, lse, buffers, params, threads, *rest)

    def backward(
        self, q: Any, k: Any, v: Any, o: Any, lse: Any, buffers: list[Any], params: list[float],
        d_o: Any, d_lse: Any, dq: Any, dk: Any, dv: Any, d_buffers: list[Any], threads: int, *rest: Any,
    ) -> None:  # fmt: skip
        """As the kernel."""
        self._tune("backward", q, k, v, buffers, params, threads)
        self._kernel.backward(
            q, k, v, o, lse, buffers, params, d_o, d_lse, dq, dk, dv, d_buffers, threads, *rest
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def _tune(
        self, direction: Direction, q: Any, k: Any, v: Any, buffers: Sequence[Any], params: Sequence[float], threads: int
    ) -> None:  # fmt: skip
        if direction not in self._todo:
            return
        with self._lock:
            if direction not in self._todo:
                return
            self._todo.remove(direction)
            batch, heads, q_len, head_dim = q.shape
            dims = Dims(batch, heads, k.shape[1], q_len, k.shape[2], head_dim, v.shape[3])
            arrays = [_array(b) for b in buffers]
            asked = Problem(self._spec, direction, dims, "", arrays, list(params), threads)
            try:
                tune(
                    asked, user(), backend=self._backend, again=self._again, until=time.monotonic() + SECONDS
                )
            except AttnkitError as exc:
                warnings.warn(
                    f"attnkit: not tuned: {' '.join(str(exc).split())}", RuntimeWarning, stacklevel=4
                )
                return
            backend = backends.get(self._backend)
            self._kernel = backend.build(self._spec, serve(backend, self._spec, self._lengths).config)


def _array(tensor: Any) -> Any:
    """A captured tensor as numpy's, float32 where it is a 16-bit float; the kernel's own are not touched."""
    found = tensor.detach()
    return (found.float() if found.is_floating_point() else found).contiguous().numpy()


def at_first(kernel: Kernel, backend: str, spec: KernelSpec, served: Served, lengths: Lengths) -> Kernel:
    """The kernel, or one that is tuned at its first call."""
    return (
        TunedAtFirst(kernel, backend, spec, served, lengths)
        if wants_tuning(backend, spec, served, lengths)
        else kernel
    )
