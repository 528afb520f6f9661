"""What the machine can do: multiply-adds and bytes read per second, probed between the rounds of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnkit.backends.cpu.engine import engine

_FMA_ROUNDS = 1_000_000  # about 5 ms a burst
_READ_BYTES = 256 << 20  # far beyond any cache
# The engine's probes of arithmetic, each ``(threads, rounds) -> GFLOP/s`` or None: no ceiling at this level.
_PROBES = {"float32": "fma_gflops", "bfloat16": "bf16_gflops"}


@dataclass(frozen=True)
class Burst:
    """What one round saw: ``gflops`` by dtype, and GB/s read."""

    gflops: dict[str, float]
    read_gbytes_per_s: float

    def least_seconds(self, dtype: str, flops: int, num_bytes: int) -> tuple[float, str, float] | None:
        """The time that a problem must take, what binds (``compute`` or ``memory``), and that ceiling (TFLOP/s, GB/s).

        None where compute might bind and there is no probe for it: narrower numbers than float32 are no slower.
        """
        memory = num_bytes / (self.read_gbytes_per_s * 1e9)
        tflops = self.gflops.get(dtype, self.gflops["float32"]) * 1e-3
        compute = flops / (tflops * 1e12)
        if memory > compute:
            return memory, "memory", self.read_gbytes_per_s
        return (compute, "compute", tflops) if dtype in self.gflops else None


class Ceilings:
    """The bursts of a run, and the best of them.

    Bursts are short and many, spread over the whole run: a shared machine slows down for tenths of a second, and the
    ceiling is what it reaches undisturbed.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.bursts: list[Burst] = []
        self._memory = np.ones(_READ_BYTES // 4, np.float32)

    def burst(self) -> None:
        """Probe every ceiling, thrice: the best of them is the round's."""
        once = [
            Burst(self._gflops(), engine().read_gbytes_per_s(self.threads, self._memory)) for _ in range(3)
        ]
        self.bursts.append(best(once))

    def _gflops(self) -> dict[str, float]:
        probed = {d: getattr(engine(), name)(self.threads, _FMA_ROUNDS) for d, name in _PROBES.items()}
        return {dtype: gflops for dtype, gflops in probed.items() if gflops is not None}

    @property
    def best(self) -> Burst:
        """The best of all rounds."""
        return best(self.bursts)


def best(bursts: list[Burst]) -> Burst:
    """The largest of every number."""
    return Burst(
        {dtype: max(b.gflops[dtype] for b in bursts) for dtype in bursts[0].gflops},
        max(b.read_gbytes_per_s for b in bursts),
    )
