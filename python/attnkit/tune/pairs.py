"""Two rivals timed in turn, until it is known which is faster or that nobody can tell.

What happens to the machine in one round happens to both, so ratios are formed within rounds. Each has two turns in a round, in
the order ABBA or BAAB, and the quicker one counts: what disturbs a single turn disturbs nothing. Rivals are of one library and share its threads: nobody has to wait for the other's to fall asleep.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from attnkit.tune.statistics import Interval, interval

Run = Callable[[], object]
_SETTLE_S = 30e-3  # other libraries' threads, which have just checked results, spin for so long on our cores
_WARM_S = 20e-3
_MIN_TURN_S = 2e-3  # below it, the clock and cold caches are what is measured
_MAX_REPEATS = 1000
_LEAST = 3
_HOPELESS = 1.10  # slower than this in every round: no more rounds are needed
_KNOWN = 0.01  # the relative width of an interval that is close enough,
_UNCLEAR = 0.1  # and of one that tells nothing: somebody else is using the machine
_PATIENCE = 4


class Paired(NamedTuple):
    """The ratio of the rival's time to the incumbent's, and the rival's seconds a call."""

    ratio: Interval
    seconds: float


def paired(incumbent: Run, rival: Run, rounds: int) -> Paired:
    """At most so many rounds, fewer where they leave no doubt; up to four times as many where they contradict each other.

    Raises:
        AttnkitError: as the rivals.
    """
    rivals = incumbent, rival
    time.sleep(_SETTLE_S)
    repeats = [_repeats(run) for run in rivals]
    ratios: list[float] = []
    times: list[float] = []
    with _no_collection():
        while not _is_enough(ratios, rounds):
            order = (0, 1, 1, 0) if len(ratios) % 2 == 0 else (1, 0, 0, 1)
            turns = [(i, _turn(rivals[i], repeats[i])) for i in order]
            first, second = (min(t for i, t in turns if i == rival) for rival in (0, 1))
            ratios.append(second / first)
            times.append(second)
    return Paired(interval(ratios), interval(times).median)


def _is_enough(ratios: list[float], rounds: int) -> bool:
    if len(ratios) < _LEAST:
        return False
    if min(ratios) > _HOPELESS:
        return True
    known = interval(ratios)
    width = (known.hi - known.lo) / known.median
    if len(ratios) >= 2 * _LEAST and (width < _KNOWN or known.lo > 1 + _KNOWN):
        return True
    return len(ratios) >= rounds * (1 if width < _UNCLEAR else _PATIENCE)


def _repeats(run: Run) -> int:
    """How many calls fill a turn, after a few that count for nothing.

    Threads that slept are woken on the core of the one that waits for them, and the first calls take a scheduler's quantum each.
    """
    start, least = time.perf_counter(), math.inf
    while time.perf_counter() - start < _WARM_S or least == math.inf:
        least = min(least, _turn(run, 1))
    return min(_MAX_REPEATS, math.ceil(_MIN_TURN_S / max(least, 1e-9)))


def _turn(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
