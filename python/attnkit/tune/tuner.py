"""One entry, measured to the end: what is known is looked up, what is missing is measured and kept at once."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attnkit import backends
from attnkit.errors import AttnkitError, error
from attnkit.plan.space import Space, default_config, of_direction, pinned
from attnkit.tune import lookup
from attnkit.tune.cost import PRUNED, candidates
from attnkit.tune.entry import Entry, Measurement, entry
from attnkit.tune.key import Key, buckets, key_of
from attnkit.tune.pairs import paired
from attnkit.tune.problem import Problem
from attnkit.tune.rig import RIGS, Rig
from attnkit.tune.search import ROUNDS, Job, Strategy, halving
from attnkit.tune.store import Folder

Progress = Callable[[Entry, int], None]  # what is known, and how many configs there are


def tune(
    problem: Problem,
    folder: Folder,
    *,
    backend: str = "cpu",
    strategy: Strategy = halving,
    pruned: float = PRUNED,
    again: bool = False,
    until: float = float("inf"),
    progress: Progress = lambda entry, candidates: None,
) -> tuple[Entry, bool]:
    """The entry of a problem, and whether it is complete. Every measurement is in the folder as soon as it is taken.

    ``pruned``: configs that look so much worse than the best are left out. ``again`` forgets what is known. ``until`` is a time of `time.monotonic` after which nothing more is begun.

    Raises:
        AttnkitError: AK501, the backend cannot be tuned here; AK5xx, it cannot run the problem.
    """
    space, key = tuned_space(problem, backend), key_of_problem(problem, backend)
    known = None if again else folder.get(key)
    if known is not None and known.problem != entry(key, problem.facts).problem:
        known = None  # of another problem of the bucket: its times are not comparable
    found, replace = known or entry(key, problem.facts), known is None
    every = candidates(space, problem, pruned)
    measure = Measure(problem, space, folder.path, backend)
    while (job := strategy(every, found)) is not None:
        if time.monotonic() >= until:
            return found, False
        found = found.with_(measure(job))
        folder.put(found, replace=replace)
        replace = False
        progress(found, len(every))
    return found, True


def tuned_space(problem: Problem, backend: str) -> Space:
    """What may be chosen for a problem: the fields of its direction."""
    space = of_direction(backends.get(backend).space(problem.spec), problem.direction)
    return pinned(space) if lookup.is_pinned() else space


def key_of_problem(problem: Problem, backend: str) -> Key:
    """The key of a problem on this machine.

    Raises:
        AttnkitNotImplementedError: AK501, the backend takes no part in tuning.
    """
    prints = lookup.fingerprint(backends.get(backend))
    if prints is None or backend not in RIGS:
        raise error(
            "AK501",
            what="backend cannot be tuned here",
            where=f"backend {backend!r}",
            allowed=", ".join(RIGS),
        )
    return key_of(backend, problem.spec, problem.direction, buckets(problem.spec, problem.lengths), *prints)


class Measure:
    """Measurements of one problem. A config is checked before it is timed, and timed beside the default.

    Processes that tune into one folder take turns with the clock: they would disturb each other.
    """

    def __init__(self, problem: Problem, space: Space, clock: Path | None, backend: str = "cpu") -> None:
        self._problem, self._space, self._clock, self._backend = problem, space, clock, backend
        self._rig: Rig | None = None

    def __call__(self, job: Job) -> Measurement:
        """What is found out about a config."""
        config, rung = job
        if self._rig is None:
            self._rig = RIGS[self._backend](self._problem)
        try:
            if wrong := self._rig.wrong(config):
                return Measurement.refused(config, wrong)
            default, rival = self._rig.run(default_config(self._space)), self._rig.run(config)
            with _alone(self._clock):
                ratio, seconds = paired(default, rival, ROUNDS[rung])
        except AttnkitError as exc:
            return Measurement.refused(config, " ".join(str(exc).split()))
        return Measurement.of(config, rung, ratio, seconds)


@contextmanager
def _alone(folder: Path | None) -> Iterator[None]:
    """No other process that tunes into this folder is measuring meanwhile."""
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".clock").open("w")
    except OSError:  # what is measured cannot be kept either, and that is said
        yield
        return
    with lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
