"""What ran where: the numbers behind `installed_report`, and the recorder behind `explain`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Counts:
    """Calls of torch's op given to attnkit (``taken``) and left to torch (``declined``, by reason); kernels run."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler, or a finalizer, may come back here
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        with self._lock:
            self.taken = 0
            self.kernel_runs = 0
            self.declined: Counter[str] = Counter()

    def take(self) -> None:
        """One call of torch's op was given to attnkit."""
        with self._lock:
            self.taken += 1

    def decline(self, reason: str) -> None:
        """One call went on to torch."""
        with self._lock:
            self.declined[reason] += 1

    def run(self) -> None:
        """One attnkit kernel ran."""
        with self._lock:
            self.kernel_runs += 1


counts = Counts()

Recorder = Callable[..., None]


class _Local(threading.local):
    recorder: Recorder | None = None


_local = _Local()


def recorder() -> Recorder | None:
    """What `explain` put here in this thread: called with a description of each call instead of running it."""
    return _local.recorder


@contextmanager
def recording(record: Recorder) -> Iterator[None]:
    """Inside, attention calls of this thread are described to ``record`` and not run."""
    previous = _local.recorder
    try:
        _local.recorder = record
        yield
    finally:
        _local.recorder = previous
