"""Attention that carries, on the engine: see csrc/cpu/carry.h."""

from __future__ import annotations

from typing import Any

from attnkit.backends.cpu.backend import CpuKernel, Store, too_large
from attnkit.backends.cpu.engine import engine
from attnkit.errors import AttnkitError, error
from attnkit.plan.bytecode import Bytecode
from attnkit.plan.carried import selecting
from attnkit.plan.spec import Config, KernelSpec


class CarriedKernel(CpuKernel):
    """One program of which a head's scores are carried from query to query."""

    def __init__(self, spec: KernelSpec, config: Config) -> None:
        super().__init__(spec, config)
        attend = self._canonical.attend
        self._what = attend.head, attend.budget or 0
        self._selecting, self._carry = self._compile(selecting(attend), None)
        self._back: tuple[tuple[Bytecode, Any], tuple[Bytecode, Any]] | None = None

    def __call__(self, *args: Any) -> None:
        """Nothing: `torch.ops.attnkit.attend_carried` calls `attend`.

        Raises:
            AttnkitError: AK502, always.
        """
        given = "a program that carries"
        raise error(
            "AK502", where="torch.ops.attnkit.attend", given=given, hint="ak.selective_attention runs it"
        )

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        lse: Any,
        sums: Any,
        gone: Any | None,
        buffers: list[Any],
        params: list[float],
        threads: int,
    ) -> None:
        """Compute ``o`` and ``lse`` in place.

        ``sums``, float32 ``[B, keys]`` and contiguous, holds what was carried before, and then what is carried after. With a
        budget ``gone``, int32 of that shape, is the largest int everywhere, and then the first query that misses a key.

        Raises:
            AttnkitError: as `CpuKernel`.
        """
        try:
            fault, about = engine().attend_carried(
                self.program, self._carry, q, k, v, o, lse, self.scale,
                None if self._sink is None else buffers[self._sink], self._sequences(q, k, buffers), buffers, params,
                (*self._what, sums, gone), threads, *self.sizes, None if self._table is None else buffers[self._table],
            )  # fmt: skip
        except ValueError as exc:
            raise too_large(exc) from exc
        if fault:
            raise self._fault_of(fault, about, self.bytecode, self._selecting, k, buffers)

    def attend_stores(
        self,
        q: Any,
        k: Store,
        v: Store,
        num_coded: Any | None,
        rows: Any,
        o: Any,
        lse: Any,
        sums: Any,
        gone: Any | None,
        buffers: list[Any],
        params: list[float],
        threads: int,
    ) -> None:
        """As `attend`, of a cache that keeps codes; ``rows`` has the shape that the keys would have as elements.

        Raises:
            AttnkitError: as `CpuKernel`.
        """
        fault, about = self._run_stores(
            q, k, v, num_coded, o, lse, buffers, params, None, threads, self._carry, (*self._what, sums, gone)
        )
        if fault:
            raise self._fault_of(fault, about, self.bytecode, self._selecting, rows, buffers)

    def backward_of(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        lse: Any,
        sums: Any,
        gone: Any | None,
        buffers: list[Any],
        params: list[float],
        d_o: Any,
        d_lse: Any | None,
        d_carry: Any | None,
        dq: Any,
        dk: Any,
        dv: Any,
        d_initial: Any | None,
        threads: int,
    ) -> None:
        """Compute the gradients in place, from the inputs of a call, what it returned, and the cotangents of that.

        ``sums`` is what was carried *before*, ``gone`` what the call left. ``dq`` (float32), and rows of the others that belong to
        no sequence, are zero before.

        Raises:
            AttnkitError: as `attend`; AK503, there is a sink.
        """
        if self._sink is not None:
            raise error("AK503", where="torch.ops.attnkit.attend_carried", given="a sink")
        if self._back is None:
            attend, none = self._canonical.attend, frozenset[int]()
            self._back = self._compile(attend, none), self._compile(selecting(attend), none)
        (bytecode, program), (selecting_code, carry) = self._back
        try:
            fault, about = engine().attend_carried_backward(
                program, carry, q, k, v, o, lse, self.scale, self._sequences(q, k, buffers), buffers, params,
                (*self._what, sums, gone), d_o, d_lse, d_carry, dq, dk, dv, d_initial, threads,
                self.config["backward_tile_q"], min(self.config["backward_tile_kv"], 96),
            )  # fmt: skip
        except ValueError as exc:
            raise too_large(exc) from exc
        if fault:
            raise self._fault_of(fault, about, bytecode, selecting_code, k, buffers)

    def _fault_of(
        self, fault: int, about: int, score: Bytecode, carry: Bytecode, k: Any, buffers: list[Any]
    ) -> AttnkitError:
        """Of an instruction of the score or of the carry, which the engine marks, or of anything else."""
        mark = engine().of_carry
        if about >= mark:
            return self._fault(fault, about - mark, carry, k, buffers)
        return self._fault(fault, about, score, k, buffers)
