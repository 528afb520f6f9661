"""Which config to measure next: a pure function of what is known, so that a search that was killed goes on where it was.

A strategy names one config and a rung, or nothing: then the search is over. Rungs are rounds: each has more of them than the one
before, and fewer configs reach it (successive halving, Jamieson and Talwalkar 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnkit.plan.space import Config
from attnkit.tune.choose import TIE
from attnkit.tune.entry import Entry

ROUNDS = (5, 11, 40)  # at most, of each rung
_LAST = len(ROUNDS) - 1
_KEPT = 1 / 3
_FINALISTS = 4

Job = tuple[Config, int]  # and the rung
# (candidates, the default first; what is known) -> what to measure next, None if nothing.
Strategy = Callable[[Sequence[Config], Entry], Job | None]


def halving(candidates: Sequence[Config], entry: Entry) -> Job | None:
    """Every candidate a little, the best third of them more, the best few for certain.

    The default goes along beside itself: what it differs from itself is noise. Where nothing may be faster than it, it has won.
    """
    default, survivors = candidates[0], list(candidates)
    for rung in range(len(ROUNDS)):
        for config in survivors:
            known = entry.measured(config)
            if known is None or (known.ratio is not None and known.rung < rung):
                return config, rung
        ranked = []
        for order, config in enumerate(survivors):
            known = entry.measured(config)
            if (
                config != default
                and known is not None
                and known.ratio is not None
                and known.ratio.lo < 1 - TIE
            ):
                ranked.append((known.ratio.median, order, config))
        if not ranked:
            return None
        kept = max(_FINALISTS, int(len(survivors) * _KEPT)) if rung + 1 < _LAST else _FINALISTS
        survivors = [default, *(config for _, _, config in sorted(ranked, key=lambda r: r[:2])[:kept])]
    return None


def exhaustive(candidates: Sequence[Config], entry: Entry) -> Job | None:
    """Every candidate for certain."""
    for config in candidates:
        known = entry.measured(config)
        if known is None or (known.ratio is not None and known.rung < _LAST):
            return config, _LAST
    return None


STRATEGIES: dict[str, Strategy] = {"halving": halving, "exhaustive": exhaustive}
