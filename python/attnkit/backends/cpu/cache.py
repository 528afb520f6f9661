"""The engine on caches that keep codes: a kernel that takes stores in the place of k and v."""

from __future__ import annotations

from typing import Any

from attnkit.backends.cpu.backend import CpuKernel, Store
from attnkit.backends.cpu.engine import FAULTS, engine
from attnkit.errors import error


class CacheKernel(CpuKernel):
    """One program on the engine, of which k or v are codes. It has no backward."""

    def attend_stores(
        self,
        q: Any,
        k: Store,
        v: Store,
        num_coded: Any | None,
        rows: Any,
        o: Any,
        lse: Any | None,
        buffers: list[Any],
        params: list[float],
        threads: int,
        seed: int | None = None,
    ) -> None:
        """Compute ``o`` (and ``lse`` if given) in place. ``rows`` has the shape that the keys would have as elements.

        Raises:
            AttnkitError: as `CpuKernel`.
        """
        fault, about = self._run_stores(
            q, k, v, num_coded, o, lse, buffers, params, self._dropped(params, seed), threads
        )
        if fault:
            raise self._fault(fault, about, self.bytecode, rows, buffers)


def append(
    k_store: Store, v_store: Store, k: Any, v: Any, lengths: Any, counts: Any | None, state: Any | None, residual: int,
    table: Any | None, threads: int,
) -> tuple[str, int] | None:  # fmt: skip
    """Put tokens at the end of each row, and count them. Returns an error's code and the row or tensor it is about.

    Raises:
        AttnkitError: AK502, the tensors are not such a cache.
    """
    try:
        fault, about = engine().kv_append(
            k_store, v_store, k, v, lengths, counts, state, residual, table, threads
        )
    except ValueError as exc:
        raise error("AK502", where="append", given=str(exc)) from exc
    return (FAULTS[fault], about) if fault else None
