"""Kernels on tensors of their own, to be timed and checked. numpy alone: tuning needs no torch.

What takes part here is a CPU kernel, called as `attnkit.backends.Kernel` says. Another device brings a rig of its own: its tensors
lie elsewhere, and so does its clock (`RIGS`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnkit import backends
from attnkit.backends.reference.backend import attend
from attnkit.backends.reference.run import gradients
from attnkit.errors import AttnkitError
from attnkit.ir.program import Program, Return
from attnkit.plan.space import Config, Space, default_config, of_direction, same_bits
from attnkit.testing.floats import rounded
from attnkit.tune.problem import Problem

Array = NDArray[Any]
# The engine's numbers of dtypes (csrc/cpu/problem.h); bfloat16 has none in numpy and travels as its bits.
_CODES = {"float32": 0, "int32": 1, "int64": 2, "bool": 3, "bfloat16": 4, "float16": 5}
# A relative error above this is not rounding; below the second number it is no matter that another config has a smaller one.
_TOLERANCE = {"float32": (1e-4, 1e-6), "bfloat16": (3e-2, 4e-3), "float16": (4e-3, 5e-4)}
_FACTOR = 2.0  # FlashAttention's rule, of the default's error
_COLD = 4  # caches that a decoder goes through in turn, so that none is warm
_DECODE_QUERIES = 4


class Rig(Protocol):
    """A problem ready to run with any config."""

    def run(self, config: Config) -> Callable[[], object]:
        """What is timed.

        Raises:
            AttnkitError: the config cannot be built or run.
        """

    def wrong(self, config: Config) -> str:
        """Why a config may not be used, empty if its results are right."""


class Tensor(tuple[Any, ...]):
    """An array as the engine takes one, (address, dtype, sizes, strides), that also answers what kernels ask of a tensor."""

    array: Array
    dtype: str

    @classmethod
    def of(cls, array: Array, dtype: str) -> Tensor:
        """The tensor over an array; of 16-bit floats the array has the bits."""
        strides = tuple(stride // array.itemsize for stride in array.strides)
        made = cls((array.ctypes.data, _CODES[dtype], array.shape, strides))
        made.array, made.dtype = array, dtype
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.array.shape

    def tolist(self) -> Any:
        """Its elements."""
        return self.array.tolist()

    def values(self) -> Array:
        """Its elements as float64."""
        if self.dtype == "bfloat16":
            return (self.array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.array.astype(np.float64)


class CpuRig:
    """A problem on the CPU engine."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._backend = backends.get("cpu")
        self._space = self._backend.space(problem.spec)
        self._tensors = _Tensors(problem, 0)

    def run(self, config: Config) -> Callable[[], object]:
        """What is timed: one direction with a config of its fields, those of the other at their defaults."""
        return self._run(config, self._tensors)

    def _run(self, config: Config, tensors: _Tensors) -> Callable[[], object]:
        kernel: Any = self._backend.build(self.problem.spec, default_config(self._space) | config)
        t, p = tensors, self.problem
        if p.direction == "backward":
            for array in t.gradients.values():
                array.array[...] = 0
            arguments = (t.q, t.k[0], t.v[0], t.o, t.lse, t.buffers, p.params, t.d_o, None)
            d = t.gradients

            def backward() -> None:
                d["dq"].array[...] = 0  # as a caller has to
                kernel.backward(*arguments, d["dq"], d["dk"], d["dv"], [None] * len(t.buffers), p.threads)

            return backward
        turn = 0

        def forward() -> None:
            nonlocal turn
            turn = (turn + 1) % len(t.k)
            kernel(t.q, t.k[turn], t.v[turn], t.o, t.lse, t.buffers, p.params, p.threads)

        return forward

    def wrong(self, config: Config) -> str:
        """Beside the default: the same bits if only the schedule differs; beside float64: no more than twice its error."""
        if config == self._default:
            return ""
        try:
            found = self._results(config, self._tensors)
            if same_bits(self._part, config, self._default):
                alike = all(
                    np.array_equal(a, b, equal_nan=True) for a, b in zip(found, self._expected, strict=True)
                )
                return "" if alike else "its bits are not those of the default's numeric fields"
            limit, floor = _TOLERANCE[self.problem.spec.dtype]
            if (error := _error(found, self._expected)) > limit:
                return f"relative distance {error:.1e} from the default's results"
            allowed = min(limit, max(floor, _FACTOR * self._oracle_error(self._default)))
            if (error := self._oracle_error(config)) > allowed:
                return f"relative error {error:.1e}, allowed {allowed:.1e}"
        except AttnkitError as exc:
            return " ".join(str(exc).split())
        return ""

    @cached_property
    def _default(self) -> Config:
        return default_config(self._part)

    @cached_property
    def _part(self) -> Space:
        return of_direction(self._space, self.problem.direction)

    @cached_property
    def _expected(self) -> list[Array]:
        return self._results(self._default, self._tensors)

    def _results(self, config: Config, tensors: _Tensors) -> list[Array]:
        """What one call gives, as float64."""
        if self.problem.direction == "backward" and not tensors.has_forward:
            tensors.has_forward = True
            _forward(
                self._backend.build(self.problem.spec, default_config(self._space)), tensors, self.problem
            )
        self._run(config, tensors)()
        return [x.values() for x in tensors.results]

    @cached_property
    def _cropped(self) -> tuple[_Tensors, list[Array]]:
        """A small problem, and what float64 makes of it."""
        small = self.problem.cropped()
        tensors = _Tensors(small, 1, copies=1)
        return tensors, _in_float64(small, tensors)

    def _oracle_error(self, config: Config) -> float:
        tensors, expected = self._cropped
        return _error(self._results(config, tensors), expected)


