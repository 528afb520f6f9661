"""What the machine can do: multiply-adds and bytes read per second, probed between the rounds of a run."""

from __future__ import annotations

import numpy as np

from attnkit.backends.cpu.engine import engine

_FMA_ROUNDS = 1_000_000  # about 5 ms a burst
_READ_BYTES = 256 << 20  # far beyond any cache


class Ceilings:
    """The best of the bursts seen so far.

    Bursts are short and many, spread over the whole run: a shared machine slows down for tenths of a second, and the
    ceiling is what it reaches undisturbed.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.fma_gflops = 0.0
        self.read_gbytes_per_s = 0.0
        self.bursts = 0
        self._memory = np.ones(_READ_BYTES // 4, np.float32)

    def burst(self) -> None:
        """Probe both ceilings once."""
        fma = engine().fma_gflops(self.threads, _FMA_ROUNDS)
        read = engine().read_gbytes_per_s(self.threads, self._memory)
        self.fma_gflops = max(self.fma_gflops, fma)
        self.read_gbytes_per_s = max(self.read_gbytes_per_s, read)
        self.bursts += 1

    def compute_tflops(self, dtype: str) -> float | None:
        """The ceiling of arithmetic in ``dtype``; None where there is no probe for it."""
        return self.fma_gflops * 1e-3 if dtype == "float32" else None
