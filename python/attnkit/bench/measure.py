"""Timing rivals fairly on a noisy machine: interleaved rounds, medians, ratios taken round by round.

The clock of a shared machine moves by tens of per cent within a second. What happens in one round happens to every
contender alike, so ratios are formed within rounds, and the median over rounds is reported with its interval.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from attnkit.tune.statistics import Interval, interval

__all__ = ["Contender", "Interval", "Rounds", "interval", "measure", "ratio"]

# A turn shorter than this is repeated within the round: below it, the clock and cold caches are what is measured.
_MIN_TURN_S = 5e-3
_MAX_REPEATS = 2000
# Before a turn, the threads of the one before go to sleep: they spin for a while, each library's own, and would take
# the cores of the next.
_SETTLE_S = 10e-3
_LONG_S = 0.1
_MIN_ROUNDS = 5
_PRECISION = 0.005  # rounds stop early once every median is known this well


@dataclass(frozen=True)
class Contender:
    """A callable that competes; ``context`` is entered around its turn, outside the time taken."""

    run: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


Rounds = dict[str, list[float]]  # seconds per call of each contender; equal positions are the same round


def measure(
    contenders: Mapping[str, Contender],
    *,
    seconds: float,
    rounds: int | None = None,
    after_round: Callable[[], None] = lambda: None,
) -> Rounds:
    """Call every contender in turn, round after round, and return the seconds each call took.

    The first round warms up and sets how often short calls repeat; it is thrown away. Without ``rounds`` there are at
    least 3, then as many as fit into ``seconds``, fewer if the medians settle. Every round starts with another contender,
    so that none always runs after the same rival. ``after_round`` may measure something else beside them.
    """
    names = list(contenders)
    start = time.perf_counter()
    warm = {name: _turn(contenders[name], 1) for name in names}
    for name, first in warm.items():
        # The first call of a short one is mostly start-up: parked threads wake, at times behind one that spins for them
        # on their own core, for milliseconds. Taken for its time, that would be the only call of every turn.
        if first < _LONG_S:
            warm[name] = min(_turn(contenders[name], 2) for _ in range(3))
    repeats = {name: _repeats(t) for name, t in warm.items()}
    times: Rounds = {name: [] for name in names}
    done = 0
    while done < (rounds if rounds is not None else 3) or (
        rounds is None and time.perf_counter() - start < seconds and not settled(times)
    ):
        for i in range(len(names)):
            name = names[(done + i) % len(names)]
            times[name].append(_turn(contenders[name], repeats[name]))
        after_round()
        done += 1
    return times


def ratio(times: Rounds, slow: str, fast: str) -> Interval:
    """How many times faster ``fast`` is than ``slow``: the median over rounds of their ratio in each round."""
    return interval([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def _repeats(seconds: float) -> int:
    """How many calls of so many seconds fill a turn."""
    return min(_MAX_REPEATS, math.ceil(_MIN_TURN_S / max(seconds, 1e-9)))


def _turn(contender: Contender, repeats: int) -> float:
    time.sleep(_SETTLE_S)
    with contender.context():
        collecting = gc.isenabled()
        gc.disable()
        try:
            if repeats > 1:
                contender.run()  # wakes this library's threads; of a long call that is no part worth mentioning
            start = time.perf_counter()
            for _ in range(repeats):
                contender.run()
            return (time.perf_counter() - start) / repeats
        finally:
            if collecting:
                gc.enable()


def settled(times: Rounds) -> bool:
    """Whether every median is known well enough to stop."""
    for values in times.values():
        if len(values) < 3 * _MIN_ROUNDS:
            return False
        known = interval(values)
        if known.hi - known.lo > 2 * _PRECISION * known.median:
            return False
    return True