class _Tensors:
    """Standard normal inputs and room for outputs."""

    def __init__(self, problem: Problem, seed: int, copies: int | None = None) -> None:
        d, dtype = problem.dims, problem.spec.dtype
        rng = np.random.default_rng(seed)
        if copies is None:
            copies = _COLD if problem.direction == "forward" and d.q_len <= _DECODE_QUERIES else 1
        q_shape, k_shape, v_shape = d.shapes
        o_shape = (*q_shape[:3], d.v_head_dim)
        self.q, self.d_o = (_normal(rng, shape, dtype) for shape in (q_shape, o_shape))
        self.k = [_normal(rng, k_shape, dtype) for _ in range(copies)]
        self.v = [_normal(rng, v_shape, dtype) for _ in range(copies)]
        self.o = _zeros(o_shape, dtype)
        self.lse = _zeros(o_shape[:3], "float32")
        self.buffers = [Tensor.of(x, x.dtype.name) for x in problem.buffers]
        self.has_forward = False
        backward = problem.direction == "backward"
        self.gradients = (
            {"dq": _zeros(q_shape, "float32"), "dk": _zeros(k_shape, dtype), "dv": _zeros(v_shape, dtype)}
            if backward
            else {}
        )
        self.results = list(self.gradients.values()) if backward else [self.o, self.lse]


def _forward(kernel: Any, t: _Tensors, problem: Problem) -> None:
    kernel(t.q, t.k[0], t.v[0], t.o, t.lse, t.buffers, problem.params, problem.threads)


def _in_float64(problem: Problem, t: _Tensors) -> list[Array]:
    program, buffers = problem.spec.program, [b.array for b in t.buffers]
    q, k, v = (x.values() for x in (t.q, t.k[0], t.v[0]))
    if problem.direction == "forward":
        return list(attend(program, q, k, v, buffers, problem.params))
    only_o = Program(program.inputs, program.buffers, program.num_params, (program.attend, Return((3,))))
    return gradients(only_o, (q, k, v), [t.d_o.values()], buffers, problem.params).inputs


def _error(found: list[Array], expected: list[Array]) -> float:
    """The largest relative error of several results; infinite where something is not a number on one side alone."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        known = np.isfinite(b)
        if not np.array_equal(np.isfinite(a), known) or not np.array_equal(
            a[~known], b[~known], equal_nan=True
        ):
            return float("inf")
        norm = float(np.linalg.norm(b[known])) or 1.0
        worst = max(worst, float(np.linalg.norm(a[known] - b[known])) / norm)
    return worst


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Tensor:
    x = rng.standard_normal(shape, np.float32)
    if dtype == "bfloat16":
        return Tensor.of((rounded(x, dtype).view(np.uint32) >> 16).astype(np.uint16), dtype)
    return Tensor.of(x.astype(dtype), dtype)


def _zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    return Tensor.of(np.zeros(shape, np.uint16 if dtype == "bfloat16" else dtype), dtype)


# The rig of each backend that can be tuned here.
RIGS: dict[str, Callable[[Problem], Rig]] = {"cpu": CpuRig}
